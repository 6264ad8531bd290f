"""A strength sweep judged against controls: does the finding come, and what else changes?

    on target    share of studies whose steered report states (or no longer states) the finding
    off target   share of the other labels that differ from the unsteered report
    KL           mean over the unsteered report's tokens of KL(unsteered || steered), nats, teacher-forced
    perplexity   of the steered report under the unsteered model, beside that of the unsteered report
    repetition   share of 4-grams seen before in the report;   length   words, relative to the unsteered report

The strength of each method is chosen on one half of the studies (largest on - off) and reported on the other, with
Wilson intervals for shares of studies and bootstrap intervals for means; controls take the strength of the method
they belong to. Labels are read by a callable; it knows nothing about findings or phantoms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.steering.interventions import Direction, Intervention
from sae_lens_maira.steering.prefix import Job, SharedPrompts, Written
from sae_lens_maira.steering.schedule import View, patches
from sae_lens_maira.steering.tables import SteeringTables, summarise

LabelReader = Callable[[str], frozenset[str]]


@dataclass(frozen=True)
class Method:
    """One way to steer.

    Attributes:
        name: for tables.
        make: interventions of a strength.
        control_of: the method whose strength it takes; None chooses its own.
        strengths: its own sweep, where the common one does not fit; one strength is taken as it is.
        sae: its own SAE, where it is not the common one.
        p99: (d_sae,) units of that SAE.
    """

    name: str
    make: Callable[[float], Sequence[Intervention]]
    control_of: str | None = None
    strengths: tuple[float, ...] | None = None
    sae: SAE[Any] | None = None
    p99: torch.Tensor | None = None


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
    batch_size: int = 256,
    max_new_tokens: int = 120,
    seed: int = 0,
    progress: bool = True,
    prompts: SharedPrompts | None = None,
    measure_kl: bool = True,
) -> SteeringTables:
    """Sweep every method on `choose`, and report the chosen strength on `report`.

    Args:
        maira: the model.
        sae: whose latents.
        hook_name: a residual stream.
        methods: what to compare; a control stands behind its method.
        choose: studies on which the strength is chosen, or their numbers in `prompts`.
        report: other studies, on which it is reported, or their numbers.
        finding: one of `labels`.
        read: text -> the labels it states.
        labels: all labels.
        strengths: the sweep.
        remove: count the finding's absence instead of its presence.
        p99: units of the latents.
        batch_size: rows a batch, studies and methods together.
        max_new_tokens: budget of a report.
        seed: of the bootstrap.
        progress: show a bar.
        prompts: prompts that were run before; a table over many findings needs them once.
        measure_kl: also measure the divergence, which costs a third more.

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
    if prompts is None:
        prompts = SharedPrompts(maira, hook_name, [*choose, *report])
        choose, report = range(len(choose)), range(len(choose), len(prompts))
    runs: list[tuple[int, float, str]] = []
    for i, method in enumerate(methods):
        swept = method.strengths or tuple(strengths)
        if method.control_of is None and len(swept) > 1:
            runs += [(i, strength, "choose") for strength in swept]
    frames: list[pd.DataFrame] = []
    sweeps = {m.name: m.strengths or tuple(strengths) for m in methods}
    chosen = {name: swept[0] for name, swept in sweeps.items() if len(swept) == 1}
    with tqdm(total=len(runs) + len(methods), desc=f"steering {finding}", disable=not progress) as bar:

        def run(wanted: Sequence[tuple[int, float, str]]) -> None:
            for group in _by_sae(methods, wanted, sae, p99):
                jobs = [
                    Job(choose if half == "choose" else report, _made(methods[i], strength))
                    for i, strength, half in group.runs
                ]
                # Divergence and perplexity only where they are reported.
                last = group.runs[0][2] == "report"
                written = prompts.write_all(
                    jobs, group.sae, group.p99, max_new_tokens, batch_size, measure_kl=measure_kl and last
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
            if method.control_of is not None:
                chosen[method.name] = chosen[method.control_of]
            elif method.name not in chosen:
                gains = [float((f.on_target - f.off_target).mean()) for f in swept]
                chosen[method.name] = float(swept[int(np.argmax(gains))].strength.iloc[0])
        run([(i, chosen[name], "report") for i, name in enumerate(names)])
    table = pd.concat(frames, ignore_index=True)
    plain = prompts.unsteered(report, max_new_tokens)
    before = np.mean([(finding in read(text)) != remove for text in plain])
    return SteeringTables(table, summarise(table, names, chosen, float(before), seed), finding)


def _made(method: Method, strength: float) -> Sequence[Intervention]:
    items = method.make(strength)
    if not items:
        raise InterventionError(
            f"The method {method.name!r} makes no intervention at strength {strength}; its reports would be unsteered "
            "and be shown as steered."
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


def map_directions(
    delta: torch.Tensor,
    shape: tuple[int, int],
    strength: float,
    view: View = "frontal",
    tolerance: float = 1e-6,
) -> list[Direction]:
    """A vector per patch, (rows * cols, d_model), as directions with patch weights: its singular value decomposition.

    Their sum is `strength * delta` at every patch, up to the directions whose singular value is at most `tolerance` of
    the largest.
    """
    u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
    kept = s > tolerance * s[0]
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
        on.append(float((finding in now) != remove))
        off.append(sum((label in now) != (label in before) for label in others) / max(1, len(others)))
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
