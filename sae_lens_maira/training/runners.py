"""Make SAELens' runners use the fused trainer.

    with fused_training():
        LanguageModelSAETrainingRunner(cfg).run()

SAELens' runners have no argument for the trainer class. Within the context, the name of the class refers to the fused
trainer in every module that uses it; afterwards it refers to SAELens' trainer again.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.training.prefetch import PrefetchingIterator
from typing_extensions import override

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels import ProcessGroupCommunicator
from sae_lens_maira.kernels.dispatch import Backend
from sae_lens_maira.kernels.problem import AskedCandidates
from sae_lens_maira.training.trainer import FusedSAETrainer

USERS_OF_THE_TRAINER = (
    "sae_lens.llm_sae_training_runner",
    "sae_lens.training.multi_sae_trainer",
    "sae_lens.synthetic.synthetic_sae_runner",
    "sae_lens.synthetic.training",
)


class ShardedBatches:
    """Iterator over this rank's share of every batch of a provider that yields the same whole batches on all ranks."""

    def __init__(self, batches: Iterator[torch.Tensor], rank: int, size: int) -> None:
        self.batches, self.rank, self.size = batches, rank, size

    def __iter__(self) -> "ShardedBatches":
        """Return the iterator."""
        return self

    def __next__(self) -> torch.Tensor:
        """Return this rank's rows of the next batch; shares differ by at most one row and may be empty."""
        batch = next(self.batches)
        start, stop = (len(batch) * (self.rank + i) // self.size for i in (0, 1))
        return batch[start:stop]


@contextmanager
def fused_training(
    backend: Backend = "auto",
    candidates: AskedCandidates = "off",
    comm: ProcessGroupCommunicator | None = None,
    sole_writer: bool = False,
) -> Iterator[None]:
    """Context in which every SAELens runner builds a `FusedSAETrainer` with these arguments. It is not thread-safe.

    Over several ranks every rank's runner harvests the same whole batches (equal seeds) and trains on its share.

    Raises:
        BackendError: This version of SAELens builds its trainer elsewhere, or ranks and prefetching were requested
            together.
    """

    def fused(*args: Any, data_provider: Any, **kwargs: Any) -> FusedSAETrainer:
        if comm is not None:
            data_provider = _share_of(data_provider, comm)
        return FusedSAETrainer(
            *args,
            data_provider=data_provider,
            backend=backend,
            candidates=candidates,
            sole_writer=sole_writer,
            comm=comm,
            **kwargs,
        )

    modules = [importlib.import_module(name) for name in USERS_OF_THE_TRAINER]
    before: list[Any] = [getattr(module, "SAETrainer", None) for module in modules]
    lost = [m.__name__ for m, trainer in zip(modules, before, strict=True) if trainer is None]
    if lost:
        raise BackendError(
            f"{', '.join(lost)} no longer names SAETrainer, so the fused trainer cannot take its place. "
            "Use FusedSAETrainer directly, or a SAELens between 6.54 and 7."
        )
    try:
        for module in modules:
            vars(module)["SAETrainer"] = fused
        yield
    finally:
        for module, trainer in zip(modules, before, strict=True):
            vars(module)["SAETrainer"] = trainer


def _share_of(data_provider: Any, comm: ProcessGroupCommunicator) -> ShardedBatches:
    if isinstance(data_provider, PrefetchingIterator):
        raise BackendError(
            "prefetch_llm_batches is on over several ranks. SAELens pauses its prefetcher during an evaluation and "
            "would not recognise a rank's share of it; set prefetch_llm_batches=False."
        )
    return ShardedBatches(data_provider, comm.rank, comm.size)


class FusedLanguageModelSAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' language model runner with the fused trainer: same arguments, same results, faster."""

    fused_backend: Backend = "auto"

    @override
    def run(self) -> Any:
        """Run the training."""
        with fused_training(backend=self.fused_backend):
            return super().run()
