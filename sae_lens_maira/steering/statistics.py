"""Statistics for steering, from the studies of one half: mean activations with and without each finding.

    present[f, p, j], absent[f, p, j]   mean activation of latent j at frontal patch p, with and without finding f
    means[f, p]                         difference of the mean residual stream, the supervised reference
    gradient[f, p]                      d/dh [log P(sentence that states f) - log P(own first sentence)] at patch p

They also hold units and densities of latents, their agreement with each finding, and the places of a finding's boxes.
Activations are accumulated study by study, so memory does not depend on the number of studies.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows, RowSettings, read_rows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.io import atomic_file
from sae_lens_maira.latents import Encoder
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.stats import Quantiles, f1_of_firing
from sae_lens_maira.steering.choose import report_gradient
from sae_lens_maira.steering.maps import ROWS_AT_ONCE, PatchMeans, frontal_rows
from sae_lens_maira.steering.positions import box_grid
from sae_lens_maira.studies import FindingReader, Study


@dataclass(frozen=True)
class SteeringStatistics:
    """Statistics of F findings, P frontal patches and D latents.

    Attributes:
        findings: Names of the findings.
        present, absent: (F, P, D) mean activations.
        means: (F, P, d_model) difference of means of the stream.
        gradient: (F, P, d_model) mean gradient; 0 where it was not computed.
        boxes: (F, P) mean share of each patch that the finding's boxes cover, over positive studies; 0 without boxes.
        p99, density: (D,) unit, and share of patches at which a latent is active.
        agreement: (D, F) F1 of firing at the patches.
        shape: Rows and columns of patches.
    """

    findings: tuple[str, ...]
    present: torch.Tensor
    absent: torch.Tensor
    means: torch.Tensor
    gradient: torch.Tensor
    boxes: torch.Tensor
    p99: torch.Tensor
    density: torch.Tensor
    agreement: torch.Tensor
    shape: tuple[int, int]

    def column(self, finding: str) -> int:
        """Index of a finding; InterventionError if the statistics do not have it."""
        if finding not in self.findings:
            raise InterventionError(
                f"The statistics are of {', '.join(self.findings)}, and {finding!r} was requested; collect them again."
            )
        return self.findings.index(finding)

    def save(self, file: Path) -> None:
        """Write a safetensors file, atomically."""
        tensors = {k: v.contiguous() for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        # One entry: safetensors writes several in a random order, and equal statistics would be different files.
        about = json.dumps({"findings": self.findings, "shape": self.shape})
        with atomic_file(file) as draft:
            save_file(tensors, draft, {"about": about})

    @classmethod
    def load(cls, file: Path) -> "SteeringStatistics":
        """Read what `save` wrote; InterventionError if the file is damaged."""
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads(opened.metadata()["about"])
            findings, shape = (tuple(about[name]) for name in ("findings", "shape"))
            return cls(findings=findings, shape=shape, **load_file(file))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InterventionError(
                f"{file} cannot be read as steering statistics ({error}). Remove it, so that it is made again."
            ) from error


def encoder_of(sae: SAE[Any]) -> Encoder:
    """The SAE's `encode` without gradients, on the SAE's device: (n, d_in) to (n, D) float32 on the CPU."""

    def encode(values: torch.Tensor, /) -> torch.Tensor:
        with torch.no_grad():
            return sae.encode(values.to(sae.W_dec)).float().cpu()

    return encode


def image_rows(
    maira: Maira2, studies: Sequence[Study], which: Sequence[int], hook_name: str, progress: bool = True
) -> Iterator[ActivationRows]:
    """Read the activations at the image patches of some studies, a few studies at a time.

    Args:
        maira: The model.
        studies: All studies.
        which: Indices of the studies to read.
        hook_name: Hook point.
        progress: Show a progress bar.

    Yields:
        Rows whose `study` is an index of `studies`.
    """
    side = maira.processor.patches_per_side
    at_once = max(1, BLOCK_ROWS // side**2)
    starts = range(0, len(which), at_once)
    for start in tqdm(starts, desc=f"activations at {hook_name}", unit="block", disable=not progress):
        part = np.asarray(which[start : start + at_once])
        chosen = [studies[int(i)] for i in part]
        settings = RowSettings(roles="image_only", batch_size=max(1, min(16, at_once // 8)))
        rows = read_rows(maira, chosen, hook_name, settings, progress=False)
        yield replace(rows, study=part[rows.study])


BLOCK_ROWS = 2**15
"""Frontal patches that are read at once: 512 studies of 64 patches, 23 of 1,369."""


def collect_statistics(
    blocks: Iterable[ActivationRows],
    encode: Encoder,
    studies: Sequence[Study],
    known: np.ndarray,
    reader: FindingReader,
    findings: Sequence[str] | None = None,
    maira: Maira2 | None = None,
    n_gradients: int = 8,
) -> SteeringStatistics:
    """Collect statistics of one SAE; see `collect_of_several`."""
    return collect_of_several(blocks, [encode], studies, known, reader, findings, maira, n_gradients)[0]


def collect_of_several(
    blocks: Iterable[ActivationRows],
    encoders: Sequence[Encoder],
    studies: Sequence[Study],
    known: np.ndarray,
    reader: FindingReader,
    findings: Sequence[str] | None = None,
    maira: Maira2 | None = None,
    n_gradients: int = 8,
) -> list[SteeringStatistics]:
    """Collect statistics of several SAEs from the same activations at image patches, which are read once.

    Args:
        blocks: Rows of the studies to learn from; a study is in one block, with all its frontal patches.
        encoders: Encoder of each SAE.
        studies: All studies.
        known: (n_studies, F) findings of the studies, in the order of the reader's names.
        reader: Reader of findings in reports.
        findings: Findings to compare; all if not given.
        maira: The model, if gradients are wanted.
        n_gradients: Studies without the finding over which a gradient is averaged.

    Raises:
        InterventionError: A finding that none or all of the studies have.
    """
    findings = tuple(reader.names if findings is None else findings)
    columns = [reader.index(finding) for finding in findings]
    truth = known[:, columns]
    groups = np.concatenate([truth, ~truth], axis=1).T
    latents: list[_LatentSums] = []
    stream, shape, hook_name = PatchMeans(groups, (0, 0)), (0, 0), ""
    seen: list[np.ndarray] = []
    for rows in blocks:
        frontal, grid = frontal_rows(rows)
        if not seen:
            shape, hook_name, stream = grid, rows.hook_name, PatchMeans(groups, grid)
            latents = [_LatentSums(encode, groups, grid, len(studies), frontal) for encode in encoders]
        if grid != shape:
            raise InterventionError(
                f"Frontal images have {grid} and {shape} rows and columns of patches; use images of one size."
            )
        seen.append(np.unique(frontal.study))
        stream.add(frontal, lambda values: values)
        for sums in latents:
            sums.add(frontal)
    if not seen:
        raise InterventionError("There are no studies to learn from; read studies with frontal images.")
    numbers = np.concatenate(seen)
    positives = truth[numbers].sum(0)
    wrong = [f for f, n in zip(findings, positives, strict=True) if not 0 < n < len(numbers)]
    if wrong:
        raise InterventionError(
            f"Of {len(numbers)} studies to learn from, none or all have {', '.join(wrong)}; a finding must be present "
            "in some and absent from others. Read more studies."
        )
    with_it, without = stream.means().chunk(2)
    gradient = torch.zeros_like(with_it)
    if maira is not None:
        for column, finding in enumerate(findings):
            chosen = [studies[int(i)] for i in numbers]
            sentences = stating_sentences(chosen, finding, reader)
            lacking = [s for s, has in zip(chosen, truth[numbers, column], strict=True) if not has]
            lacking = [s for s in lacking if s.prior_frontal is None and s.report][:n_gradients]
            if sentences and lacking:
                targets = [sentences[k % len(sentences)] for k in range(len(lacking))]
                own = [sentences_of(s.report or "")[0] for s in lacking]
                gradient[column] = report_gradient(maira, hook_name, lacking, targets, own)
    boxes = _boxes([studies[int(i)] for i in numbers], findings, shape)
    made = []
    for sums in latents:
        present, absent = sums.means.means().chunk(2)
        fires = sums.fires[torch.from_numpy(numbers)].numpy()
        made.append(
            SteeringStatistics(
                findings,
                present,
                absent,
                with_it - without,
                gradient,
                boxes,
                sums.quantiles.value(),
                sums.active.float() / max(1, sums.rows),
                torch.from_numpy(f1_of_firing(fires, truth[numbers])),
                shape,
            )
        )
    return made


class _LatentSums:
    """Sums over rows for the latents of one SAE."""

    def __init__(
        self,
        encode: Encoder,
        groups: np.ndarray,
        shape: tuple[int, int],
        n_studies: int,
        first: ActivationRows,
    ) -> None:
        width = encode(first.values[:1]).shape[1]
        self.encode, self.means, self.quantiles = encode, PatchMeans(groups, shape), Quantiles(width)
        self.fires = torch.zeros(n_studies, width, dtype=torch.bool)
        self.active, self.rows = torch.zeros(width, dtype=torch.int64), 0

    def add(self, frontal: ActivationRows) -> None:
        self.means.add(frontal, self.encode)
        study = torch.from_numpy(frontal.study)
        for part in torch.arange(len(frontal)).split(ROWS_AT_ONCE):
            acts = self.encode(frontal.values[part])
            row, latent = (acts > 0).nonzero(as_tuple=True)
            self.quantiles.add(latent, acts[row, latent])
            self.fires[study[part][row], latent] = True
            self.active += (acts > 0).sum(0)
            self.rows += len(part)


def sentences_of(text: str) -> list[str]:
    """Sentences of a report, each with its full stop."""
    return [part.strip() for part in re.findall(r"[^.]+\.", text)] or [text]


def stating_sentences(studies: Sequence[Study], finding: str, reader: FindingReader) -> list[str]:
    """Sentences of the studies' reports that state the finding and no other, in alphabetical order."""
    sentences = {s for study in studies for s in sentences_of(study.report or "")}
    return sorted(s for s in sentences if reader.read(s) == {finding})


def _boxes(studies: Sequence[Study], findings: Sequence[str], shape: tuple[int, int]) -> torch.Tensor:
    covered, counts = torch.zeros(len(findings), shape[0] * shape[1]), torch.zeros(len(findings), 1)
    for study in studies:
        for item in study.truth or ():
            if item.present and item.box is not None and item.key in findings:
                column = findings.index(item.key)
                covered[column] += box_grid(item.box, shape).flatten()
                counts[column] += 1
    return covered / counts.clamp(min=1)
