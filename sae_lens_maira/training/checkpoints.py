"""The newest checkpoint, how a run continues from it, and where its data provider stood.

A folder is complete when it carries its final name, as `whole` leaves it: a killed process leaves no half. The files
inside are SAELens', and one more where the data provider can say where its next batch starts. This module knows names
and files, nothing about tensors.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens.constants import SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME

from sae_lens_maira.errors import CheckpointError

if TYPE_CHECKING:
    from sae_lens_maira.training.trainer import FusedSAETrainer

PROVIDER_FILENAME = "data_provider.json"
_NAME = re.compile(r"(?:rescue_)?(\d+)")


def latest_checkpoint(base: Path | str) -> Path | None:
    """The complete checkpoint of an unfinished run with the most samples, `<samples>` or `rescue_<samples>`."""
    found = []
    for folder in Path(base).glob("*"):
        name = _NAME.fullmatch(folder.name)
        files = [folder / SAE_WEIGHTS_FILENAME, folder / TRAINER_STATE_FILENAME]
        if name is not None and all(file.exists() for file in files):
            found.append((int(name.group(1)), folder))
    return max(found)[1] if found else None


def resume(trainer: "FusedSAETrainer", checkpoint: Path | str) -> None:
    """Loads weights, trainer state and, where the checkpoint has it, the data provider's place, all in place.

    A provider without `state_dict` and `load_state_dict` is the caller's to move on.

    Raises:
        CheckpointError: the folder is not a training checkpoint.
    """
    checkpoint = Path(checkpoint)
    missing = [n for n in (SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME) if not (checkpoint / n).exists()]
    if missing:
        raise CheckpointError(
            f"{checkpoint} lacks {' and '.join(missing)}; expected a training checkpoint of SAELens or of "
            "this package. A saved SAE alone cannot be resumed."
        )
    trainer.sae.load_weights_from_checkpoint(checkpoint)
    trainer.load_trainer_state(checkpoint)


def provider_state(provider: Any) -> Any:
    """Where a data provider's next batch starts, if it can say."""
    return provider.state_dict() if hasattr(provider, "load_state_dict") else None


def save_provider_state(checkpoint: Path, state: Any) -> None:
    """Write a state of `provider_state` into a checkpoint."""
    if state is not None:
        (checkpoint / PROVIDER_FILENAME).write_text(json.dumps(state), encoding="utf-8")


def load_provider_state(checkpoint: Path, provider: Any) -> None:
    """Move a data provider to where it stood, if it can be moved and the checkpoint says where."""
    file = checkpoint / PROVIDER_FILENAME
    if file.exists() and hasattr(provider, "load_state_dict"):
        provider.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
