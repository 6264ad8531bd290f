"""Files of the project around the code: owner, version, changelog, citation, workflows."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from sae_lens_maira import __version__

ROOT = Path(__file__).parent.parent
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_all_urls_have_one_owner() -> None:
    """`make owner` changes every URL: the files with an owner are those that it edits, and all name the same one."""
    owner = re.compile(r"github\.com/([\w-]+)/sae-lens-maira|([\w-]+)\.github\.io/sae-lens-maira")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found: dict[str, set[str]] = {}
    for name in filter(None, listed.stdout.split("\0")):
        if Path(name).suffix in {".toml", ".cff", ".md", ".yml", ".yaml"} and (ROOT / name).is_file():
            owners = owner.findall((ROOT / name).read_text(encoding="utf-8"))
            if owners:
                found[name] = {one or other for one, other in owners}
    assert set(found) == {"pyproject.toml", "CITATION.cff", "README.md", "tests/docs_blocks.yaml"}
    assert len(set.union(*found.values())) == 1
    assert all(name in (ROOT / "Makefile").read_text(encoding="utf-8") for name in found)


def test_citation_and_changelog_have_the_version() -> None:
    """The version of the package is that of CITATION.cff, and has a section in the changelog."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == __version__
    assert re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", CHANGELOG, re.M)


def test_changelog_entries_are_one_line() -> None:
    """Every line is a heading, an entry of at most 200 characters, or the introduction."""
    lines = CHANGELOG.splitlines()
    entries = [line for line in lines if line.startswith("- ")]
    assert len(entries) > 50
    assert [line for line in lines if len(line) > 200] == []
    assert [
        line for line in lines[4:] if line and not line.startswith(("- ", "#", "The first release"))
    ] == []


@pytest.mark.parametrize("name", ["ci.yml", "docs.yml", "release.yml"])
def test_workflows_call_what_exists(name: str) -> None:
    """A workflow parses, pins every action to a version, and calls scripts and make targets that exist."""
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    assert steps
    assert all(re.search(r"@(v\d+|release/v\d+)$", step["uses"]) for step in steps if "uses" in step)
    commands = "\n".join(step.get("run", "") for step in steps)
    targets = re.findall(r"\bmake ([\w-]+)", commands)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert all((ROOT / script).is_file() for script in re.findall(r"^\.ci/\w+", commands, re.M))
    expected = {"ci.yml": ".ci/run", "docs.yml": "make docs", "release.yml": "twine check --strict"}[name]
    assert expected in commands


def test_issue_forms_parse() -> None:
    """Each of the three forms has a name, a description and a required field; the template of pull requests exists."""
    forms = [
        path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"
    ]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert all(form[key] for key in ("name", "description"))
        assert any(part.get("validations", {}).get("required") for part in form["body"])
    assert (ROOT / ".github" / "pull_request_template.md").is_file()
