"""Words of the project's former private language do not come back into sentences that people read.

The list grows as sentences are rewritten. `docs/log.md` keeps its history.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("sae_lens_maira", "hooks", "recipes", "benchmarks", "docs", ".github")
KINDS = {".py", ".md", ".yaml", ".yml", ".js", ".css", ".html", ".ipynb"}
PRIVATE = {
    r"knows? nothing\b": "leave the sentence out: tests/test_imports.py checks directions of imports",
    r"\banew\b": "again",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bevery door\b|\ba door\b|\bdoors\b": "interface",
    r"\bstands? (beside|behind|in|there|apart)\b": "is, is next to",
    r"\b(lies|lie|lay) (beside|behind|in|at|on|there|below|elsewhere|outside)\b": "is, is stored in",
    r"\bbeside\b": "next to, with, in addition to",
    r"\byardsticks?\b": "control, baseline",
    r"\bthe house\b": "the package",
    r"\brooms\b": "packages",
    r"films?\b|\bfilms?_": "image, radiograph; view where that is meant",
    r"\btwins?\b": "copy that shares weights; matched random control",
    r"\bheat\b": "activation map",
    r"\btold (otherwise|apart)\b|\b(is|are|be) told\b|\btold =": "by default; distinguish; the name of what it holds",
    r"\bwithout a word\b|\bin silence\b": "silently, without a warning",
    r"\bhand(s|ed)? (out|on|back)\b": "return, pass",
    r"\b(nobody|whoever)\b": "say who or what",
    r"\bmade if missing\b": "created if missing",
    r"\b(was|were) (not )?asked (for|of)\b": "requested",
    r"\bchoosing half\b": "selection half",
    r"\braises? many kinds\b": "raises many types",
    r"\bNone (takes|is (the|all|every)) ": "None for",
    r"\bprocess(es)? of (its|their) own\b": "a separate process",
    r"\b(that|which) sees\b": "with image input",
    r"\bshow a bar\b": "show a progress bar",
    r"\b(rows|studies|tokens|sequences|bytes) an? (row|study|token|latent|batch|shard|file|image|step)\b": "per",
}
# Words of reports that are read, and names of files of others.
ALLOWED = {("cues.py", "films?"), ("sections.py", "FILMS?")}


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
        and not any(path.name == name and word in line for name, word in ALLOWED)
    ]
    assert not found, f"write: {PRIVATE[pattern]}\n" + "\n".join(found)


def test_the_list_finds_what_it_bans() -> None:
    """A pattern that matches nothing would ban nothing."""
    sample = (
        "It knows nothing about doors in rooms; mended anew, it stands beside the house as a yardstick. A film lies in "
        "the heat, nobody is told; its twin is handed back without a word at 3 tokens a row. "
        "The folder is made if missing, in a process of its own; None is the default. Show a bar: what was asked for "
        "of the choosing half, by a model that sees. It raises many kinds. None takes all."
    )
    assert all(re.search(pattern, sample, re.I) for pattern in PRIVATE)
    assert len(files()) > 200
