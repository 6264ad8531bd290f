"""A small training run as a user would write it for torchrun; started by test_distributed.py, alone or with torchrun.

Batch i is a function of i, so a resumed run sees what the first one would have seen. Batches of one row leave
rank 0 of two with nothing. `--kill-step` makes the named ranks kill themselves before that step.
"""

import argparse
import copy
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from sae_lens.config import SAETrainerConfig

from sae_lens_maira.distributed import distributed
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, load_matryoshka
from sae_lens_maira.sae.config import LossConvention
from sae_lens_maira.training import (
    FusedSAETrainer,
    ProcessGroupCommunicator,
    ShardedBatches,
    latest_checkpoint,
    resume,
)
from sae_lens_maira.training.initial import start_from

ROWS = (64, 63, 1, 64)
STEPS = 14
D_IN, D_SAE = 24, 65


def whole_batches(start: int) -> Iterator[torch.Tensor]:
    """Batches of all ranks together."""
    directions = torch.randn(96, D_IN, generator=torch.Generator().manual_seed(0))
    index = start
    while True:
        generator = torch.Generator().manual_seed(index + 1)
        on = torch.rand(ROWS[index % len(ROWS)], 96, generator=generator) < 0.05
        yield on * torch.rand(on.shape, generator=generator) @ directions + 0.3
        index += 1


def samples(steps: int) -> int:
    return sum(ROWS[i % len(ROWS)] for i in range(steps))


def train(kind: str, out: Path, comm: ProcessGroupCommunicator | None, kill_step: int | None) -> list[float]:
    """One run to the end, or to the kill; the loss and auxiliary loss of every step done here.

    `kind` is a loss convention, or "whitened": that of SAELens on whitened rows; "-sharded" divides the optimizer's
    state over the ranks, "-latents" the latents; "-init" starts from another SAE.
    """
    kind, *options = kind.split("-")
    convention = cast(LossConvention, "saelens" if kind == "whitened" else kind)
    torch.manual_seed(0 if comm is None else comm.rank)  # ranks start apart: rank 0's weights must win
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=4.5,
        matryoshka_widths=[8, 24, D_SAE],
        loss_convention=convention,
        use_matryoshka_aux_loss=convention == "saelens",
        threshold_start_step=3,
        dead_after_tokens=60,
        normalize_activations="covariance_whitening" if kind == "whitened" else "none",
    )
    trainer_cfg = SAETrainerConfig(
        total_training_samples=samples(STEPS),
        train_batch_size_samples=64,
        lr=1e-3,
        lr_end=1e-3,
        dead_feature_window=3,
        n_checkpoints=3,
        n_batches_for_norm_estimate=8,
        checkpoint_path=str(out),
    )
    trainer = FusedSAETrainer(
        trainer_cfg,
        MatryoshkaTrainingSAE(cfg),
        iter(()),
        comm=comm,
        shard_optimizer="sharded" in options,
        shard_latents="latents" in options,
    )
    if "init" in options:
        torch.manual_seed(7)
        other = MatryoshkaTrainingSAE(copy.deepcopy(cfg))
        other.b_enc.data.normal_()
        start_from(trainer, load_matryoshka(other))
    found = latest_checkpoint(out) if out.exists() else None
    if found is not None:
        resume(trainer, found)
    batches = whole_batches(trainer.n_training_steps)
    trainer.data_provider = batches if comm is None else ShardedBatches(batches, comm.rank, comm.size)
    losses = []
    plain_step = trainer.step

    def step(batch: torch.Tensor):
        if trainer.n_training_steps == kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
        output = plain_step(batch)
        losses.append(float(output.loss))
        losses.append(float(output.losses["auxiliary_reconstruction_loss"]))
        return output

    trainer.step = step
    sae = trainer.fit()
    if trainer.comm.rank == 0:
        sae.save_model(out / "done")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", nargs="+", default=["saelens"])
    parser.add_argument("--kill-step", type=int, default=None)
    parser.add_argument("--kill-ranks", type=int, nargs="*", default=[])
    args = parser.parse_args()
    with distributed(timeout_s=60) as ranks:
        comm = ProcessGroupCommunicator(ranks)
        for kind in args.kind:
            kill_step = args.kill_step if comm.rank in args.kill_ranks else None
            losses = train(kind, args.out / kind, comm, kill_step)
            (args.out / kind / f"losses_{comm.rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
