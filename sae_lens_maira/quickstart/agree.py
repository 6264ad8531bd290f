"""Agreement of an SAE's latents with the findings, with its controls.

    trained, frozen, untrained, raw, supervised -> F1 of firing, units chosen on one half of the patients, reported on
                                                   the other

Of several SAEs that differ only in their initial weights, the one that agrees best on the selection half is taken. The
untrained SAE and the frozen controls are drawn as often and taken by the same rule.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.latents import (
    Agreement,
    Encoder,
    Halves,
    MeanDifference,
    best_dictionary,
    best_units,
    paired_difference,
    study_firing,
)
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.quickstart.results import Draw, PlaceResult
from sae_lens_maira.quickstart.sae import TrainedSAE
from sae_lens_maira.sae import make_control


def agreement(
    place: str,
    rows: ActivationRows,
    truth: np.ndarray,
    halves: Halves,
    saes: Sequence[TrainedSAE],
    seed: int,
    frozen: Mapping[str, Sequence[TrainedSAE]] | None = None,
) -> PlaceResult:
    """Score SAEs of one modality, choose one, and compare it with its controls.

    Args:
        place: "text" or "image".
        rows: Positions of this kind, of both halves.
        truth: (n_studies, F) bool.
        halves: The split by patient.
        saes: Trained on the selection half's rows from different initial weights; one or more.
        seed: Random seed of the untrained SAEs; the i-th has `seed + i`.
        frozen: Frozen controls by kind, as many of each as there are SAEs.

    Returns:
        The scores of the SAE taken, of its controls, and of every SAE drawn.
    """
    n = len(truth)
    chosen_half = rows.where(halves.choose[rows.study])
    held_out = rows.where(halves.report[rows.study]).values

    def scored(name: str, encode: Encoder) -> tuple[Agreement, float]:
        fires, l0 = study_firing(encode, rows, n)
        return best_units(name, fires, truth, FINDING_KEYS, halves), l0

    trained = [scored("Matryoshka SAE", sae.encode) for sae in saes]
    taken = best_dictionary([scores for scores, _ in trained])
    best, l0 = trained[taken]

    def control_of(kind: str, sae: TrainedSAE, seed: int = 0) -> Encoder:
        return make_control(kind, sae.inference, chosen_half.values, seed, l0=l0).encode

    # As many draws as SAEs were trained, each as sparse as the one taken, whitened if that was.
    untrained = [
        scored(
            "untrained SAE",
            control_of("untrained_whitened" if sae.whitened else "untrained", sae, seed + i),
        )[0]
        for i, sae in enumerate(saes)
    ]
    control = untrained[best_dictionary(untrained)]
    taken_frozen = {}
    for kind, controls in (frozen or {}).items():
        candidates = [scored(kind.replace("_", " "), one.encode)[0] for one in controls]
        taken_frozen[kind] = candidates[best_dictionary(candidates)]
    raw = scored("raw dimensions", control_of("raw", saes[taken]))[0]
    draws = tuple(
        Draw(
            seed=sae.seed,
            choose_f1=float(scores.choose_f1.mean()),
            f1=float(scores.f1.mean()),
            untrained_choose_f1=float(other.choose_f1.mean()),
            untrained_f1=float(other.f1.mean()),
            explained_variance=sae.explained_variance(held_out),
        )
        for sae, (scores, _), other in zip(saes, trained, untrained, strict=True)
    )
    # The supervised direction of a finding belongs to that finding: its unit is given, not chosen.
    fitted = study_firing(MeanDifference(rows, truth, halves.choose), rows, n)[0]
    own = np.arange(len(FINDING_KEYS))
    return PlaceResult(
        place=place,
        sae=saes[taken],
        trained=best,
        untrained=control,
        raw=raw,
        supervised=best_units("difference of means", fitted, truth, FINDING_KEYS, halves, unit=own),
        frozen=taken_frozen,
        gains={
            kind: paired_difference(best, other)
            for kind, other in {**taken_frozen, "untrained": control, "raw": raw}.items()
        },
        l0=l0,
        explained_variance=draws[taken].explained_variance,
        n_rows=len(rows),
        draws=draws,
    )
