"""Options that several commands share: dataclasses, lists of numbers such as "0-49,77", and parts such as `trainer`.

A command has a dataclass as its parameter `options`; on the command line and in a recipe each field is one option. A
part sets fields of another library. Since libraries check few of their fields, the types are checked here, with
messages that name the field, the value and the expected type.
"""

import json
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Union,  # noqa: TID251 - the origin of hints of other libraries
    get_args,
    get_origin,
    get_type_hints,
)

from sae_lens_maira.distributed import TIMEOUT_S, Ranks, distributed
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.interface import ModelDtype, chosen_studies, label, named_model, read_studies

if TYPE_CHECKING:
    from sae_lens_maira.activations import ActivationStore, RowSettings
    from sae_lens_maira.maira2 import Maira2, Maira2Processor
    from sae_lens_maira.studies import Study

MOST = 10_000_000
"""Largest number of numbers in one option; no SAE has as many latents."""


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Parse a list such as "0-49,77" to numbers, each once; None for None.

    Args:
        text: List of numbers and ranges.
        option: Name of the option, for the error.

    Raises:
        ConfigError: The text is not such a list, or a range ends before it begins.
    """
    if text is None:
        return None
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or not (last.isdecimal() if dash else not last):
            raise ConfigError(
                f'{option} {text!r} is not a list of numbers. Write numbers and ranges as in "0-49,77".'
            )
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ConfigError(
                f"{option} {text!r} contains the range {part.strip()}, which ends before it begins. Write "
                f"{last}-{first}."
            )
        if len(span) > MOST - len(found):
            raise ConfigError(
                f"{option} {text!r} lists more than {MOST:,} numbers. Write the latents you need."
            )
        found |= dict.fromkeys(span)
    return tuple(found)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_SEQUENCES = (list, tuple, set, frozenset, Sequence, Collection)


def checked_fields(part: str, given: Mapping[str, Any], source: Callable[..., Any]) -> dict[str, Any]:
    """Check the values of a part against the types of its fields; whole numbers written as 1e3 become integers.

    Args:
        part: Name of the part, for the message.
        given: Field -> value; fields that `source` does not have are returned unchanged.
        source: Dataclass or function whose fields or arguments the part sets.

    Raises:
        ConfigError: A value has another type than its field.
    """
    hints = get_type_hints(source.__init__ if isinstance(source, type) else source)
    checked = {}
    for name, value in given.items():
        fits, checked[name] = _converted(value, hints.get(name, Any))
        if not fits:
            raise ConfigError(f"{part}.{name} is {value!r}; expected {_described(hints[name])}.")
    return checked


def _converted(value: Any, hint: Any) -> tuple[bool, Any]:
    """Return whether a value has a type, and the value converted to it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        results = [_converted(value, one) for one in inner]
        return next(((True, made) for fits, made in results if fits), (False, value))
    if origin is Literal:
        return value in inner, value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        whole = number and value == value // 1
        return whole, int(value) if whole else value
    if hint is float:
        return number, value
    if hint in (bool, str):
        return isinstance(value, hint), value
    if hint is type(None) or hint is None:
        return value is None, value
    if (origin or hint) in _SEQUENCES:
        listed = isinstance(value, (list, tuple, set, frozenset))
        if not listed or not inner:
            return listed, value
        parts = [_converted(one, inner[0]) for one in value]
        return all(fits for fits, _ in parts), type(value)(made for _, made in parts)
    if (origin or hint) in (dict, Mapping):
        return isinstance(value, Mapping), value
    if (origin or hint) is Callable:
        return callable(value), value
    # A nested configuration is a mapping here.
    return hint is Any or not isinstance(hint, type) or isinstance(value, (hint, Mapping)), value


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if (origin or hint) in _SEQUENCES:
        return f"a list of {_described(inner[0])}" if inner else "a list"
    if (origin or hint) in (dict, Mapping):
        return "a mapping"
    if (origin or hint) is Callable:
        return "a function"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


