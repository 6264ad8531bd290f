"""Compiles every triton kernel for a GPU that need not be there and prints its registers, stack and load widths.

Run by test_triton.py in a process of its own: `python compiled_triton.py 90`. ptxas and the disassembler come with
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
    triton_latent_backward,
    triton_prefix_decode,
    triton_select,
    triton_stats,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
D_IN = 4096
F, L = "*fp32", "*i64"


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Kernel, argument types, constants and warps, by name; types of arguments that are sizes mean divisible by 16."""
    found = {}
    block, warps = triton_prefix_decode.block_and_warps(D_IN)
    width, wide_warps = triton_latent_backward.width_and_warps(D_IN)
    for name, operand in (("fp32", F), ("bf16", "*bf16")):
        decode = {"suffix": operand, "errors": F, "squares": F, "offsets": L, "cols": L, "coefficients": F}
        decode |= {"W_dec": operand, "b_dec": F, "x": F, "scales": F, "batch": "i32", "d_in": "i32"}
        constants = {"LEVELS": 4, "KEEP": False, "BLOCK": block}
        found[f"prefix_decode_{name}"] = (triton_prefix_decode.prefix_decode_kernel, decode, constants, warps)
        backward = {"dW_dec": F, "dW_enc": F, "db_enc": F, "partial": F, "partial_b": F}
        backward |= dict.fromkeys(("latents", "firsts", "lasts", "slots", "rows", "bags"), L)
        backward |= {"coefficients": F, "suffix": operand, "xc": operand, "W_dec": operand, "d_in": "i32"}
        kernel = triton_latent_backward.latent_backward_kernel
        found[f"latent_backward_{name}"] = (kernel, backward, {"BLOCK": width}, wide_warps)
    add = dict.fromkeys(("dW_dec", "dW_enc", "db_enc", "partial", "partial_b"), F)
    add |= {"hot": L, "hot_first": L, "hot_number": L, "d_in": "i32"}
    found["add_segments"] = (triton_latent_backward.add_segments_kernel, add, {"BLOCK": 1024}, 4)
    select = {"found": L, "counter": "*i32", "scores": F, "bounds": F, "capacity": "i32", "d_sae": "i32"}
    constants = {"BLOCK": triton_select.BLOCK}
    found["compact"] = (triton_select.compact_kernel, select, constants, triton_select.WARPS)
    adam = dict.fromkeys(("parameter", "gradient", "mean", "square", "norms", "scale"), F) | {
        "shadow": "*bf16"
    }
    adam |= dict.fromkeys(("step_size", "beta1", "beta2", "root_correction2", "eps"), "fp32") | {
        "width": "i32"
    }
    constants = {"SHADOW": True, "BLOCK": triton_adam.BLOCK}
    found["adam_rows"] = (triton_adam.adam_rows_kernel, adam, constants, triton_adam.WARPS)
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
    }


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    report = {}
    for name, (kernel, types, constants, warps) in kernels().items():
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        attributes = {
            (place,): [["tt.divisibility", 16]]
            for place, argument in enumerate(kernel.arg_names)
            if types.get(argument, "").startswith("*") or argument in ("d_in", "d_sae", "width", "size")
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        report[name] = examine(compiled.asm["cubin"])
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
