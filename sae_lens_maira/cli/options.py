"""Options that several commands share, as dataclasses.

A command takes them as a parameter `options`; on the command line and in a recipe each field is one option.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_lens_maira.distributed import TIMEOUT_S, Ranks, distributed
from sae_lens_maira.interface import ModelDtype, device_of, named_model

if TYPE_CHECKING:
    from sae_lens_maira.activations import RowSettings


@dataclass(frozen=True, kw_only=True)
class HarvestOptions:
    """Which model reads which studies, and which of their rows are kept.

    Attributes:
        hooks: a hook point such as blocks.15.hook_resid_post, or several in brackets; all of them in one pass.
        store: folder of the store; train needs none with --direct true.
        model: "phantom", a folder or a hub id.
        studies: phantom studies to read, unless a table is given.
        study_seed: of the phantom studies; the phantom itself was trained on 0.
        table: Parquet or CSV with one study a row, see studies import.
        root: folder that the table's relative image paths are below; the table's own if not given.
        split: read only the table's studies of this split, for example train.
        roles: tokens to keep: content (sections, report and image patches), paper, paper_last_image, text_only,
            image_only, generated_only, all, or a list of roles.
        rates: share to keep by role, for example "{image: 0.05}".
        reports: text after the prompt: teacher (the study's own report), generated, both, or prompt (none).
        max_new_tokens: token limit of a generated report.
        task: prompt of the studies: findings, or grounded for findings with boxes.
        shard_studies: studies per shard, which is what a kill can lose.
        batch_size: studies per forward pass.
        dtype: of the stored rows.
        model_dtype: of the model's weights; auto is float32 for the phantom and bfloat16 for others.
        max_norm: drop rows with a larger norm.
        max_norm_ratio: drop rows whose norm exceeds this multiple of the median norm of their study and modality.
        seed: of every draw but the phantom studies: the sample of rows, in train the shuffle and the initial weights.
        device: auto, cpu, cuda, ...
        workers: threads that read and encode images ahead of the model.
        rank: number of this process, instead of torchrun's or SLURM's; needs --world.
        world: number of processes that share the work.
        rank_timeout: seconds without a sign of life after which a rank counts as dead.
    """

    hooks: list[str] | str
    store: Path | None = None
    model: str = "phantom"
    studies: int = 2000
    study_seed: int = 0
    table: Path | None = None
    root: Path | None = None
    split: str | None = None
    roles: str | list[str] = "content"
    rates: dict[str, float] | None = None
    reports: Literal["teacher", "generated", "both", "prompt"] = "teacher"
    max_new_tokens: int = 300
    task: Literal["findings", "grounded"] = "findings"
    shard_studies: int = 256
    batch_size: int = 8
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    model_dtype: ModelDtype = "auto"
    max_norm: float | None = None
    max_norm_ratio: float | None = None
    seed: int = 0
    device: str = "auto"
    workers: int = 2
    rank: int | None = None
    world: int | None = None
    rank_timeout: float = TIMEOUT_S

    @property
    def hook_names(self) -> list[str]:
        """The hook points, as a list also where a bare name was given."""
        return [self.hooks] if isinstance(self.hooks, str) else self.hooks

    def ranks(self) -> AbstractContextManager[Ranks]:
        """Meet the other ranks, and wait for them at the end."""
        return distributed(self.rank, self.world, self.rank_timeout)

    def row_settings(self) -> "RowSettings":
        """The options that decide which rows are kept."""
        from sae_lens_maira.activations import RowSettings

        names = [field.name for field in fields(RowSettings) if field.init]
        return RowSettings(**{name: getattr(self, name) for name in names})

    def load(self) -> tuple[Any, Any, str]:
        """Model, studies and device that the options name.

        Raises:
            StudyError, CheckpointError: the table or the model cannot be read.
        """
        from sae_lens_maira.errors import StudyError
        from sae_lens_maira.phantom import generate_studies
        from sae_lens_maira.studies import read_table

        device = device_of(self.device)
        # A forward over given reports ends at the last hook point; writing reports takes the whole model.
        hooks = self.hook_names if self.reports == "teacher" else None
        maira = named_model(self.model, dtype=self.model_dtype, device=device, hooks=hooks)
        if self.table is None:
            side = maira.processor.recipe.crop
            return maira, generate_studies(self.studies, seed=self.study_seed, size=side), device
        table = read_table(self.table, self.root)
        chosen = (table if self.split is None else table.where(split=self.split)).studies
        if not len(chosen):
            raise StudyError(
                f"{self.table} has {len(table):,} studies, none of them in the split {self.split}. `studies show` "
                "counts studies by split; name one of these."
            )
        return maira, chosen, device
