"""The command line of a recipe: settings of one frozen dataclass from a YAML file and options, then one function.

A script beside its YAML file names the dataclass and the function, and nothing else. It knows nothing about either.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from jsonargparse import ArgumentParser

Settings = TypeVar("Settings")


def run_recipe(
    settings: type[Settings],
    run: Callable[[Settings], Path],
    about: str | None,
    arguments: list[str] | None = None,
) -> int:
    """Read the settings, run (or go on), and print the path that comes back.

    Args:
        settings: a dataclass; its fields are the options.
        run: what to do with them.
        about: the script's docstring, for the help.
        arguments: the words after the script's name; those of the process if not given.

    Returns:
        0, the exit code.
    """
    parser = ArgumentParser(description=about, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0 = torch's choice)")
    parser.add_class_arguments(settings, None)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = {name: value for name, value in vars(options).items() if name not in ("config", "threads")}
    sys.stdout.write(f"{run(settings(**chosen))}\n")
    return 0


__all__ = ["run_recipe"]
