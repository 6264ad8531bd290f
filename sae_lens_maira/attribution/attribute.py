"""Attribute the sentences of a report to SAE latents at positions of the prompt.

    gradient     v_j(p) = a_j(p) W_dec[j] . g(p),       g = d score / d h at the unedited stream
    integrated   the same with g averaged along the path that removes the candidates,
                 h(t) = h - (1 - t) sum over candidates of a W_dec,   t in 0..1; then the sum over candidates is
                 score(h) - score(h(0)) up to the error of the quadrature

The candidates of a sentence are the entries (latent, position) of highest gradient attribution. Entries at tokens of
the sentence itself count too, where they precede a later token of it. With `candidates=None` all active entries are
candidates, and the path removes all of them. Every answer includes its check.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE

from sae_lens_maira.attribution.difference import DifferenceRun, compared_with
from sae_lens_maira.attribution.entries import Entries, active_entries
from sae_lens_maira.attribution.faithfulness import Faithfulness, check_faithfulness
from sae_lens_maira.attribution.inputs import encode_with_report, hook_point_of, trained_roles
from sae_lens_maira.attribution.residual import BUDGET_BYTES, ResidualRun
from sae_lens_maira.attribution.sentences import (
    Sentence,
    pick_sentences,
    report_sentences,
    report_text,
    words_of,
)
from sae_lens_maira.errors import ConfigError, SAEError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding, role_mask

Method = Literal["gradient", "integrated"]
VIEWS = ("frontal", "lateral", "prior")
FEWEST_STEPS, MOST_STEPS = 4, 32
CONVERGED = 0.05
"""The quadrature has converged if the sum differs from the true difference by at most this share."""


@dataclass(frozen=True)
class Attribution:
    """Attribution of one sentence to entries (latent, position).

    Attributes:
        sentence: The sentence, or the words of it that are explained.
        score: Its log-probability given everything before it, nats; minus that of `instead` if there is one.
        method: "gradient" or "integrated".
        steps: Points of the quadrature; 1 for "gradient".
        position, latent: (n,) int64, the entries of highest attribution, highest first.
        activation: (n,) float32.
        value: (n,) float32 attribution in nats.
        share_kept: Sum of these entries' positive attribution as a share of that of all candidates.
        n_candidates: Number of candidates from which they were taken.
        by_position: (L,) float32, summed positive attribution of the candidates at every position.
        error: First-order effect of the reconstruction error, nats, summed over encoded positions.
        bias: First-order effect of the decoder bias, nats, summed over encoded positions.
        check: Result of the ablations; None if it was not requested.
        instead: The text that the sentence was compared with; None if it was not.
    """

    sentence: Sentence
    score: float
    method: Method
    steps: int
    position: np.ndarray
    latent: np.ndarray
    activation: np.ndarray
    value: np.ndarray
    share_kept: float
    n_candidates: int
    by_position: np.ndarray
    error: float
    bias: float
    check: Faithfulness | None = None
    instead: str | None = None

    def latents(self, names: dict[int, str] | None = None) -> pd.DataFrame:
        """One row per latent: its share of the kept attribution, in how many positions, and where it is strongest.

        Args:
            names: Name per latent, if known.
        """
        table = pd.DataFrame({"latent": self.latent, "value": self.value, "position": self.position})
        grouped = table.groupby("latent", sort=False)
        found = grouped.agg(value=("value", "sum"), positions=("position", "nunique")).reset_index()
        strongest = table.loc[grouped["value"].idxmax(), ["latent", "position"]]
        found = found.merge(strongest.rename(columns={"position": "strongest"}), on="latent")
        positive = float(found["value"].clip(lower=0).sum())
        found["share"] = found["value"] / positive if positive else 0.0
        found["name"] = [(names or {}).get(int(j), "") for j in found["latent"]]
        return found.sort_values("value", ascending=False, ignore_index=True)


@dataclass(frozen=True)
class ReportAttribution:
    """Attributions of the sentences of one report.

    Attributes:
        study_id: The study.
        report: The report's text.
        hook_name: Hook point that the SAE reads.
        sentences: One attribution per sentence that was requested.
        encoding: The encoded study, for roles and patch coordinates.
        names: Name per latent, where known.
    """

    study_id: str
    report: str
    hook_name: str
    sentences: tuple[Attribution, ...]
    encoding: Maira2Encoding = field(repr=False)
    names: dict[int, str] = field(default_factory=dict, repr=False)

    def map(self, number: int, view: str = "frontal") -> np.ndarray:
        """Attribution of a sentence over the patches of one image.

        Args:
            number: Place in `sentences`.
            view: "frontal", "lateral" or "prior".

        Returns:
            (rows, columns) float32, positive attribution in nats.

        Raises:
            ConfigError: The study has no such image.
        """
        if view not in VIEWS:
            raise ConfigError(f"The view was {view!r}; use {', '.join(VIEWS)}.")
        here = (self.encoding.view[0] == VIEWS.index(view)).cpu().numpy()
        if not here.any():
            raise ConfigError(f"Study {self.study_id} has no {view} image, so there is no map of it.")
        row = self.encoding.patch_row[0].cpu().numpy()[here]
        col = self.encoding.patch_col[0].cpu().numpy()[here]
        grid = np.zeros((int(row.max()) + 1, int(col.max()) + 1), dtype=np.float32)
        grid[row, col] = self.sentences[number].by_position[here]
        return grid

    def table(self) -> pd.DataFrame:
        """One row per sentence: score, drop under ablation, controls, and whether the check passed."""
        rows = []
        for item in self.sentences:
            row: dict[str, Any] = {"sentence": item.sentence.text, "score": item.score}
            if item.instead is not None:
                row["instead"] = item.instead
            if item.check is not None:
                c = item.check
                row |= {
                    "drop": c.drop,
                    "random": c.drop_random,
                    "largest": c.drop_largest,
                    "gradient_step": c.drop_gradient,
                    "efficiency": c.efficiency,
                    "check": "passed" if c.passed else "; ".join(c.problems),
                }
            rows.append(row)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        return f"{self.study_id} at {self.hook_name}\n{self.table().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False, escape=True, float_format=lambda x: f"{x:.2f}")


def attribute(
    hooked: HookedMaira2,
    study: Any,
    sae: SAE[Any],
    sentence: int | Sequence[int] | None = None,
    report: str = "generated",
    hook_name: str | None = None,
    roles: Any = None,
    method: Method = "integrated",
    candidates: int | None = 256,
    max_steps: int = MOST_STEPS,
    top: int = 512,
    n_check: int = 32,
    check: bool = True,
    words: str | None = None,
    instead: str | None = None,
    names: dict[int, str] | None = None,
    max_new_tokens: int | None = None,
    budget_bytes: int = BUDGET_BYTES,
    seed: int = 0,
) -> ReportAttribution:
    """Attribute the sentences of a report to latents at positions.

    Args:
        hooked: The model.
        study: The study.
        sae: An SAE at the output of a decoder block.
        sentence: Number of the sentence, or several; None explains all.
        report: "generated" for the model's own greedy report, "teacher" for the study's report, or a text.
        hook_name: Hook point; taken from the SAE's metadata if not given.
        roles: Token roles whose positions count; None for those that the SAE was trained on, or every real token.
        method: "integrated", or "gradient" (one backward pass, not complete).
        candidates: Entries that are integrated over and checked, per sentence; None for every active entry.
        max_steps: Points of the quadrature at which it stops; it doubles them from 4 until it has converged.
        top: Entries that are kept in the answer.
        n_check: Entries that the check removes.
        check: Ablate and compare with controls.
        words: Explain only these words of the sentence, for example "nasogastric tube".
        instead: Explain why the sentence (or the words) and not this text: the score is the difference of both
            log-probabilities. Takes one sentence at a time, and entries before the first token that differs.
        names: Name per latent, for tables.
        max_new_tokens: Budget of a generated report.
        budget_bytes: Bytes that one batch of ablations may take.
        seed: Seed of the random controls.

    Raises:
        SAEError: The SAE names no hook point, does not fit the model, or is silent at all positions.
        PromptError: There is no report, no such sentence, no such words, or nothing to compare.
    """
    if method not in ("gradient", "integrated"):
        raise ConfigError(f"The method was {method!r}; use 'integrated' or 'gradient'.")
    if max_steps < 1 or (candidates is not None and candidates < 1):
        raise ConfigError(f"max_steps was {max_steps} and candidates {candidates}; both must be at least 1.")
    place = hook_point_of(sae, hook_name)
    encoding = encode_with_report(hooked, study, report, max_new_tokens)
    spans = pick_sentences(report_sentences(encoding, hooked.tokenizer), sentence)
    if words is not None:
        spans = [words_of(span, words, encoding, hooked.tokenizer) for span in spans]
    run: ResidualRun | DifferenceRun = ResidualRun(hooked, encoding, place, budget_bytes)
    wanted = roles or trained_roles(sae)
    here = role_mask(run.encoding, wanted)[0].nonzero()[:, 0].to(run.hidden.device)
    if instead is not None:
        if len(spans) != 1:
            raise ConfigError(
                f"{len(spans)} sentences were to be compared with {instead!r}. Name one, for example sentence=0."
            )
        run = compared_with(hooked, study, run, spans[0], instead, budget_bytes)
        here = here[here < run.shared]
    entries, error = active_entries(sae, run.hidden, here)
    if not len(entries):
        raise SAEError(
            f"No latent is active at the {len(here)} positions of roles {wanted!r} of this study. Check that the SAE "
            f"was trained at {place} on these roles."
        )
    scores, gradients = run.gradients(run.hidden, [s.positions for s in spans])
    found = [
        _explain(
            run, span, entries, error, here, sae, float(score), gradient, method, candidates, max_steps, top
        )
        for span, score, gradient in zip(spans, scores, gradients, strict=True)
    ]
    answers = []
    for (answer, order, values, true), gradient in zip(found, gradients, strict=True):
        outcome = None
        if check:
            outcome = check_faithfulness(
                run, answer.sentence.positions, entries, order, values, gradient, answer.score, n_check,
                seed=seed, true_difference=true,
            )  # fmt: skip
        answers.append(Attribution(**{**vars(answer), "check": outcome, "instead": instead}))
    text = " ".join(s.text for s in report_sentences(encoding, hooked.tokenizer))
    return ReportAttribution(
        str(getattr(study, "study_id", "")), text, run.hook_name, tuple(answers), run.encoding, names or {}
    )


def attribute_at_points(
    hooked: HookedMaira2, study: Any, saes: Sequence[SAE[Any]], report: str = "generated", **keywords: Any
) -> dict[str, ReportAttribution]:
    """Explain the same report at several hook points.

    Args:
        hooked: The model.
        study: The study.
        saes: SAEs whose metadata name different hook points.
        report: "generated", "teacher" or a text; generated once.
        **keywords: Further arguments of `attribute`, except `hook_name`.

    Returns:
        One answer per hook point, in the order of the SAEs. Each hook point contains the whole stream, so that
        attributions at different hook points overlap; do not add them.

    Raises:
        ConfigError: Two SAEs read the same hook point.
    """
    places = [hooked.points.resolve(hook_point_of(sae)).name for sae in saes]
    if len(set(places)) < len(places):
        raise ConfigError(f"The SAEs read {', '.join(places)}. Give one SAE per hook point.")
    if report == "generated":
        encoding = encode_with_report(hooked, study, report, keywords.get("max_new_tokens"))
        report = report_text(encoding, hooked.tokenizer)
    return {
        place: attribute(hooked, study, sae, report=report, hook_name=place, **keywords)
        for place, sae in zip(places, saes, strict=True)
    }


def _explain(
    run: ResidualRun | DifferenceRun,
    span: Sentence,
    entries: Entries,
    error: torch.Tensor,
    encoded: torch.Tensor,
    sae: SAE[Any],
    score: float,
    gradient: torch.Tensor,
    method: Method,
    candidates: int | None,
    max_steps: int,
    top: int,
) -> tuple[Attribution, torch.Tensor, torch.Tensor, float | None]:
    """One sentence: the answer, its candidates in order, their values, and the true difference if it was measured."""
    first_order = entries.dot(gradient)
    chosen = first_order.argsort(descending=True)[:candidates]
    if candidates is not None:
        positive = chosen[first_order[chosen] > 0]
        chosen = positive if len(positive) else chosen[:1]
    values, steps, true = first_order[chosen], 1, None
    average = gradient
    if method == "integrated":
        average, steps, true = _path_average(run, span.positions, entries, chosen, gradient, score, max_steps)
        values = entries.dot(average)[chosen]
    ranked = values.argsort(descending=True)
    order, values = chosen[ranked], values[ranked]
    by_position = torch.zeros(entries.length, device=values.device)
    by_position.index_add_(0, entries.position[order], values.clamp(min=0))
    positive = float(values.clamp(min=0).sum())
    kept = order[:top]
    answer = Attribution(
        sentence=span,
        score=score,
        method=method,
        steps=steps,
        position=entries.position[kept].cpu().numpy(),
        latent=entries.latent[kept].cpu().numpy(),
        activation=entries.activation[kept].cpu().numpy(),
        value=values[:top].cpu().numpy(),
        share_kept=float(values[:top].clamp(min=0).sum()) / positive if positive else 0.0,
        n_candidates=len(chosen),
        by_position=by_position.cpu().numpy(),
        error=float((error * average[encoded]).sum()),
        bias=float((average[encoded] @ sae.b_dec.detach().float()).sum()),
    )
    return answer, order, values, true


def _path_average(
    run: ResidualRun | DifferenceRun,
    positions: Sequence[int],
    entries: Entries,
    chosen: torch.Tensor,
    gradient: torch.Tensor,
    score: float,
    max_steps: int,
) -> tuple[torch.Tensor, int, float]:
    """Gradient averaged along the path that removes the candidates; points used; the true difference."""
    removed = entries.delta(chosen)
    true = score - float(run.scores([-removed], positions)[0])
    average, steps = gradient, min(FEWEST_STEPS, max_steps)
    while True:
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        scales = [-(1 - (float(node) + 1) / 2) for node in nodes]
        average = run.path_gradient(removed, scales, [float(weight) / 2 for weight in weights], positions)
        total = float((removed * average).sum())
        if abs(total - true) <= CONVERGED * max(abs(true), 0.1) or 2 * steps > max_steps:
            return average, steps, true
        steps *= 2


__all__ = [
    "Attribution",
    "ReportAttribution",
    "attribute",
    "attribute_at_points",
]
