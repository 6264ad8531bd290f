"""Times the training step: `python benchmarks/step.py --json`, the same as `sae-lens-maira bench step`.

Everything is in `sae_lens_maira.training.benchmark`; this file is the door that a reader of the repository finds.
"""

import sys

from sae_lens_maira.training.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
