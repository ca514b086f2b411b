"""Our own processes have no PyTorch, though it may be installed; processes of others keep theirs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOKENIZERS = "from transformers import AutoTokenizer, PreTrainedTokenizerFast"


@pytest.fixture(scope="module")
def with_pytorch(tmp_path_factory):
    """Runs Python statements where what seems to be PyTorch is installed, which says when it is imported."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('PyTorch was imported')")
    (folder / "torch-2.13.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"
    (folder / "torch-2.13.0.dist-info" / "METADATA").write_text(metadata)

    def run(*statements: str) -> str:
        code = "\n".join((f"import sys; sys.path[:0] = {[str(ROOT), str(folder)]}", *statements))
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        return result.stdout + result.stderr

    return run


def test_transformers_imports_it_by_itself(with_pytorch):
    """Else there would be nothing to keep out."""
    assert "PyTorch was imported" in with_pytorch(TOKENIZERS)


@pytest.mark.parametrize(
    "begin", ["import paged.cli", "from server.front_end import import_tokenizers; import_tokenizers()"]
)
def test_a_process_of_ours_imports_none(with_pytorch, begin):
    assert with_pytorch(begin, TOKENIZERS, "print('torch' in sys.modules)") == "False\n"


def test_an_import_of_it_by_another_is_none_of_our_business(with_pytorch):
    """Such as scipy's, which looks whether others have imported it."""
    assert "PyTorch was imported" in with_pytorch("import paged.cli", TOKENIZERS, "import torch")


def test_who_imports_the_engine_keeps_it(with_pytorch):
    assert "PyTorch was imported" in with_pytorch("import paged.llm", "import torch")


def test_what_was_imported_before_stays(with_pytorch):
    before = "import types; torch = sys.modules['torch'] = types.ModuleType('torch')"
    after = "from paged.no_pytorch import import_transformers_alone; import_transformers_alone()"
    assert with_pytorch(before, after, "import torch as still; print(still is torch)") == "True\n"
