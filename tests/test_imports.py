"""Rules on imports: they point one way, public names exist, nothing heavy is imported by itself."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A package may import the packages it names here, the leaves below, and itself.
ALLOWED = {
    "errors": set(),
    "distributed": {"errors"},
    "io": {"errors"},
    "checksums": {"io"},
    "privacy": {"errors"},
    "stats": {"errors"},
    "memory": set(),
    "maira2": set(),
    "studies": set(),
    "sizing": {"maira2", "activations"},
    "phantom": {"maira2", "studies"},
    "hooks": {"maira2"},
    "kernels": set(),
    "sae": {"kernels"},
    "activations": {"maira2", "studies", "hooks"},
    # SAELens' store reads rows by the reader that everything uses, so this one file is above activations.
    "hooks.sae_lens": {"maira2", "hooks", "activations"},
    "training": {"sae", "kernels", "activations"},
    "latents": {"activations", "sae", "maira2", "studies"},
    "interp": {"latents", "studies"},
    "dashboards": {"latents", "interp", "maira2"},
    "attribution": {"hooks", "sae", "studies", "maira2", "latents"},
    "steering": {"hooks", "sae", "studies", "maira2", "activations", "latents"},
    "evaluation": {"hooks", "sae", "studies", "maira2", "activations"},
}
# Packages that compose others. Only these may import the phantom; none imports one that is further down.
LIBRARY = set(ALLOWED) - {"phantom"}
ALLOWED |= {
    "interactive": LIBRARY,
    "interface": LIBRARY | {"phantom", "interactive"},
    "quickstart": LIBRARY | {"phantom", "interface"},
    "workbench": LIBRARY | {"interface"},
    "cli": LIBRARY | {"phantom", "interface", "quickstart", "workbench"},
    "recipes": LIBRARY | {"phantom", "interface", "quickstart", "cli"},
    "__init__": LIBRARY | {"interface", "interactive", "workbench"},
    "__main__": {"cli"},
}
LEAVES = {"checksums", "distributed", "errors", "io", "memory", "privacy", "stats"}


def modules() -> list[tuple[str, Path]]:
    """(room, file) of every module of the package."""
    files = []
    for folder in (ROOT / "sae_lens_maira", ROOT / "hooks", ROOT / "recipes"):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            room = parts[0] if parts[0] in ("hooks", "recipes") else parts[1]
            room = "hooks.sae_lens" if parts == ("hooks", "sae_lens") else room
            files.append((room, file))
    return files


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sae_lens_maira" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize(("room", "file"), modules(), ids=lambda x: str(getattr(x, "name", x)))
def test_imports_point_down(room: str, file: Path):
    """A module imports only rooms below its own."""
    assert room in ALLOWED, f"{file}: the room {room} is not in the table of rooms; add its row to this test"
    leaves = {"errors"} if room in LEAVES else LEAVES
    known = set(ALLOWED)
    wrong = {r for r in imported_rooms(file) if r in known} - ALLOWED[room] - {room, *leaves}
    assert not wrong, f"{file} imports {sorted(wrong)}; {room} may import {sorted(ALLOWED[room])}"


@pytest.mark.parametrize(("room", "file"), modules(), ids=lambda x: str(getattr(x, "name", x)))
def test_module_opens_with_its_thesis(room: str, file: Path):
    """Every module says what it is."""
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{file} has no module docstring"


def test_packages_are_declared():
    """pyproject lists every package folder: a forgotten one would be missing from the wheel only."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {file.parent for _, file in modules()}
    for folder in folders:
        name = ".".join(folder.relative_to(ROOT).parts)
        name = name if name.startswith("sae_lens_maira") else f"sae_lens_maira.{name}"
        assert f'"{name}"' in text, f"{name} is not in pyproject's packages"


def test_public_names_exist():
    """`__all__` of every package names things that are there."""
    for folder in {file.parent for _, file in modules()}:
        name = ".".join(folder.relative_to(ROOT).parts)
        name = name if name.startswith("sae_lens_maira") else f"sae_lens_maira.{name}"
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            assert hasattr(module, public), f"{name}.__all__ names {public}, which is not there"


def test_importing_the_package_brings_nothing_heavy():
    """Importing the top package loads no triton, no openai, no nnsight, and starts no GPU."""
    code = (
        "import sys, sae_lens_maira\n"
        "bad = [m for m in ('triton', 'openai', 'nnsight') if m in sys.modules]\n"
        "torch = sys.modules.get('torch')\n"
        "assert not bad, bad\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
