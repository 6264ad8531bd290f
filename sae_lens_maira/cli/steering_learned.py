"""What steering learns about all findings at once, from the studies of one half: one pass over the patches.

    present[f, p, j], absent[f, p, j]   mean activation of latent j at frontal patch p, with and without finding f
    means[f, p]                         difference of the mean residual stream, the supervised reference
    gradient[f, p]                      d/dh [log P(sentence that states f) - log P(own first sentence)] at patch p

Beside them the latents' units and densities, how well each agrees with each finding, and where a finding's boxes lie.
It composes rooms, and knows nothing about interventions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import Encoder, study_firing
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import FINDING_KEYS, read_report
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.stats import f1_of_firing, p99
from sae_lens_maira.steering.choose import report_gradient
from sae_lens_maira.steering.positions import box_grid
from sae_lens_maira.studies import Study


@dataclass(frozen=True)
class Learned:
    """Learned from the choosing half; F findings, P frontal patches, D latents.

    Attributes:
        present, absent: (F, P, D) mean activations.
        means: (F, P, d_model) difference of means of the stream.
        gradient: (F, P, d_model) mean gradient; 0 where it was not asked for.
        boxes: (F, P) mean share of each patch that the finding's boxes cover, over positive studies.
        p99, density: (D,) unit and share of patches at which a latent is active.
        agreement: (D, F) F1 of firing at the patches.
        cols: patches a row.
    """

    present: torch.Tensor
    absent: torch.Tensor
    means: torch.Tensor
    gradient: torch.Tensor
    boxes: torch.Tensor
    p99: torch.Tensor
    density: torch.Tensor
    agreement: torch.Tensor
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.means.shape[1] // self.cols, self.cols

    def save(self, file: Path) -> None:
        """Write a safetensors file."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if name != "cols"}
        save_file(tensors | {"cols": torch.tensor(self.cols)}, file)

    @classmethod
    def load(cls, file: Path) -> "Learned":
        """Read what `save` wrote."""
        tensors = load_file(file)
        return cls(cols=int(tensors.pop("cols")), **tensors)


def learn(
    rows: ActivationRows,
    encode: Encoder,
    studies: Sequence[Study],
    truth: np.ndarray,
    taught: np.ndarray,
    maira: Maira2 | None = None,
    n_gradients: int = 8,
    findings: Sequence[str] = FINDING_KEYS,
) -> Learned:
    """Learn from the studies of one half.

    Args:
        rows: patches of all studies, frontal ones complete.
        encode: the SAE's encoder.
        studies: all studies.
        truth: (n_studies, F) bool.
        taught: (n_studies,) bool, those that may be learned from.
        maira: the model, if gradients are wanted.
        n_gradients: studies without the finding over which a gradient is averaged.
        findings: those whose gradients are wanted.

    Raises:
        InterventionError: a finding that no taught study has, or that all have.
    """
    frontal = rows.where((rows.kind == 0) & taught[rows.study])
    cols = int(frontal.patch_col.max()) + 1
    n_patches = (int(frontal.patch_row.max()) + 1) * cols
    numbers = frontal.study.reshape(-1, n_patches)[:, 0]
    known = torch.from_numpy(truth[numbers]).float()
    counts = known.sum(0)
    if not bool(((counts > 0) & (counts < len(known))).all()):
        raise InterventionError(
            f"Of {len(known)} studies to learn from, {counts.int().tolist()} have each finding; every finding must be "
            "present in some and absent from others. Draw more studies."
        )
    totals: list[list[torch.Tensor]] = []
    for start in range(0, len(numbers), 32):
        values = frontal.values[start * n_patches : (start + 32) * n_patches]
        acts = encode(values)
        here = known[start : start + 32]
        totals.append([m.T @ x.reshape(len(here), -1) for x in (acts, values) for m in (here, 1 - here)])
    sums = [torch.stack(parts).sum(0) for parts in zip(*totals, strict=True)]
    weights = (counts, len(known) - counts) * 2
    present, absent, with_it, without = (
        (s / w[:, None]).reshape(len(counts), n_patches, -1) for s, w in zip(sums, weights, strict=True)
    )
    sampled = encode(rows.values[:: max(1, len(rows) // 20_000)])
    fires, _ = study_firing(encode, frontal, len(studies))
    gradient = torch.zeros_like(with_it)
    if maira is not None:
        for finding in findings:
            column = FINDING_KEYS.index(finding)
            subjects = [
                studies[i] for i in numbers if not truth[i, column] and studies[i].prior_frontal is None
            ]
            sentences = stating_sentences([studies[i] for i in numbers], finding)
            subjects = subjects[:n_gradients]
            targets = [sentences[k % len(sentences)] for k in range(len(subjects))]
            own = [first_sentence(study) for study in subjects]
            gradient[column] = report_gradient(maira, rows.hook_name, subjects, targets, own)
    return Learned(
        present,
        absent,
        with_it - without,
        gradient,
        _boxes([studies[i] for i in numbers], (n_patches // cols, cols)),
        p99(sampled),
        (sampled > 0).float().mean(0),
        torch.from_numpy(f1_of_firing(fires[taught], truth[taught])),
        cols,
    )


def encoder_of(sae: MatryoshkaSAE) -> Encoder:
    """The SAE's `encode` without gradients."""

    def encode(values: torch.Tensor, /) -> torch.Tensor:
        with torch.no_grad():
            return sae.encode(values)

    return encode


def first_sentence(study: Study) -> str:
    """How a study's own report begins."""
    return _split(study.report or "")[0]


def stating_sentences(studies: Sequence[Study], finding: str) -> list[str]:
    """Sentences of the studies' reports that state the finding and no other.

    Raises:
        InterventionError: there is none.
    """
    said = {s for study in studies for s in _split(study.report or "")}
    found = sorted(s for s in said if read_report(s).present == {finding})
    if not found:
        raise InterventionError(
            f"No report of the studies states {finding!r} in a sentence of its own; draw more."
        )
    return found


def _split(text: str) -> list[str]:
    return [part.strip() + "." for part in text.split(".") if part.strip()]


def _boxes(studies: Sequence[Study], shape: tuple[int, int]) -> torch.Tensor:
    covered = torch.zeros(len(FINDING_KEYS), shape[0] * shape[1])
    counts = torch.zeros(len(FINDING_KEYS), 1)
    for study in studies:
        for item in study.truth or ():
            if item.present and item.box is not None:
                column = FINDING_KEYS.index(item.key)
                covered[column] += box_grid(item.box, shape).flatten()
                counts[column] += 1
    return covered / counts.clamp(min=1)
