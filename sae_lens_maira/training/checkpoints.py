"""Checkpoints of a training run: written by one rank, checked when read, and bound to the run's settings.

    sae_weights.safetensors, cfg.json, trainer_state.pt, ...    SAELens' files
    data_provider.json                                          where the next batch starts
    run.json                                                    settings of the run
    checksums.json                                              XXH3-128 of every other file

A checkpoint is written to a draft folder and renamed, so that a kill leaves the old one or the new one. With several
ranks, rank 0 writes; if a rank fails, any other rank can write, since all have the same state.
"""

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from sae_lens_maira.checksums import damaged_files, write_sums
from sae_lens_maira.errors import CheckpointError, MairaError
from sae_lens_maira.io import atomic_folder
from sae_lens_maira.kernels import LocalCommunicator, ProcessGroupCommunicator
from sae_lens_maira.training.latent_shares import LatentShares
from sae_lens_maira.training.sharded_optimizer import DividedAdam, ShardedAdam

PROVIDER_FILENAME = "data_provider.json"
RUN_FILENAME = "run.json"
_NAME = re.compile(r"(?:rescue_)?(\d+)")

LONGER = "trainer.total_training_samples"
"""Setting that may increase when a run continues; the learning-rate schedule is then that of the longer run."""
FREE = frozenset(
    {
        "sae.device",
        "sae.inference_architecture",
        "sae.metadata",
        "trainer.device",
        "trainer.n_checkpoints",
        "trainer.checkpoint_path",
        "trainer.save_final_checkpoint",
        "trainer.logger",
    }
)
"""Settings that do not change the result; a continued run uses the new values."""


class SavingTrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """Base of `FusedSAETrainer`: SAELens' trainer with atomic, checked checkpoints that include the position in the
    data.

    Attributes:
        comm: Communication with the other ranks.
        run_settings: Further settings that must be equal in a continued run, such as the seed, as JSON values.
        shares: The division of latents over ranks, if they are divided.
    """

    comm: ProcessGroupCommunicator | LocalCommunicator
    run_settings: dict[str, Any]
    shares: LatentShares | None = None
    _place: Any = None
    """State of the data provider after the last complete step."""

    def settings(self) -> dict[str, Any]:
        """Settings of this run by name, as JSON values."""
        parts = {"sae": self.sae.cfg.to_dict(), "trainer": asdict(self.cfg), "run": self.run_settings}
        flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return json.loads(json.dumps(flat, default=str))

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Write SAELens' checkpoint atomically, on rank 0; every rank has to call this if state is divided."""
        if isinstance(self.optimizer, DividedAdam):
            self.optimizer.collect()
        if self.shares is not None:
            self.shares.collect()
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
        # SAELens writes before it increments the step, so that its checkpoints during a run count one step too few.
        self.n_training_steps += 1
        super()._checkpoint_if_needed()
        self.n_training_steps -= 1

    @property
    def sharded(self) -> bool:
        """Whether this rank has only the moments of its share of the latents."""
        return isinstance(self.optimizer, ShardedAdam)

    def save_rescue(self) -> None:
        """Write an emergency checkpoint, on any rank that has the full state."""
        if self.cfg.checkpoint_path is None:
            return
        if isinstance(self.optimizer, DividedAdam):
            what = "the optimizer's state is" if self.shares is None else "latents are"
            sys.stderr.write(
                f"No rescue checkpoint is written: {what} divided over ranks, and this rank has its share only. The "
                "run continues from its last checkpoint.\n"
            )
            return
        name = f"rescue_{self.n_training_samples}"
        place = Path(self.cfg.checkpoint_path) / name
        with atomic_folder(place, "replace", owner=str(self.comm.rank)) as draft:
            SAETrainer.save_checkpoint(self, draft.name, self.cfg.checkpoint_path)

    @override
    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """Write SAELens' state, the data provider's, the settings, and the checksums of all files so far."""
        super().save_trainer_state(checkpoint_path)
        if self._place is not None:
            (checkpoint_path / PROVIDER_FILENAME).write_text(json.dumps(self._place), encoding="utf-8")
        (checkpoint_path / RUN_FILENAME).write_text(json.dumps(self.settings(), indent=1), encoding="utf-8")
        write_sums(checkpoint_path)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Read a checkpoint of this trainer or of SAELens'."""
        fresh = self.lr_scheduler.state_dict() if self._is_longer(Path(checkpoint_path)) else None
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._load_on_host(checkpoint_path)
        if fresh is not None:
            self._reschedule(fresh, rates)
        place = Path(checkpoint_path) / PROVIDER_FILENAME
        if place.exists() and hasattr(self.data_provider, "load_state_dict"):
            provider: Any = self.data_provider
            provider.load_state_dict(json.loads(place.read_text(encoding="utf-8")))
        self._place = provider_state(self.data_provider)
        done = self.n_training_samples
        self.checkpoint_thresholds = [at for at in self.checkpoint_thresholds if at >= done]

    def _load_on_host(self, checkpoint_path: Path | str) -> None:
        """Read SAELens' state into memory of the host; the optimizer takes to the device what it keeps."""
        device, self.cfg.device = self.cfg.device, "cpu"
        try:
            super().load_trainer_state(checkpoint_path)
        finally:
            self.cfg.device = device
        self.act_freq_scores = self.act_freq_scores.to(device)
        self.n_forward_passes_since_fired = self.n_forward_passes_since_fired.to(device)

    def _is_longer(self, checkpoint: Path) -> bool:
        saved = _saved_settings(checkpoint)
        return saved is not None and saved.get(LONGER, 0) != self.cfg.total_training_samples

    def _reschedule(self, fresh: dict[str, Any], rates: list[float]) -> None:
        """Advance a schedule of another length to the current step."""
        self.lr_scheduler.load_state_dict(fresh)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for _ in range(self.n_training_steps):
            self.lr_scheduler.step()


