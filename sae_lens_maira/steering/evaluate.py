"""A strength sweep with controls: does the finding appear, and what else changes?

    on target    share of studies whose steered report states (or no longer states) the finding
    off target   share of the other labels that differ from the unsteered report
    KL           mean over the unsteered report's tokens of KL(unsteered || steered), nats, teacher-forced
    perplexity   of the steered report under the unsteered model, and of the unsteered report
    repetition   share of 4-grams seen before in the report;   length   words, relative to the unsteered report

The strength of each method is chosen on one half of the studies (largest on - off) and reported on the other, with
Wilson intervals for shares of studies and bootstrap intervals for means. A control takes the strength of its method,
unless it has strengths of its own: then its strength is chosen like that of a method.
Findings in a report are read by a function that the caller gives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_maira.checksums import write_parquet
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.io import save_figure
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.privacy import private_files
from sae_lens_maira.stats import bootstrap_mean, wilson
from sae_lens_maira.steering.interventions import Intervention
from sae_lens_maira.steering.prompts import Job, SharedPrompts, Written

LabelReader = Callable[[str], frozenset[str] | None]
"""Function from a report to the labels it states; None for a report that cannot be read, which is in no score."""
METRICS = (
    "on_target",
    "off_target",
    "kl",
    "perplexity",
    "unsteered_perplexity",
    "repetition",
    "length",
    "ratio",
)
SHARES = ("on_target",)


@dataclass(frozen=True)
class SteeringTables:
    """Tables of a sweep.

    Attributes:
        studies: A row per method, strength and study, with its report.
        summary: A row per method: chosen strength, `n` studies of the reporting half, and every metric on them with
            a 95 % interval.
        finding: What was steered.
    """

    studies: pd.DataFrame
    summary: pd.DataFrame
    finding: str

    @property
    def best(self) -> str:
        """Name of the method of largest on - off target, neither a control nor supervised if there is another."""
        own = self.summary.control_of.isna() & ~self.summary.method.astype(str).str.contains("supervised")
        ranked = self.summary[own] if bool(own.any()) else self.summary
        return str(ranked.method.iloc[int(np.argmax(ranked.on_target - ranked.off_target))])

    def save(self, folder: Path) -> None:
        """Write `studies.parquet`, `dose_response.png` and, last, `summary.parquet`, each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        with private_files(folder):
            write_parquet(self.studies, folder / "studies.parquet")
        save_figure(dose_response(self), folder / "dose_response.png", dpi=130)
        write_parquet(self.summary, folder / "summary.parquet")


@dataclass(frozen=True)
class Method:
    """One way to steer.

    Attributes:
        name: Name in tables.
        make: Interventions of a strength.
        control_of: Method that this is a control of; it takes the strength of that method unless it has `strengths`.
        strengths: A sweep of its own; a single strength is used as it is.
        sae: An SAE of its own, where it is not the common one.
        p99: (d_sae,) units of that SAE.
        control_seed: Replace every change by a random direction of the same norm, drawn with this seed.
    """

    name: str
    make: Callable[[float], Sequence[Intervention]]
    control_of: str | None = None
    strengths: tuple[float, ...] | None = None
    sae: SAE[Any] | None = None
    p99: torch.Tensor | None = None
    control_seed: int | None = None


