"""SAELens' training runner on MAIRA-2.

`LanguageModelSAETrainingRunner` accepts a loaded model (`override_model`); its activations store is text-only in one
method, `get_raw_llm_batch`, which `Maira2ActivationsStore` replaces: studies in, rows of the chosen token roles out,
read by `activations.reader` as everywhere else. Mixing buffer, trainer, checkpoints and saving stay SAELens'. For large
runs harvest first (`sae_lens_maira.activations`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from sae_lens import (
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from safetensors.torch import load_file

from sae_lens_maira.activations.reader import RowReader
from sae_lens_maira.activations.sampling import RowSettings
from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._evaluation import Maira2Evaluator
from sae_lens_maira.hooks._inputs import is_study
from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding


class Maira2ActivationsStore(ActivationsStore):
    """SAELens' activations store over studies with images; created by `over`.

    Rows are the values at the hook point that `RowSettings` keep, (rows, d_in); at vision and projector points, which
    have no token positions, they are all patches. One epoch is every study once, in a new order per epoch.
    """

    studies: Sequence[Any]
    settings: RowSettings
    shuffle_seed: int | None
    _reader: RowReader | None
    _announced_epoch = 0

    @classmethod
    def over(
        cls,
        studies: Sequence[Any],
        model: HookedMaira2,
        cfg: LanguageModelSAERunnerConfig[Any],
        settings: RowSettings | None = None,
        shuffle_seed: int | None = 0,
    ) -> "Maira2ActivationsStore":
        """Create a store.

        Args:
            studies: Studies, or encodings of any number of rows each.
            model: The hooked model; its processor encodes studies.
            cfg: SAELens' runner configuration; hook, batch sizes, buffer, device and dtype are read from it.
            settings: Which rows are kept; `RowSettings()` if not given. Its batch size is the configuration's
                `store_batch_size_prompts`.
            shuffle_seed: Random seed of the order of studies; None keeps the given order.

        Raises:
            HookError: There are no studies, the hook point is unknown, its width (or that of one head) is not the
                SAE's, or the configuration asks for a slice of positions.
        """
        if len(studies) == 0:
            raise HookError("The store was given no studies; expected at least one study or encoding.")
        point = model.points.resolve(cfg.hook_name)
        _check_rows(model, cfg)
        store = cls.from_config(model, cfg, override_dataset=_no_dataset(cfg))
        assert isinstance(store, cls)
        store.studies, store.shuffle_seed = studies, shuffle_seed
        store.settings = replace(settings or RowSettings(), batch_size=store.store_batch_size_prompts)
        store._reader = None
        if not point.prefill_only:
            if is_study(studies[0]) and model.processor is None:
                raise HookError(
                    "Studies must be encoded, and the model was wrapped without a processor. Wrap the result of"
                    " load_maira2, or give the store encodings."
                )
            store._reader = RowReader(
                model, studies, [point.name], store.settings, workers=0, model_kwargs=store.model_kwargs
            )
        return store

    def get_batch_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: SAELens' evaluations call it and would run MAIRA-2 without its images."""
        raise HookError(
            "SAELens asked the store for a batch of text tokens, which its own evaluations run without"
            " images. Evaluate with sae_lens_maira.hooks.Maira2Evaluator; maira2_runner does so by itself."
        )

    @torch.no_grad()
    def get_raw_llm_batch(self, raise_on_epoch_end: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of the next batch of studies.

        Args:
            raise_on_epoch_end: Whether the end of an epoch raises StopIteration, once.

        Returns:
            Activations (rows, d_in) and their token ids (rows,), or None for ids at vision points.

        Raises:
            HookError: No position of a whole epoch is kept.
        """
        for _ in range(-(-len(self.studies) // self.store_batch_size_prompts) + 1):
            numbers = self._next_numbers(raise_on_epoch_end)
            if self._reader is None:
                return self._all_patches(numbers), None
            if is_study(self.studies[numbers[0]]):
                batch = self._reader.ordered(list(self._reader.batches(numbers)))
            else:
                encoding: Maira2Encoding = self.studies[numbers[0]]
                names = [f"encoding {numbers[0]}, row {row}" for row in range(len(encoding))]
                batch = self._reader.read(encoding, numbers * len(encoding), names)
            (value,) = batch.values.values()
            if len(value):
                tokens = torch.from_numpy(batch.index["token"].to_numpy(copy=True)).long()
                return self._of_width(value), tokens.to(self.device)
        raise HookError(
            f"No position of any study is kept by roles={self.settings.roles!r}, so there is nothing to train"
            " on. Ask for other roles, or use encodings with reports if reports were meant."
        )

    def _of_width(self, value: torch.Tensor) -> torch.Tensor:
        """Rows (n, width) of the hook point as rows of the SAE, on the store's device."""
        value = value.to(self.device, self.dtype)
        if self.hook_head_index is not None:
            value = value.view(len(value), -1, self.d_in)[:, self.hook_head_index]
        return value.reshape(-1, self.d_in)

    def _all_patches(self, numbers: list[int]) -> torch.Tensor:
        """Rows (images x patches, d_in) of a vision or projector point."""
        model: Any = self.model
        point = model.points.resolve(self.hook_name)
        first = self.studies[numbers[0]]
        encoding = (
            first if not is_study(first) else model.processor.encode([self.studies[i] for i in numbers])
        )
        _, cache = model.run_with_cache(
            encoding, names_filter=[point.name], stop_at_layer=point.stop, **self.model_kwargs
        )
        return self._of_width(cache[point.name].flatten(2).flatten(0, 1))

    def _next_numbers(self, raise_on_epoch_end: bool) -> list[int]:
        """Numbers of the next batch: several studies, or one encoding."""
        count = len(self.studies)
        epoch, start = divmod(self.n_dataset_processed, count)
        if raise_on_epoch_end and start == 0 and epoch > 0 and epoch != self._announced_epoch:
            self._announced_epoch = epoch
            raise StopIteration(f"All {count} studies were used; epoch {epoch + 1} begins.")
        order = list(range(count))
        if self.shuffle_seed is not None:
            order = torch.randperm(count, generator=_generator(self.shuffle_seed, epoch)).tolist()
        size = self.store_batch_size_prompts if is_study(self.studies[order[start]]) else 1
        numbers = order[start : start + size]
        self.n_dataset_processed += len(numbers)
        return numbers

    def load(self, file_path: str) -> None:
        """Continue after the studies that a checkpoint had read, without running through them."""
        self.n_dataset_processed = int(load_file(file_path)["n_dataset_processed"])
        self._announced_epoch = self.n_dataset_processed // len(self.studies)


class Maira2TrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner with a store over studies and an evaluation that keeps the images."""

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        model: HookedMaira2,
        studies: Sequence[Any],
        eval_studies: Sequence[Any] | None = None,
        settings: RowSettings | None = None,
        target_roles: Any = "generated_only",
        shuffle_seed: int | None = 0,
        override_sae: Any = None,
    ) -> None:
        """Build SAELens' runner and give it the store.

        Args:
            cfg: SAELens' runner configuration.
            model: The hooked model.
            studies: Studies or encodings to train on.
            eval_studies: Studies or encodings to evaluate on while training; None evaluates on nothing.
            settings: Which rows are kept; `RowSettings()` if not given. Vision and projector points keep all patches.
            target_roles: Token roles whose prediction is evaluated.
            shuffle_seed: Random seed of the order of studies; None keeps the given order.
            override_sae: An SAE to train instead of a new one.

        Raises:
            HookError: There are no studies, or the hook point is unknown.
        """
        point = model.points.resolve(cfg.hook_name)
        super().__init__(
            cfg, override_dataset=_no_dataset(cfg), override_model=model, override_sae=override_sae
        )
        store = Maira2ActivationsStore.over(studies, model, cfg, settings, shuffle_seed)
        self.activations_store = store
        where = None if point.prefill_only else store.settings.roles
        batches = _encoded(eval_studies or (), store)
        self.evaluator = Maira2Evaluator(model, batches, where, target_roles) if batches else _no_evaluation  # pyright: ignore[reportAttributeAccessIssue]
        # SAELens adds hook, model and context when it runs; these record which positions the SAE was trained on.
        metadata = self.sae.cfg.metadata
        metadata.token_roles = None if where is None else _role_names(store.settings)
        metadata.task = store.settings.task


def maira2_runner(
    model: HookedMaira2,
    studies: Sequence[Any],
    sae: Any,
    hook_name: str,
    training_tokens: int,
    eval_studies: Sequence[Any] | None = None,
    settings: RowSettings | None = None,
    **cfg: Any,
) -> Maira2TrainingRunner:
    """Build SAELens' runner over studies; `run()` trains and returns the SAE.

    Args:
        model: The hooked model.
        studies: Studies or encodings to train on.
        sae: SAELens' training configuration of the SAE, for instance `BatchTopKTrainingSAEConfig`.
        hook_name: Any accepted name of a hook point.
        training_tokens: Rows to train on.
        eval_studies: Studies or encodings to evaluate on.
        settings: Which rows are kept; `RowSettings()` if not given.
        **cfg: Fields of SAELens' `LanguageModelSAERunnerConfig`. Unless given: no logging, no checkpoints, no
            output folder, 8 studies per forward.

    Raises:
        HookError: The hook point is unknown, there are no studies, or the SAE's width is not the hook point's.
    """
    point = model.points.resolve(hook_name)
    defaults: dict[str, Any] = {
        "model_name": model.cfg.model_name,
        "model_class_name": "HookedMaira2",
        "context_size": model.cfg.n_ctx,
        "store_batch_size_prompts": 8,
        "prepend_bos": False,
        "device": str(model.W_E.device),
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
    }
    config = LanguageModelSAERunnerConfig(
        sae=sae, hook_name=point.name, training_tokens=training_tokens, **defaults | cfg
    )
    _check_rows(model, config)
    return Maira2TrainingRunner(config, model, studies, eval_studies, settings)


def _check_rows(model: HookedMaira2, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Check that a configuration's rows are those of its SAE.

    Raises:
        HookError: The SAE's width is not the hook point's (or one head's), there is no such head, or positions are to
            be cut by number.
    """
    point = model.points.resolve(cfg.hook_name)
    width, heads, head = model.points.width(point.name), model.points.heads(point.name), cfg.hook_head_index
    if head is not None:
        if heads is None or not -heads <= head < heads:
            raise HookError(
                f"hook_head_index={head} was requested, but {point.name!r} has {heads or 'no'} heads. Use a number"
                " below that, or leave it out."
            )
        width = (width or 0) // heads
    d_in = cfg.sae.d_in
    if d_in != width:
        what = "one head" if head is not None else "the value"
        raise HookError(
            f"The SAE's d_in is {d_in}, but {what} at {point.name!r} has width {width}. Set d_in={width}"
            + (", or hook_head_index to train on one head." if head is None and heads is not None else ".")
        )
    if any(bound is not None for bound in cfg.seqpos_slice or ()):
        raise HookError(
            f"seqpos_slice={tuple(cfg.seqpos_slice)} was requested, but rows of studies are chosen by token role, not"
            " by position. Leave it out and pass settings=RowSettings(roles=...)."
        )


def _no_dataset(cfg: LanguageModelSAERunnerConfig[Any]) -> Any:
    """One row of zeros: SAELens' store looks at its text dataset when it is created, and never again."""
    return [{"tokens": [0] * cfg.context_size}]


def _encoded(studies: Sequence[Any], store: Maira2ActivationsStore) -> list[Maira2Encoding]:
    """Encodings to evaluate on, with the studies' own reports."""
    if len(studies) == 0 or not is_study(studies[0]):
        return list(studies)
    model: Any = store.model
    size = store.store_batch_size_prompts
    return [
        model.processor.encode(list(studies[i : i + size]), task=store.settings.task, report="teacher")
        for i in range(0, len(studies), size)
    ]


def _role_names(settings: RowSettings) -> list[str]:
    names = {role.name for role in settings.kept}
    return sorted(names | {"IMAGE"} if settings.last_image else names)


def _no_evaluation(*_: Any, **__: Any) -> dict[str, float]:
    return {}


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 100_003 + epoch)
