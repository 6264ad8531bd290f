"""The wheel that is published: what is in it, what is not, how large it is, and which versions it forbids."""

import email
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist of a clean export: what git tracks, and nothing that lies about."""
    work = tmp_path_factory.mktemp("build")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, work / "tree" / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(work / "tree")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (work / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_module_of_the_tree_is_inside(names: set[str]) -> None:
    """The explicit list of packages has forgotten none: every Python file is there, under the package."""
    files = [file.relative_to(ROOT).as_posix() for file in (ROOT / "sae_lens_maira").rglob("*.py")]
    for folder in ("hooks", "recipes"):
        files += [f"sae_lens_maira/{f.relative_to(ROOT).as_posix()}" for f in (ROOT / folder).rglob("*.py")]
    assert set(files) - names == set()


def test_what_is_no_python_is_inside(names: set[str]) -> None:
    """Weights of the phantom, recipes, notebooks, assets of pages, the type marker, the licence."""
    wanted = {"sae_lens_maira/py.typed"}
    for folder in ("sae_lens_maira", "hooks", "recipes"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".yaml", ".ipynb", ".css", ".js", ".html", ".json", ".safetensors"):
                path = file.relative_to(ROOT).as_posix()
                wanted.add(path if folder == "sae_lens_maira" else f"sae_lens_maira/{path}")
    assert {name for name in wanted if ".ipynb_checkpoints" not in name} - names == set()
    assert any(name.endswith("LICENSE") for name in names)
    assert "sae_lens_maira/phantom/weights/model.safetensors" in names
    assert "sae_lens_maira/recipes/phantom.yaml" in names


def test_nothing_else_is_inside(names: set[str]) -> None:
    """One top-level package: no tests, benchmarks, docs or caches, and no global `hooks` or `recipes`."""
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not re.fullmatch(r"sae_lens_maira(-[\d.]+\.dist-info)?", top)} == set()
    assert not [
        name for name in names if re.search(r"(^|/)(tests?|benchmarks|__pycache__)/|test_\w+\.py", name)
    ]


def test_the_wheel_is_smaller_than_12_megabytes(wheel: Path) -> None:
    assert wheel.stat().st_size < 12e6


def test_the_command_is_declared(wheel: Path) -> None:
    """`sae-lens-maira` is the one script, and every extra of the README is there."""
    with zipfile.ZipFile(wheel) as opened:
        (points,) = (name for name in opened.namelist() if name.endswith("entry_points.txt"))
        assert "sae-lens-maira = sae_lens_maira.cli:main" in opened.read(points).decode()
        (metadata,) = (name for name in opened.namelist() if name.endswith("dist-info/METADATA"))
        extras = set(re.findall(r"^Provides-Extra: (\S+)", opened.read(metadata).decode(), re.M))
    assert {"dashboard", "dicom", "llm", "notebooks", "triton"} <= extras


def test_only_two_requirements_have_an_upper_bound(wheel: Path) -> None:
    """Next to a plain sae-lens no version goes down: capped is sae-lens, and transformers where sae-lens caps it too.

    Holes are versions that no install gets today. CONTRIBUTING.md has the check by installing, which takes minutes.
    """
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("dist-info/METADATA"))
        head = email.message_from_bytes(opened.read(name))
    needed = [Requirement(line) for line in head.get_all("Requires-Dist", [])]
    needed = [one for one in needed if one.marker is None or "extra" not in str(one.marker)]
    assert len(needed) > 10
    capped = {one.name: {str(s) for s in one.specifier if s.operator != ">="} for one in needed}
    assert {name: caps for name, caps in capped.items() if caps} == {
        "sae-lens": {"<7"},
        "transformers": {"<6", "!=5.0.*", "!=5.1.*", "!=5.2.*", "!=5.3.*"},
    }
    for one in needed:
        assert one.specifier.contains(version(one.name), prereleases=True), one
