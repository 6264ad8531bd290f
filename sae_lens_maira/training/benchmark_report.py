"""The step benchmark's result as a table of text and as a figure.

This module reads the dictionary that `benchmark.measure` makes; it times nothing.
"""

from pathlib import Path
from typing import Any

from sae_lens_maira.io import save_figure

LABELS = {
    "saelens": "SAELens, default",
    "saelens_fused_adam": "SAELens, fused Adam",
    "saelens_tf32": "SAELens, fused Adam, TF32",
    "saelens_autocast": "SAELens, fused Adam, autocast",
    "saelens_autocast_compiled": "SAELens, fused Adam, autocast, compiled",
    "fused": "this package",
    "fused_autocast": "this package, autocast",
    "fused_autocast_sole_writer": "this package, autocast, sole writer",
    "fused_candidates": "this package, low-precision candidates (exact)",
}


def table(report: dict[str, Any]) -> str:
    """Milliseconds p20 / p50 / p80 by arm and ratio to SAELens' default, for every auxiliary setting."""
    shape = report["shape"]
    lines = [
        f"d_in {shape['d_in']}, d_sae {shape['d_sae']}, batch {shape['batch']}, k {shape['k']:g}, {shape['dtype']}, "
        f"on {report['device']}, backend {report['backend']}, {report['rounds']} rounds, "
        f"{'Zipf' if shape['zipf'] else 'uniform'} firing, a new batch per step",
        f"{'':48s}{'p20':>10s}{'p50':>10s}{'p80':>10s}{'ratio':>8s}",
    ]
    for setting, arms in report["milliseconds"].items():
        lines.append(f"auxiliary loss {setting}")
        base = arms["saelens"]["p50"]
        for name, ms in arms.items():
            figures = "".join(f"{ms[q]:10.1f}" for q in ("p20", "p50", "p80"))
            lines.append(f"  {LABELS[name]:46s}{figures}{base / ms['p50']:8.2f}")
    lines.append(
        f"encoder product alone {report['encoder_gemm_ms']:.1f} ms, {report['encoder_share']:.0%} of our step; "
        f"gradient error {report['grad_rel_err']:.1e}"
    )
    if report["peak_bytes"] is not None:
        ours, theirs = report["peak_bytes"] / 2**20, report["saelens_peak_bytes"] / 2**20
        lines.append(f"peak above parameters, gradients, moments: {ours:.0f} MiB, SAELens {theirs:.0f} MiB")
    for axis, points in report["scaling"].items():
        for point in points:
            lines.append(
                f"  {axis} {point[axis]:6d}: SAELens {point['saelens_ms']:9.1f} ms, ours {point['fused_ms']:8.1f} ms, "
                f"encoder {point['encoder_gemm_ms']:8.1f} ms, ratio {point['ratio']:.2f}"
            )
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of the medians, and the scaling curves if they were measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes_measured = [axis for axis, points in report["scaling"].items() if points]
    figure, panels = plt.subplots(
        1,
        1 + len(axes_measured),
        figsize=(6 + 4 * len(axes_measured), 3.6),
        squeeze=False,
        layout="constrained",
    )
    bars = panels[0, 0]
    settings = list(report["milliseconds"])
    for place, setting in enumerate(settings):
        arms = report["milliseconds"][setting]
        rows = [index + (place - (len(settings) - 1) / 2) * 0.38 for index in range(len(arms))]
        medians = [ms["p50"] for ms in arms.values()]
        spread = [
            [ms["p50"] - ms["p20"] for ms in arms.values()],
            [ms["p80"] - ms["p50"] for ms in arms.values()],
        ]
        bars.barh(rows, medians, 0.36, xerr=spread, label=f"auxiliary loss {setting}")
    names = list(report["milliseconds"][settings[0]])
    bars.set_yticks(range(len(names)), [LABELS[name] for name in names])
    bars.invert_yaxis()
    bars.axvline(report["encoder_gemm_ms"], color="black", linestyle=":", label="encoder product alone")
    bars.set_xlabel("ms per step, p50 with p20 to p80")
    bars.legend(fontsize="small")
    for panel, axis in zip(panels[0, 1:], axes_measured, strict=True):
        points = report["scaling"][axis]
        sizes = [point[axis] for point in points]
        for key, label in (
            ("saelens_ms", "SAELens"),
            ("fused_ms", "this package"),
            ("encoder_gemm_ms", "encoder"),
        ):
            panel.plot(sizes, [point[key] for point in points], marker="o", label=label)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms per step")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        panel.set_xticks([], minor=True)
        panel.legend(fontsize="small")
    figure.suptitle(report["device"], fontsize="small")
    save_figure(figure, path, dpi=120)
    plt.close(figure)
