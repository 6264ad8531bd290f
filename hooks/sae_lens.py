"""SAELens' training runner on MAIRA-2, through the seams SAELens offers.

`LanguageModelSAETrainingRunner` takes a model as it is (`override_model`); its activations store is
text-only in one method, `get_raw_llm_batch`, which `Maira2ActivationsStore` replaces: studies in, rows of
the wanted token roles out. Mixing buffer, trainer, checkpoints and saving stay SAELens'. For large runs
harvest first (`sae_lens_maira.activations`). It knows nothing about architectures or steering.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens import (
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from safetensors.torch import load_file

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._evaluation import Maira2Evaluator
from sae_lens_maira.hooks._inputs import is_study
from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding, resolve_roles, role_mask


class Maira2ActivationsStore(ActivationsStore):
    """SAELens' activations store over studies with images; made by `over`.

    Rows are the values at the hook at positions of the wanted roles, `(rows, d_in)`; at vision and projector
    points they are all patches. One epoch is every study once, in an order drawn anew from the seed.
    """

    studies: Sequence[Any]
    roles: Any
    task: str
    report: Any
    shuffle_seed: int | None

    @classmethod
    def over(
        cls,
        studies: Sequence[Any],
        model: HookedMaira2,
        cfg: LanguageModelSAERunnerConfig[Any],
        roles: Any = "all",
        task: str = "findings",
        report: Any = "teacher",
        shuffle_seed: int | None = 0,
    ) -> "Maira2ActivationsStore":
        """Make a store.

        Args:
            studies: studies, or encodings of any number of rows each.
            model: the hooked model; its processor encodes studies.
            cfg: SAELens' runner configuration; hook, batch sizes, buffer, device and dtype are read from it.
            roles: token roles that are kept: a preset ("all", "paper", "text_only", "image_only", ...), a
                role, or several.
            task: for studies, see `Maira2Processor.encode`.
            report: for studies, as above; None trains on prompts alone.
            shuffle_seed: seed of the order; None keeps the given order.

        Raises:
            HookError: no studies, or an unknown hook.
        """
        if len(studies) == 0:
            raise HookError("The store was given no studies; expected at least one study or encoding.")
        model.points.resolve(cfg.hook_name)
        store = cls.from_config(model, cfg, override_dataset=_no_dataset(cfg))
        assert isinstance(store, cls)
        store.studies, store.roles, store.task = studies, roles, task
        store.report, store.shuffle_seed = report, shuffle_seed
        return store

    def get_batch_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: SAELens' evaluations call it and would run MAIRA-2 without its images."""
        raise HookError(
            "SAELens asked the store for a batch of text tokens, which its own evaluations run without"
            " images. Evaluate with sae_lens_maira.hooks._evaluation.Maira2Evaluator; maira2_runner does"
            " so by itself."
        )

    @torch.no_grad()
    def get_raw_llm_batch(self, raise_on_epoch_end: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of the next batch of studies.

        Args:
            raise_on_epoch_end: whether the end of an epoch raises StopIteration, once.

        Returns:
            Activations `(rows, d_in)` and their token ids `(rows,)`, or None for ids at vision points.

        Raises:
            HookError: a whole epoch has no position of a wanted role.
        """
        model: Any = self.model
        point = model.points.resolve(self.hook_name)
        for _ in range(-(-len(self.studies) // self.store_batch_size_prompts) + 1):
            encoding = self._next_encoding(raise_on_epoch_end)
            _, cache = model.run_with_cache(
                encoding, names_filter=[point.name], stop_at_layer=point.stop, **self.model_kwargs
            )
            value = cache[point.name].to(self.device, self.dtype)
            if self.hook_head_index is not None:
                value = value[:, :, self.hook_head_index]
            if point.prefill_only:
                return value.reshape(-1, self.d_in), None
            kept = role_mask(encoding, self.roles).to(self.device)
            if bool(kept.any()):
                return value[kept].reshape(-1, self.d_in), encoding.input_ids.to(self.device)[kept]
        raise HookError(
            f"No position of any study has one of the roles {self.roles!r}, so there is nothing to train"
            " on. Ask for other roles, or encode with report='teacher' if reports were meant."
        )

    def _next_encoding(self, raise_on_epoch_end: bool) -> Maira2Encoding:
        count = len(self.studies)
        epoch, start = divmod(self.n_dataset_processed, count)
        if raise_on_epoch_end and start == 0 and epoch > 0 and epoch != self._told_epoch:
            self._told_epoch = epoch
            raise StopIteration(f"All {count} studies were used; epoch {epoch + 1} begins.")
        order = list(range(count))
        if self.shuffle_seed is not None:
            order = torch.randperm(count, generator=_generator(self.shuffle_seed, epoch)).tolist()
        first = self.studies[order[start]]
        if not is_study(first):
            self.n_dataset_processed += 1
            return first.to(self._llm_device)
        stop = min(start + self.store_batch_size_prompts, count)
        batch = [self.studies[i] for i in order[start:stop]]
        self.n_dataset_processed += len(batch)
        processor = self._processor()
        return processor.encode(batch, task=self.task, report=self.report).to(self._llm_device)

    _told_epoch = 0

    @property
    def _llm_device(self) -> torch.device:
        model: Any = self.model
        return model.W_E.device

    def _processor(self) -> Any:
        model: Any = self.model
        if model.processor is None:
            raise HookError(
                "Studies must be encoded, and the model was wrapped without a processor. Wrap the result of"
                " load_maira2, or give the store encodings."
            )
        return model.processor

    def load(self, file_path: str) -> None:
        """Go to where a checkpoint stood, without running through the studies before it."""
        self.n_dataset_processed = int(load_file(file_path)["n_dataset_processed"])
        self._told_epoch = self.n_dataset_processed // len(self.studies)


class Maira2TrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner with a store over studies and an evaluation that keeps the images.

    Args:
        cfg: SAELens' runner configuration.
        model: the hooked model.
        studies: what to train on, see `Maira2ActivationsStore.over`.
        eval_studies: what to evaluate on while training; None evaluates on nothing.
        roles: token roles to train on; None at vision and projector points means all patches.
        target_roles: token roles whose prediction is evaluated.
        **more: further arguments of `Maira2ActivationsStore.over`, and `override_sae`.

    Raises:
        HookError: no studies, or an unknown hook.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        model: HookedMaira2,
        studies: Sequence[Any],
        eval_studies: Sequence[Any] | None = None,
        roles: Any = "all",
        target_roles: Any = "generated_only",
        **more: Any,
    ) -> None:
        point = model.points.resolve(cfg.hook_name)
        override_sae = more.pop("override_sae", None)
        super().__init__(
            cfg, override_dataset=_no_dataset(cfg), override_model=model, override_sae=override_sae
        )
        store = Maira2ActivationsStore.over(studies, model, cfg, roles=roles, **more)
        self.activations_store = store
        where = None if point.prefill_only else roles
        batches = _encoded(eval_studies or (), store)
        self.evaluator = Maira2Evaluator(model, batches, where, target_roles) if batches else _no_evaluation  # pyright: ignore[reportAttributeAccessIssue]
        # SAELens adds hook, model and context when it runs; these tell which positions the SAE knows.
        metadata = self.sae.cfg.metadata
        metadata.token_roles = None if where is None else sorted(role.name for role in resolve_roles(where))
        metadata.task = store.task


def maira2_runner(
    model: HookedMaira2,
    studies: Sequence[Any],
    sae: Any,
    hook_name: str,
    training_tokens: int,
    eval_studies: Sequence[Any] | None = None,
    roles: Any = "all",
    **cfg: Any,
) -> Maira2TrainingRunner:
    """A runner of SAELens over studies; `run()` trains and returns the SAE.

    Args:
        model: the hooked model.
        studies: studies or encodings to train on.
        sae: SAELens' training configuration of the SAE, for instance `BatchTopKTrainingSAEConfig`.
        hook_name: any accepted name of a hook point.
        training_tokens: rows to train on.
        eval_studies: studies or encodings to evaluate on.
        roles: token roles to train on.
        **cfg: fields of SAELens' `LanguageModelSAERunnerConfig`. Unless given: no logging, no checkpoints, no
            output folder, 8 studies per forward.

    Raises:
        HookError: an unknown hook, no studies, or an SAE of another width than the hook's.
    """
    point = model.points.resolve(hook_name)
    width = model.points.width(point.name)
    if sae.d_in != width:
        raise HookError(
            f"The SAE's d_in is {sae.d_in}, but the value at {point.name!r} has width {width}. Set"
            f" d_in={width}."
        )
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
    return Maira2TrainingRunner(config, model, studies, eval_studies, roles)


def _no_dataset(cfg: LanguageModelSAERunnerConfig[Any]) -> Any:
    """One row of zeros: SAELens' store looks at its text dataset when it is made, and never again."""
    return [{"tokens": [0] * cfg.context_size}]


def _encoded(studies: Sequence[Any], store: Maira2ActivationsStore) -> list[Maira2Encoding]:
    if len(studies) == 0 or not is_study(studies[0]):
        return list(studies)
    size = store.store_batch_size_prompts
    return [
        store._processor().encode(list(studies[i : i + size]), task=store.task, report="teacher")
        for i in range(0, len(studies), size)
    ]


def _no_evaluation(*_: Any, **__: Any) -> dict[str, float]:
    return {}


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 100_003 + epoch)
