"""Times the dashboard writers over records of MAIRA-2's size: `python benchmarks/dashboards.py --latents 16384 --json`.

    seconds (and core-seconds, on a busy machine) and peak memory of a process that writes sae-dashboard's batches,
    Neuronpedia's export, the page

Records are artificial: 65 contexts of 250 tokens per latent, two views of 37 x 37 patches of which 30 fire, 2,000
studies. Every writer runs in a separate process; its memory is compared with that of a quarter as many latents.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIDE, TOKENS, STUDIES = 37, 250, 2_000
WRITERS = ("saedashboard", "export", "page")
WORDS = (
    "the",
    "heart",
    "left",
    "pleural",
    "effusion",
    "is",
    "no",
    "small",
    "lung",
    "base",
    "opacity",
    "clear",
)


def texts() -> Iterator[Any]:
    """Tokens of every study."""
    from sae_lens_maira.latents.records import StudyText

    rng = random.Random(1)
    for study in range(STUDIES):
        yield StudyText(
            f"s{study:05d}",
            tokens=tuple(f" {rng.choice(WORDS)}" for _ in range(TOKENS)),
            positions=tuple(range(3000, 3000 + TOKENS)),
            roles=("indication",) * 30 + ("report",) * (TOKENS - 30),
            read=(True,) * TOKENS,
            span=(0, TOKENS),
            views=tuple((view, SIDE, SIDE) for view in ("frontal", "lateral")),
        )


def records(n: int) -> Iterator[object]:
    """Latent records, one at a time."""
    from sae_lens_maira.latents.records import (
        Context,
        FindingAgreement,
        Firing,
        Histogram,
        Interval,
        LatentRecord,
        MeanMap,
        Neighbour,
        TokenWeight,
    )

    rng = random.Random(0)
    known = {text.study: text for text in texts()}

    def short(value: float) -> float:
        return float(f"{value:.6g}")

    def context(study: int, value: float) -> Context:
        modality = "image" if study % 2 else "text"
        name, at, values, patches = f"s{study:05d}", (), (), (((), ()), ((), ()))
        if value:
            on = [tuple(sorted(rng.sample(range(SIDE * SIDE), 30))) for _ in range(2)]
            strong = [tuple(short(0.9 * value * rng.random()) for _ in range(30)) for _ in range(2)]
            first = rng.randrange(40, TOKENS)
            at = tuple(range(first, min(first + 8, TOKENS)))
            values = tuple(short(0.9 * value * rng.random()) for _ in at)
            if study % 2:
                strong[0] = (value, *strong[0][1:])
            else:
                values = (value, *values[1:])
            patches = tuple(zip(on, strong, strict=True))
        return Context(name, 0, TOKENS, modality, at, values, patches, known)

    for latent in range(n):
        chosen = rng.sample(range(STUDIES), 65)
        largest = short(4 + 8 * rng.random())
        mean = tuple(short(rng.random()) for _ in range(SIDE * SIDE))
        yield LatentRecord(
            latent=latent,
            level=int(latent >= n // 2),
            status="alive",
            density=short(0.02 * rng.random()),
            max=largest,
            p99=short(0.9 * largest),
            histogram=Histogram(
                tuple(short(largest * i / 40) for i in range(41)), tuple(int(9e5 * 0.8**i) for i in range(40))
            ),
            firing=tuple(
                Firing(kind, 10**7, 10**5, 10**5, 10**4, 1.0, largest, largest / 2)
                for kind in ("text", "image")
            ),
            top_tokens=tuple(TokenWeight(f" up{i}", i, 1 - i / 20) for i in range(10)),
            bottom_tokens=tuple(TokenWeight(f" down{i}", i, i / 20 - 1) for i in range(10)),
            agreement=tuple(
                FindingAgreement(f"finding_{i}", "image", 0.5, 0.4, 0.6, 0.5, 0.5, 900, 10**5)
                for i in range(10)
            ),
            neighbours=tuple(Neighbour(rng.randrange(n), "similar", 0.4) for _ in range(15)),
            maps=(MeanMap("frontal", SIDE, SIDE, mean, 10**5), MeanMap("lateral", SIDE, SIDE, mean, 10**5)),
            top=tuple(context(s, short(largest * (1 - i / 50))) for i, s in enumerate(chosen[:20])),
            intervals=tuple(
                Interval(
                    largest / 2 ** (i + 1),
                    largest / 2**i,
                    0.001,
                    tuple(context(s, short(largest * 0.75 / 2**i)) for s in chosen[20 + 5 * i : 25 + 5 * i]),
                )
                for i in range(5)
            ),
            zero=tuple(context(s, 0.0) for s in chosen[45:]),
        )


def make(folder: Path, n: int) -> None:
    """Write the record set."""
    from sae_lens_maira.latents.records import RecordsMeta, StudyInfo
    from sae_lens_maira.latents.writing import write_records

    meta = RecordsMeta(
        "microsoft/maira-2", "blocks.15.hook_resid_post", 15, "made up", "trained", 4096, n, (n // 2, n),
        10**7, 10**8, STUDIES, (), 0, {},
    )  # fmt: skip
    studies = [StudyInfo(f"s{i:05d}", f"p{i:05d}", "synthetic") for i in range(STUDIES)]
    write_records(folder, meta, studies, texts(), records(n))  # pyright: ignore[reportArgumentType]: typed where it is built


def write(kind: str, folder: Path, out: Path) -> dict[str, float]:
    """Run one writer in this process; return seconds, and the peak memory of this process or one of its workers."""
    from sae_lens_maira.dashboards.export import write_export
    from sae_lens_maira.dashboards.html import write_page
    from sae_lens_maira.dashboards.saedashboard import write_saedashboard
    from sae_lens_maira.dashboards.target import Target
    from sae_lens_maira.latents.recordset import RecordSet

    opened, target = RecordSet.open(folder), Target(set_name="res-16k")
    start, before = time.perf_counter(), os.times()
    if kind == "page":
        write_page(opened, [], out, images=False)
    else:
        {"saedashboard": write_saedashboard, "export": write_export}[kind](opened, target, out)
    seconds, after = time.perf_counter() - start, os.times()
    worked = sum(after[:4]) - sum(before[:4])  # of this process and of those it waited for
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    files = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    largest = max((p.stat().st_size for p in out.glob("data/latents/*/*")), default=0)
    return {
        "seconds": round(seconds, 1),
        "core_seconds": round(worked, 1),
        "peak_mb": round(peak / 1024),
        "written_mb": round(sum(files) / 1e6),
        "largest_latent_kb": round(largest / 1e3, 1),
    }


def in_process(*words: str) -> dict[str, float]:
    """Run this script in a child process and return its figures."""
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout or "{}")


def main() -> int:
    """Make two record sets, run every writer over both, print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "-").splitlines()[0])
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--only", nargs=3, metavar=("WHAT", "RECORDS", "OUT"), help="run one step in this process"
    )
    options = parser.parse_args()
    if options.only:
        what, folder, out = options.only
        if what == "records":
            make(Path(folder), int(out))
        else:
            sys.stdout.write(json.dumps(write(what, Path(folder), Path(out))))
        return 0
    found: dict[str, object] = {"latents": options.latents, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as scratch:
        for n in (options.latents // 4, options.latents):
            folder = Path(scratch) / f"records{n}"
            in_process("--only", "records", str(folder), str(n))
            for kind in WRITERS:
                out = Path(scratch) / "out"
                found[f"{kind} of {n}"] = in_process("--only", kind, str(folder), str(out))
                subprocess.run(["rm", "-r", str(out)], check=True)
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    for name, figures in found.items():
        sys.stdout.write(f"{name}: {figures}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
