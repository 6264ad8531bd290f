"""Token filters compared by steering: a thin script over `sae_lens_maira.commands.steering_filter`."""

import sys

import torch
from jsonargparse import ArgumentParser

from sae_lens_maira.commands.steering_filter import FilterRun, run_filters


def main(arguments: list[str] | None = None) -> int:
    """Read the settings, train and steer (or go on), write tables and figures."""
    parser = ArgumentParser(description=__doc__, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0 = torch's choice)")
    parser.add_class_arguments(FilterRun, None)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("config", "threads")}
    sys.stdout.write(f"{run_filters(FilterRun(**settings))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
