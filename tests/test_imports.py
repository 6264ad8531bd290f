"""Rules on imports: they point one way, public names exist, and no heavy library is loaded before it is used."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A package may import the packages it names here, the leaves below, and itself.
ALLOWED = {
    "errors": set(),
    "distributed": {"errors", "ranks"},
    "ranks": {"errors"},
    "io": {"errors"},
    "checksums": {"io"},
    "privacy": {"errors"},
    "stats": {"errors"},
    "lazy": set(),
    "memory": set(),
    "token_roles": {"errors"},
    "maira2": set(),
    "studies": set(),
    "sizing": {"maira2", "activations"},
    "costs": {"sizing"},
    "phantom": {"maira2", "studies"},
    "hooks": {"maira2"},
    "kernels": set(),
    "sae": {"kernels"},
    "activations": {"maira2", "studies", "hooks"},
    # SAELens' store reads rows by the reader that everything uses, so this one file is above activations.
    "hooks.sae_lens": {"maira2", "hooks", "activations"},
    "training": {"sae", "kernels", "activations"},
    "bench": {"training", "sae", "kernels", "activations", "maira2"},
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
LEAVES = {
    "checksums",
    "distributed",
    "errors",
    "io",
    "lazy",
    "memory",
    "privacy",
    "ranks",
    "stats",
    "token_roles",
}


def modules() -> list[tuple[str, Path]]:
    """(package, file) of every module."""
    files = []
    for folder in (ROOT / "sae_lens_maira", ROOT / "hooks", ROOT / "recipes"):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            package = parts[0] if parts[0] in ("hooks", "recipes") else parts[1]
            package = "hooks.sae_lens" if parts == ("hooks", "sae_lens") else package
            files.append((package, file))
    return files


def imported_packages(file: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sae_lens_maira" and len(parts) > 1:
                packages.add(parts[1])
    return packages


@pytest.mark.parametrize(("package", "file"), modules(), ids=lambda x: str(getattr(x, "name", x)))
def test_imports_point_down(package: str, file: Path):
    """A module imports only packages below its own."""
    assert package in ALLOWED, (
        f"{file}: the package {package} is not in the table ALLOWED; add its row to this test"
    )
    leaves = {"errors"} if package in LEAVES else LEAVES
    known = set(ALLOWED)
    wrong = {r for r in imported_packages(file) if r in known} - ALLOWED[package] - {package, *leaves}
    assert not wrong, f"{file} imports {sorted(wrong)}; {package} may import {sorted(ALLOWED[package])}"


@pytest.mark.parametrize(("package", "file"), modules(), ids=lambda x: str(getattr(x, "name", x)))
def test_every_module_has_a_docstring(package: str, file: Path):
    """Every module has a docstring."""
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{file} has no module docstring"


def test_packages_are_declared():
    """pyproject lists every package folder: a forgotten one would be missing from the wheel only."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {file.parent for _, file in modules()}
    assert len(folders) > 15
    for folder in folders:
        name = ".".join(folder.relative_to(ROOT).parts)
        name = name if name.startswith("sae_lens_maira") else f"sae_lens_maira.{name}"
        assert f'"{name}"' in text, f"{name} is not in pyproject's packages"


def test_public_names_exist():
    """Every name in `__all__` of a package exists."""
    for folder in {file.parent for _, file in modules()}:
        name = ".".join(folder.relative_to(ROOT).parts)
        name = name if name.startswith("sae_lens_maira") else f"sae_lens_maira.{name}"
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            assert hasattr(module, public), f"{name}.__all__ names {public}, which is not there"


def loaded(*steps: str) -> list[set[str]]:
    """Modules that a new process has loaded after each of some statements."""
    code = "import sys, json\n" + "".join(f"{step}\nprint(json.dumps(list(sys.modules)))\n" for step in steps)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def test_nothing_heavy_is_loaded_before_it_is_used():
    """The package alone loads no library; all public names load no optional one beyond what SAELens loads itself.

    The last step shows that the search can fail: `Maira2NNsight` loads nnsight.
    """
    optional = {"triton", "openai", "nnsight", "starlette", "uvicorn", "pydicom", "matplotlib.pyplot"}
    alone, hosts, public, asked = loaded(
        "import sae_lens_maira",
        "import sae_lens, transformer_lens",
        "[getattr(sae_lens_maira, n) for n in sae_lens_maira.__all__ if n not in ('Maira2NNsight', 'workbench')]\n"
        "assert not sys.modules['torch'].cuda.is_initialized()",
        "sae_lens_maira.Maira2NNsight",
    )
    assert not alone & {"torch", "transformers", "sae_lens", "transformer_lens", "pandas", "numpy"}
    assert "sae_lens_maira.steering" in public
    assert not (public - hosts) & optional
    assert "nnsight" in asked


def test_commands_that_read_json_load_no_torch():
    """`store show`, `dashboards validate` and `dashboards html` without images start in a second."""
    steps = ["activations.manifest", "dashboards.validate", "dashboards.html"]
    for modules_then in loaded(*(f"import sae_lens_maira.{name}" for name in steps)):
        assert not modules_then & {"torch", "transformers", "sae_lens", "datasets"}
