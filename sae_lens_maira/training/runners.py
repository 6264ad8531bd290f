"""The seam that lets SAELens' runners use the fused trainer: one line for an existing user.

    with fused_training():
        LanguageModelSAETrainingRunner(cfg).run()

SAELens names its trainer inside the runners, with no argument to replace it. Within the context that name stands for
the fused trainer in every module that uses it, and is put back on the way out. It knows nothing about steps.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sae_lens import LanguageModelSAETrainingRunner
from typing_extensions import override

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels.dispatch import Backend
from sae_lens_maira.kernels.problem import Candidates
from sae_lens_maira.training.distributed import ProcessGroupCommunicator
from sae_lens_maira.training.trainer import FusedSAETrainer

USERS_OF_THE_TRAINER = (
    "sae_lens.llm_sae_training_runner",
    "sae_lens.training.multi_sae_trainer",
    "sae_lens.synthetic.synthetic_sae_runner",
    "sae_lens.synthetic.training",
)


@contextmanager
def fused_training(
    backend: Backend = "auto", candidates: Candidates = "off", comm: ProcessGroupCommunicator | None = None
) -> Iterator[None]:
    """Inside, every SAELens runner builds a `FusedSAETrainer` with these arguments. Not for threads that race.

    Raises:
        BackendError: this SAELens builds its trainer elsewhere.
    """
    fused = partial(FusedSAETrainer, backend=backend, candidates=candidates, comm=comm)
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


class FusedLanguageModelSAETrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' language model runner with the fused trainer; same arguments, same results, less time."""

    fused_backend: Backend = "auto"

    @override
    def run(self) -> Any:
        """Runs the training."""
        with fused_training(backend=self.fused_backend):
            return super().run()
