"""Token filters compared by steering: a thin script over `sae_lens_maira.cli.steering_filter`."""

import sys

from sae_lens_maira.cli.recipe import run_recipe
from sae_lens_maira.cli.steering_filter import FilterRun, run_filters

if __name__ == "__main__":
    sys.exit(run_recipe(FilterRun, run_filters, __doc__))
