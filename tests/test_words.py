"""Words of the project's former private language do not come back into sentences that people read.

The list grows as sentences are rewritten. `docs/log.md` keeps its history.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("sae_lens_maira", "hooks", "recipes", "benchmarks", "docs", ".github")
KINDS = {".py", ".md", ".yaml", ".yml", ".js", ".html", ".ipynb"}
PRIVATE = {
    r"knows nothing about": "leave the sentence out: tests/test_imports.py checks directions of imports",
    r"\banew\b": "again",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bevery door\b|\ba door\b|\bdoors\b": "interface",
    r"\bstands? beside\b": "next to, compared with",
    r"\byardsticks?\b": "control, baseline",
    r"\bthe house\b": "the package",
}


def files() -> list[Path]:
    found = [
        path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in KINDS
    ]
    return [*found, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("pattern", PRIVATE)
def test_private_words_are_not_used(pattern: str) -> None:
    """Each finding names the file and line; the value in the table is what to write instead."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files()
        if path.name != "log.md" and "site" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line, re.I)
    ]
    assert not found, f"write: {PRIVATE[pattern]}\n" + "\n".join(found)


def test_the_list_finds_what_it_bans() -> None:
    """A pattern that matches nothing would ban nothing."""
    sample = "It knows nothing about doors; mended anew, it stands beside the house as a yardstick."
    assert all(re.search(pattern, sample, re.I) for pattern in PRIVATE)
    assert len(files()) > 200