def evaluate_steering(
    maira: Maira2,
    sae: SAE[Any] | None,
    hook_name: str,
    methods: Sequence[Method],
    choose: Sequence[Any],
    report: Sequence[Any],
    finding: str,
    read: LabelReader,
    labels: Sequence[str],
    strengths: Sequence[float] = (0.5, 1.0, 2.0, 3.0),
    remove: bool = False,
    p99: torch.Tensor | None = None,
    max_new_tokens: int = 120,
    seed: int = 0,
    progress: bool = True,
    prompts: SharedPrompts | None = None,
    measure_kl: bool = True,
) -> SteeringTables:
    """Sweep every method on `choose`, and report the chosen strength on `report`.

    Args:
        maira: The model.
        sae: SAE whose latents are meant.
        hook_name: A residual stream.
        methods: What to compare; a control comes after its method.
        choose: Studies on which the strength is chosen, or their indices in `prompts`.
        report: Other studies, on which it is reported, or their indices.
        finding: One of `labels`.
        read: Function from a report to the labels it states; None where it cannot be read (`FindingReader.stated`).
        labels: All labels.
        strengths: Strengths of the sweep.
        remove: Count the absence of the finding instead of its presence.
        p99: (d_sae,) units of the latents.
        max_new_tokens: Maximum length of a report.
        seed: Random seed of the bootstrap.
        progress: Show a progress bar.
        prompts: Shared prompts, if several findings use the same studies.
        measure_kl: Also measure the divergence, which takes a third more time.

    Raises:
        InterventionError: No studies, an unknown finding, or a control without its method.
    """
    if not choose or not report or finding not in labels or not strengths:
        raise InterventionError(
            f"{len(choose)} and {len(report)} studies, {len(strengths)} strengths and the finding {finding!r} were "
            f"given; both halves need studies, and the finding must be one of {', '.join(labels)}."
        )
    names = [method.name for method in methods]
    for i, method in enumerate(methods):
        if method.control_of is not None and method.control_of not in names[:i]:
            raise InterventionError(
                f"The control {method.name!r} belongs to {method.control_of!r}, which does not come before it."
            )
    if prompts is None:
        prompts = SharedPrompts(maira, hook_name, [*choose, *report])
        choose, report = range(len(choose)), range(len(choose), len(prompts))
    runs: list[tuple[int, float, str]] = []
    for i, method in enumerate(methods):
        swept = method.strengths or tuple(strengths)
        if (method.control_of is None or method.strengths is not None) and len(swept) > 1:
            runs += [(i, strength, "choose") for strength in swept]
    frames: list[pd.DataFrame] = []
    sweeps = {m.name: m.strengths or tuple(strengths) for m in methods}
    chosen = {name: swept[0] for name, swept in sweeps.items() if len(swept) == 1}
    with tqdm(total=len(runs) + len(methods), desc=f"steering {finding}", disable=not progress) as bar:

        def run(wanted: Sequence[tuple[int, float, str]]) -> None:
            for group in _by_sae(methods, wanted, sae, p99):
                jobs = [
                    Job(
                        choose if half == "choose" else report,
                        _made(methods[i], strength),
                        methods[i].control_seed,
                    )
                    for i, strength, half in group.runs
                ]
                # Divergence and perplexity are measured only where they are reported.
                last = group.runs[0][2] == "report"
                written = prompts.write_all(
                    jobs, group.sae, group.p99, max_new_tokens, measure_kl=measure_kl and last
                )
                for (i, strength, half), job, out in zip(group.runs, jobs, written, strict=True):
                    frame = _score(
                        prompts, job.which, out, finding, read, labels, remove, max_new_tokens, last
                    )
                    frames.append(frame.assign(method=names[i], strength=strength, half=half))
                bar.update(len(group.runs))

        run(runs)
        for method in methods:
            swept = [f for f in frames if f.method.iloc[0] == method.name]
            if method.control_of is not None and method.strengths is None:
                chosen[method.name] = chosen[method.control_of]
            elif method.name not in chosen:
                # A report that cannot be read is no gain, so that a strength does not win by destroying reports.
                gains = [float((f.on_target - f.off_target).fillna(0).mean()) for f in swept]
                chosen[method.name] = float(swept[int(np.argmax(gains))].strength.iloc[0])
        run([(i, chosen[name], "report") for i, name in enumerate(names)])
    table = pd.concat(frames, ignore_index=True)
    plain = prompts.unsteered(report, max_new_tokens)
    stated = [found for found in map(read, plain) if found is not None]
    before = np.mean([(finding in found) != remove for found in stated]) if stated else np.nan
    summary = summarise(table, names, chosen, float(before), seed)
    return SteeringTables(table, summary.assign(control_of=[m.control_of for m in methods]), finding)


def _made(method: Method, strength: float) -> Sequence[Intervention]:
    items = method.make(strength)
    if not items:
        raise InterventionError(
            f"The method {method.name!r} makes no intervention at strength {strength}; unsteered reports would be "
            "reported as steered."
        )
    return items


@dataclass(frozen=True)
class _Group:
    """Runs that share an SAE and its units: (method, strength, half)."""

    sae: SAE[Any] | None
    p99: torch.Tensor | None
    runs: list[tuple[int, float, str]]


