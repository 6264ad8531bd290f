"""Pages made from docstrings when the site is built: a page per package, the errors, and the help of every command.

A page holds the package's own docstring, then every public module of it. MkDocs calls `on_files`; nothing is written to
the source tree, so that a new module cannot be forgotten.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sae_lens_maira"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site's files."""
    for name, text in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def pages() -> dict[str, str]:
    """Page name -> Markdown, for every package, the errors and the commands."""
    made = {folder.name: package_page(folder) for folder in packages()}
    made["errors"] = f"# errors\n\n::: {PACKAGE}.errors\n"
    made["commands"] = commands_page()
    return made


def packages() -> list[Path]:
    """Folders with a public module: those of the library and `hooks`."""
    inside = [file.parent for file in sorted((ROOT / PACKAGE).glob("*/__init__.py"))]
    return [folder for folder in inside if folder.name != "commands"] + [ROOT / "hooks"]


def package_page(folder: Path) -> str:
    """The docstring of the package, then of each of its modules."""
    name = f"{PACKAGE}.{folder.name}"
    modules = [file.stem for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_")]
    blocks = [f"# {folder.name}", f"::: {name}\n    options:\n      members: false"]
    return "\n\n".join(blocks + [f"::: {name}.{module}" for module in modules]) + "\n"


def commands_page() -> str:
    """Every command's help, as `--help` prints it."""
    from sae_lens_maira.cli import COMMANDS, help_of

    parts = ["# Commands", "What `sae-lens-maira COMMAND --help` prints."]
    for name in COMMANDS:
        parts.append(f"## {name}\n\n```text\n{help_of(name)}```")
    return "\n\n".join(parts) + "\n"
