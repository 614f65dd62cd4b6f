"""The structure that docs/design.md promises: imports go down only, torch stays where it belongs, help is instant."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ao

PACKAGE = Path(ao.__file__).parent
# A module imports only from rows below its own; modules of one row do not import each other.
ROWS = [
    {"__main__"},
    {"cli"},
    {"demo"},
    {"train", "collect", "eval", "inspection"},
    {"training"},
    {"oracle", "pack", "plots", "rollouts", "push"},
    {"decode", "selftest", "plan", "replica", "cache_writer", "build_folder"},
    {"residuals", "loss", "activations", "cache", "checkpoint", "shards", "distributed", "memory"},
    {"batch", "summary", "packed", "cache_files"},
    {"injection", "attention"},
    {"models"},
    {"prompt", "sources", "probes", "card"},
    {"manifest", "user_cache", "transfer"},
    {"config"},
    {"_ao"},
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
TORCH_FREE = [
    "config",
    "manifest",
    "prompt",
    "probes",
    "sources",
    "pack",
    "build_folder",
    "packed",
    "shards",
    "cache",
    "cache_files",
    "cache_writer",
    "summary",
    "card",
    "plan",
    "inspection",
    "cli",
]


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, as a dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "ao" else {node.module}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    mine = module_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "ao" or parts[1] in ("Oracle", "Activations", "Answer", mine):
            continue
        assert LEVEL[parts[1]] > LEVEL[mine], f"{path.name} imports ao.{parts[1]}, which is not below it"


@pytest.mark.parametrize(
    ("library", "homes"),
    [("torch.distributed", {"distributed"}), ("peft", {"models"}), ("bitsandbytes", {"models"})],
)
def test_some_libraries_have_one_home(library, homes):
    users = {module_of(path) for path in FILES if any((name + ".").startswith(library + ".") for name in imports(path))}
    assert users <= homes


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_free_modules_stay_so(module):
    assert fresh(f"import sys, ao.{module}; print('torch' in sys.modules)") == "False\n"


def test_importing_ao_does_nothing():
    code = "import sys, ao; print([m for m in ('torch', 'numpy', 'ao._ao', 'tyro') if m in sys.modules])"
    assert fresh(code) == "[]\n"
    assert fresh("import ao; from ao import Oracle; print(Oracle.__name__)") == "Oracle\n"


def test_help_loads_neither_torch_nor_numpy():
    code = (
        "import sys\nfrom ao.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit as stop: code = stop.code\n"
        "print(code, [m for m in ('torch', 'numpy', 'pydantic', 'ao._ao') if m in sys.modules])"
    )
    assert fresh(code).splitlines()[-1] == "0 []"