def checkpoints(base: Path | str) -> list[Path]:
    """List the checkpoints of an unfinished run, `<samples>` or `rescue_<samples>`, most samples first; some may be
    damaged.
    """
    found = []
    for folder in Path(base).glob("*"):
        name = _NAME.fullmatch(folder.name)
        if name is not None and folder.is_dir() and any(folder.iterdir()):
            found.append((int(name.group(1)), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def latest_checkpoint(base: Path | str) -> Path | None:
    """Checkpoint with the most samples, or None."""
    return next(iter(checkpoints(base)), None)


def set_aside(base: Path | str) -> Path | None:
    """Move all checkpoints of a folder to a subfolder that is not searched; return it, or None without checkpoints."""
    old = checkpoints(base)
    if not old:
        return None
    number = 1 + max(
        (int(p.name[9:]) for p in Path(base).glob("replaced-*") if p.name[9:].isdigit()), default=0
    )
    place = Path(base) / f"replaced-{number}"
    place.mkdir()
    for folder in old:
        shutil.move(folder, place / folder.name)
    return place


def resume_latest(trainer: SavingTrainer[Any, Any], base: Path | str) -> Path | None:
    """Continue from the newest undamaged checkpoint; damaged ones are reported and skipped.

    Returns:
        Path of the checkpoint; None if there is none.

    Raises:
        CheckpointError: All checkpoints are damaged, or the newest one belongs to a run with other settings.
    """
    found = checkpoints(base)
    damage = []
    for number, folder in enumerate(found, 1):
        try:
            verify(folder)
        except CheckpointError as error:
            damage.append(str(error))
            if trainer.comm.rank == 0:
                following = " The checkpoint before it is tried." if number < len(found) else ""
                sys.stderr.write(f"warning: {error}{following}\n")
            continue
        _load(trainer, folder)
        return folder
    if damage:
        raise CheckpointError(
            f"None of the {len(found)} checkpoints in {base} can be used. {damage[0]} Remove them, or pass --resume "
            "false, to start again."
        )
    return None


def resume(trainer: SavingTrainer[Any, Any], checkpoint: Path | str) -> None:
    """Load weights, trainer state and, if the checkpoint has it, the data provider's position, all in place.

    For a provider without `state_dict` and `load_state_dict`, the caller must skip the used batches.

    Raises:
        CheckpointError: The folder is not a training checkpoint, is damaged, or belongs to a run with other settings.
    """
    checkpoint = Path(checkpoint)
    missing = [n for n in (SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME) if not (checkpoint / n).exists()]
    if missing:
        raise CheckpointError(
            f"{checkpoint} lacks {' and '.join(missing)}; expected a training checkpoint of SAELens or of "
            "this package. A saved SAE alone cannot be resumed."
        )
    verify(checkpoint)
    _load(trainer, checkpoint)


def _load(trainer: SavingTrainer[Any, Any], checkpoint: Path) -> None:
    """Resume from a checkpoint whose files were verified."""
    try:
        _check_settings(trainer, checkpoint)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        trainer.load_trainer_state(checkpoint)
    except MairaError:
        raise
    except Exception as error:  # torch and pickle raise many types for a damaged file
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{checkpoint} cannot be read ({reason}). Remove it to continue from the one before, or start again with "
            "another checkpoint folder."
        ) from error


def verify(checkpoint: Path) -> None:
    """Compare every file with its checksum; a checkpoint without checksums, as written by SAELens, is accepted.

    Raises:
        CheckpointError: A file is missing or changed.
    """
    lacking = [n for n in (SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME) if not (checkpoint / n).exists()]
    if wrong := lacking or damaged_files(checkpoint):
        raise CheckpointError(
            f"The checkpoint {checkpoint} is damaged: {', '.join(wrong)} is missing or was changed."
        )


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """List settings that differ but must be equal, each as "name is X in the checkpoint and Y here"."""
    names = sorted(name for name in saved.keys() | asked.keys() if name not in {*FREE, LONGER})
    return [
        f"{name} is {saved.get(name)!r} in the checkpoint and {asked.get(name)!r} here"
        for name in names
        if saved.get(name) != asked.get(name)
    ]


def provider_state(provider: Any) -> Any:
    """State of a data provider before its next batch; None if it cannot be saved and loaded."""
    return provider.state_dict() if hasattr(provider, "load_state_dict") else None


def contiguous_W_enc(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook that makes W_enc contiguous, since safetensors refuses other memory orders."""
    state_dict[f"{prefix}W_enc"] = state_dict[f"{prefix}W_enc"].contiguous()


def _check_settings(trainer: SavingTrainer[Any, Any], checkpoint: Path) -> None:
    saved, asked = _saved_settings(checkpoint), trainer.settings()
    first = trainer.comm.rank == 0
    if saved is None:
        if first:
            sys.stderr.write(
                f"warning: {checkpoint} does not record the settings of its run, so they are not compared.\n"
            )
        return
    if differ := differences(saved, asked):
        raise CheckpointError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(differ)}. Use the settings of that run to "
            "continue it, name another trainer.checkpoint_path, or pass --resume false to start again."
        )
    before, wanted = saved[LONGER], asked[LONGER]
    name = _NAME.fullmatch(checkpoint.name)
    done = int(name.group(1)) if name is not None else 0
    if wanted < done:
        raise CheckpointError(
            f"{checkpoint} has {done:,} samples, and {LONGER} is {wanted:,} here. Ask for at least as many, name "
            "another trainer.checkpoint_path, or pass --resume false to start again."
        )
    if wanted != before and first:
        sys.stderr.write(
            f"The run is continued to {wanted:,} samples instead of {before:,}; the learning rate follows the schedule "
            "of the new length.\n"
        )


def _saved_settings(checkpoint: Path) -> dict[str, Any] | None:
    path = checkpoint / RUN_FILENAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


__all__ = [
    "SavingTrainer",
    "checkpoints",
    "latest_checkpoint",
    "provider_state",
    "resume",
    "resume_latest",
    "set_aside",
]
