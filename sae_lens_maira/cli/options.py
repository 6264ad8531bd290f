"""Options that several commands share, and how a command takes them: one dataclass, written once.

`flat` turns a function's dataclass parameter `options` into parameters of its own, so that on the command line and in a
recipe they stand beside the command's others. It knows nothing about models.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sae_lens_maira.cli.models import ModelDtype, device_of, named_model


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
        roles: tokens to keep: paper, text_only, image_only, generated_only, all, or a list of roles.
        rates: share to keep by role, for example "{image: 0.05}".
        reports: teacher (the studies' own), generated ones, or both.
        max_new_tokens: budget of a generated report.
        shard_studies: studies a shard, which is what a kill can lose.
        batch_size: studies a forward.
        dtype: of the stored rows.
        model_dtype: of the model's weights; auto is float32 for the phantom and bfloat16 for others.
        max_norm: drop rows with a larger norm.
        seed: of every draw but the phantom studies: the sample of rows, in train the shuffle and the initial weights.
        device: auto, cpu, cuda, ...
        workers: threads that read and encode images ahead of the model.
    """

    hooks: list[str] | str
    store: Path | None = None
    model: str = "phantom"
    studies: int = 2000
    study_seed: int = 0
    table: Path | None = None
    root: Path | None = None
    split: str | None = None
    roles: str | list[str] = "paper"
    rates: dict[str, float] | None = None
    reports: Literal["teacher", "generated", "both"] = "teacher"
    max_new_tokens: int = 300
    shard_studies: int = 256
    batch_size: int = 8
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    model_dtype: ModelDtype = "auto"
    max_norm: float | None = None
    seed: int = 0
    device: str = "auto"
    workers: int = 2

    @property
    def hook_names(self) -> list[str]:
        """The hook points, as a list also where a bare name was given."""
        return [self.hooks] if isinstance(self.hooks, str) else self.hooks

    @property
    def rows(self) -> dict[str, Any]:
        """The arguments of `RowSettings`."""
        names = ("roles", "rates", "reports", "batch_size", "max_norm", "max_new_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def load(self) -> tuple[Any, Any, str]:
        """Model, studies and device that the options name.

        Raises:
            StudyError, CheckpointError: the table or the model cannot be read.
        """
        from sae_lens_maira.errors import StudyError
        from sae_lens_maira.phantom import generate_studies
        from sae_lens_maira.studies import read_table

        device = device_of(self.device)
        maira = named_model(self.model, dtype=self.model_dtype, device=device)
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


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """`function(options, ...)` as a function of the fields of `options` and its other parameters.

    Signature, annotations and docstring are those of a function written out by hand.
    """
    parameters = dict(inspect.signature(function).parameters)
    shared = parameters.pop("options").annotation
    names = [field.name for field in fields(shared)]
    first = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in inspect.signature(shared).parameters.values()
    ]
    rest = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    told = re.search(r"Attributes:\n(.*)", inspect.getdoc(shared) or "", re.DOTALL)
    head, _, tail = (inspect.getdoc(function) or "").partition("Args:\n")
    tail = re.sub(r"    options: .*\n", "", tail)

    def spread(**given: Any) -> None:
        options = shared(**{name: given.pop(name) for name in names if name in given})
        function(options, **given)

    spread.__name__ = spread.__qualname__ = function.__name__
    spread.__module__ = function.__module__
    spread.__doc__ = f"{head}Args:\n{told.group(1).rstrip() if told else ''}\n{tail}"
    spread.__signature__ = inspect.Signature([*first, *rest])  # pyright: ignore[reportFunctionMemberAccess]
    spread.__annotations__ = {p.name: p.annotation for p in (*first, *rest)} | {"return": None}
    return spread
