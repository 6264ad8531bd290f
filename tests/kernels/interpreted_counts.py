"""Launches and host syncs of a whole training step on the triton path; run by test_triton.py with the interpreter."""

from typing import Any

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig

from sae_lens_maira.bench.counts import counted
from sae_lens_maira.kernels.problem import AskedCandidates
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_maira.training import FusedSAETrainer


def trainer(
    autocast: bool = False, convention: str = "saelens", candidates: AskedCandidates = "off"
) -> FusedSAETrainer[Any, Any]:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"d_in": 12, "d_sae": 24, "k": 3, "loss_convention": convention}
    levels: dict[str, Any] = (
        {"matryoshka_widths": [8, 24]} if convention == "saelens" else {"group_fractions": [0.3, 0.7]}
    )
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**shared, **levels))
    cfg = SAETrainerConfig(
        total_training_samples=10**6,
        train_batch_size_samples=6,
        lr=1e-4,
        lr_end=1e-4,
        autocast=autocast,
        dead_feature_window=10**6,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return FusedSAETrainer(cfg, sae, iter(()), backend="triton", candidates=candidates, sole_writer=True)


@pytest.mark.parametrize(
    ("options", "n_dead", "launches", "syncs"),
    [
        ({}, 0, 60, 2),
        ({"autocast": True}, 0, 60, 2),
        ({"candidates": "bf16"}, 0, 80, 2),
        ({"convention": "dictionary_learning", "autocast": True}, 5, 145, 2),
    ],
)
def test_a_step_launches_little_and_waits_twice(options, n_dead, launches, syncs):
    run = trainer(**options)
    *first, last = torch.randn(4, 6, 12)

    def kill() -> None:
        run.n_forward_passes_since_fired[:n_dead] = 2e6
        if n_dead and "convention" in options:
            run.sae.tokens_since_fired[:n_dead] = 10**8

    for batch in first:  # they make constants and moments
        kill()
        run._train_step(run.sae, batch)
        run.n_training_steps += 1
    kill()
    with counted() as counts:
        run._train_step(run.sae, last)
    total = counts.total
    table = "\n".join(f"{name:40s} {work}" for name, work in counts.stages.items())
    assert total.syncs <= syncs, table
    assert total.launches <= launches, table
