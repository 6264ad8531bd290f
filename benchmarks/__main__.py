"""Every benchmark, one after another: `python -m benchmarks`, which is `make bench`. Timings are ratios in one run."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Run each script of this folder in a process of its own, so that none finds a warm cache or another's hooks."""
    failed = 0
    for script in sorted(
        set(HERE.glob("[!_]*.py")) - {HERE / name for name in ("timing.py", "counts.py", "gpu.py")}
    ):
        sys.stdout.write(f"\n== {script.stem} ==\n")
        sys.stdout.flush()
        failed += subprocess.run([sys.executable, str(script)], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
