"""Command line; `sae-lens-maira COMMAND --help` describes each command.

A command is a function in a module of this package. `_TABLE` lists all commands, and `parser.py` makes options and help
from the arguments and the docstring of the function. Heavy modules are imported when their command runs.

    stdout   the result, with --json one JSON value     exit 0     done
    stderr   progress and errors                        exit 2     one message: an error that the user can fix
                                                        exit 1     a traceback: a bug in this package
                                                        exit 130   interrupted; 141: the reader of stdout has ended

stdout and stderr print control characters as escapes, since a study id or a report may contain terminal sequences that
move the cursor, rename the window or hide text.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import re
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

from jsonargparse import ArgumentParser

from sae_lens_maira import __version__
from sae_lens_maira.cli.outcome import exit_code
from sae_lens_maira.cli.parser import HELP_WIDTH, command_parser, run_command
from sae_lens_maira.ranks import check_single_process

PROGRAM = "sae-lens-maira"
# Every command, in the order of use: its words -> the module and function that run it.
_TABLE: dict[str, str] = {
    "quickstart": "quickstart:quickstart",
    "studies import": "studies:import_studies",
    "studies show": "studies_show:show",
    "studies validate": "studies:validate_studies",
    "harvest": "store:harvest",
    "store show": "store:show",
    "store validate": "store:validate",
    "store export": "store:export",
    "store import": "store:bring",
    "train": "train:train",
    "evaluate": "evaluate:evaluate",
    "match": "evaluate:match",
    "locate": "evaluate:locate",
    "latents": "latents:latents",
    "interpret run": "interpret:run",
    "interpret report": "interpret:report_scores",
    "interpret findings": "interpret:findings",
    "interpret published": "interpret:published",
    "dashboards html": "dashboards:html",
    "dashboards neuronpedia": "dashboards:neuronpedia",
    "dashboards saedashboard": "dashboards:saedashboard",
    "dashboards validate": "dashboards:check",
    "dashboards upload": "dashboards:upload",
    "attribute": "attribute:attribute",
    "steer": "steer:steer",
    "workbench": "quickstart:open_workbench",
    "measure-phantom": "quickstart:measure_phantom",
}


class _Commands(UserDict[str, Any]):
    """Command name -> function. The module of a command is imported on first use."""

    def __getitem__(self, key: str) -> Callable[..., None]:
        target = self.data[key]
        if isinstance(target, str):
            module, function = target.split(":")
            target = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return target


COMMANDS = _Commands(_TABLE)


def build_parser(name: str) -> ArgumentParser:
    """Make the parser of a command.

    Args:
        name: A key of `COMMANDS`, such as "latents" or "interpret run".
    """
    return command_parser(name, COMMANDS[name])


def help_of(name: str) -> str:
    """Return the text that `sae-lens-maira NAME --help` prints.

    Args:
        name: A key of `COMMANDS`.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        build_parser(name).print_help()
    return text.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command-line arguments; those of the process if not given.

    Returns:
        Exit code, as listed in the module docstring.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["bench"]:
        return _bench(words[1:])
    if not words or words[0] in ("-h", "--help", "--version"):
        sys.stdout.write(f"{PROGRAM} {__version__}\n" if words[:1] == ["--version"] else _overview())
        return 0 if words else 2
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
    if name is None:
        return _no_command(words)
    try:
        options = build_parser(name).parse_args(words[len(name.split()) :])
    except SystemExit as stopped:  # After --help, or an error of the parser.
        return stopped.code if isinstance(stopped.code, int) else 0
    with _printable(), visible_streams():
        return _run(name, options)


@contextlib.contextmanager
def _printable() -> Iterator[None]:
    """Context in which characters that stdout or stderr cannot encode are printed as escapes."""
    changed = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
            changed.append(stream)
    try:
        yield
    finally:
        for stream in changed:
            stream.reconfigure(errors="strict")


def _run(name: str, options: Any) -> int:
    """Run a command with parsed options; return the exit code."""

    def command() -> None:
        if "rank" not in vars(options):
            check_single_process(name)
        run_command(COMMANDS[name], {key: value for key, value in vars(options).items() if key != "config"})

    return exit_code(f"{PROGRAM} {name}", command)


def _overview(group: str = "") -> str:
    """List all commands, or those of a group, each with the first line of its help."""
    lines = {
        n: (inspect.getdoc(f) or "").splitlines()[0] for n, f in COMMANDS.items() if f"{n} ".startswith(group)
    }
    if not group:
        lines["bench step"] = "Time one training step against SAELens."
    width = max(map(len, lines))
    shown = "".join(
        f"  {name:<{width}}  {_cut(line, HELP_WIDTH - width - 4)}\n" for name, line in lines.items()
    )
    return (
        f"usage: {PROGRAM} {group or 'COMMAND '}[options]\n\n{shown}\n"
        f"{PROGRAM} COMMAND --help describes a command.\n"
    )


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3].rsplit(" ", 1)[0] + " ..."


def _no_command(words: list[str]) -> int:
    """Handle words that are not a command: list the members of a group, else report the nearest command."""
    members = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if members and words[1:2] in (["--help"], ["-h"]):
        sys.stdout.write(_overview(f"{words[0]} "))
        return 0
    typed = " ".join(words[:2] if members else words[:1])
    close = difflib.get_close_matches(typed, members or [*COMMANDS, *{n.split()[0] for n in COMMANDS}], n=1)
    guess = f"Did you mean {close[0]}? " if close else ""
    known = ", ".join(members or [*COMMANDS, "bench step"])
    alone = members and not words[1:]
    seen = f"{typed!r} alone is not a command" if alone else f"there is no command {typed!r}"
    sys.stderr.write(f"{PROGRAM}: {seen}. {'' if alone else guess}Commands are {known}.\n")
    return 2


def _bench(words: list[str]) -> int:
    """Run a benchmark. Benchmarks have their own parsers, since they also run as scripts without jsonargparse."""
    if words[:1] in (["--help"], ["-h"]):
        sys.stdout.write(
            f"usage: {PROGRAM} bench step [options]\n\n{PROGRAM} bench step --help describes it.\n"
        )
        return 0
    if words[:1] != ["step"]:
        typed = f"{' '.join(words)!r} is not a benchmark" if words else "no benchmark was named"
        sys.stderr.write(f"{PROGRAM} bench: {typed}; the only one is bench step.\n")
        return 2
    from sae_lens_maira.bench.step import main as step

    def benchmark() -> None:
        check_single_process("bench step")
        step(words[1:])

    return exit_code(f"{PROGRAM} bench step", benchmark)


_CONTROL = re.compile(r"\x1b\[A|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Replace control characters by escapes."""
    return _CONTROL.sub(
        lambda found: found[0] if found[0] == "\x1b[A" else found[0].encode("unicode_escape").decode(), text
    )


class _VisibleStream:
    """Text stream whose `write` applies `visible`; all other attributes are those of the wrapped stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(visible(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def visible_streams() -> Iterator[None]:
    """Context in which stdout and stderr print control characters as escapes."""
    out: Any = _VisibleStream(sys.stdout)
    err: Any = _VisibleStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


__all__ = ["COMMANDS", "build_parser", "help_of", "main"]
