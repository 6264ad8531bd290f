"""Judge an SAE on a MAIRA-2: reconstruction and spliced cross-entropy, per level and role, beside an untrained one.

    explained variance, L0, dead latents     of rows at the SAE's hook point, per token role
    loss recovered                           (CE_ablated - CE_spliced) / (CE_ablated - CE_clean) over report tokens

The studies are teacher-forced on their reports. Reconstructions replace the positions the SAE was trained on, text
and image patches apart. It composes the model, activations and SAE rooms and computes nothing itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.errors import SAEError
from sae_lens_maira.hooks import PointTable
from sae_lens_maira.maira2 import Maira2, TokenRole, resolve_roles
from sae_lens_maira.sae import SpliceBatch, evaluate_sae, evaluate_splice, load_matryoshka, make_control
from sae_lens_maira.studies import Study

# BOS and boilerplate are no SAE's business: the first has a norm of its own, the second never varies.
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
    batch_size: int = 16,
    image_rate: float = 1.0,
    progress: bool = True,
) -> EvaluationTables:
    """Evaluate an SAE on held-out studies.

    Args:
        maira: the model it was trained on.
        sae: an SAE, or the folder of one.
        studies: held-out studies with reports.
        hook_name: `blocks.{i}.hook_resid_post`; taken from the SAE if not given.
        batch_size: studies a forward pass.
        image_rate: share of image patches used for the reconstruction table.
        progress: show a bar.

    Returns:
        The tables.

    Raises:
        SAEError: the SAE names no hook point and none was given, or its width is not the model's.
        HookError: the model has no such hook point.
    """
    if not isinstance(sae, SAE):
        sae = load_matryoshka(sae)
    hook_name = hook_name or sae.cfg.metadata.hook_name
    if not hook_name:
        raise SAEError(
            "The SAE's metadata name no hook point, and none was given; pass hook_name, for example "
            "blocks.15.hook_resid_post."
        )
    module = maira.model.get_submodule(PointTable(maira.model.config).resolve(hook_name).module)
    width = maira.model.config.get_text_config().hidden_size
    if sae.cfg.d_in != width:
        raise SAEError(
            f"The SAE reads {sae.cfg.d_in} dimensions and the model's residual stream has {width}; it belongs to "
            "another model. Give the SAE of this one."
        )
    rows = read_rows(
        maira,
        studies,
        hook_name,
        RowSettings(roles=KEPT, rates={"image": image_rate}, batch_size=batch_size),
        progress=progress,
    )
    names = {int(role): role.name.lower() for role in TokenRole}
    table = evaluate_sae(sae, rows.values, rows.role, role_names=names)
    baselines = {}
    for where, roles in POSITIONS.items():
        here = np.isin(rows.role, [int(role) for role in roles])
        baselines[where] = make_control("untrained", sae, rows.where(here).values)
    spliced = evaluate_splice(
        maira.model,
        module,
        splice_batches(maira, studies, batch_size),
        sae,
        baseline=baselines,
        positions={where: [int(role) for role in roles] for where, roles in POSITIONS.items()},
    )
    return EvaluationTables(table.to_frame(), spliced.to_frame(), hook_name, len(studies))


def splice_batches(maira: Maira2, studies: Sequence[Study], batch_size: int) -> Iterator[SpliceBatch]:
    """Batches of studies, teacher-forced on their reports, whose report tokens are the targets."""
    for start in range(0, len(studies), batch_size):
        encoding = maira.processor.encode(
            studies[start : start + batch_size], report="teacher", padding_side="right"
        ).to(maira.model.device, maira.model.dtype)
        labels = torch.where(encoding.roles == TokenRole.REPORT, encoding.input_ids, -100)
        yield SpliceBatch(encoding.model_inputs(), labels, encoding.roles)
