"""Plant errors in the phantom: it takes one finding for another, and hardly sees a third.

    y' = y - loss <u_m, y - c> u_m + confusion <u_s, y - c'> u_f          y (d_model) a projected patch

u_f, u_m, u_s are the main directions in which images with and without a finding differ (first right singular vector of
the difference of mean patch maps), c and c' the means of images without. The map is linear and is folded into the
projector's last layer, so that the flawed phantom is an ordinary one.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom.generator import truth_labels
from sae_lens_maira.phantom.sampling import FINDING_KEYS
from sae_lens_maira.studies import Study


@dataclass(frozen=True)
class Flaw:
    """What is planted.

    Attributes:
        missed: Finding that is hardly seen any more.
        loss: Share of its direction that is taken away.
        seen: Finding that is taken for another one too.
        stated: The finding that it is taken for.
        confusion: How much of one direction is added per unit of the other.
    """

    missed: str = "central_venous_line"
    loss: float = 0.75
    seen: str = "endotracheal_tube"
    stated: str = "nasogastric_tube"
    confusion: float = 0.9

    def __post_init__(self) -> None:
        unknown = [key for key in (self.missed, self.seen, self.stated) if key not in FINDING_KEYS]
        if unknown or len({self.missed, self.seen, self.stated}) < 3:
            raise ConfigError(
                f"The flaw names {self.missed!r}, {self.seen!r} and {self.stated!r}; give three different findings of "
                f"{', '.join(FINDING_KEYS)}."
            )


def plant(maira: Maira2, studies: Sequence[Study], flaw: Flaw) -> Maira2:
    """A copy of the phantom with the flaw; the given one is unchanged.

    Args:
        maira: The phantom.
        studies: With truth, from which directions are measured; a few hundred.
        flaw: What to plant.

    Raises:
        ConfigError: None of the studies has one of the findings, or all have it.
    """
    (missed, centre), (seen, centre_seen), (false, _) = _directions(maira, studies, flaw)
    width = len(missed)
    change = (
        torch.eye(width) - flaw.loss * torch.outer(missed, missed) + flaw.confusion * torch.outer(false, seen)
    )
    shift = flaw.loss * missed * (missed @ centre) - flaw.confusion * false * (seen @ centre_seen)
    flawed = Maira2(copy.deepcopy(maira.model), maira.processor)
    last: Any = flawed.model.model.multi_modal_projector.layers[-1]
    with torch.no_grad():
        change, shift = change.to(last.weight), shift.to(last.weight)
        last.bias.copy_(change @ last.bias + shift)
        last.weight.copy_(change @ last.weight)
    return flawed


def planted_coefficient(
    maira: Maira2, studies: Sequence[Study], flaw: Flaw
) -> Callable[[Study], torch.Tensor]:
    """How much of the stated finding's direction the flaw adds to each patch.

    Args:
        maira: The phantom without the flaw.
        studies: The studies that `plant` received.
        flaw: The flaw.

    Returns:
        Function from a study to (patches,) float32: confusion times the patch's coordinate along the direction of the
        finding that is seen.
    """
    _, (seen, centre), _ = _directions(maira, studies, flaw)
    return lambda study: flaw.confusion * ((projected_patches(maira, [study])[0] - centre) @ seen)


def _directions(
    maira: Maira2, studies: Sequence[Study], flaw: Flaw
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Direction and centre of the missed, the seen and the stated finding."""
    truth = np.stack([truth_labels(study) for study in studies])
    patches = projected_patches(maira, studies)
    return [_direction(patches, truth, key) for key in (flaw.missed, flaw.seen, flaw.stated)]


@torch.no_grad()
def projected_patches(maira: Maira2, studies: Sequence[Study], batch: int = 32) -> torch.Tensor:
    """(n, patches, d_model) of the frontal images, as the language model receives them."""
    inner: Any = maira.model.model
    found = []
    for start in range(0, len(studies), batch):
        # The frontal image alone: one image per study.
        part = [
            Study(study_id=s.study_id, patient_id=s.patient_id, frontal=s.frontal)
            for s in studies[start : start + batch]
        ]
        pixels = maira.processor.encode(part).to(maira.model.device, maira.model.dtype).model_inputs()
        seen = inner.vision_tower(pixels["pixel_values"]).feature_maps[-1][:, 1:]
        found.append(inner.multi_modal_projector(seen).float().cpu())
    return torch.cat(found)


def _direction(patches: torch.Tensor, truth: np.ndarray, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    present = torch.from_numpy(truth[:, FINDING_KEYS.index(key)])
    if not bool(present.any()) or bool(present.all()):
        raise ConfigError(
            f"{int(present.sum())} of {len(present)} studies have {key!r}; studies with it and without it are needed "
            "to measure its direction. Draw more."
        )
    difference = patches[present].mean(0) - patches[~present].mean(0)
    vector = torch.linalg.svd(difference, full_matrices=False).Vh[0]
    return vector * (difference @ vector).sum().sign(), patches[~present].flatten(0, 1).mean(0)
