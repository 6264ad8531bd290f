"""Run all benchmarks one after another: `python -m benchmarks`, or `make bench`. Timings are ratios within one run."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SEPARATE = {"timing", "gpu", "kills"}
"""The module that other benchmarks import, and those with a command of their own."""


def main() -> int:
    """Run each script of this folder and `bench step`, each in a separate process, so that none has a warm cache."""
    runs = {
        script.stem: [str(script)] for script in sorted(HERE.glob("[!_]*.py")) if script.stem not in SEPARATE
    }
    runs["step"] = ["-m", "sae_lens_maira", "bench", "step", "--data-path", "--mixing"]
    failed = 0
    for name, words in runs.items():
        sys.stdout.write(f"\n== {name} ==\n")
        sys.stdout.flush()
        failed += subprocess.run([sys.executable, *words], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
