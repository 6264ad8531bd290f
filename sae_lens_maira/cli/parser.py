"""Build the parser of one command from its function: arguments become options, the docstring becomes the help.
jsonargparse reads types, defaults and `--config` files.

This module adds hyphens in options and in keys of config files (underscores are accepted too), numbers for text options
in config files (`latents: 1`), help of a fixed width, and one-line errors that name the command and suggest the closest
option.

A parameter `options`, annotated with a dataclass, gives one option per field (see `options.py`); its default, an
instance, contains the defaults of this command. A recipe is a script with a YAML file of the same name, whose options
are the fields of one dataclass. It calls `run_recipe`.
"""

import contextlib
import difflib
import inspect
import re
import sys
import textwrap
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader

from sae_lens_maira.cli.outcome import check_numbers, exit_code
from sae_lens_maira.io import locked

HELP_WIDTH = 110

Command = TypeVar("Command", bound=Callable[..., None])


def accepts_parts_of(name: str, other: Callable[..., None]) -> Callable[[Command], Command]:
    """Allow parts in `--config` of a command that only another command reads.

    So one recipe can be used for both commands. On the command line these options are refused.

    Args:
        name: Name of the command that reads the parts, such as "train".
        other: Function of that command; its arguments that the decorated function does not have are accepted and
            ignored.
    """

    def mark(function: Command) -> Command:
        own = inspect.signature(function).parameters
        names = tuple(part for part in inspect.signature(other).parameters if part not in own)
        vars(function)["ignored_parts"] = (name, names)
        return function

    return mark


def works_in(option: str) -> Callable[[Command], Command]:
    """Lock the folder that an option names while the command runs; an estimate needs no lock.

    Args:
        option: Name of the option.
    """

    def mark(function: Command) -> Command:
        vars(function)["works_in"] = option
        return function

    return mark


def run_command(function: Callable[..., None], values: dict[str, Any]) -> None:
    """Call a command with parsed values; fields of its `options` dataclass are collected into one argument.

    Args:
        function: Function of the command.
        values: Option -> value, as `command_parser(...).parse_args()` returns them.
    """
    values = {key: value for key, value in values.items() if key not in _ignored(function)[1]}
    check_numbers(values)
    if "json" in values:
        values["as_json"] = values.pop("json")
    shared = _shared_options(function)
    if shared is not None:
        values["options"] = shared(**{f.name: values.pop(f.name) for f in fields(shared) if f.name in values})
    folder = values.get(vars(function).get("works_in", ""))
    with nullcontext() if folder is None or values.get("estimate") else locked(folder):
        function(**values)


def command_parser(name: str, function: Callable[..., None]) -> ArgumentParser:
    """Make the parser of a command.

    Args:
        name: Name of the command, such as "latents" or "interpret run".
        function: Function of the command; an argument `as_json` becomes the switch `--json`.
    """
    about = (inspect.getdoc(function) or "").split("\nArgs:")[0].strip()
    parser = _Parser(
        prog=f"sae-lens-maira {name}", description=about, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_function_arguments(function, as_group=False, skip={"as_json", "options"})
    parser.add_texts(function)
    parameters = inspect.signature(function).parameters
    shared = _shared_options(function)
    if shared is not None:
        parser.add_class_arguments(shared, as_group=False)
        parser.add_texts(shared)
        if is_dataclass(given := parameters["options"].default):
            parser.set_defaults({f.name: getattr(given, f.name) for f in fields(given)})
    parser.reader, ignored = _ignored(function)
    for name in ignored:
        parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)
        parser.ignored.add(name)
    if "as_json" in parameters:
        parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")
    return parser


