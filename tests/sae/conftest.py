"""Small SAEs and activation rows that the tests of this room share."""

import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file

from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig

D_IN, D_SAE = 12, 48


@pytest.fixture
def make_rows() -> Callable[..., torch.Tensor]:
    """Rows with a low-dimensional sparse structure, so that an SAE has something to learn."""

    def make(n: int, seed: int = 0, d_in: int = D_IN, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(20, d_in, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
        codes = torch.rand(n, 20, generator=generator, dtype=torch.float64)
        codes = codes * (torch.rand(n, 20, generator=generator, dtype=torch.float64) < 0.15)
        noise = 0.05 * torch.randn(n, d_in, generator=generator, dtype=torch.float64)
        return (codes @ directions + noise + 0.5).to(dtype)

    return make


@pytest.fixture
def make_config() -> Callable[..., MatryoshkaTrainingSAEConfig]:
    def make(**changes: object) -> MatryoshkaTrainingSAEConfig:
        fields = {"d_in": D_IN, "d_sae": D_SAE, "k": 4, "matryoshka_widths": [8, 20, 48]} | changes
        return MatryoshkaTrainingSAEConfig(**fields)  # pyright: ignore[reportArgumentType] - keywords of mixed types

    return make


@pytest.fixture
def step_input() -> Callable[..., TrainStepInput]:
    def make(rows: torch.Tensor, dead: torch.Tensor | None = None, step: int = 0) -> TrainStepInput:
        return TrainStepInput(
            sae_in=rows, coefficients={}, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False
        )

    return make


@pytest.fixture
def make_trainer(make_rows: Callable[..., torch.Tensor]) -> Callable[..., SAETrainer]:
    """A trainer of SAELens' own over an endless stream of rows that starts after `skip` batches."""

    def make(
        sae: MatryoshkaTrainingSAE, steps: int = 20, batch: int = 64, skip: int = 0, **changes: object
    ) -> SAETrainer:
        def rows() -> Iterator[torch.Tensor]:
            index = skip
            while True:
                yield make_rows(batch, seed=1000 + index, dtype=sae.dtype)
                index += 1

        fields = {
            "total_training_samples": steps * batch,
            "train_batch_size_samples": batch,
            "lr": 1e-3,
            "lr_end": 1e-3,
            "logger": LoggingConfig(log_to_wandb=False),
            "n_batches_for_norm_estimate": 3,
        } | changes
        return SAETrainer(
            cfg=SAETrainerConfig(**fields),  # pyright: ignore[reportArgumentType] - keywords of mixed types
            sae=sae,
            data_provider=rows(),
        )

    return make


@pytest.fixture
def trained(
    make_config: Callable[..., MatryoshkaTrainingSAEConfig], make_trainer: Callable[..., SAETrainer]
) -> MatryoshkaTrainingSAE:
    """A briefly trained SAE whose threshold and decoder norms are away from their first values."""
    sae = MatryoshkaTrainingSAE(make_config())
    make_trainer(sae, steps=60).fit()
    return sae.eval()


@pytest.fixture
def their_trainer_module() -> Iterator[types.ModuleType]:
    """Their Matryoshka trainer, imported without the parts of that package that want nnsight < 0.4."""
    spec = importlib.util.find_spec("dictionary_learning")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("dictionary_learning is not installed")
    root = spec.submodule_search_locations[0]
    before = set(sys.modules)
    for name, path in (("dictionary_learning", root), ("dictionary_learning.trainers", f"{root}/trainers")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    yield importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
    for name in set(sys.modules) - before:
        if name.startswith("dictionary_learning"):
            del sys.modules[name]


class Harmful:
    """Its pickle runs a command that leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.path}",))


class Published:
    """Small SAEs as others publish them: d_in 6, three groups, expansions 2, 4 and 8."""

    d_in = 6
    harmful = Harmful
    sizes = {2: [3, 3, 6], 4: [6, 6, 12], 8: [12, 12, 24]}  # noqa: RUF012 - never changed

    @staticmethod
    def state_of(expansion=4, seed=0):
        """A state dict as dictionary_learning's MatryoshkaBatchTopKSAE writes it."""
        generator = torch.Generator().manual_seed(seed + expansion)
        d_sae = expansion * Published.d_in
        return {
            "k": torch.tensor(3, dtype=torch.int),
            "threshold": torch.tensor(0.4),
            "group_sizes": torch.tensor(Published.sizes[expansion]),
            "W_enc": torch.randn(Published.d_in, d_sae, generator=generator),
            "b_enc": 0.1 * torch.randn(d_sae, generator=generator),
            "W_dec": torch.randn(d_sae, Published.d_in, generator=generator),
            "b_dec": torch.randn(Published.d_in, generator=generator),
        }

    @staticmethod
    def config_of(expansion=4, **changes):
        trainer = {
            "dict_class": "MatryoshkaBatchTopKSAE",
            "activation_dim": Published.d_in,
            "dict_size": expansion * Published.d_in,
            "k": 3,
            "group_sizes": Published.sizes[expansion],
            "group_fractions": [0.25, 0.25, 0.5],
            "layer": 15,
            "lm_name": "maira-2",
        } | changes
        return {"trainer": {name: value for name, value in trainer.items() if value is not None}}

    @staticmethod
    def reference(state, rows, scale=1.0):
        """dictionary_learning's inference: relu, strict threshold, decode."""
        b_dec, b_enc = state["b_dec"] * scale, state["b_enc"] * scale
        acts = torch.relu((rows - b_dec) @ state["W_enc"] + b_enc)
        acts = acts * (acts > state["threshold"] * scale)
        return acts, acts @ state["W_dec"] + b_dec

    @staticmethod
    def without_groups(state):
        return {name: value for name, value in state.items() if name != "group_sizes"}

    @staticmethod
    def write_pt(folder, state, config=None, name="ae.pt"):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / name)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def published() -> type[Published]:
    return Published


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of converted SAEs of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SAE_LENS_MAIRA_CACHE", str(folder))
    return folder


@pytest.fixture
def release(tmp_path, published):
    """Three SAEs in folders, the largest as safetensors, with a run's checkpoints and tables next to them."""
    root = tmp_path / "release"
    for expansion in (2, 4):
        published.write_pt(
            root / f"layer15_ef{expansion}", published.state_of(expansion), published.config_of(expansion)
        )
    (root / "layer15_ef8").mkdir()
    save_file(published.state_of(8), root / "layer15_ef8" / "ae.safetensors")
    published.write_pt(root / "layer15_ef8", published.state_of(8, seed=1), published.config_of(8))
    published.write_pt(root / "layer15_ef4" / "checkpoints", published.state_of(4, seed=2), name="ae_100.pt")
    (root / "README.md").write_text("---\nlibrary_name: dictionary-learning\n---\n")
    (root / "layer15_ef4" / "interpretations.csv").write_text("latent,interpretation\n0,pacemaker\n")
    return root
