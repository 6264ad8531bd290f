"""Generated tests over all commands: config files and lists of numbers as users type them, output on any stream."""

import argparse
import asyncio
import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from sae_lens_maira.cli import COMMANDS, build_parser, main
from sae_lens_maira.cli.options import MOST, numbers
from sae_lens_maira.cli.outcome import FROM_ONE, SIGNED
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.io import locked

NO_CONFIG = {
    "binary": b"\x89PNG\r\n\x1a\n\x00\x00\xdf\xff",
    "utf-16": "seed: 1".encode("utf-16"),
    "a control character": b"seed: \x00",
    "a list": b"[1, 2]",
    "a number": b"3",
    "nothing": b"",
    "a comment": b"# seed: 0",
    "no keys": b"1: 2",
    "a bracket": b"seed: [",
    "too deep": b"[" * 5000,
    "an unknown key": b"seeed-x: 1",
}


def options_of(name: str) -> dict[str, argparse.Action]:
    hidden = ("help", "config", "print_config", "json")
    actions = build_parser(name)._actions
    return {a.dest: a for a in actions if a.dest not in hidden and a.help != argparse.SUPPRESS}


def hints_of(name: str) -> dict[str, Any]:
    """Type of every option."""
    hints = get_type_hints(COMMANDS[name])
    hints |= get_type_hints(hints["options"]) if "options" in hints else {}
    return {key: hints[key] for key in options_of(name)}


def _kinds(hint: Any) -> set[Any]:
    return set(get_args(hint)) if get_origin(hint) is types.UnionType else {hint}


