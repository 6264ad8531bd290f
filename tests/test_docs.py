"""README and docs: every command block runs, every command that is named exists, links lead somewhere.

Blocks of a page run in order in one empty folder. `<!-- test: a => b; c => d -->` above a block makes it small;
`<!-- not run: reason -->` leaves it out, and the reason stands in the page's source.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sae_lens_maira.cli import COMMANDS, build_parser, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!--\s*(?P<note>(?:test|not run):.*?)-->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.M | re.S
)
OWN_TEST = {"hooks.md"}  # tests/hooks/test_docs.py runs every line of it


@dataclass(frozen=True)
class Block:
    """A fenced block, made small where its page says how, and the reason if it is not run."""

    kind: str
    text: str
    skipped: str | None


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        text, note = match["text"], " ".join((match["note"] or "").split())
        word, _, said = note.partition(": ")
        for change in said.split("; ") if word == "test" else []:
            old, new = change.split(" => ")
            assert old in text, f"{page.name}: the block has no {old!r} to make small"
            text = text.replace(old, new)
        found.append(Block(match["kind"], text, said if word == "not run" else None))
    return found


def runnable(kind: str) -> list[Path]:
    return [
        p
        for p in PAGES
        if p.name not in OWN_TEST and any(b.kind == kind and not b.skipped for b in blocks(p))
    ]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    """A relative link of a page is a file (pages of the reference are made when the site is built)."""
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|reference/", link):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_blocks_left_out_say_why() -> None:
    """Every bash or python block is run here or by a test of its own, or its page says why not."""
    for page in PAGES:
        for block in blocks(page):
            assert block.skipped is None or len(block.skipped) > 10, page.name


def run(script: str, folder: Path) -> None:
    """Run a script of bash: `sae-lens-maira ...` in this process, which has its imports; the lines between in bash."""
    others: list[str] = []

    def flush() -> None:
        if others:
            subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(others)], cwd=folder, check=True)
            others.clear()

    for line in re.sub(r"\\\n\s*", " ", script).splitlines():
        if not line.startswith("sae-lens-maira "):
            others.append(line)
            continue
        flush()
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    flush()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", runnable("bash"), ids=lambda page: page.name)
def test_bash_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's bash blocks, in order, in one empty folder that holds the recipes."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    run(
        "\n".join(block.text for block in blocks(page) if block.kind == "bash" and not block.skipped),
        tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", runnable("python"), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """The page's python blocks, in order, in one process."""
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(b.text for b in blocks(page) if b.kind == "python" and not b.skipped))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script.read_text()}\n{done.stderr[-3000:]}"
