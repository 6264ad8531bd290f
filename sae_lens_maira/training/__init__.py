"""Training of SAEs with the fused step, inside SAELens' own trainer and runners.

`FusedSAETrainer` is SAELens' `SAETrainer` with another `_train_step`; `fused_training()` makes SAELens' runners use it.
The package also contains multi-process training, and checkpoints that survive a kill.
"""

from sae_lens_maira.kernels import ProcessGroupCommunicator
from sae_lens_maira.training.checkpoints import latest_checkpoint, resume
from sae_lens_maira.training.controls import train_control
from sae_lens_maira.training.optimizer import RowMajorAdam
from sae_lens_maira.training.runners import (
    FusedLanguageModelSAETrainingRunner,
    ShardedBatches,
    fused_training,
)
from sae_lens_maira.training.sharded_optimizer import ShardedAdam
from sae_lens_maira.training.trainer import FusedSAETrainer

__all__ = [
    "FusedLanguageModelSAETrainingRunner",
    "FusedSAETrainer",
    "ProcessGroupCommunicator",
    "RowMajorAdam",
    "ShardedAdam",
    "ShardedBatches",
    "fused_training",
    "latest_checkpoint",
    "resume",
    "train_control",
]
