"""Steering all findings of the phantom: a thin script over `sae_lens_maira.commands.steering_*`."""

import sys

import torch
from jsonargparse import ArgumentParser

from sae_lens_maira.commands.steering_run import SteeringRun, run_steering


def main(arguments: list[str] | None = None) -> int:
    """Read the settings, steer (or go on), write tables and figures."""
    parser = ArgumentParser(description=__doc__, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0 = torch's choice)")
    parser.add_class_arguments(SteeringRun, None)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("config", "threads")}
    sys.stdout.write(f"{run_steering(SteeringRun(**settings))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
