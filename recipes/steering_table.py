"""Steering all findings of the phantom: a thin script over `sae_lens_maira.cli.steering_*`."""

import sys

from sae_lens_maira.cli.recipe import run_recipe
from sae_lens_maira.cli.steering_run import SteeringRun, run_steering

if __name__ == "__main__":
    sys.exit(run_recipe(SteeringRun, run_steering, __doc__))