LAYOUT = ("batch_size", "seed")
"""Settings that may differ between train and its store: rounding, and the random sample of a rate below 1."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of a model and its studies.

    Attributes:
        model: "phantom", a folder or a hub id.
        table: Parquet or CSV with one study per row, see studies import; phantom studies if not given.
        root: Folder that the table's image paths are relative to; the table's folder if not given.
        split: Read only the table's studies of this split, for example test.
        study_seed: Random seed of the phantom studies; the phantom itself was trained on 0.
        model_dtype: Precision of the model's weights; auto is float32 for the phantom and bfloat16 for others.
        device: Device of the model: auto, cpu, cuda, ...
    """

    model: str = "phantom"
    table: Path | None = None
    root: Path | None = None
    split: str | None = None
    study_seed: int = 10_000
    model_dtype: ModelDtype = "auto"
    device: str = "auto"

    def load_model(self, hooks: list[str] | None = None) -> "Maira2":
        """Load the model; with `hooks`, only the decoder layers up to them."""
        return named_model(self.model, dtype=self.model_dtype, device=self.device, hooks=hooks)

    def first_studies(self, n: int, processor: "Maira2Processor") -> "Sequence[Study]":
        """First `n` studies of the table, or `n` phantom studies of the processor's image size."""
        return chosen_studies(n, self.study_seed, processor.recipe.crop, self.table, self.root, self.split)

    def table_studies(self) -> "Sequence[Study] | None":
        """All studies of the table, without loading a model; None without a table."""
        return None if self.table is None else read_studies(self.table, self.root, self.split)

    def all_studies(self, n: int, processor: "Maira2Processor") -> "Sequence[Study]":
        """All studies of the table, or `n` phantom studies of the processor's image size."""
        listed = self.table_studies()
        return self.first_studies(n, processor) if listed is None else listed

    def model_source(self) -> dict[str, str]:
        """Name, fingerprint and precision of the checkpoint, as in `StoreSpec.source`."""
        from sae_lens_maira.maira2.loading import checkpoint_fingerprint, dtype_of

        automatic = str(dtype_of(self.model)).removeprefix("torch.")
        kind = automatic if self.model_dtype == "auto" else self.model_dtype
        return {"model": label(self.model), "checkpoint": checkpoint_fingerprint(self.model), "dtype": kind}


