"""The command line: `sae-lens-maira COMMAND --help` says what each command does.

A command is one function of a module of `commands`; `commands/parser.py` makes its options and help of it. Heavy
modules are imported when their command runs.

    stdout   the result, with --json one JSON value     exit 0     done
    stderr   progress and errors                        exit 2     one paragraph: something that the user can mend
                                                        exit 1     a traceback: a fault of ours
                                                        exit 130   interrupted; 141: nobody reads stdout any more
"""

import contextlib
import difflib
import errno
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import sys
from collections.abc import Callable

from jsonargparse import ArgumentParser

from sae_lens_maira import __version__, commands
from sae_lens_maira.commands.parser import HELP_WIDTH, command_parser
from sae_lens_maira.errors import MairaError

PROGRAM = "sae-lens-maira"
ORDER = [
    "quickstart",
    "studies",
    "harvest",
    "train",
    "evaluate",
    "latents",
    "interpret",
    "dashboards",
    "steer",
]
# What a path or a disk can be guilty of, and no code of ours.
DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR, errno.ENOENT}
INTERRUPTED, UNREAD = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what a shell reports for any other program


def _discover() -> dict[str, Callable[..., None]]:
    """Commands of every module of `commands` that has a table `COMMANDS`, in the order of the work.

    A name of two words, such as "studies import", is a command of a group.
    """
    found: dict[str, Callable[..., None]] = {}
    for module in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."):
        if _has_table(module.name):
            found |= importlib.import_module(module.name).COMMANDS
    place = {word: number for number, word in enumerate(ORDER)}
    return {name: found[name] for name in sorted(found, key=lambda n: (place.get(n.split()[0], 99), n))}


def _has_table(module: str) -> bool:
    """Whether a module sets `COMMANDS`: asked of its code, so that compositions with heavy imports stay unloaded."""
    spec = importlib.util.find_spec(module)
    code = getattr(spec and spec.loader, "get_code", lambda _: None)(module)
    return code is not None and "COMMANDS" in code.co_names


COMMANDS: dict[str, Callable[..., None]] = _discover()


def build_parser(name: str) -> ArgumentParser:
    """The parser of a command.

    Args:
        name: a key of `COMMANDS`, such as "latents" or "interpret run".
    """
    return command_parser(name, COMMANDS[name])


def help_of(name: str) -> str:
    """What `sae-lens-maira NAME --help` prints.

    Args:
        name: a key of `COMMANDS`.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        build_parser(name).print_help()
    return text.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; those of the process if not given.

    Returns:
        0, or another exit code of this module's docstring.
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
    options = build_parser(name).parse_args(words[len(name.split()) :])
    chosen = {key: value for key, value in vars(options).items() if key != "config"}
    if "json" in chosen:
        chosen["as_json"] = chosen.pop("json")
    try:
        COMMANDS[name](**chosen)
        sys.stdout.flush()
    except MairaError as error:
        sys.stderr.write(f"{PROGRAM} {name}: {error}\n")
        return 2
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the interpreter flushes once more at its end
        return UNREAD
    except OSError as error:
        if error.errno not in DISK or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        place = f" at {error.filename}" if error.filename is not None else ""
        sys.stderr.write(
            f"{PROGRAM} {name}: {error.strerror}{place}. Give another path, or make room or rights there.\n"
        )
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM} {name}: interrupted.\n")
        return INTERRUPTED
    return 0


def _overview(group: str = "") -> str:
    """All commands, or those of a group, each with the first line of its help."""
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
        f"usage: {PROGRAM} {group or 'COMMAND '}[options]\n\n{shown}\n{PROGRAM} COMMAND --help says more.\n"
    )


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3].rsplit(" ", 1)[0] + " ..."


def _no_command(words: list[str]) -> int:
    """A group alone lists its members; anything else is an error that names the nearest command."""
    members = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if members and words[1:2] in (["--help"], ["-h"]):
        sys.stdout.write(_overview(f"{words[0]} "))
        return 0
    typed = " ".join(words[:2] if members else words[:1])
    close = difflib.get_close_matches(typed, members or [*COMMANDS, *{n.split()[0] for n in COMMANDS}], n=1)
    guess = f"Did you mean {close[0]}? " if close else ""
    known = ", ".join(members or [*COMMANDS, "bench step"])
    alone = members and not words[1:]
    seen = f"{typed!r} alone is no command" if alone else f"there is no command {typed!r}"
    sys.stderr.write(f"{PROGRAM}: {seen}. {'' if alone else guess}Commands are {known}.\n")
    return 2


def _bench(words: list[str]) -> int:
    """Benchmarks have parsers of their own: they also run as scripts, where jsonargparse is not wanted."""
    if words[:1] != ["step"]:
        typed = " ".join(words) or "nothing"
        sys.stderr.write(f"{PROGRAM} bench: {typed} is no benchmark; try bench step --help.\n")
        return 2
    from sae_lens_maira.training.benchmark import main as step

    return step(words[1:])


__all__ = ["COMMANDS", "build_parser", "help_of", "main"]

if __name__ == "__main__":
    sys.exit(main())
