"""`python -m sae_lens_maira COMMAND`, for example under torchrun: the command line of `sae_lens_maira.cli`."""

import sys

from sae_lens_maira.cli import main

if __name__ == "__main__":
    sys.exit(main())
