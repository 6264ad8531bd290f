"""Print and draw the figures of the step benchmark."""

import platform
import re
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lens_maira.bench.arms import ARMS
from sae_lens_maira.io import save_figure

QUANTILES = ("p20", "p50", "p80")


def environment(device: str) -> dict[str, Any]:
    """Name of the device, with the number of threads on a CPU, and versions of what is measured."""
    found = {name: metadata.version(name) for name in ("torch", "sae-lens", "sae-lens-maira")}
    found["triton"] = metadata.version("triton") if find_spec("triton") else "not installed"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
        name = model[1] if model else platform.processor() or platform.machine()
        name += f", {torch.get_num_threads()} threads"
    return {"device": name, "versions": {"python": platform.python_version(), **found}}


def table_of_arms(milliseconds: dict[str, dict[str, Any]], host: dict[str, Any]) -> Iterable[str]:
    """Lines with milliseconds, ratios, launches and syncs of every arm and setting of the dead latents.

    Args:
        milliseconds: Quantiles by setting and arm.
        host: Launches and syncs by setting and arm.
    """
    yield f"{'':48s}{''.join(f'{q:>10s}' for q in QUANTILES)}{'ratio':>8s}{'best':>8s}{'launches':>10s}{'syncs':>7s}"
    for setting, arms in milliseconds.items():
        yield f"auxiliary loss {setting}"
        theirs = {name: ms["p50"] for name, ms in arms.items() if not ARMS[name].ours}
        for name, ms in arms.items():
            figures = "".join(f"{ms[q]:10.1f}" for q in QUANTILES)
            ratios = [f"{x / ms['p50']:8.2f}" if x else f"{'':8s}" for x in best_of(name, theirs)]
            work = host.get(setting, {}).get(name)
            counts = f"{work['launches']:10d}{work['syncs']:7d}" if work else ""
            yield f"  {ARMS[name].label:46s}{figures}{''.join(ratios)}{counts}"


def best_of(name: str, theirs: dict[str, float]) -> tuple[float | None, float | None]:
    """Milliseconds of SAELens' default, and of its fastest arm in the same precision.

    Args:
        name: Name of an arm.
        theirs: Milliseconds of SAELens' arms.
    """
    like = [ms for other, ms in theirs.items() if ARMS[other].autocast == ARMS[name].autocast]
    return theirs.get("saelens"), min(like, default=None)


def table(report: dict[str, Any]) -> str:
    """The whole report as text.

    Args:
        report: What `bench step --json` prints.
    """
    shape = report["shape"]
    lines = [
        f"d_in {shape['d_in']}, d_sae {shape['d_sae']}, batch {shape['batch']}, k {shape['k']:g}, on "
        f"{report['device']}, backend {report['backend']}, {report['rounds']} rounds, "
        f"{'Zipf' if shape['zipf'] else 'uniform'} firing, a new batch per step",
        "ratio: to SAELens' default; best: to SAELens' fastest arm in the same precision"
        + ("" if shape["device"] == "cuda" else "; launches and syncs: of the same operators on a GPU"),
        *table_of_arms(report["milliseconds"], report["host"]),
        f"encoder product alone {report['encoder_gemm_ms']:.1f} ms, {report['encoder_share']:.0%} of our step; "
        f"gradient error {report['grad_rel_err']:.1e}",
    ]
    if report["peak_bytes"] is not None:
        ours, theirs = report["peak_bytes"] / 2**20, report["saelens_peak_bytes"] / 2**20
        lines.append(f"peak above parameters, gradients, moments: {ours:.0f} MiB, SAELens {theirs:.0f} MiB")
    lines += [
        f"  {axis} {point[axis]:6d}: SAELens {point['saelens_ms']:9.1f} ms, ours {point['fused_ms']:8.1f} ms, "
        f"encoder {point['encoder_gemm_ms']:8.1f} ms, ratio {point['ratio']:.2f}"
        for axis, points in report["scaling"].items()
        for point in points
    ]
    return "\n".join([*lines, *rows_lines(report.get("data_path", {}))]) + "\n"


def rows_lines(found: dict[str, Any]) -> Iterable[str]:
    """Lines about the data path.

    Args:
        found: Result of `rows.data_path`.
    """
    for name, step in found.get("step", {}).items():
        yield (
            f"from a store, {ARMS[name].label}: {step['store_wall_ms']:.1f} ms, in memory {step['memory_wall_ms']:.1f} "
            f"ms; share {step['share_wall']:.2f} by wall and {step['share_cpu']:.2f} by processor time"
        )
    for name, ms in found.get("caller_ms", {}).items():
        yield f"caller's time per batch, {name}: p50 {ms['p50']:.2f} ms, p80 {ms['p80']:.2f} ms, CPU {ms['cpu']:.2f} ms"
    for name in ("paper", "all"):
        if mixing := found.get(f"mixing_{name}"):
            yield (
                f"studies per batch of 4,096 rows, {name}: {mixing['counted']:,} effective ({mixing['expected']:,} "
                f"expected), {mixing['share']:.0%} of {mixing['ideal']:,}; buffer of {mixing['buffer_rows']:,} rows"
            )


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw bars of the medians, and the scaling curves if they were measured.

    Args:
        report: What `bench step --json` prints.
        path: Image file.
    """
    from matplotlib.figure import Figure

    scaling = {axis: points for axis, points in report["scaling"].items() if points}
    figure = Figure(figsize=(6 + 4 * len(scaling), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(scaling), squeeze=False)[0]
    settings: dict[str, dict[str, Any]] = report["milliseconds"]
    for place, (setting, arms) in enumerate(settings.items()):
        rows = [index + (place - (len(settings) - 1) / 2) * 0.38 for index in range(len(arms))]
        low, mid, high = ([ms[q] for ms in arms.values()] for q in QUANTILES)
        panels[0].barh(
            rows, mid, 0.36, xerr=abs(np.array([low, high]) - mid), label=f"auxiliary loss {setting}"
        )
        panels[0].set_yticks(range(len(arms)), [ARMS[name].label for name in arms])
    panels[0].invert_yaxis()
    panels[0].axvline(report["encoder_gemm_ms"], color="black", linestyle=":", label="encoder product alone")
    panels[0].set_xlabel("ms per step, p50 with p20 to p80")
    panels[0].legend(fontsize="small")
    for panel, (axis, points) in zip(panels[1:], scaling.items(), strict=True):
        sizes = [point[axis] for point in points]
        for key, label in (("saelens", "SAELens"), ("fused", "this package"), ("encoder_gemm", "encoder")):
            panel.plot(sizes, [point[f"{key}_ms"] for point in points], marker="o", label=label)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms per step")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.legend(fontsize="small")
    figure.suptitle(report["device"], fontsize="small")
    save_figure(figure, path, dpi=120)


__all__ = ["best_of", "draw", "environment", "rows_lines", "table", "table_of_arms"]
