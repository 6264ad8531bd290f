"""The command line of a recipe: settings of one frozen dataclass from a YAML file and options, then one function.

A recipe is a script with a YAML file of the same name; it ends by calling `run_recipe`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from sae_lens_maira.cli.parser import settings_parser
from sae_lens_maira.errors import MairaError

Settings = TypeVar("Settings")


def run_recipe(
    settings: type[Settings],
    run: Callable[[Settings], Path],
    about: str | None,
    arguments: list[str] | None = None,
) -> int:
    """Read the settings, run (or continue), and print the path of the result.

    An error that the user can fix is printed, and the exit code is 2.

    Args:
        settings: A dataclass; its fields are the options.
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
        torch.set_num_threads(options.threads)
    chosen = {name: value for name, value in vars(options).items() if name not in ("config", "threads")}
    try:
        sys.stdout.write(f"{run(settings(**chosen))}\n")
    except MairaError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


__all__ = ["run_recipe"]