def _example(hint: Any) -> Any:
    """A value of a type, as a config file holds it."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return inside[0]
    if origin is types.UnionType or type(None) in inside:
        return _example(next(kind for kind in inside if kind is not type(None)))
    if origin in (list, tuple):
        return [_example(inside[0])] * (len(inside) if origin is tuple and ... not in inside else 1)
    return {str: "x", Path: "x", int: 1, float: 0.5, bool: True}.get(origin or hint, {})


def _word(value: Any) -> str:
    """A value as it is typed."""
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_texts_are_phrases_with_a_capital(name):
    """Every option has a help text that begins with a capital, a quotation mark or a number."""
    for option, action in options_of(name).items():
        assert action.help, f"{name} --{option} has no help"
        assert not action.help[0].islower(), f"{name} --{option}: {action.help}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_file_that_is_no_config_is_one_line_and_code_2(name, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    for kind, content in NO_CONFIG.items():
        file.write_bytes(content)
        assert main([*name.split(), "--config", str(file)]) == 2, kind
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), kind
        assert err.startswith(f"sae-lens-maira {name}: ")
        assert len(err) < 400


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_keys_of_a_config_may_have_hyphens(name, tmp_path, capsys):
    """All options of a command in one file, with hyphens and with underscores, are the same options."""
    values = {key: _example(hint) for key, hint in hints_of(name).items()}
    file, read = tmp_path / "run.yaml", []
    for sign in ("_", "-"):
        file.write_text(yaml.safe_dump({key.replace("_", sign): value for key, value in values.items()}))
        parsed = vars(build_parser(name).parse_args(["--config", str(file)]))
        read.append({key: value for key, value in parsed.items() if key != "config"})
    assert read[0] == read[1]
    both = next((key for key in values if "_" in key), None)
    if both:
        file.write_text(f"{both}: {values[both]}\n{both.replace('_', '-')}: {values[both]}\n")
        assert main([*name.split(), "--config", str(file)]) == 2
        assert f"gives --{both.replace('_', '-')} twice" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_number_in_a_config_is_text_where_text_is_wanted(name, tmp_path):
    """`latents: 1` and `out: 2024` are as on the command line, where everything is text."""
    hints = hints_of(name)
    texts = [key for key, hint in hints.items() if _kinds(hint) <= {str, Path, type(None)}]
    required = {key: _example(hints[key]) for key, action in options_of(name).items() if action.required}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(required | dict.fromkeys(texts, 20)))
    parsed = vars(build_parser(name).parse_args(["--config", str(file)]))
    assert {key: str(parsed[key]) for key in texts} == dict.fromkeys(texts, "20")


@pytest.mark.parametrize("name", [n for n in sorted(COMMANDS) if "latents" in options_of(n)])
@pytest.mark.parametrize("given", ["10-1", "", "1,,2", "-3", "1e3", "1-2-3", "٣-x", "0-99999999999"])
def test_a_list_of_latents_that_is_none_is_refused_first(name, given, capsys):
    """Before any folder is read or model loaded; the message names the option and what it holds."""
    needed = [w for key, a in options_of(name).items() if a.required for w in (f"--{key}", "/nowhere")]
    assert main([*name.split(), *needed, f"--latents={given}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--latents {given!r} " in err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_numbers_that_mean_nothing_are_refused_first(name, tmp_path, capsys):
    """Negative, zero of what must be there, and beyond 64 bits: one message, before anything is read or written."""
    hints = hints_of(name)
    needed = [
        w
        for key, a in options_of(name).items()
        if a.required
        for w in (f"--{key}", _word(_example(hints[key])))
    ]
    before = {p.name for p in tmp_path.iterdir()}
    for key, hint in hints.items():
        if not _kinds(hint) & {int, float} or key in SIGNED:
            continue
        for wrong in (
            "-1",
            *(["0"] if key in FROM_ONE else []),
            *([str(2**70)] if int in _kinds(hint) else []),
        ):
            code = main([*name.split(), *needed, f"--{key.replace('_', '-')}={wrong}"])
            out, err = capsys.readouterr()
            assert (code, out, err.count("\n")) == (2, "", 1), (key, wrong, err)
            assert f"--{key.replace('_', '-')} is " in err
    assert {p.name for p in tmp_path.iterdir()} == before


# Commands with --out, --store or --records that hold no lock for all of their run, and why.
READERS = {"store show", "store validate", "workbench"}
ONE_FILE = {"studies import", "studies validate", "locate"}  # written at the end, atomically
BY_RANK = {"harvest", "train", "latents"}  # each locks for its ranks together, which their own tests show


@pytest.mark.parametrize("name", [n for n in COMMANDS if {"out", "store", "records"} & {*options_of(n)}])
def test_a_command_locks_the_folder_that_it_writes(name, tmp_path, capsys):
    """Refused before anything is read while another process works there."""
    option = vars(COMMANDS[name]).get("works_in")
    assert (option is None) == (name in READERS | ONE_FILE | BY_RANK)
    if option is None:
        return
    values = {key: str(tmp_path / "x") for key, a in options_of(name).items() if a.required}
    values[option] = str(tmp_path / "folder")
    kinds = hints_of(name)
    listed = {key: f"[{v}]" if get_origin(kinds[key]) is list else v for key, v in values.items()}
    with locked(tmp_path / "folder"):
        assert main([*name.split(), *(word for key, v in listed.items() for word in (f"--{key}", v))]) == 2
    assert f"{tmp_path / 'folder'} is in use" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - BY_RANK))
def test_a_command_that_shares_no_work_refuses_torchrun(name, tmp_path, monkeypatch, capsys):
    """Before anything is read; tasks of a SLURM step may run different commands and are warned only."""
    hints, options = hints_of(name), options_of(name)
    needed = [
        w for key, a in options.items() if a.required for w in (f"--{key}", _word(_example(hints[key])))
    ]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert main([*name.split(), *needed]) == 2
    assert not list(tmp_path.iterdir())
    assert f"{name} works in one process, and this is rank 1 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place", ["below a file", "a loop of links", "a long name", "a link to nothing below a file"]
)
@pytest.mark.parametrize("name", [n for n in sorted(COMMANDS) if vars(COMMANDS[n]).get("works_in")])
def test_a_folder_that_cannot_be_is_one_message(name, place, tmp_path, capsys):
    """Whatever is in the way, the message names the path and no traceback is printed."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "x")
    places = {"below a file": "file/x", "a loop of links": "loop/x", "a long name": f"{'n' * 300}/x"}
    values = {key: str(tmp_path / "x") for key, a in options_of(name).items() if a.required}
    values[vars(COMMANDS[name])["works_in"]] = str(tmp_path / places.get(place, "link"))
    kinds = hints_of(name)
    listed = {key: f"[{v}]" if get_origin(kinds[key]) is list else v for key, v in values.items()}
    assert main([*name.split(), *(word for key, v in listed.items() for word in (f"--{key}", v))]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert "Traceback" not in err


def test_numbers_and_ranges():
    """ "3, 0-2" lists numbers once, in order; reversed, too long and other lists are errors."""
    assert numbers(None, "--latents") is None
    assert numbers("3, 0-2,2, 7-7", "--latents") == (3, 0, 1, 2, 7)
    with pytest.raises(ConfigError, match="Write 1-10"):
        numbers("10-1", "--latents")
    with pytest.raises(ConfigError, match="more than"):
        numbers(f"0-{MOST}", "--latents")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_on_a_stream_that_is_not_utf8(encoding, monkeypatch):
    """Characters that a stream cannot encode are escaped; the host's stream is as before afterwards."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setitem(COMMANDS, "measure-phantom", lambda **_: sys.stdout.write("→ λ \udcff\n"))
    assert main(["measure-phantom"]) == 0
    assert stream.errors == "strict"
    assert stream.buffer.getvalue() == rb"\u2192 \u03bb \udcff" + b"\n"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_whole_program_on_a_stream_that_is_not_utf8():
    program = "import sys, sae_lens_maira.cli as c; sys.exit(c.main(['studies', 'import', '--help']))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_command_within_a_running_event_loop(capsys):
    """As in a notebook: help, a parser's error and a command's error return their codes; nothing ends the host."""

    async def host() -> list[int]:
        words = (["--help"], ["train", "--help"], ["train", "--nothing"], ["evaluate", "--sae", "/nowhere"])
        return [main([*each]) for each in words]

    assert asyncio.run(host()) == [0, 0, 2, 2]
