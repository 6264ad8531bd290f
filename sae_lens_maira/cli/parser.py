"""The parser of one command, made from its function: arguments are options, the docstring is the help.

jsonargparse reads types, defaults and `--config` files. What is ours: options are typed with hyphens (underscores are
taken too), help keeps its lines and one width in every terminal, and an error is one line that names the command and
the option that was probably meant. It knows nothing about what commands do.
"""

import difflib
import inspect
import re
import sys
import textwrap
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

HELP_WIDTH = 110
FOREIGN = "not used here"
"""How the text of an argument begins that a recipe of another command may hold: no option, and not in the help."""


def command_parser(name: str, function: Callable[..., None]) -> ArgumentParser:
    """The parser of a command.

    Args:
        name: the command, such as "latents" or "interpret run".
        function: what it calls; an argument `as_json` becomes the switch `--json`.
    """
    about = (inspect.getdoc(function) or "").split("\nArgs:")[0].strip()
    parser = _Parser(
        prog=f"sae-lens-maira {name}", description=about, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_function_arguments(function, as_group=False, skip={"as_json"})
    for action in parser._actions:
        if str(action.help).startswith(FOREIGN):
            parser.foreign[action.dest], action.help = str(action.help), SUPPRESS
    if "as_json" in inspect.signature(function).parameters:
        parser.add_argument("--json", action="store_true", help="print JSON instead of text.")
    return parser


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Descriptions keep their lines, words keep their hyphens, and the width is one and the same everywhere.

    argparse asks the terminal for its width and breaks at hyphens, which makes "sae-" and "lens-maira" of a command
    that someone wants to copy.
    """

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **(settings | {"width": HELP_WIDTH}))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _format_action_invocation(self, action: Action) -> str:
        return _hyphens(super()._format_action_invocation(action))

    def _format_usage(self, usage: Any, actions: Any, *args: Any, **kwargs: Any) -> str:
        return _hyphens(super()._format_usage(usage, actions, *args, **kwargs))

    def _get_type_str(self, action: Action) -> str | None:
        kind = super()._get_type_str(action)
        if kind is None or kind.startswith("Literal"):  # the words to choose from stand beside the option
            return None
        kind = re.sub(r"(?:Optional|Union)\[(.*)\]", r"\1", kind)
        kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("Path", "path")
        return re.sub(r" \| null|, null$", "", kind)


class _Parser(ArgumentParser):
    """jsonargparse's parser with our spelling and our errors.

    Attributes:
        foreign: options that `--config` may hold and the command line may not, with the reason.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.foreign: dict[str, str] = {}

    def parse_args(self, args: list[str] | None = None, *rest: Any, **settings: Any) -> Any:
        words = None if args is None else [_underscores(word) for word in args]
        for word in words or ():
            name = re.split(r"[.=]", word.removeprefix("--"))[0]
            if word.startswith("--") and name in self.foreign:
                self.error(f"--{name} is {self.foreign[name].rstrip('.')}")
        return super().parse_args(words, *rest, **settings)

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        text = _plain(message)
        unknown = re.search(r"unrecognized arguments: (-*[\w.-]+)", text)
        close: list[str] = []
        if unknown:
            known = [_hyphens(option) for action in self._actions for option in action.option_strings]
            wanted = "--" + unknown.group(1).lstrip("-").replace("_", "-")
            close = difflib.get_close_matches(wanted, known, n=1)
        guess = f"Did you mean {close[0]}? " if close else ""
        sys.stderr.write(f"{self.prog}: {text}. {guess}See {self.prog} --help.\n")
        raise SystemExit(2)


def _hyphens(text: str) -> str:
    """Options as they are typed, `--set-name`; the parser knows them as the arguments are called, `--set_name`."""
    return re.sub(r"--\w[\w.]*", lambda option: option.group().replace("_", "-"), text)


def _underscores(word: str) -> str:
    """An option as the parser knows it; its value, and words that are no option, stay as they are."""
    option, equals, value = word.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _plain(message: str) -> str:
    """Jsonargparse's messages in the words of a command line, on one line."""
    text = " ".join(message.split())
    for pattern, wording in (
        (r'Parser key "([\w.]+)":', r"--\1:"),
        (r"<class '(\w+)'>", r"\1"),
        (r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1"),
        (r"Expected a (?=[aeiou])", r"Expected an "),
        (r"Option '([\w.]+)' is not accepted", r"unrecognized arguments: --\1"),
    ):
        text = re.sub(pattern, wording, text)
    missing = re.fullmatch(r"the following arguments are required: (.*)", text)
    if missing:
        text = "it needs " + ", ".join(f"--{option}" for option in missing.group(1).split(", "))
    return _hyphens(text).rstrip(".")


__all__ = ["HELP_WIDTH", "command_parser"]
