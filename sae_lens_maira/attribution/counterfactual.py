"""Change one thing about a study and compare: which sentences and which latents change.

Parts of a study are replaced or removed, and regions of its frontal image are erased or pasted over. Nothing else is
removed along with them: a prior report needs a prior image, so removing the image alone is refused.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sae_lens import SAE

from sae_lens_maira.attribution.inputs import hook_point_of
from sae_lens_maira.attribution.sentences import split_sentences
from sae_lens_maira.errors import StudyError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2.images import read_grey
from sae_lens_maira.studies import Box, Study
from sae_lens_maira.studies.study import check_box


class Keep(Enum):
    """Marks a part of a study that is unchanged (None removes it)."""

    KEEP = 0


KEEP = Keep.KEEP


def counterfactual(
    study: Study,
    *,
    prior_image: Any = KEEP,
    prior_report: str | Keep | None = KEEP,
    lateral: Any = KEEP,
    indication: str | Keep | None = KEEP,
    technique: str | Keep | None = KEEP,
    comparison: str | Keep | None = KEEP,
    erase: Sequence[Box] = (),
    paste: Sequence[tuple[Box, Any]] = (),
) -> Study:
    """Make a study that differs from another one in the named parts.

    Args:
        study: The study.
        prior_image: Replacement, or None to remove it.
        prior_report: Replacement, or None to remove it.
        lateral: Replacement, or None to remove it.
        indication: Replacement, or None to remove it.
        technique: Replacement, or None to remove it.
        comparison: Replacement, or None to remove it.
        erase: Boxes of the frontal image, (x_min, y_min, x_max, y_max) in 0..1, filled from their surroundings.
        paste: (box, image) pairs: the same box of another frontal image is pasted in.

    Returns:
        The study, without its truth (which may no longer be right) and without its own report.

    Raises:
        StudyError: A prior report would be left without its image, a box is not in 0..1, or nothing was changed.
    """
    parts = {
        "prior_frontal": prior_image,
        "prior_report": prior_report,
        "lateral": lateral,
        "indication": indication,
        "technique": technique,
        "comparison": comparison,
    }
    changed: dict[str, Any] = {name: value for name, value in parts.items() if not isinstance(value, Keep)}
    if not changed and not erase and not paste:
        raise StudyError(
            "Nothing was changed, so there is nothing to compare. Name a part of the study to replace or remove, or a "
            "region to erase or paste."
        )
    image_after = changed.get("prior_frontal", study.prior_frontal)
    report_after = changed.get("prior_report", study.prior_report)
    if image_after is None and report_after is not None:
        raise StudyError(
            f"Study {study.study_id} would keep a prior report without a prior image, and the prompt cannot contain "
            "it. Remove both (prior_report=None), or keep the image."
        )
    if erase or paste:
        changed["frontal"] = _edited(study.frontal, erase, paste)
    return dataclasses.replace(study, **changed, truth=None, report=None, grounded_report=None)


@dataclass(frozen=True)
class Comparison:
    """Two versions of a study, read by the same model.

    Attributes:
        before, after: The reports.
        latents: One row per latent whose summed activation changed, largest change first: latent, before, after,
            change, name. None without an SAE.
    """

    before: str
    after: str
    latents: pd.DataFrame | None

    @property
    def sentences(self) -> pd.DataFrame:
        """Sentences of both reports in order, each "kept", "removed" or "added"."""
        old, new = ([text[a:b] for a, b in split_sentences(text)] for text in (self.before, self.after))
        rows = []
        for kind, a, b, c, d in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
            if kind == "equal":
                rows += [("kept", text) for text in old[a:b]]
            else:
                rows += [("removed", text) for text in old[a:b]] + [("added", text) for text in new[c:d]]
        return pd.DataFrame(rows, columns=["change", "sentence"])

    def __str__(self) -> str:
        sign = {"kept": "  ", "removed": "- ", "added": "+ "}
        lines = [sign[row["change"]] + row["sentence"] for row in self.sentences.to_dict("records")]
        if self.latents is not None:
            lines += ["", self.latents.head(10).to_string(index=False)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        html = self.sentences.to_html(index=False, escape=True)
        return (
            html if self.latents is None else html + self.latents.head(10).to_html(index=False, escape=True)
        )


@torch.no_grad()
def compare(
    hooked: HookedMaira2,
    before: Study,
    after: Study,
    sae: SAE[Any] | None = None,
    hook_name: str | None = None,
    names: dict[int, str] | None = None,
    max_new_tokens: int | None = None,
) -> Comparison:
    """Generate the reports of two versions of a study in one batch, and compare latents over their prompts.

    Args:
        hooked: The model.
        before: One version.
        after: The other one.
        sae: An SAE whose latents are compared; None compares reports only.
        hook_name: Hook point; taken from the SAE's metadata if not given.
        names: Name per latent, if known.
        max_new_tokens: Budget of a report.

    Raises:
        SAEError: The SAE names no hook point.
    """
    reports = hooked.generate([before, after], return_type="reports", max_new_tokens=max_new_tokens)
    latents = None
    if sae is not None:
        place = hook_point_of(sae, hook_name)
        old, new = (_summed_activations(hooked, study, sae, place) for study in (before, after))
        change = new - old
        order = change.abs().argsort(descending=True)
        order = order[change[order] != 0].cpu()
        latents = pd.DataFrame(
            {
                "latent": order.tolist(),
                "before": old.cpu()[order].tolist(),
                "after": new.cpu()[order].tolist(),
                "change": change.cpu()[order].tolist(),
                "name": [(names or {}).get(int(j), "") for j in order],
            }
        )
    return Comparison(reports[0].text, reports[1].text, latents)


def _summed_activations(hooked: HookedMaira2, study: Study, sae: SAE[Any], hook_name: str) -> torch.Tensor:
    """(d_sae,) activations summed over the image and section positions of the prompt."""
    stop = hooked.points.resolve(hook_name).stop
    _, cache = hooked.run_with_cache(study, names_filter=[hook_name], stop_at_layer=stop)
    rows = cache[hook_name][0]
    total = torch.zeros(sae.cfg.d_sae, device=sae.W_dec.device)
    for part in rows.split(max(1, (1 << 26) // sae.cfg.d_sae)):
        total += sae.encode(part.to(sae.W_dec)).float().sum(0)
    return total


def _edited(image: Any, erase: Sequence[Box], paste: Sequence[tuple[Box, Any]]) -> np.ndarray:
    """(H, W) float32 image with regions filled from their surroundings, or pasted from other images."""
    if image is None:
        raise StudyError("The study has no frontal image, so no region of it can be changed. Give one.")
    grey = read_grey(image).astype(np.float32).copy()
    for box in erase:
        _fill(grey, _pixels(box, grey.shape))
    for box, source in paste:
        other = read_grey(source).astype(np.float32)
        low, high = float(grey.min()), float(grey.max())
        span = float(other.max() - other.min()) or 1.0
        other = (other - other.min()) / span * (high - low) + low
        resized = Image.fromarray(other).resize((grey.shape[1], grey.shape[0]), Image.Resampling.BICUBIC)
        rows, cols = _pixels(box, grey.shape)
        grey[rows, cols] = np.asarray(resized)[rows, cols].clip(low, high)
    return grey


def _pixels(box: Box, shape: tuple[int, ...]) -> tuple[slice, slice]:
    check_box(box)
    height, width = shape[:2]
    x0, x1 = int(box[0] * width), max(int(box[0] * width) + 1, round(box[2] * width))
    y0, y1 = int(box[1] * height), max(int(box[1] * height) + 1, round(box[3] * height))
    return slice(y0, y1), slice(x0, x1)


def _fill(grey: np.ndarray, region: tuple[slice, slice]) -> None:
    """Interpolate a region linearly between the pixels around it, along rows and columns, and average both."""
    rows, cols = region
    y0, y1, x0, x1 = rows.start, rows.stop, cols.start, cols.stop
    top, bottom = grey[max(0, y0 - 1), cols], grey[min(grey.shape[0] - 1, y1), cols]
    left, right = grey[rows, max(0, x0 - 1)], grey[rows, min(grey.shape[1] - 1, x1)]
    down = np.linspace(0, 1, y1 - y0 + 2, dtype=np.float32)[1:-1, None]
    across = np.linspace(0, 1, x1 - x0 + 2, dtype=np.float32)[None, 1:-1]
    vertical = (1 - down) * top[None] + down * bottom[None]
    horizontal = (1 - across) * left[:, None] + across * right[:, None]
    grey[rows, cols] = (vertical + horizontal) / 2


__all__ = ["KEEP", "Comparison", "compare", "counterfactual"]
