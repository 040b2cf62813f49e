"""A module imports only from modules above it; the plain-data ones import no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "imagegen"
ORDER = [
    "canvas",
    "request",
    "lock",
    "licences",
    "cards",
    "catalog",
    "receipt",
    "result",
    "weights",
    "contents",
    "hub",
    "sources",
    "profile",
    "prompts",
    "report",
    "measure",
    "sampling",
    "fidelity",
    "kernels",
    "families",
    "levers",
    "speed",
    "roofline",
    "fit",
    "guides",
    "variations",
    "model",
    "loader",
    "inspection",
    "reference",
    "reference_set",
    "comparison",
    "tuner",
    "finetune",
    "engine",
    "batch",
    "bench",
    "studio",
    "server",
    "startup",
    "cli",
    "__main__",
]
NO_TORCH = [*ORDER[: ORDER.index("sampling")], "cli"]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts[0]


def imports_of(path):
    """Yield the package's modules that a file imports, and whether it does so for type checkers only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "imagegen":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imagegen."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("imagegen."))


def test_every_module_has_its_place():
    assert {name for _, name in modules()} <= set(ORDER)


@pytest.mark.parametrize(("path", "name"), modules(), ids=lambda value: str(value.stem if isinstance(value, Path) else value))
def test_imports_only_from_above(path, name):
    allowed = {*ORDER[: ORDER.index(name)], "__version__"}
    if path.parent != PACKAGE:
        allowed.add(name)  # modules of one folder know each other
    assert set(imports_of(path)) <= allowed


def test_plain_data_imports_no_torch():
    names = "".join(f"import imagegen.{name}; " for name in NO_TORCH)
    code = f"import sys; import imagegen; {names} print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
