"""Run the command line with `python -m sae_lens_maira.cli`, for instance under torchrun."""

import sys

from sae_lens_maira.cli import main

if __name__ == "__main__":
    sys.exit(main())
