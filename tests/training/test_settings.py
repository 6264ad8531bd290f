"""A continued run has the settings of its checkpoint: every field of every configuration is compared, or is free."""

import json
from dataclasses import fields

import pytest
import torch
from sae_lens.config import SAETrainerConfig

from sae_lens_maira import checksums
from sae_lens_maira.checksums import SUMS
from sae_lens_maira.errors import CheckpointError
from sae_lens_maira.sae import MatryoshkaTrainingSAEConfig
from sae_lens_maira.training import FusedSAETrainer, latest_checkpoint
from sae_lens_maira.training.checkpoints import (
    FREE,
    LONGER,
    checkpoints,
    differences,
    resume_latest,
    set_aside,
)

TRAINER = [f"trainer.{field.name}" for field in fields(SAETrainerConfig)]
SAE = [f"sae.{field.name}" for field in fields(MatryoshkaTrainingSAEConfig)]
UNCHANGING = {"sae.device", "sae.inference_architecture", "sae.metadata", "trainer.device", "trainer.logger"}
UNCHANGING |= {"trainer.checkpoint_path", "trainer.n_checkpoints", "trainer.save_final_checkpoint"}


@pytest.fixture
def trainer(make_sae, make_config, planted_data, tmp_path):
    """Builder of trainers that write their checkpoints to one folder."""

    def make(steps=12, kind="dictionary_learning", seed=0, run=None, start=0, batch=64, **options):
        sae = {name[4:]: value for name, value in options.items() if name.startswith("sae_")}
        rest = {name: value for name, value in options.items() if not name.startswith("sae_")}
        cfg = make_config(steps, batch, checkpoint_path=str(tmp_path), **{"n_checkpoints": 3, **rest})
        data = planted_data(24, batch, start=start)
        return FusedSAETrainer(cfg, make_sae(kind, **sae), data, run_settings=run or {"seed": seed})

    return make


@pytest.mark.parametrize("name", [*SAE, *TRAINER, "run.seed", "run.store", "run.init"])
def test_every_field_is_compared_or_named_as_free(name, trainer):
    """Generated from the configurations: a field that someone adds is refused when it differs, without further work."""
    saved = trainer(run={"seed": 0, "store": "a", "init": None}).settings()
    assert name in saved
    asked = saved | {name: "another value"}
    if name in UNCHANGING or name == LONGER:
        assert differences(saved, asked) == []
    else:
        assert differences(saved, asked) == [
            f"{name} is {saved[name]!r} in the checkpoint and 'another value' here"
        ]


def test_the_free_settings_are_these():
    """Only what does not change the result is free; adding to the list means editing this test."""
    assert FREE == UNCHANGING
    assert {*SAE, *TRAINER} >= FREE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 5e-4}, "trainer.lr is 0.001 in the checkpoint and 0.0005 here"),
        ({"sae_k": 3}, "sae.k is 4.5"),
        ({"sae_d_sae": 96, "sae_matryoshka_widths": [8, 24, 96]}, "sae.d_sae is 64"),
        ({"sae_matryoshka_widths": [16, 24, 64]}, r"sae.matryoshka_widths is \[8, 24, 64\]"),
        ({"sae_normalize_activations": "expected_average_only_in"}, "sae.normalize_activations is 'none'"),
        ({"seed": 1}, "run.seed is 0"),
        ({"kind": "ours"}, "sae.loss_convention is 'dictionary_learning'"),
    ],
)
def test_other_settings_are_refused_with_a_way_out(trainer, change, message, tmp_path):
    trainer().fit()
    with pytest.raises(CheckpointError, match=f"{message}.*--resume false"):
        resume_latest(trainer(**change), tmp_path)


def test_fewer_samples_are_refused_and_more_continue(trainer, tmp_path, capsys):
    """A longer run takes over the weights and follows the schedule of its own length."""
    first = trainer(lr_decay_steps=4)
    first.fit()
    with pytest.raises(CheckpointError, match=r"has 640 samples, and trainer\.total_training_samples is 256"):
        resume_latest(trainer(4, lr_decay_steps=4), tmp_path)
    longer = trainer(24, lr_decay_steps=4, start=10)
    assert resume_latest(longer, tmp_path) == tmp_path / "640"
    assert "continued to 1,536 samples instead of 768" in capsys.readouterr().err
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)  # the decay of 12 steps had begun
    longer.fit()
    assert longer.n_training_steps == 24
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["sae_weights.safetensors", "trainer_state.pt", "cfg.json", "run.json"])
def test_a_damaged_checkpoint_is_passed_over(trainer, damage, name, tmp_path, capsys):
    """The checkpoint before it is used; with none left, the error says what to do."""
    trainer().fit()
    newest, before, *_ = checkpoints(tmp_path)
    path = newest / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content) if damage == "flip" else bytes(content[: len(content) // 2]))
    if damage == "remove":
        path.unlink()
    resumed = trainer(start=6)
    assert resume_latest(resumed, tmp_path) == before
    assert resumed.n_training_samples == int(before.name)
    assert name in capsys.readouterr().err
    for folder in checkpoints(tmp_path):
        (folder / SUMS).write_text("{")
    capsys.readouterr()
    with pytest.raises(CheckpointError, match=r"None of the .* checkpoints"):
        resume_latest(trainer(), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    tried = ["The checkpoint before it is tried." in line for line in lines]
    assert tried == [True] * (len(lines) - 1) + [False]  # there is none before the oldest


def test_a_checkpoint_is_read_once_to_be_verified(trainer, tmp_path, monkeypatch):
    trainer().fit()
    read = []
    summed = checksums._sum_of
    monkeypatch.setattr(checksums, "_sum_of", lambda path: read.append(path.name) or summed(path))
    assert resume_latest(trainer(), tmp_path) is not None
    assert len(read) == len(set(read)) > 3


def test_starting_again_sets_checkpoints_aside(trainer, tmp_path):
    trainer().fit()
    names = {folder.name for folder in checkpoints(tmp_path)}
    assert set_aside(tmp_path) == tmp_path / "replaced-1"
    assert {path.name for path in (tmp_path / "replaced-1").iterdir()} == names
    assert latest_checkpoint(tmp_path) is None
    assert set_aside(tmp_path) is None


def test_a_run_too_short_to_set_its_threshold_sets_it_at_the_end(trainer):
    """Never set, the threshold passes every positive activation; from the last batches, about k pass."""
    short = trainer(9, sae_threshold_start_step=1000)
    with pytest.warns(UserWarning, match="before the threshold is first set"):
        sae = short.fit()
    assert float(sae.topk_threshold) > 0
    rows = next(short.data_provider)
    with torch.no_grad():
        passing = (sae.encode_with_hidden_pre(rows)[1] > sae.topk_threshold).sum(1).float().mean()
    assert float(passing) < 4.5 * 2


def test_a_threshold_that_no_batch_can_set_is_reported(trainer):
    """With hooks on the SAE SAELens' own step runs, which records no smallest activations."""
    short = trainer(9, sae_threshold_start_step=1000)
    short.sae.hook_sae_input.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="the threshold was never set"):
        sae = short.fit()
    assert float(sae.topk_threshold) == -1


def test_settings_are_json(trainer):
    """Settings are unchanged by a round trip through JSON."""
    settings = trainer().settings()
    assert json.loads(json.dumps(settings)) == settings
