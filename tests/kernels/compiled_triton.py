"""Compile every triton kernel for a GPU that need not be there; print registers, stack, load widths and occupancy.

Run by test_triton.py in a separate process: `python compiled_triton.py 90`. ptxas and the disassembler come with
triton. Pointers and sizes are marked divisible by 16, as a launch with the real shapes would mark them.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae_lens_maira.kernels import (
    triton_adam,
    triton_candidates,
    triton_latent_backward,
    triton_prefix_decode,
    triton_scores,
    triton_select,
    triton_stats,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
D_IN = 4096
F, L, N, H = "*fp32", "*i64", "*i32", "*bf16"
SIZES = ("d_in", "d_sae", "width", "size", "stride", "batch", "capacity", "n", "rows", "slots")
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory per multiprocessor that blocks can use."""


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Kernel, argument types, constants and warps, by name; types of arguments that are sizes mean divisible by 16."""
    found = {}
    block, warps = triton_prefix_decode.block_and_warps(D_IN)
    width, wide_warps = triton_latent_backward.width_and_warps(D_IN)
    gradients = dict.fromkeys(("dW_dec", "dW_enc", "db_enc", "squares", "partial", "partial_b"), F)
    gradients |= {"latents": N, "pointers": L} | dict.fromkeys(
        ("pieces", "batch", "d_sae", "slots", "d_in"), "i32"
    )
    for name, operand in (("fp32", F), ("bf16", H)):
        decode = {"suffix": operand, "errors": F, "squares": F, "offsets": L, "cols": L, "coefficients": F}
        decode |= {"W_dec": operand, "b_dec": F, "x": F, "scales": F, "batch": "i32", "d_in": "i32"}
        constants = {"LEVELS": 4, "KEEP": False, "BLOCK": block}
        found[f"prefix_decode_{name}"] = (triton_prefix_decode.prefix_decode_kernel, decode, constants, warps)
        backward = gradients | {"rows": L, "coefficients": F, "widths": N}
        backward |= {"suffix": operand, "xc": operand, "W_dec": operand}
        constants = {"LEVELS": 4, "SEGMENT": triton_latent_backward.SEGMENT}
        constants |= {"STAGES": triton_latent_backward.STAGES, "BLOCK": width}
        found[f"latent_backward_{name}"] = (
            triton_latent_backward.latent_backward_kernel,
            backward,
            constants,
            wide_warps,
        )
    constants = {"SEGMENT": triton_latent_backward.SEGMENT, "BLOCK": triton_latent_backward.ADDED_AT_ONCE}
    found["add_pieces"] = (triton_latent_backward.add_pieces_kernel, gradients, constants, 4)
    buffer = {
        "columns": N,
        "h": F,
        "values": F,
        "starts": N,
        "counts": N,
        "total": N,
        "odd": N,
        "threshold": F,
    }
    buffer |= dict.fromkeys(("safety", "slack"), "fp32") | dict.fromkeys(("capacity", "rows", "d_sae"), "i32")
    for name, table in (("fp32", F), ("bf16", H), ("bounds_fp32", F), ("bounds_bf16", H)):
        bounded = name.startswith("bounds")
        types = buffer | {"table": table, "bias": F, "norms": F, "bounds": table}
        constants = {"BIAS": name == "bf16", "NORMS": True, "BOUNDED": bounded}
        constants |= {"ROWS": triton_candidates.ROWS, "BLOCK": triton_candidates.BLOCK}
        found[f"candidates_{name}"] = (triton_candidates.candidates_kernel, types, constants, 8)
        if bounded:
            types = types | dict.fromkeys(("xc", "W_enc_t", "b_enc"), F) | {"broken": L, "d_in": "i32"}
            constants = {"NORMS": True, "BLOCK": width}
            kernel = triton_candidates.exact_scores_kernel
            found[f"exact_scores_{name[7:]}"] = (kernel, types, constants, wide_warps)
            types = {"out": table, "values": F, "width": "i32", "stride": "i32", "accumulation": "fp32"}
            constants = {"BF16": table == H, "WEIGHT": True, "PAD": 32, "BLOCK": width}
            found[f"round_rows_{name[7:]}"] = (triton_scores.round_rows_kernel, types, constants, 8)
    select = dict.fromkeys(("kth", "threshold", "values", "h", "h_out", "values_out"), F)
    select |= dict.fromkeys(
        ("ties", "histograms", "total", "above", "equal", "starts", "counts", "columns"), N
    )
    select |= dict.fromkeys(("rows_out", "cols_out", "offsets", "check", "above_ends", "equal_ends"), L)
    select |= {
        "keys_out": N,
        "widths": N,
        "odd": N,
        "poison": "*fp64",
        "capacity": "i32",
        "n": "i32",
        "d_sae": "i32",
    }
    select |= {"safety": "fp32"}
    rows = {"BLOCK": triton_select.AT_ONCE}
    found["histogram"] = (
        triton_select.histogram_kernel,
        select,
        {"DONE": 3, "DIGITS": 4, "ENTRIES": triton_select.ENTRIES},
        4,
    )
    found["count"] = (triton_select.count_kernel, select, rows | {"DIGITS": 4}, 1)
    found["write"] = (triton_select.write_kernel, select, rows | {"LEVELS": 4, "LANES": 4}, 1)
    adam = dict.fromkeys(("parameter", "gradient", "mean", "square", "norms", "scale"), F) | {
        "shadow": "*bf16"
    }
    adam |= {"settings": F, "width": "i32"} | dict.fromkeys(("beta1", "beta2", "eps"), "fp32")
    constants = {"SHADOW": True, "FRESH": False, "UNIT": False, "BLOCK": triton_adam.BLOCK}
    found["adam_rows"] = (triton_adam.adam_rows_kernel, adam, constants, triton_adam.WARPS)
    constants = constants | {"UNIT": True, "BLOCK": width}
    found["adam_unit_rows"] = (triton_adam.adam_rows_kernel, adam, constants, wide_warps)
    tangent = {"squares": F, "gradient": F, "parameter": F, "width": "i32"}
    found["tangent_squares"] = (triton_adam.tangent_squares_kernel, tangent, {"BLOCK": width}, wide_warps)
    step = {"settings": F, "step": F, "lr": F} | dict.fromkeys(("log_beta1", "log_beta2"), "fp32")
    found["next_step"] = (triton_adam.next_step_kernel, step, {}, 1)
    stats = {"counts": L, "frequency": F, "since_fired": F, "size": "i32"}
    found["firing"] = (triton_stats.firing_kernel, stats, {"BLOCK": triton_stats.BLOCK}, 4)
    return found


def examine(cubin: bytes) -> dict[str, int]:
    """Registers, stack bytes, local-memory instructions and 128-bit global loads of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([TOOLS / "nvdisasm", path], capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.E[^;\n]*\.128", code)),
        "loads": len(re.findall(r"\bLDG\.E", code)),
        "copies": len(re.findall(r"\bLDGSTS", code)),
    }


def occupancy(registers: int, warps: int, shared: int, capability: int) -> dict[str, int]:
    """Blocks per multiprocessor, and its warps in percent of 64, from registers, warps and shared memory."""
    per_warp = -(-registers // 8) * 8 * 32
    blocks = min(65536 // (per_warp * warps), 64 // warps, SHARED[capability] // (shared + 1024), 32)
    return {"blocks": blocks, "occupancy": 100 * blocks * warps // 64}


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    report = {}
    for name, (kernel, types, constants, warps) in kernels().items():
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        attributes = {
            (place,): [["tt.divisibility", 16]]
            for place, argument in enumerate(kernel.arg_names)
            if types.get(argument, "").startswith("*") or argument in SIZES
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        figures = examine(compiled.asm["cubin"])
        shared = int(compiled.metadata.shared)
        report[name] = (
            figures | {"shared": shared} | occupancy(figures["registers"], warps, shared, capability)
        )
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
