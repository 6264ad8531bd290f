"""README and docs: every block runs, every command that is named exists, links lead to a file, lines fit.

Blocks of a page run in order, bash and python, in one folder. `docs_blocks.yaml` holds what a reader does not need:
what makes a block small, why a block is not run and which test does its work, and the files that a page takes for
granted (outputs of the tutorial, a small MIMIC-CXR tree, a release in the published layout, a radiograph).
"""

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_lens_maira.cli import COMMANDS, build_parser, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```", re.M | re.S)
MARKS = yaml.safe_load((ROOT / "tests" / "docs_blocks.yaml").read_text(encoding="utf-8"))
OWN_TEST = {"hooks.md"}  # tests/hooks/test_docs.py runs every line of it


@dataclass(frozen=True)
class Block:
    """A fenced block, made small by its mark, and the reason if it is not run."""

    kind: str
    text: str
    skipped: str | None


def blocks(page: Path) -> list[Block]:
    marks = MARKS.get(page.name, {}).get("blocks", {})
    found = []
    for number, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")), 1):
        text, mark = match["text"], marks.get(number, {})
        if mark:
            first = text.splitlines()[0]
            assert mark["first"] == first, (
                f"{page.name}: block {number} begins {first!r}, not {mark['first']!r}"
            )
        for old, new in mark.get("replace", {}).items():
            assert old in text, f"{page.name}: block {number} has no {old!r} to make small"
            text = text.replace(old, new)
        found.append(Block(match["kind"], text, mark.get("not_run")))
    return found


def test_every_mark_belongs_to_a_block() -> None:
    """A mark of a page or block that is gone would be silently unused."""
    assert set(MARKS) <= {page.name for page in PAGES}
    for page in PAGES:
        marks = MARKS.get(page.name, {}).get("blocks", {})
        assert all(1 <= number <= len(blocks(page)) for number in marks), page.name


def to_run(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.kind in ("bash", "python") and not block.skipped]


def named(page: Path) -> list[str]:
    """Every `sae-lens-maira ...` of the page, in blocks and in running text."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    return re.findall(r"(?:^|`)sae-lens-maira +([a-z][^`\n#]*)", text, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    """A page names commands, and options of them, that the command line has."""
    for words in named(page):
        if words.startswith(("bench", "COMMAND")):
            continue
        name = next(
            (n for n in sorted(COMMANDS, key=len, reverse=True) if f"{words} ".startswith(f"{n} ")), None
        )
        group = any(n.startswith(f"{words.split()[0]} ") for n in COMMANDS)
        assert name or group, f"{page.name} names the command {words!r}, which is not there"
        if name is None:
            continue
        known = {option.replace("_", "-") for a in build_parser(name)._actions for option in a.option_strings}
        for option in re.findall(r"(?<=\s)--[\w-]+", words):
            assert option.replace("_", "-") in known, f"{page.name}: {name} has no option {option}"


def test_five_tasks_take_one_import_and_ten_statements() -> None:
    """README's first python block: load, cache, load an SAE, top latents, steer; its other blocks run as well."""
    block = next(block for block in blocks(ROOT / "README.md") if block.kind == "python")
    tree = ast.parse(block.text)
    assert len(tree.body) <= 10
    assert sum(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree)) == 1
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {"load", "run_with_cache", "load_sae", "top_latents", "steer"} <= called
    assert block.skipped is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    """A relative link of a page is a file (pages of the reference are made when the site is built)."""
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|reference/", link):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def runs_command(name: str, source: str) -> bool:
    """Whether a test's source has the command as consecutive words, in one string or in a list of strings."""
    between = r"(?:\s+|[\"'],\s*[\"'])"
    return bool(re.search(rf"(?<![\w-]){between.join(map(re.escape, name.split()))}(?![\w-])", source))


def sources(names: list[str]) -> str:
    """Text of the named test files, and of every file of the named folders."""
    paths = [path for name in names for path in sorted((ROOT / name).rglob("*.py")) or [ROOT / name]]
    return "".join(path.read_text(encoding="utf-8") for path in paths)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_left_out_names_the_test_that_does_its_work(page: Path) -> None:
    """The reason names tests, and these run each command of the block."""
    for block in blocks(page):
        if block.skipped is None:
            continue
        files = re.findall(r"(?:tests|\.ci)/[\w/.]*\w", block.skipped)
        assert files, f"{page.name}: {block.skipped!r} names no test"
        tests = sources(files)
        for command in re.findall(r"(?:sae-lens-maira|sae_lens_maira(?:\.cli)?) +([a-z].*)", block.text):
            name = max((n for n in COMMANDS if f"{command} ".startswith(f"{n} ")), key=len)
            assert runs_command(name, tests), f"{page.name}: {files} do not run {name}"


def test_the_search_for_a_command_can_fail() -> None:
    """Words of a command that are apart, or part of other words, do not count."""
    assert runs_command("studies import", 'main(["studies", "import", "--table"])')
    assert runs_command("steer", "assert main('steer --sae x'.split()) == 0")
    assert not runs_command("studies import", "import studies")
    assert not runs_command("steer", "steering, steer_out, re-steer")
    assert not runs_command("dashboards upload", sources(["tests/cli/test_steer.py"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit(page: Path) -> None:
    """The log: 100 columns. Other pages: text 100 (README and CONTRIBUTING 120), code 120, rows of tables 200.

    Rows of the tables in hooks.md have 260: their cells are code.
    """
    text = 120 if page.parent == ROOT else 100
    row = {"log.md": 100, "hooks.md": 260}.get(page.name, 200)
    code, long = False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        code ^= line.startswith("```")
        limit = row if line.startswith("|") else 120 if code and page.name != "log.md" else text
        if len(line) > limit:
            long.append(f"{page.name}:{number}: {len(line)} columns, at most {limit}")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_in_blocks_of_their_language(page: Path) -> None:
    """A block without a language holds no command: it would not be run."""
    for block in blocks(page):
        if not block.kind:
            assert not re.search(r"^(?:sae-lens-maira|python|pip|make|export|import) ", block.text, re.M)


def run(block: Block, space: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """Run a block here: python and `sae-lens-maira ...` in this process, which has its imports; other lines in bash."""
    if block.kind == "python":
        exec(compile(block.text, "block", "exec"), space)
        return
    others: list[str] = []

    def flush() -> None:
        if others:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            script = ["bash", "-euo", "pipefail", "-c", "\n".join(others)]
            subprocess.run(script, env=os.environ | {"PATH": path}, check=True)
            others.clear()

    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        if setting := re.fullmatch(r"export (\w+)=(\S+)", line):
            patch.setenv(*setting.groups())
        elif not line.startswith("sae-lens-maira "):
            others.append(line)
        else:
            flush()
            assert main(shlex.split(line, comments=True)[1:]) == 0, line
    flush()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: the folder of the tutorial, whose blocks all run, and what others publish."""
    folder = tmp_path_factory.mktemp("tutorial")
    space: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in to_run(TUTORIAL):
            run(block, space, patch)
    others_data(folder)
    return folder


def others_data(folder: Path) -> None:
    """A small MIMIC-CXR tree, a release in the published layout, interpretations, a checkpoint, a radiograph."""
    from pydicom.data import get_testdata_file

    from sae_lens_maira.phantom import phantom_path
    from sae_lens_maira.sae import export_dictionary_learning, load_matryoshka

    mimic = runpy.run_path(str(ROOT / "tests" / "studies" / "conftest.py"))
    cases = [mimic["Case"](f"1{n:07d}", f"5{n:07d}", "21800506", "80000") for n in range(12)]
    mimic["build_mimic_tree"](folder / "mimic-cxr-jpg", cases, reports=folder / "mimic-cxr")
    export_dictionary_learning(load_matryoshka(folder / "sae"), folder / "release")
    shutil.copytree(phantom_path(), folder / "weights")
    (folder / "interpretations.csv").write_text(
        "latent,interpretation,score\n3,pacemaker,0.9\n", encoding="utf-8"
    )
    radiograph = get_testdata_file("RG1_UNCI.dcm", download=False)
    assert isinstance(radiograph, str), "install pydicom-data"
    shutil.copy(radiograph, folder / "radiograph.dcm")


def copy_given(page: Path, material: Path, folder: Path) -> None:
    """The recipes and benchmarks, and the page's `given`, into the folder that its blocks run in."""
    for name in ("recipes", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    for copy, original in MARKS.get(page.name, {}).get("given", {}).items():
        target = folder / copy
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (material / original).is_dir() else shutil.copy)(material / original, target)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_runs(given: Path) -> None:
    """Every block of the tutorial, in order; what its text promises is written."""
    for name in ("records_untrained", "report/scores.png", "page/index.html", "steered/index.html"):
        assert (given / name).exists(), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != TUTORIAL and page.name not in OWN_TEST and to_run(page)],
    ids=lambda page: page.name,
)
def test_blocks_run(page: Path, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's blocks, in order, in one folder that holds the recipes and what the page takes for granted."""
    copy_given(page, given, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_LENS_MAIRA_CACHE", str(tmp_path / "cache"))
    space: dict[str, Any] = {}
    for block in to_run(page):
        run(block, space, monkeypatch)
