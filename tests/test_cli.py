"""The command line: help with examples, one-paragraph errors and exit code 2, JSON where it is asked for."""

import json
import re
import subprocess
import sys

import pytest

from sae_lens_maira.cli import COMMANDS, main


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sae_lens_maira.cli", *words], capture_output=True, text=True, check=False
    )


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_shows_an_example_and_describes_every_option(name, capsys):
    """`COMMAND --help` holds its example on one line, and a sentence of the docstring for every option."""
    text = help_of(name, capsys)
    assert f"Example: sae-lens-maira {name} " in text
    words = " ".join(text.split())
    for option in COMMANDS[name].__annotations__:
        if option not in ("return", "as_json"):
            assert re.search(rf"--{option} \S+ [^(\s]", words), f"{name} --{option} has no text"


@pytest.mark.parametrize("columns", ["20", "80", "400", ""])
def test_help_is_the_same_in_every_terminal(columns, capsys, monkeypatch):
    """A narrow terminal would break the example at a hyphen: "sae-" and "lens-maira" on two lines."""
    wanted = help_of("interpret run", capsys)
    monkeypatch.setenv("COLUMNS", columns)
    assert help_of("interpret run", capsys) == wanted


def test_the_command_line_starts_without_the_model_libraries():
    """The parser of all commands loads no torch, transformers or SAELens: help answers at once."""
    program = (
        "import sys, sae_lens_maira.cli as c; c.build_parser();"
        "print(sorted({'torch', 'transformers', 'sae_lens', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_option_names_the_closest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", "--studees", "5"])
    assert stopped.value.code == 2
    assert "Did you mean --studies?" in capsys.readouterr().err


def test_unknown_key_in_a_config_file_names_the_closest(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("studees: 5\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", "--config", str(file)])
    assert stopped.value.code == 2
    assert "studees" in capsys.readouterr().err


def test_user_errors_are_one_paragraph_and_code_2(capsys):
    """A wrong setting and a folder that is no SAE: no traceback, nothing on stdout."""
    assert main(["quickstart", "--layer", "9"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sae-lens-maira quickstart: layer is 9;")
    assert captured.err.count("\n") == 1


def test_missing_sae_is_a_user_error(tmp_path, capsys):
    assert main(["evaluate", "--sae", str(tmp_path / "nothing")]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err


@pytest.mark.slow
def test_measure_phantom_prints_json_alone():
    """With --json stdout is one JSON object, whatever progress bars do on stderr."""
    done = run("measure-phantom", "--studies", "4", "--json")
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    assert score["n"] == 4
    assert set(score["accuracy"]) == set(score["positives"])


def test_version_and_bench_door():
    """`--version` prints the package's version; an unknown benchmark is a user error."""
    from sae_lens_maira import __version__

    assert run("--version").stdout.split() == ["sae-lens-maira", __version__]
    done = run("bench", "nothing")
    assert done.returncode == 2
    assert "bench step" in done.stderr
