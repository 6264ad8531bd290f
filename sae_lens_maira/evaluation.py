"""Evaluate an SAE on a MAIRA-2: reconstruction and spliced cross-entropy, per level and role, with an untrained
control.

    explained variance, L0, dead latents     of rows at the SAE's hook point, per token role
    loss recovered                           (CE_ablated - CE_spliced) / (CE_ablated - CE_clean) over report tokens

The studies are teacher-forced on their reports. Reconstructions replace the positions that the SAE was trained on,
separately for text and image patches. Rows are streamed from the model. The part of the model below the hook point runs
once per study, for any number of reconstructions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_maira.activations import RowReader, RowSettings
from sae_lens_maira.errors import SAEError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.hooks._upper import UpperRun
from sae_lens_maira.maira2 import Maira2, TokenRole, resolve_roles
from sae_lens_maira.sae import evaluate_sae, load_matryoshka
from sae_lens_maira.sae.controls import UntrainedControls
from sae_lens_maira.sae.evaluation import summarise_rows
from sae_lens_maira.sae.splice import ROWS_AT_ONCE, evaluate_runs
from sae_lens_maira.stats import IGNORED_LABEL
from sae_lens_maira.studies import Study

# BOS, whose norm is unlike all others, and the fixed text of the prompt are left out.
KEPT = tuple(role for role in TokenRole if role not in (TokenRole.PAD, TokenRole.BOS, TokenRole.TEMPLATE))
POSITIONS = {"text": resolve_roles("paper"), "image": resolve_roles("image_only")}


@dataclass(frozen=True)
class EvaluationTables:
    """Two tables: `rows` (reconstruction, per role and level) and `splice` (cross-entropy, per position set)."""

    rows: pd.DataFrame
    splice: pd.DataFrame
    hook_name: str
    n_studies: int


def evaluate(
    maira: Maira2,
    sae: SAE | Path | str,
    studies: Sequence[Study],
    hook_name: str | None = None,
    batch_size: int = 8,
    image_rate: float = 1.0,
    progress: bool = True,
    workers: int = 1,
) -> EvaluationTables:
    """Evaluate an SAE on held-out studies.

    Activations are read from the model twice, and a third time for the cross-entropies, so that memory does not grow
    with the number of studies. All computations run on the model's device.

    Args:
        maira: Model that the SAE was trained on.
        sae: SAE, or the folder of one.
        studies: Held-out studies with reports.
        hook_name: `blocks.{i}.hook_resid_post`; taken from the SAE if not given.
        batch_size: Number of studies per forward pass while rows are read; cross-entropies are measured study by study.
        image_rate: Share of image patches used for the reconstruction table.
        progress: Show a progress bar.
        workers: Number of threads that encode studies in advance.

    Returns:
        Tables of reconstruction and of cross-entropy.

    Raises:
        SAEError: The SAE names no hook point and none was given, or its width is not the model's.
        HookError: The model has no such hook point.
    """
    device = maira.model.device
    sae = sae.to(device) if isinstance(sae, SAE) else load_matryoshka(sae, device=str(device))
    hook_name = hook_name or sae.cfg.metadata.hook_name
    if not hook_name:
        raise SAEError(
            "The SAE's metadata name no hook point, and none was given; pass hook_name, for example "
            "blocks.15.hook_resid_post."
        )
    hooked = HookedMaira2(maira)
    settings = RowSettings(roles=KEPT, rates={"image": image_rate}, batch_size=batch_size)
    reader = RowReader(hooked, studies, [hook_name], settings, workers)
    width = reader.hooks[hook_name]
    if sae.cfg.d_in != width:
        raise SAEError(
            f"The SAE reads {sae.cfg.d_in} dimensions and the model has {width} at {hook_name}; it belongs to "
            "another model. Give the SAE of this one."
        )
    rows = _Rows(reader, hook_name, len(studies))
    names = {int(role): role.name.lower() for role in TokenRole}
    with tqdm(
        total=3 * len(studies), desc=f"evaluate at {hook_name}", unit="study", disable=not progress
    ) as bar:
        rows.bar = bar
        summary = summarise_rows(rows, width)
        table = evaluate_sae(sae, rows, role_names=names, summary=summary)
        positions = {where: [int(role) for role in roles] for where, roles in POSITIONS.items()}
        controls = UntrainedControls(sae)
        baselines = {where: controls.fit(summary.sample(roles)) for where, roles in positions.items()}
        runs = report_runs(hooked, studies, hook_name)
        spliced = evaluate_runs(_counted(runs, bar), sae, baseline=baselines, positions=positions)
    return EvaluationTables(table.to_frame(), spliced.to_frame(), hook_name, len(studies))


class _Rows:
    """Rows and roles of the studies; every iteration reads them from the model."""

    bar: Any = None

    def __init__(self, reader: RowReader, hook_name: str, n: int) -> None:
        self._reader, self._hook_name, self._n = reader, hook_name, n

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in self._reader.batches(range(self._n)):
            roles = torch.from_numpy(part.index["role"].to_numpy(copy=True))
            for start in range(0, len(roles), ROWS_AT_ONCE):
                chunk = slice(start, start + ROWS_AT_ONCE)
                yield part.values[self._hook_name][chunk], roles[chunk]
            self.bar.update(part.studies)


def report_runs(hooked: HookedMaira2, studies: Iterable[Study], hook_name: str) -> Iterator[UpperRun]:
    """Yield forward passes of studies, teacher-forced on their reports, with the report tokens as targets."""
    for study in studies:
        encoding = hooked.encode(study, report="teacher", padding_side="right")
        labels = torch.where(encoding.roles == TokenRole.REPORT, encoding.input_ids, IGNORED_LABEL)
        yield UpperRun(hooked, encoding, labels, hook_name)


def _counted(runs: Iterable[UpperRun], bar: Any) -> Iterator[UpperRun]:
    for run in runs:
        yield run
        bar.update(1)
