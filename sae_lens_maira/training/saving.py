"""SAELens' trainer, with checkpoints that are whole, written by one rank, and know where the data stood.

SAELens writes into the final folder, so a kill in between leaves half a checkpoint under a whole one's name. Here the
folder is written aside and renamed. Of several ranks the first writes, or, when one fails, whichever survivor comes
first, for all hold the same state. It knows nothing about how a step is made.
"""

from pathlib import Path
from typing import Any

from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from sae_lens_maira.io import atomic_folder
from sae_lens_maira.kernels import LocalCommunicator, ProcessGroupCommunicator
from sae_lens_maira.training.checkpoints import load_provider_state, provider_state, save_provider_state


class SavingTrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """Base of `FusedSAETrainer`.

    Attributes:
        comm: The other ranks.
    """

    comm: ProcessGroupCommunicator | LocalCommunicator
    _place: Any = None
    """Where the data provider stood behind the last whole step."""

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """SAELens' checkpoint, written aside and then renamed: a kill leaves the old or the new, never half."""
        if self.comm.rank > 0:
            return
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
            return
        with atomic_folder(Path(base) / checkpoint_name, "replace", owner="0") as draft:
            super().save_checkpoint(draft.name, base, wandb_aliases)

    @override
    def _checkpoint_if_needed(self) -> None:
        # SAELens writes before it counts the step, so its own mid-run checkpoints are one step short of their weights.
        self.n_training_steps += 1
        super()._checkpoint_if_needed()
        self.n_training_steps -= 1

    def save_rescue(self) -> None:
        """Any survivor may write it: all ranks hold the same state, and the first complete one wins."""
        if self.cfg.checkpoint_path is None:
            return
        name = f"rescue_{self.n_training_samples}"
        place = Path(self.cfg.checkpoint_path) / name
        with atomic_folder(place, "replace", owner=str(self.comm.rank)) as draft:
            SAETrainer.save_checkpoint(self, draft.name, self.cfg.checkpoint_path)

    @override
    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """SAELens' state, and where the data provider's next batch starts."""
        super().save_trainer_state(checkpoint_path)
        save_provider_state(checkpoint_path, self._place)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Reads a checkpoint of this trainer or of SAELens'."""
        super().load_trainer_state(checkpoint_path)
        load_provider_state(Path(checkpoint_path), self.data_provider)
        self._place = provider_state(self.data_provider)
        done = self.n_training_samples
        self.checkpoint_thresholds = [at for at in self.checkpoint_thresholds if at >= done]
