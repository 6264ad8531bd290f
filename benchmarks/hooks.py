"""Times the hooks: `python benchmarks/hooks.py --json`.

    overhead of one read hook  = t(forward + hook) / t(forward) - 1, per library
    gain of stop_at_layer      = t(whole forward) / t(stopped after half of the blocks)
    memory of run_with_cache   = bytes held by a cache of the named tensors, and by a cache of everything

Runs of the two variants alternate, and medians of their ratios are taken, so that a busy machine affects both. The
model has MAIRA-2's architecture at a size that a CPU runs in tenths of a second; overheads are smaller for larger
models.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import WALL, interleaved, spread

from sae_lens_maira.hooks import HookedMaira2, Maira2NNsight
from sae_lens_maira.maira2 import Maira2ForConditionalGeneration, make_config, register
from sae_lens_maira.maira2.versions import has_transformer_bridge

NAME = "blocks.7.hook_resid_post"


def make_model(device: str) -> Maira2ForConditionalGeneration:
    """Sixteen blocks of width 256 over four vision blocks of width 128, 112 px, random weights."""
    register()
    config = make_config(
        text_config={
            "vocab_size": 2207,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        vision_config={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "mlp_ratio": 4,
            "image_size": 112,
            "out_features": ["stage4"],
        },
        image_token_index=2204,
        image_seq_length=64,
    )
    torch.manual_seed(0)
    model: Any = Maira2ForConditionalGeneration(config).eval()
    return model.to(device)


def make_inputs(device: str, rows: int) -> dict[str, torch.Tensor]:
    """One image and 128 tokens of text per row."""
    text = torch.randint(3, 2000, (rows, 128))
    ids = torch.cat([torch.ones(rows, 1, dtype=torch.long), torch.full((rows, 64), 2204), text], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(rows, 3, 112, 112)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def compare(base: Callable[[], Any], other: Callable[[], Any], repeats: int, device: str) -> dict[str, float]:
    """Alternate two runs; medians in milliseconds and quantiles of other/base."""
    times = interleaved({"base": base, "other": other}, repeats, device)
    wall = {name: taken[:, WALL] for name, taken in times.items()}
    return {
        "base_ms": 1e3 * float(np.median(wall["base"])),
        "other_ms": 1e3 * float(np.median(wall["other"])),
        **spread("ratio", wall["other"] / wall["base"]),
    }


@torch.no_grad()
def measure(device: str, repeats: int, rows: int) -> dict[str, Any]:
    """Measure all figures of this file."""
    model = make_model(device)
    inputs = make_inputs(device, rows)
    hooked = HookedMaira2(model)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"cpu, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "positions": inputs["input_ids"].shape[1],
        "repeats": repeats,
    }

    def plain() -> Any:
        return model(**inputs, use_cache=False)

    def read(value: torch.Tensor, hook: Any) -> None: ...

    found["read hook, HookedMaira2.run_with_hooks"] = compare(
        plain, lambda: hooked.run_with_hooks(inputs, fwd_hooks=[(NAME, read)]), repeats, device
    )
    found["read hook, HookedMaira2.run_with_cache"] = compare(
        plain, lambda: hooked.run_with_cache(inputs, names_filter=[NAME]), repeats, device
    )
    found["no hook, HookedMaira2"] = compare(plain, lambda: hooked(inputs), repeats, device)
    found["stop_at_layer 8 of 16"] = compare(
        plain, lambda: hooked.run_with_cache(inputs, names_filter=[NAME], stop_at_layer=8), repeats, device
    )
    found["memory, named"] = held(hooked.run_with_cache(inputs, names_filter=[NAME])[1])
    found["memory, everything"] = held(hooked.run_with_cache(inputs)[1])
    traced = Maira2NNsight(model)
    found["read hook, nnsight"] = compare(plain, lambda: traced.read(inputs, [NAME]), repeats, device)
    if has_transformer_bridge():
        from sae_lens_maira.hooks import to_bridge

        model.set_attn_implementation("eager")
        bridge = to_bridge(model)
        found["no hook, bridge"] = compare(plain, lambda: bridge(inputs), repeats, device)
        found["read hook, bridge"] = compare(
            lambda: bridge(inputs),
            lambda: bridge.run_with_hooks(inputs, fwd_hooks=[(NAME, read)]),
            repeats,
            device,
        )
    return found


def held(cache: dict[str, torch.Tensor]) -> dict[str, float]:
    """Bytes of a cache's tensors, and of their storages, in MiB."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.values()}
    return {
        "tensors": len(cache),
        "tensors_mib": sum(t.numel() * t.element_size() for t in cache.values()) / 2**20,
        "held_mib": sum(storages.values()) / 2**20,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its figures to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30, help="runs of each side")
    parser.add_argument("--rows", type=int, default=2, help="rows of the batch")
    options = parser.parse_args(arguments)
    found = measure(options.device, options.repeats, options.rows)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    for name, value in found.items():
        shown = ", ".join(f"{k} {v:.4g}" for k, v in value.items()) if isinstance(value, dict) else value
        sys.stdout.write(f"{name:45} {shown}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
