"""Put a finding into reports of studies that do not have it, by steering at the image positions.

The map (which latents, how strong at which patch) is learned on the first half of the patients, the strength is chosen
on a few negative studies of that half, and the effect is counted on negative studies of the second half. Controls are
the difference-of-means map, a random direction of equal norm at every patch, and maps of control SAEs (untrained, or
with frozen weights), which are learned by the same rule, scaled to the same norm and swept over the same strengths.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import Halves
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import FINDING_KEYS, phantom_reader, read_report
from sae_lens_maira.quickstart.sae import TrainedSAE
from sae_lens_maira.stats import wilson
from sae_lens_maira.steering import Intervention, difference_map, map_directions, mean_patch_maps
from sae_lens_maira.steering.maps import LatentMap, frontal_rows, random_direction
from sae_lens_maira.steering.prompts import Job, SharedPrompts
from sae_lens_maira.steering.report_errors import error_changes
from sae_lens_maira.steering.statistics import encoder_of
from sae_lens_maira.studies import Study

STRENGTHS = (1.0, 1.5, 2.0, 3.0)
MAX_NEW_TOKENS = 120


@dataclass(frozen=True)
class SteeringRow:
    """What one intervention did to held-out negative studies.

    Attributes:
        label: Name of the intervention.
        strength: Multiple of its map; 0 for no intervention.
        on_target: Share of reports that state the finding.
        low, high: 95 % Wilson interval of `on_target`.
        off_target: Share of the other findings' statements that differ from the unsteered report.
        relative_norm: Mean |delta| over mean |h| at the steered patches.
        n: Number of studies.
        errors: Errors per report in other findings: false findings, omissions, wrong sides, places and changes.
        errors_change: Difference of `errors` to the unsteered reports with its 95 % interval (value, low, high).
    """

    label: str
    strength: float
    on_target: float
    low: float
    high: float
    off_target: float
    relative_norm: float
    n: int
    errors: float
    errors_change: tuple[float, float, float]


@dataclass(frozen=True)
class SteeringResult:
    """A steering run.

    Attributes:
        finding: The finding that was put in.
        latents: Latents of the map.
        sweep: (strength, share of first-half negatives with the finding), from which the strength was chosen.
        rows: The interventions on the second half.
        before, after: Report of one held-out study without and with the latents.
        example: Index of that study.
    """

    finding: str
    latents: tuple[int, ...]
    sweep: tuple[tuple[float, float], ...]
    rows: tuple[SteeringRow, ...]
    before: str
    after: str
    example: int


def steer_finding(
    maira: Maira2,
    studies: Sequence[Study],
    image_rows: ActivationRows,
    truth: np.ndarray,
    halves: Halves,
    trained: TrainedSAE,
    finding: str,
    n_studies: int,
    seed: int,
    progress: bool,
    controls: Mapping[str, SAE[Any]] | None = None,
) -> SteeringResult:
    """Steer `finding` into negative studies.

    Args:
        maira: The model.
        studies: All studies.
        image_rows: Activations at their image patches.
        truth: (n_studies, F) bool.
        halves: Learn and choose on `choose`, report on `report`.
        trained: The SAE.
        finding: One of `FINDING_KEYS`.
        n_studies: Negative studies of the second half to steer; a third as many of the first choose the strength.
        seed: Random seed of the random direction.
        progress: Show a progress bar.
        controls: Control SAEs by name.

    Raises:
        InterventionError: There are no negative studies to steer.
    """
    column = FINDING_KEYS.index(finding)
    present = truth[:, column]
    learn = (halves.choose & present, halves.choose & ~present)
    tuning = _negatives(studies, halves.choose & ~present, max(4, n_studies // 3))
    held_out = _negatives(studies, halves.report & ~present, n_studies)
    latents = difference_map(image_rows, trained.encode, trained.decoder, *learn)
    present_mean, absent_mean = mean_patch_maps(image_rows, lambda values: values, *learn)
    means, shape = present_mean - absent_mean, frontal_rows(image_rows)[1]
    added = latents.delta(trained.decoder)
    norm_added = added.norm()
    others: list[tuple[str, SAE[Any], LatentMap]] = []
    for name, sae in (controls or {}).items():
        decoder = sae.W_dec.detach()
        theirs = difference_map(image_rows, encoder_of(sae), decoder, *learn)
        scale = norm_added / theirs.delta(decoder).norm().clamp(min=1e-12)
        others.append((name, sae, replace(theirs, grids=theirs.grids * scale)))
    maps: list[tuple[str, torch.Tensor, Callable[[float], Sequence[Intervention]]]] = [
        (f"{len(latents.latents)} latents", added, latents.interventions),
        ("difference of means", means, lambda s: map_directions(means, shape, s)),
        (f"random direction {seed}", added, lambda s: [random_direction(added, shape, s, seed)]),
    ]
    norm = float(image_rows.values[:: max(1, len(image_rows) // 10_000)].norm(dim=1).mean())

    def relative_norm(delta: torch.Tensor, strength: float) -> float:
        return strength * float(delta.norm(dim=1).mean()) / norm

    prompts = SharedPrompts(maira, image_rows.hook_name, [studies[i] for i in (*tuning, *held_out)])
    tuned, reported = range(len(tuning)), range(len(tuning), len(prompts))

    with tqdm(total=2 + 2 * len(others), desc=f"steering {finding}", unit="run", disable=not progress) as bar:

        def write(which: range, wanted: Sequence[Sequence[Intervention]], sae: SAE[Any]) -> list[list[str]]:
            """Reports of the studies under each of the wanted interventions, which share batches."""
            jobs = [Job(which, interventions) for interventions in wanted]
            written = prompts.write_all(jobs, sae, max_new_tokens=MAX_NEW_TOKENS)
            bar.update()
            return [one.texts for one in written]

        def strength_of(added: LatentMap, sae: SAE[Any]) -> tuple[float, list[tuple[float, float]]]:
            """The weakest strength within 2 points of the best on the selection half, and the sweep."""
            texts = write(tuned, [added.interventions(strength) for strength in STRENGTHS], sae)
            shares = [float(np.mean([finding in read_report(t).present for t in part])) for part in texts]
            sweep = list(zip(STRENGTHS, shares, strict=True))
            return next(strength for strength, share in sweep if share >= max(shares) - 0.02), sweep

        chosen, sweep = strength_of(latents, trained.inference)
        plain, *changed_texts = write(
            reported, [(), *(make(chosen) for _, _, make in maps)], trained.inference
        )
        steered, after = [studies[i] for i in held_out], changed_texts[0]
        rows = [_row("no intervention", 0.0, plain, plain, finding, 0.0, steered)]
        for (label, delta, _), texts in zip(maps, changed_texts, strict=True):
            rows.append(_row(label, chosen, texts, plain, finding, relative_norm(delta, chosen), steered))
        for name, sae, other in others:
            own, _ = strength_of(other, sae)
            (texts,) = write(reported, [other.interventions(own)], sae)
            label = f"{len(other.latents)} latents, {name.replace('_', ' ')}"
            relative = relative_norm(other.delta(sae.W_dec.detach()), own)
            rows.append(_row(label, own, texts, plain, finding, relative, steered))
    changed = [i for i, text in enumerate(after) if finding in read_report(text).present]
    example = changed[0] if changed else 0
    return SteeringResult(
        finding, latents.latents, tuple(sweep), tuple(rows), plain[example], after[example], held_out[example]
    )


def _negatives(studies: Sequence[Study], mask: np.ndarray, n: int) -> list[int]:
    """The first `n` studies of `mask` without a prior image: with one, "unchanged" could be right as well."""
    found = [i for i in np.flatnonzero(mask) if studies[int(i)].prior_frontal is None][:n]
    if not found:
        raise InterventionError("There is no study without the finding to steer; ask for more studies.")
    return [int(i) for i in found]


def _row(
    label: str,
    strength: float,
    texts: Sequence[str],
    plain: Sequence[str],
    finding: str,
    relative: float,
    studies: Sequence[Study],
) -> SteeringRow:
    hits = sum(finding in read_report(text).present for text in texts)
    others = [key for key in FINDING_KEYS if key != finding]
    changed = [
        (key in read_report(text).present) != (key in read_report(reference).present)
        for text, reference in zip(texts, plain, strict=True)
        for key in others
    ]
    low, high = wilson(hits, len(texts))
    table = error_changes({label: texts}, plain, studies, phantom_reader(), finding).set_index("measure")
    after, *change = map(float, table.loc["errors_per_report", ["after", "change", "low", "high"]])
    return SteeringRow(
        label,
        strength,
        hits / len(texts),
        low,
        high,
        float(np.mean(changed)),
        relative,
        len(texts),
        after,
        (change[0], change[1], change[2]),
    )
