"""The command line: help with examples, one-paragraph errors and exit code 2, JSON where it is asked for."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sae_lens_maira.cli import COMMANDS, build_parser, main
from sae_lens_maira.training.interruption import StoppedError

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sae_lens_maira", *words], capture_output=True, text=True, check=False
    )


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*name.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_shows_an_example_and_describes_every_option(name, capsys):
    """`COMMAND --help` holds its example on one line, and a sentence of the docstring for every option."""
    text = help_of(name, capsys)
    assert f"Example: sae-lens-maira {name} " in text
    words = " ".join(text.split())
    for action in build_parser(name)._actions:
        if action.help != argparse.SUPPRESS and action.dest not in ("help", "config", "print_config", "json"):
            shown = action.dest.replace("_", "-")
            assert re.search(rf"--{shown} \S+ [^(\s]", words), f"{name} --{shown} has no text"


@pytest.mark.parametrize("columns", ["20", "80", "400", ""])
def test_help_is_the_same_in_every_terminal(columns, capsys, monkeypatch):
    """A narrow terminal would break the example at a hyphen: "sae-" and "lens-maira" on two lines."""
    wanted = help_of("interpret run", capsys)
    monkeypatch.setenv("COLUMNS", columns)
    assert help_of("interpret run", capsys) == wanted


def test_the_command_line_starts_without_the_model_libraries():
    """The help of all commands loads no torch, transformers or SAELens: help answers at once."""
    program = (
        "import sys, sae_lens_maira.cli as c; [c.help_of(name) for name in c.COMMANDS];"
        "print(sorted({'torch', 'transformers', 'sae_lens', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            ["quickstart", "--studees", "5"],
            "quickstart: unrecognized arguments: --studees 5. Did you mean --studies?",
        ),
        (["dashboards", "upload", "--set-nam", "x"], "Did you mean --set-name?"),
        (["quickstart", "--studies", "five"], "quickstart: --studies: Expected an int. Got value: five."),
        (["interpret", "run"], "interpret run: it needs --records."),
        (["quickstart", "--config", "/nowhere.yaml"], "quickstart: --config: File does not exist"),
        (["nothing"], "there is no command 'nothing'. Commands are quickstart"),
        (["dashboards"], "'dashboards' alone is not a command. Commands are dashboards"),
        (["intrepret", "run"], "Did you mean interpret?"),
    ],
)
def test_wrong_words_are_one_line_and_code_2(words, wanted, capsys):
    """What the parser refuses names the command and the option that was probably meant: no usage page."""
    code = main(words)
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert wanted in captured.err


@pytest.mark.parametrize("command", ["quickstart", "interpret run"])
def test_unknown_key_in_a_config_file_names_the_closest(command, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("seeed: 5\n", encoding="utf-8")
    assert main([*command.split(), "--config", str(file)]) == 2
    assert f"{command}: unrecognized arguments: --seeed. Did you mean --seed?" in capsys.readouterr().err


def test_options_are_taken_with_hyphens_and_with_underscores(tmp_path):
    """`--set-name` and `--set_name` are one option; a value keeps its own hyphens and underscores."""
    words = ["--records", "a_b", "--out", str(tmp_path)]
    parser = build_parser("dashboards neuronpedia")
    for spelling in (["--set-name", "res-16k"], ["--set_name", "res-16k"], ["--set-name=res-16k"]):
        options = parser.parse_args([*words, *spelling])
        assert (options.set_name, str(options.records)) == ("res-16k", "a_b")


def test_a_recipes_other_parts_are_no_options(capsys):
    """`harvest` takes a recipe of `train`, whose parts are not in its help and refused as options."""
    options = build_parser("harvest").parse_args(["--config", str(ROOT / "recipes" / "phantom.yaml")])
    assert options.sae["d_sae"] == 1024
    text = help_of("harvest", capsys)
    assert "not used" not in text
    assert not re.search(r"--(sae|trainer|out|provider|direct)\b", text.split("options:")[0])
    for words in (["--provider.foo", "3"], ["--trainer", "{}"], ["--out=x"]):
        assert main(["harvest", "--hooks", "blocks.1.hook_resid_post", *words]) == 2
        assert "is not used here; a recipe of `train` may contain it. See" in capsys.readouterr().err


def test_a_word_that_is_no_choice_names_the_choices(capsys):
    """Options with a few words to choose from list them in the help and in the error."""
    assert main(["latents", "--sae", "a", "--out", "b", "--control", "none"]) == 2
    assert (
        "--control: Expected one of 'trained', 'untrained', 'untrained_whitened', 'raw', 'frozen_decoder', "
        "'frozen_encoder'. Got value: none." in capsys.readouterr().err
    )
    assert "--dtype {bfloat16,float32}" in help_of("harvest", capsys)


def test_one_seed_of_phantom_studies_everywhere():
    """`--study-seed` draws phantom studies wherever a command reads them by number: 0 to learn on, 10,000 held out."""
    actions = {name: {a.dest: a for a in build_parser(name)._actions} for name in COMMANDS}
    found = {name: known["study_seed"].default for name, known in actions.items() if "study_seed" in known}
    held_out = {"attribute", "evaluate", "latents", "dashboards saedashboard", "measure-phantom", "workbench"}
    held_out |= {"match", "locate"}
    assert {name for name, seed in found.items() if seed == 10_000} == held_out
    assert {name for name, seed in found.items() if seed == 0} == {"harvest", "train"}
    assert found["studies import"] is None  # of one source only; 0 there


def test_an_option_from_a_pipe(tmp_path):
    """A configuration may come from a pipe."""
    done = subprocess.run(
        [sys.executable, "-m", "sae_lens_maira", "quickstart", "--config", "/dev/stdin"],
        cwd=tmp_path,
        input="studies: -5\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "studies is -5" in done.stderr


def test_a_closed_pipe_is_no_error_of_ours(monkeypatch):
    """`sae-lens-maira ... | head -1`: no traceback, and the exit code of any program whose reader is gone."""
    program = (
        "import sys, sae_lens_maira.cli as c\n"
        "c.COMMANDS['quickstart'] = lambda **_: sys.stdout.writelines('line\\n' for _ in range(100_000))\n"
        "sys.exit(c.main(['quickstart']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""


def test_interruption_and_a_full_disk_show_no_traceback(monkeypatch, capsys):
    """Ctrl-C is 130, a path that cannot be written is 2, and a fault of ours stays visible."""

    def raising(error):
        monkeypatch.setitem(COMMANDS, "measure-phantom", lambda **_: (_ for _ in ()).throw(error))

    raising(KeyboardInterrupt())
    assert main(["measure-phantom"]) == 130
    raising(StoppedError("Training was ended by SIGTERM."))
    assert main(["measure-phantom"]) == 2
    assert capsys.readouterr().err.endswith("measure-phantom: Training was ended by SIGTERM.\n")
    raising(PermissionError(13, "Permission denied", "/root/x"))
    assert main(["measure-phantom"]) == 2
    assert "Permission denied at /root/x." in capsys.readouterr().err
    raising(KeyError("ours"))
    with pytest.raises(KeyError):
        main(["measure-phantom"])


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


def test_version_and_bench():
    """`--version` prints the package's version; an unknown benchmark is a user error, `bench --help` is not."""
    from sae_lens_maira import __version__

    assert run("--version").stdout.split() == ["sae-lens-maira", __version__]
    done = run("bench", "nothing")
    assert done.returncode == 2
    assert "bench step" in done.stderr
    asked = run("bench", "--help")
    assert asked.returncode == 0
    assert "bench step" in asked.stdout


def test_the_quickstart_refuses_another_model(capsys):
    """Another model is an error with a way out, not silently the phantom."""
    assert main(["quickstart", "--model", "microsoft/maira-2"]) == 2
    assert "runs only on the phantom" in capsys.readouterr().err
