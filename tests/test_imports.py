"""The architecture's one-way imports: server, scripts -> paged -> models -> kernels_pallas."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels_pallas": {"kernels_pallas"},
    "models": {"models", "kernels_pallas"},
    "paged": {"paged", "models", "kernels_pallas"},
    "scripts": {"scripts", "paged", "models"},
    "server": {"server", "paged"},
}
ENGINE_PACKAGES = {"jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors", "tqdm", "ml_dtypes"}
OWN = set(MAY_IMPORT)
DECIDES = ["block_pool", "scheduler", "request", "sampling_params", "config", "plan", "outputs", "stats", "errors"]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in OWN or top in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("name", DECIDES)
def test_files_that_decide_do_not_import_jax(name: str) -> None:
    tops = {n.split(".")[0] for n in imported(ROOT / "paged" / f"{name}.py")}
    assert not tops & {"jax", "flax", "models", "kernels_pallas"}


@pytest.mark.parametrize("package", ["kernels_pallas", "models", "paged", "scripts"])
def test_the_engine_needs_no_more_than_its_dependencies(package: str) -> None:
    """Whatever else a function needs, it imports itself and says so when it is missing."""
    for path in (ROOT / package).rglob("*.py"):
        module_level = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in module_level if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in module_level if isinstance(n, ast.ImportFrom)}
        tops = {name.split(".")[0] for name in names}
        assert not tops - ENGINE_PACKAGES - OWN - sys.stdlib_module_names, path.relative_to(ROOT)
