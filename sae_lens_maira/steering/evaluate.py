"""A strength sweep judged against controls: does the finding come, and what else changes?

    on target    share of studies whose steered report states (or no longer states) the finding
    off target   share of the other labels that differ from the unsteered report
    KL           mean over the unsteered report's tokens of KL(unsteered || steered), nats, teacher-forced
    repetition   share of 4-grams seen before in the report;   length   words, relative to the unsteered report

The strength of each method is chosen on one half of the studies (largest on - off) and reported on the other, with
bootstrap intervals over studies; controls take the strength of the method they belong to. Labels are read by a
callable; it knows nothing about findings or phantoms.
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

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import Maira2, TokenRole, generate_reports
from sae_lens_maira.steering.apply import steering
from sae_lens_maira.steering.interventions import Direction, Intervention
from sae_lens_maira.steering.schedule import View, patches

LabelReader = Callable[[str], frozenset[str]]
METRICS = ("on_target", "off_target", "kl", "repetition", "length", "ratio")


@dataclass(frozen=True)
class Method:
    """One way to steer.

    Attributes:
        name: for tables.
        make: interventions of a strength.
        control_of: the method whose strength it takes; None chooses its own.
    """

    name: str
    make: Callable[[float], Sequence[Intervention]]
    control_of: str | None = None


@dataclass(frozen=True)
class SteeringTables:
    """`studies`: a row per method, strength and study, with its report; `summary`: a row per method.

    The summary holds the chosen strength and, for the reporting half, every metric with a 95 % interval; `n` studies.
    """

    studies: pd.DataFrame
    summary: pd.DataFrame
    finding: str

    def save(self, folder: Path) -> None:
        """Write `studies.parquet`, `summary.parquet` and `dose_response.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.studies.to_parquet(folder / "studies.parquet")
        self.summary.to_parquet(folder / "summary.parquet")
        dose_response(self).savefig(folder / "dose_response.png", dpi=130)


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
    batch_size: int = 32,
    max_new_tokens: int = 120,
    seed: int = 0,
    progress: bool = True,
) -> SteeringTables:
    """Sweep every method on `choose`, and report the chosen strength on `report`.

    Args:
        maira: the model.
        sae: whose latents.
        hook_name: where.
        methods: what to compare; a control stands behind its method.
        choose: studies on which the strength is chosen.
        report: other studies, on which it is reported.
        finding: one of `labels`.
        read: text -> the labels it states.
        labels: all labels.
        strengths: the sweep.
        remove: count the finding's absence instead of its presence.
        p99: units of the latents.
        batch_size: studies a batch.
        max_new_tokens: budget of a report.
        seed: of the bootstrap.
        progress: show a bar.

    Raises:
        InterventionError: no studies, an unknown finding, or a control without its method.
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
                f"The control {method.name!r} belongs to {method.control_of!r}, which is not before it."
            )
    frames: list[pd.DataFrame] = []
    chosen: dict[str, float] = {}
    with tqdm(
        total=len(methods) * (len(strengths) + 1), desc=f"steering {finding}", disable=not progress
    ) as bar:
        plain = {
            half: _plain(maira, part, batch_size, max_new_tokens)
            for half, part in (("choose", choose), ("report", report))
        }

        def run(method: Method, half: str, strength: float) -> pd.DataFrame:
            part = choose if half == "choose" else report
            frame = _run(
                maira,
                sae,
                hook_name,
                method.make(strength),
                part,
                plain[half],
                p99,
                batch_size,
                max_new_tokens,
            )
            scored = _score(frame, plain[half], finding, read, labels, remove)
            bar.update()
            return scored.assign(method=method.name, strength=strength, half=half)

        for method in methods:
            swept = [run(method, "choose", strength) for strength in strengths]
            gains = [float((f.on_target - f.off_target).mean()) for f in swept]
            own = strengths[int(np.argmax(gains))]
            chosen[method.name] = own if method.control_of is None else chosen[method.control_of]
            frames += [*swept, run(method, "report", chosen[method.name])]
    table = pd.concat(frames, ignore_index=True)
    before = np.mean([(finding in read(text)) != remove for text in plain["report"]])
    return SteeringTables(table, _summary(table, names, chosen, float(before), seed), finding)


def map_directions(
    delta: torch.Tensor, shape: tuple[int, int], strength: float, view: View = "frontal"
) -> list[Direction]:
    """A vector per patch, (rows * cols, d_model), as directions with patch weights: its singular value decomposition.

    Their sum is `strength * delta` at every patch up to rounding.
    """
    u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
    kept = s > 1e-6 * s[0]
    return [
        Direction(vector=vh[i], strength=strength, where=patches(view, (u[:, i] * s[i]).reshape(shape)))
        for i in range(len(s))
        if kept[i]
    ]


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams of words that occurred in it before."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def dose_response(tables: SteeringTables) -> Figure:
    """On-target and off-target shares of the choosing half against strength, a line a method."""
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


def _plain(maira: Maira2, studies: Sequence[Any], batch_size: int, budget: int) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(studies), batch_size):
        part = list(studies[start : start + batch_size])
        texts += [r.text for r in generate_reports(maira.model, maira.processor, part, max_new_tokens=budget)]
    return texts


def _run(
    maira: Maira2,
    sae: SAE[Any] | None,
    hook_name: str,
    items: Sequence[Intervention],
    studies: Sequence[Any],
    plain: Sequence[str],
    p99: torch.Tensor | None,
    batch_size: int,
    budget: int,
) -> pd.DataFrame:
    texts: list[str] = []
    kls: list[float] = []
    ratios: list[float] = []
    for start in range(0, len(studies), batch_size):
        part = list(studies[start : start + batch_size])
        encoding = maira.processor.encode(part).to(maira.model.device, maira.model.dtype)
        # A gate that stays shut in a batch is a result here, and counted as no change.
        with steering(maira, sae, hook_name, items, encoding, p99, require_effect=False) as run:
            texts += [r.text for r in run.reports(maira.processor, budget)]
        ratios += [run.effect.ratio] * len(part)
        forced = maira.processor.encode(
            part, report=list(plain[start : start + batch_size]), padding_side="right"
        ).to(maira.model.device, maira.model.dtype)
        with torch.no_grad():
            base = (
                maira.model(**forced.model_inputs(), use_cache=False).logits[:, :-1].float().log_softmax(-1)
            )
        with steering(maira, sae, hook_name, items, forced, p99, require_effect=False) as run:
            moved = run.logits()[:, :-1].float().log_softmax(-1)
        counted = (forced.roles[:, 1:] == TokenRole.REPORT).float()
        kl = (base.exp() * (base - moved)).sum(-1)
        kls += ((kl * counted).sum(1) / counted.sum(1)).tolist()
    return pd.DataFrame({"text": texts, "kl": kls, "ratio": ratios, "study": range(len(texts))})


def _score(
    frame: pd.DataFrame,
    plain: Sequence[str],
    finding: str,
    read: LabelReader,
    labels: Sequence[str],
    remove: bool,
) -> pd.DataFrame:
    on, off, length = [], [], []
    others = [label for label in labels if label != finding]
    for text, reference in zip(frame.text, plain, strict=True):
        now, before = read(text), read(reference)
        on.append((finding in now) != remove)
        off.append(sum((label in now) != (label in before) for label in others) / max(1, len(others)))
        length.append(len(text.split()) / max(1, len(reference.split())))
    return frame.assign(
        on_target=np.asarray(on, float),
        off_target=off,
        length=length,
        repetition=[repetition(text) for text in frame.text],
        unsteered=list(plain),
    )


def _summary(
    table: pd.DataFrame, names: Sequence[str], chosen: dict[str, float], before: float, seed: int
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for name in names:
        part = table.loc[(table.method == name) & (table.half == "report")].sort_values(by="study")
        # The same resampled studies for every method.
        draws = np.random.default_rng(seed).integers(0, len(part), (1000, len(part)))
        row: dict[str, Any] = {"method": name, "strength": chosen[name], "n": len(part), "unsteered": before}
        for metric in METRICS:
            values = part[metric].to_numpy()
            low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
            row |= {metric: float(values.mean()), f"{metric}_low": float(low), f"{metric}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)
