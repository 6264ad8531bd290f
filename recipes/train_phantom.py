"""Train the phantom that ships in the package: a script around `sae_lens_maira.phantom`."""

import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from sae_lens_maira.phantom import PhantomTraining, train_phantom


def main(arguments: list[str] | None = None) -> int:
    """Read the settings, train or resume, and write the phantom's folder."""
    parser = ArgumentParser(description=__doc__, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/phantom"), help="checkpoints and the final weights"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0 = torch's choice)")
    parser.add_class_arguments(PhantomTraining, "train")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = parser.instantiate(options).train
    folder = train_phantom(settings, options.out)
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
