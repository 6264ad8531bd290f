"""The methods that `steer` compares on the phantom, learned on the studies of one half.

Latents by map difference with their maps, by output effect and by agreement, at the frontal patches; the latent of
best agreement everywhere, as the study steered; the difference of means as the supervised reference; and controls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae_lens_maira.activations import harvest_rows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import study_firing
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import read_report
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.steering import Ablate, Add, Direction, Intervention, mean_difference_map, p99_of
from sae_lens_maira.steering.evaluate import Method, map_directions
from sae_lens_maira.steering.schedule import everywhere, patches
from sae_lens_maira.steering.selection import by_agreement, by_map_difference, by_output_effect
from sae_lens_maira.studies import Study

N_GRADIENTS = 48


@dataclass(frozen=True)
class MethodSet:
    """Methods, the latents' units, and where they act."""

    methods: list[Method]
    p99: torch.Tensor
    hook_name: str


def phantom_methods(
    maira: Maira2,
    sae: MatryoshkaSAE,
    studies: Sequence[Study],
    learn: np.ndarray,
    present: np.ndarray,
    finding: str,
    n_latents: int,
    remove: bool,
    seed: int,
) -> MethodSet:
    """Learn the methods of one finding.

    Args:
        maira: the phantom.
        sae: an SAE that names its hook point.
        studies: all studies.
        learn: (n,) those that may be learned from.
        present: (n,) those with the finding.
        finding: its key.
        n_latents: latents a method uses.
        remove: steer away from the finding.
        seed: of the controls.

    Raises:
        InterventionError: the SAE names no hook point, or no report states the finding alone.
    """
    hook_name = sae.cfg.metadata.hook_name
    if not hook_name:
        raise InterventionError("The SAE's metadata name no hook point; train it with one.")
    taught = [int(i) for i in np.flatnonzero(learn)]
    rows = harvest_rows(maira, [studies[i] for i in taught], hook_name, roles="image_only")
    with_it, decoder = present[taught], sae.W_dec.detach()

    def encode(values: torch.Tensor, /) -> torch.Tensor:
        with torch.no_grad():
            return sae.encode(values)

    sampled = encode(rows.values[:: max(1, len(rows) // 20_000)])
    p99, density = p99_of(sampled), (sampled > 0).float().mean(0)
    sign = -1.0 if remove else 1.0
    shape = (int(rows.patch_row.max()) + 1, int(rows.patch_col.max()) + 1)
    mapped, difference = by_map_difference(rows, encode, decoder, with_it, ~with_it)
    chosen = [int(j) for j in mapped.scores.abs().topk(n_latents).indices]
    fires, _ = study_firing(encode, rows, len(taught))
    agreeing = by_agreement(fires, with_it).boost(1)
    # Units are needed for the effect to be comparable over latents; those that never fire have none.
    sentences = _sentences([studies[i] for i in taught], finding)
    subjects = [studies[i] for i in taught if present[i] == remove][:N_GRADIENTS]
    effect = by_output_effect(
        maira,
        sae,
        hook_name,
        subjects,
        [sentences[k % len(sentences)] for k in range(len(subjects))],
        [_first_sentence(study) for study in subjects],
        p99=p99,
    )
    causal = effect.boost(n_latents)
    means = mean_difference_map(rows, with_it, ~with_it).delta
    size = (difference[:, chosen] @ decoder[chosen]).norm(dim=1).reshape(shape)
    direction = torch.nn.functional.normalize(
        torch.randn(decoder.shape[1], generator=torch.Generator().manual_seed(seed)), dim=0
    )
    twins = _twins(density, chosen)

    def maps(latents: Sequence[int], strength: float, columns: Sequence[int]) -> list[Intervention]:
        return [
            Add(
                latents=(j,),
                strength=strength,
                unit="raw",
                where=patches(grid=difference[:, c].reshape(shape)),
            )
            for j, c in zip(latents, columns, strict=True)
        ]

    methods = [
        Method("latents by map, their maps", lambda s: maps(chosen, sign * s, chosen)),
        Method(
            "random direction, equal norm",
            lambda s: [Direction(vector=direction, strength=s, where=patches(grid=size))],
            "latents by map, their maps",
        ),
        Method(
            "random latents, equal density",
            lambda s: maps(twins, sign * s, chosen),
            "latents by map, their maps",
        ),
        Method("flipped sign", lambda s: maps(chosen, -sign * s, chosen), "latents by map, their maps"),
        Method("difference of means (supervised)", lambda s: map_directions(means, shape, sign * s)),
    ]
    if causal:
        methods.append(
            Method(
                "latents by output effect",
                lambda s: [Add(latents=causal, strength=sign * s, where=patches())],
            )
        )
    if agreeing:
        methods += [
            Method(
                "latent by agreement, patches",
                lambda s: [Add(latents=agreeing, strength=sign * s, where=patches())],
            ),
            Method(
                "latent by agreement, everywhere",
                lambda s: [Add(latents=agreeing, strength=sign * s, where=everywhere())],
            ),
        ]
    if remove:
        methods.append(
            Method(
                "ablate latents by map",
                lambda s: [Ablate(latents=tuple(chosen), strength=s, where=patches())],
            )
        )
    return MethodSet(methods, p99, hook_name)


def _twins(density: torch.Tensor, latents: Sequence[int]) -> list[int]:
    """For each latent another one that fires about as often, none of them twice."""
    taken, found = set(latents), []
    for j in latents:
        order = (density - density[j]).abs().argsort().tolist()
        twin = next(i for i in order if i not in taken)
        taken.add(twin)
        found.append(twin)
    return found


def _split(text: str) -> list[str]:
    return [part.strip() + "." for part in text.split(".") if part.strip()]


def _first_sentence(study: Study) -> str:
    return _split(study.report or "")[0]


def _sentences(studies: Sequence[Study], finding: str) -> list[str]:
    found = {
        s for study in studies for s in _split(study.report or "") if read_report(s).present == {finding}
    }
    if not found:
        raise InterventionError(
            f"No report of the studies states {finding!r} in a sentence of its own; draw more."
        )
    return sorted(found)
