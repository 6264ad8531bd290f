"""Recipes: the first line of each YAML file is its command, the file fits its settings, and options override it."""

import runpy
from pathlib import Path

import pytest

from sae_lens_maira.cli import COMMANDS, build_parser, parser
from sae_lens_maira.cli.parser import run_recipe

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
OWN_PARSER = {"train_phantom", "train_phantom_saes"}  # they have nested settings; tests/phantom trains


def name_of(file):
    return file.relative_to(ROOT).as_posix()


def run_script(script, monkeypatch, *arguments):
    """Exit code and settings of a script that is run with these arguments; its work is left out."""
    seen = []

    def read(settings, run, about):
        return run_recipe(settings, lambda chosen: seen.append(chosen) or chosen.out, about, list(arguments))

    with monkeypatch.context() as patch:
        patch.setattr(parser, "run_recipe", read)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(script), run_name="__main__")
    return stopped.value.code, seen


def test_every_script_has_a_file():
    """Scripts with settings have a YAML file of the same name; there are some of each kind."""
    scripts = {f for f in (ROOT / "recipes").rglob("*.py") if "run_recipe(" in f.read_text(encoding="utf-8")}
    assert {file.with_suffix(".py") for file in FILES} >= scripts
    assert len(scripts) >= 10
    assert len(FILES) - len(scripts) >= 5


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_first_line_is_the_command_and_the_file_fits_it(file, monkeypatch, capsys):
    """`python SCRIPT --config FILE` with other options, or `sae-lens-maira COMMAND --config FILE`."""
    line = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    script = file.with_suffix(".py")
    if not script.exists():
        command = max((n for n in COMMANDS if line.startswith(f"sae-lens-maira {n} ")), key=len)
        assert f" --config {name_of(file)}" in line
        build_parser(command).parse_args(["--config", str(file)])
        return
    assert line == f"python {name_of(script)} --config {name_of(file)}"
    if file.stem in OWN_PARSER:
        return
    code, (settings,) = run_script(script, monkeypatch, "--config", str(file), "--out", "elsewhere")
    assert code == 0
    assert settings.out == Path("elsewhere")
    assert capsys.readouterr().out == "elsewhere\n"


def test_an_unknown_option_is_refused(monkeypatch, capsys):
    script = ROOT / "recipes" / "steering" / "token_filter.py"
    assert run_script(script, monkeypatch, "--sedes", "3") == (2, [])
    assert "sedes" in capsys.readouterr().err
