"""SAELens' own evaluations run on SAEs that this package saved, from their metadata alone."""

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

import sae_lens_maira
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_maira.training import FusedSAETrainer

pytestmark = pytest.mark.compat


def test_run_evals_on_an_sae_of_the_phantom(phantom: Any) -> None:
    """The shipped SAE of report positions, in plain SAELens: from_sae needs prepend_bos and context_size."""
    sae = SAE.load_from_disk(Path(sae_lens_maira.__file__).parent / "phantom" / "saes" / "text")
    hooked = HookedMaira2(phantom)
    reports = Dataset.from_list([{"text": study.report} for study in generate_studies(60, seed=3)])
    store = ActivationsStore.from_sae(
        hooked, sae, reports, streaming=False, store_batch_size_prompts=2, n_batches_in_buffer=4
    )
    tokens = store.get_batch_tokens()
    assert tokens.shape == (2, 128)
    assert bool((tokens[:, 0] == phantom.processor.tokenizer.bos_token_id).all())
    metrics, _ = run_evals(
        sae,
        store,
        hooked,
        ActivationScaler(),
        get_eval_everything_config(2, 1, 1),
        exclude_special_tokens=False,
    )
    preserved = metrics["model_performance_preservation"]
    assert 0.5 < preserved["ce_loss_score"] <= 1.01
    assert all(math.isfinite(value) for part in metrics.values() for value in part.values())


def test_what_is_saved_names_its_text_context(tmp_path: Path) -> None:
    """Both kinds of folder; values that a run of SAELens has set stay."""
    config = MatryoshkaTrainingSAEConfig(d_in=16, d_sae=32, k=4, matryoshka_widths=[8, 32])
    config.metadata.context_size = 512
    sae = MatryoshkaTrainingSAE(config)
    torch.nn.init.ones_(sae.topk_threshold)
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "training")
    for folder, loaded in (
        ("inference", SAE.load_from_disk(tmp_path / "inference")),
        ("training", MatryoshkaTrainingSAE.load_from_disk(tmp_path / "training")),
    ):
        metadata = loaded.cfg.metadata
        assert (metadata.prepend_bos, metadata.context_size) == (True, 512), folder


def test_the_trainer_is_generic_as_saelens_own() -> None:
    alias = FusedSAETrainer[MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig]
    assert get_args(alias) == (MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig)
