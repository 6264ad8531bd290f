"""Times steered generation: `python benchmarks/steering.py --json`.

    throughput of steering = t(generate) / t(generate, steered)      1 means no cost; the goal is 0.97 on the phantom

The shipped phantom writes reports for a batch of studies, greedily, with the cache, while latents of an SAE are added
at the image positions. Both variants generate the same number of tokens, and their runs alternate. Figures are medians
of the ratios of neighbouring runs, so that a busy machine affects both, in wall clock and in processor time. The SAE
has random weights, which do not change the time. Two more lines are not part of the goal: latents at every position,
and strength 0.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from timing import CPU, WALL, interleaved, spread

from sae_lens_maira.maira2 import Maira2, Maira2Encoding
from sae_lens_maira.phantom import generate_studies, load_phantom
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig
from sae_lens_maira.steering import Add, Steering, steering
from sae_lens_maira.steering.positions import everywhere, patches

HOOK = "blocks.3.hook_resid_post"


def make_sae(d_sae: int, device: str) -> MatryoshkaSAE:
    """Random unit decoder rows, the encoder their transpose, thresholds low enough that latents fire."""
    config = MatryoshkaSAEConfig(d_in=128, d_sae=d_sae, matryoshka_widths=[d_sae], device="cpu")
    config.metadata.hook_name = HOOK
    sae = MatryoshkaSAE(config)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(d_sae, 128), dim=1)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.threshold.fill_(0.05)
    return sae.eval().to(device)


def compare(base: Callable[[], Any], other: Callable[[], Any], repeats: int, device: str) -> dict[str, float]:
    """Alternate two runs; return medians in milliseconds, and quantiles of base / other, the relative throughput."""
    times = interleaved({"base": base, "other": other}, repeats, device)
    left = times["base"] / times["other"]
    return {
        "plain_ms": 1e3 * float(np.median(times["base"][:, WALL])),
        "steered_ms": 1e3 * float(np.median(times["other"][:, WALL])),
        **spread("throughput", left[:, WALL]),
        "processor_p50": float(np.median(left[:, CPU])),
    }


def measure(device: str, repeats: int, rows: int, tokens: int, d_sae: int) -> dict[str, Any]:
    """Measure all figures of this file."""
    torch.manual_seed(0)
    maira: Maira2 = load_phantom()
    maira.model.to(torch.device(device))  # pyright: ignore[reportArgumentType]: its stub hides nn.Module.to
    encoding: Maira2Encoding = maira.processor.encode(generate_studies(rows, seed=99)).to(
        maira.model.device, maira.model.dtype
    )
    sae = make_sae(d_sae, device)
    p99 = torch.ones(d_sae)
    # No end token, so that both variants generate the same number of tokens.
    budget: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": None}
    latents = tuple(range(0, d_sae, d_sae // 8))[:8]

    def plain() -> Any:
        with torch.no_grad():
            return maira.model.generate(
                **encoding.model_inputs(), do_sample=False, pad_token_id=encoding.pad_token_id, **budget
            )

    def steer(item: Add) -> Callable[[], Any]:
        def run() -> Any:
            entered: AbstractContextManager[Steering] = steering(maira, sae, HOOK, item, encoding, p99)
            with entered as block:
                return block.generate(**budget)

        return run

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"cpu, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "prompt": encoding.input_ids.shape[1],
        "new tokens": tokens,
        "d_sae": d_sae,
        "repeats": repeats,
    }
    for name, item in (
        ("8 latents at the frontal patches", Add(latents=latents, strength=0.5, where=patches())),
        ("8 latents everywhere", Add(latents=latents, strength=0.5, where=everywhere())),
        ("8 latents everywhere, strength 0", Add(latents=latents, strength=0.0, where=everywhere())),
    ):
        found[name] = compare(plain, steer(item), repeats, device)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its figures to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each side")
    parser.add_argument("--rows", type=int, default=32, help="studies of the batch")
    parser.add_argument("--tokens", type=int, default=40, help="new tokens of every report")
    parser.add_argument("--d-sae", type=int, default=1024, help="latents of the SAE")
    options = parser.parse_args(arguments)
    found = measure(options.device, options.repeats, options.rows, options.tokens, options.d_sae)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    for name, value in found.items():
        shown = ", ".join(f"{k} {v:.4g}" for k, v in value.items()) if isinstance(value, dict) else value
        sys.stdout.write(f"{name:45} {shown}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