@dataclass(frozen=True, kw_only=True)
class HarvestOptions(StudyOptions):
    """Options of a harvest: model, studies, and the rows to keep.

    Attributes:
        hooks: A hook point such as blocks.15.hook_resid_post, or several in brackets, read in one pass.
        store: Folder of the store; not needed by train with --direct true.
        studies: Number of phantom studies to read, unless a table is given.
        study_seed: Random seed of the phantom studies; the phantom itself was trained on 0.
        roles: Tokens to keep: content (sections, report and image patches), paper, paper_last_image, text_only,
            image_only, generated_only, all, or a list of roles.
        rates: Share of rows to keep by role, for example "{image: 0.05}".
        reports: Text after the prompt: teacher (the study's report), generated, both, or prompt (none).
        max_new_tokens: Token limit of a generated report.
        task: Prompt of the studies: findings, or grounded for findings with boxes.
        shard_studies: Number of studies per shard, the work that a kill can lose; as many as fit --shard-bytes if not
            given.
        shard_bytes: Estimated size of a shard in bytes; a process has two shards in memory.
        batch_size: Number of studies per forward pass.
        dtype: Precision of the stored rows.
        max_norm: Drop rows with a larger norm.
        max_norm_ratio: Drop rows whose norm exceeds this multiple of the median norm of their study and modality.
        seed: Random seed of the sampled rows, and in train of the shuffle and the initial weights.
        workers: Number of threads that read and preprocess images in advance.
        rank: Number of this process, instead of torchrun's or SLURM's; needs --world.
        world: Number of processes that share the work.
        rank_timeout: Seconds without a heartbeat after which a rank counts as dead.
    """

    hooks: list[str] | str
    store: Path | None = None
    studies: int = 2000
    study_seed: int = 0
    roles: str | list[str] = "content"
    rates: dict[str, float] | None = None
    reports: Literal["teacher", "generated", "both", "prompt"] = "teacher"
    max_new_tokens: int = 300
    task: Literal["findings", "grounded"] = "findings"
    shard_studies: int | None = None
    shard_bytes: float = 1e9
    batch_size: int = 8
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_norm: float | None = None
    max_norm_ratio: float | None = None
    seed: int = 0
    workers: int = 2
    rank: int | None = None
    world: int | None = None
    rank_timeout: float = TIMEOUT_S

    @property
    def hook_names(self) -> list[str]:
        """Hook points as a list, also if one name was given."""
        return [self.hooks] if isinstance(self.hooks, str) else self.hooks

    def ranks(self) -> AbstractContextManager[Ranks]:
        """Join the other ranks, and wait for them at the end."""
        return distributed(self.rank, self.world, self.rank_timeout)

    def row_settings(self) -> "RowSettings":
        """Settings that determine which rows are kept."""
        from sae_lens_maira.activations import RowSettings

        names = [field.name for field in fields(RowSettings) if field.init]
        return RowSettings(**{name: getattr(self, name) for name in names})

    def source(self) -> dict[str, str]:
        """Description of checkpoint, dtype and source of studies, for a store's specification."""
        return self.model_source() | {"studies": "phantom" if self.table is None else "table"}

    def check_store(self, store: "ActivationStore", inputs: bool = True) -> list[str]:
        """Compare a complete store with the options, without loading the model.

        Args:
            store: Complete store.
            inputs: Also compare texts and images of a table's studies, which reads the ends of every image file. With
                several ranks, one needs to do this.

        Returns:
            Sentences about differences that do not affect training on the store.

        Raises:
            StoreError: The store does not match the options; the message names the differences.
        """
        from sae_lens_maira.activations.harvesting import check_inputs
        from sae_lens_maira.activations.store_spec import differences, other_model, other_studies
        from sae_lens_maira.errors import StoreError

        spec = store.spec
        settings = self.row_settings()
        asked = {name: value for name, value in settings.recorded().items() if name not in LAYOUT}
        notes = []
        if "imported" in spec.settings:
            notes.append(
                "The store was imported: its roles, studies and model are not compared with the options."
            )
        else:
            held = {"rates": spec.rates, "settings": spec.settings, "source": spec.source}
            wanted: dict[str, Any] = {"rates": settings.rates_by_name, "settings": asked}
            held["settings"] = {name: value for name, value in spec.settings.items() if name not in LAYOUT}
            found = differences(held, json.loads(json.dumps(wanted)))
            if spec.source:
                found += other_model(spec.source, self.source())
            else:
                notes.append(
                    "The store does not record which checkpoint it was made with, so that is not compared."
                )
            of_table = spec.source.get("studies") == "table" or not store.study_ids[0].startswith("phantom-")
            studies = None if self.table is None else read_studies(self.table, self.root, self.split)
            if studies is None and of_table:
                notes.append(
                    f"No --table was given: the store's {spec.n_studies:,} studies are used without comparing them."
                )
            else:
                if studies is None:
                    ids = [f"phantom-{self.study_seed}-{number}" for number in range(self.studies)]
                else:
                    ids = [study.study_id for study in studies]
                found += [] if ids == store.study_ids else [other_studies(store.study_ids, ids)]
            if found:
                raise StoreError(
                    f"{store.folder} has other rows than these options select: {'; '.join(found)}. Use the options "
                    "of its harvest, or name another --store."
                )
            if studies is not None and inputs:
                check_inputs(store, studies, store.committed())
            if spec.settings.get("seed") != self.seed and any(rate < 1 for rate in spec.rates.values()):
                notes.append(
                    f"The store's rows were sampled with seed {spec.settings.get('seed')}; seed {self.seed} decides "
                    "the order of the rows and the initial weights."
                )
        lacking = [name for name in self.hook_names if name not in spec.hooks]
        if lacking:
            raise StoreError(
                f"{store.folder} has {', '.join(spec.hooks)}, not {', '.join(lacking)}; name one of these with "
                "--hooks, or another --store."
            )
        if "imported" not in spec.settings and spec.dtype != self.dtype:
            notes.append(f"The store's rows are {spec.dtype}; --dtype {self.dtype} has no effect on them.")
        return notes

    def load(self) -> "tuple[Maira2, Sequence[Study]]":
        """Load the model and the studies.

        Raises:
            StudyError, CheckpointError: The table or the model cannot be read.
        """
        # A forward over given text ends at the last hook point; generating reports needs the whole model.
        maira = self.load_model(self.hook_names if self.reports in ("teacher", "prompt") else None)
        return maira, self.all_studies(self.studies, maira.processor)