def settings_parser(program: str, settings: type[Any], about: str) -> ArgumentParser:
    """Make the parser of a script whose options are the fields of a dataclass.

    Args:
        program: Name of the script in help and errors.
        settings: Dataclass of the options.
        about: Description for the help.
    """
    parser = _Parser(prog=program, description=about, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(settings, as_group=False)
    parser.add_texts(settings)
    return parser


def _shared_options(function: Callable[..., None]) -> type[Any] | None:
    """Dataclass of a command's parameter `options`, or None."""
    return get_type_hints(function).get("options")


def _ignored(function: Callable[..., None]) -> tuple[str, tuple[str, ...]]:
    return vars(function).get("ignored_parts", ("", ()))


# The C loader bounds the depth; the Python loader takes quadratic time for deep files.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help formatter that keeps the description's lines, has a fixed width, and does not break lines at hyphens.

    argparse breaks at hyphens, which would split commands that users copy.
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
        if kind is None or kind.startswith("Literal"):  # the choices are listed next to the option
            return None
        kind = re.sub(r"(?:Optional|Union)\[(.*)\]", r"\1", kind)
        kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("Path", "path")
        return re.sub(r" \| null|, null$", "", kind)


class _Parser(ArgumentParser):
    """jsonargparse's parser with hyphenated options and one-line errors.

    Attributes:
        ignored: Keys that are accepted in `--config` but not on the command line.
        reader: Command that reads these keys.
        texts: Options for text or a path, not for a number.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.ignored: set[str] = set()
        self.reader = ""
        self.texts: set[str] = set()

    def add_texts(self, source: Callable[..., Any] | type[Any]) -> None:
        """Add the arguments of a function, or the fields of a dataclass, that are text or a path and not a number."""
        for name, hint in get_type_hints(source).items():
            kinds = set(get_args(hint)) if get_origin(hint) is UnionType else {hint}
            if kinds & {str, Path} and not kinds & {int, float, Any}:
                self.texts.add(name)

    def parse_path(self, path: Any, *rest: Any, **settings: Any) -> Any:
        """Parse a config file; a file that is not text gives a one-line error."""
        try:
            return super().parse_path(path, *rest, **settings)
        except UnicodeDecodeError:
            self.error(f"--config: {path} is not text in UTF-8; expected a YAML file")

    def parse_string(self, content: str, path: Any = "", *rest: Any, **settings: Any) -> Any:
        """Parse the text of a config file after `_spelled`; text with aliases gives a one-line error."""
        with contextlib.suppress(yaml.YAMLError):  # The base class reports it.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, Loader=_YAML)):
                self.error(
                    f"--config: {path or 'its text'} contains YAML aliases (*name); write each value out"
                )
        try:
            values = get_loader("yaml")(content)
        except (ValueError, TypeError, yaml.YAMLError):
            values = {}  # The base class reports it.
        else:
            if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
                name = path or "its text"
                seen = type(values).__name__ if values is not None else "no option"
                self.error(f"--config: {name} contains {seen}; expected lines such as 'seed: 0'")
            content = yaml.safe_dump(self._spelled(values), sort_keys=False)
        return super().parse_string(content, path, *rest, **settings)

    def _spelled(self, values: dict[str, Any]) -> dict[str, Any]:
        """Convert options of a config file to the parser's form: underscores, and numbers as text for text options."""
        known = {action.dest for action in self._actions}
        result: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_") if key.replace("-", "_") in known else key
            if name in result:
                self.error(f"--config: it gives --{name} twice, with a hyphen and with an underscore")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            result[name] = str(value) if number and name in self.texts else value
        return result

    def parse_args(self, args: list[str] | None = None, *rest: Any, **settings: Any) -> Any:
        words = None if args is None else [_underscores(word) for word in args]
        for word in words or ():
            name = re.split(r"[.=]", word.removeprefix("--"))[0]
            if word.startswith("--") and name in self.ignored:
                self.error(f"--{name} is not used here; a recipe of `{self.reader}` may contain it")
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
    """Write options with hyphens, as users type them."""
    return re.sub(r"--\w[\w.]*", lambda option: option.group().replace("_", "-"), text)


def _underscores(word: str) -> str:
    """Write an option as the parser stores it; values and other words are unchanged."""
    option, equals, value = word.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _plain(message: str) -> str:
    """Rewrite messages of jsonargparse for a command line, on one line."""
    text = " ".join(message.split())
    for pattern, wording in (
        (r'Parser key "([\w.]+)":', r"--\1:"),
        (r"<class '(\w+)'>", r"\1"),
        (r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1"),
        (r"Expected a (?=[aeiou])", r"Expected an "),
        (r"Option '([\w.-]+)' is not accepted", r"unrecognized arguments: --\1"),
        (
            r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .*? Given value type: "
            r"(\w+) Given value: ",
            r"Expected one of \1. Got a value of type \2: ",
        ),
        (r"typing\.Literal\[(.*?)\]", r"\1"),
        (r"Expected one of (.*?), NoneType\. Got", r"Expected one of \1. Got"),
        (r"Expected one of list\[\w+\]\. Got a value of type \w+", r"Expected a list in brackets. Got"),
    ):
        text = re.sub(pattern, wording, text)
    missing = re.fullmatch(r"the following arguments are required: (.*)", text)
    if missing:
        text = "it needs " + ", ".join(f"--{option}" for option in missing.group(1).split(", "))
    return _hyphens(text).rstrip(".")


Settings = TypeVar("Settings")


def run_recipe(
    settings: type[Settings],
    run: Callable[[Settings], Path],
    about: str | None,
    arguments: list[str] | None = None,
) -> int:
    """Read the settings of a recipe, run or continue it, and print the path of the result.

    Errors are reported as in `exit_code`.

    Args:
        settings: Dataclass whose fields are the options.
        run: Function that runs the recipe and returns the path of its result.
        about: Docstring of the script, for the help.
        arguments: Command-line arguments; those of the process if not given.

    Returns:
        The exit code.
    """
    program = Path(sys.argv[0]).name if arguments is None else settings.__name__
    parser = settings_parser(program, settings, about or "")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0 = torch's choice)")
    options = parser.instantiate(parser.parse_args(arguments))
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    chosen = {name: value for name, value in vars(options).items() if name not in ("config", "threads")}

    def recipe() -> None:
        sys.stdout.write(f"{run(settings(**chosen))}\n")

    return exit_code(program, recipe)


__all__ = [
    "HELP_WIDTH",
    "accepts_parts_of",
    "command_parser",
    "exit_code",
    "run_command",
    "run_recipe",
    "settings_parser",
    "works_in",
]