def _by_sae(
    methods: Sequence[Method],
    runs: Sequence[tuple[int, float, str]],
    sae: SAE[Any] | None,
    p99: torch.Tensor | None,
) -> list[_Group]:
    groups: dict[int, _Group] = {}
    for number, strength, half in runs:
        own = methods[number].sae
        group = _Group(sae, p99, []) if own is None else _Group(own, methods[number].p99, [])
        groups.setdefault(id(own), group).runs.append((number, strength, half))
    return list(groups.values())


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of words in a text that occurred in it before."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _score(
    prompts: SharedPrompts,
    which: Sequence[int],
    out: Written,
    finding: str,
    read: LabelReader,
    labels: Sequence[str],
    remove: bool,
    budget: int,
    fluency: bool,
) -> pd.DataFrame:
    plain = prompts.unsteered(which, budget)
    others = [label for label in labels if label != finding]
    on, off, length = [], [], []
    for text, reference in zip(out.texts, plain, strict=True):
        now, before = read(text), read(reference)
        on.append(np.nan if now is None else float((finding in now) != remove))
        if now is None or before is None:
            off.append(np.nan)
        else:
            changed = sum((label in now) != (label in before) for label in others)
            off.append(changed / max(1, len(others)))
        length.append(len(text.split()) / max(1, len(reference.split())))
    nothing = [float("nan")] * len(which)
    return pd.DataFrame(
        {
            "study": range(len(which)),
            "text": out.texts,
            "unsteered": plain,
            "on_target": on,
            "off_target": off,
            "kl": out.kl,
            "perplexity": prompts.perplexity(which, out.ids) if fluency else nothing,
            "unsteered_perplexity": prompts.unsteered_perplexity(which, budget) if fluency else nothing,
            "repetition": [repetition(text) for text in out.texts],
            "length": length,
            "ratio": out.ratio,
        }
    )


def summarise(
    table: pd.DataFrame, names: Sequence[str], chosen: dict[str, float], before: float, seed: int
) -> pd.DataFrame:
    """Summarise a sweep: a row per method with its strength and every metric over the reporting half.

    `unreadable` counts steered reports that cannot be read; they are left out of `on_target` and `off_target`.

    Args:
        table: A row per method, strength and study.
        names: Names of the methods, in order.
        chosen: Strength of each method.
        before: Share of unsteered reports that already are as wanted.
        seed: Random seed of the bootstrap; every method uses the same resampled studies.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        part = table.loc[(table.method == name) & (table.half == "report")].sort_values(by="study")
        row: dict[str, Any] = {"method": name, "strength": chosen[name], "n": len(part), "unsteered": before}
        row["unreadable"] = int(part.on_target.isna().sum())
        for metric in METRICS:
            values = part[metric].to_numpy()
            if metric in ("on_target", "off_target"):
                values = values[~np.isnan(values)]
            if not len(values):
                row |= dict.fromkeys((metric, f"{metric}_low", f"{metric}_high"), float("nan"))
                continue
            if metric in SHARES:  # a bootstrap of 0 hits would claim certainty
                low, high = wilson(int(values.sum()), len(values))
            else:
                resampled = bootstrap_mean(values, seed=seed)
                low, high = float(resampled.low), float(resampled.high)
            row |= {metric: float(values.mean()), f"{metric}_low": float(low), f"{metric}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def dose_response(tables: SteeringTables) -> Figure:
    """Plot on-target and off-target shares of the selection half against strength, a line per method."""
    swept = tables.studies[tables.studies.half == "choose"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    colours = mpl.colormaps["tab10"]
    for axis, metric, title in zip(
        axes, ("on_target", "off_target"), ("states the finding", "other labels changed"), strict=True
    ):
        for i, (name, part) in enumerate(swept.groupby("method", sort=False)):
            means = part.groupby("strength")[metric].mean()
            dashed = "--" if "random" in str(name) or "flipped" in str(name) else "-"
            axis.plot(
                means.index, 100 * means, dashed, marker="o", ms=4, color=colours(i % 10), label=str(name)
            )
        axis.set(
            xlabel="strength", ylabel="% of studies" if metric == "on_target" else "% of labels", title=title
        )
        axis.set_ylim(bottom=-2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(tables.finding.replace("_", " "))
    return figure
