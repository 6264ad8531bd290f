"""Checkpoints: interchangeable with SAELens' trainer mid-run, both ways; resumed bit for bit; never half-written."""

from pathlib import Path

import pytest
import torch
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.errors import CheckpointError
from sae_lens_maira.training import FusedSAETrainer, RowMajorAdam, latest_checkpoint, resume

pytestmark = pytest.mark.compat


def run(trainer, steps):
    for _ in range(steps):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1


def continued(cls, cfg, sae, data, checkpoint):
    trainer = cls(cfg, sae, data)
    trainer.load_trainer_state(checkpoint)
    sae.load_weights_from_checkpoint(checkpoint)
    return trainer


@pytest.mark.parametrize("first", [SAETrainer, FusedSAETrainer])
@pytest.mark.parametrize("second", [SAETrainer, FusedSAETrainer])
@pytest.mark.parametrize("kind", ["batchtopk", "saelens", "ours", "dictionary_learning"])
def test_either_trainer_goes_on_from_the_other(
    first, second, kind, make_sae, make_config, planted_data, tmp_path
):
    cfg = make_config(16, lr_warm_up_steps=3, lr_decay_steps=4)
    whole = SAETrainer(cfg, make_sae(kind, dtype="float64"), planted_data(24, 64))
    run(whole, 16)
    start = first(cfg, make_sae(kind, dtype="float64"), planted_data(24, 64))
    run(start, 9)
    start.save_checkpoint("half", tmp_path)
    rest = continued(
        second, cfg, make_sae(kind, dtype="float64", seed=1), planted_data(24, 64, start=9), tmp_path / "half"
    )
    run(rest, 7)
    for name, tensor in whole.sae.state_dict().items():
        torch.testing.assert_close(rest.sae.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)
    assert rest.n_training_samples == whole.n_training_samples
    assert torch.equal(rest.act_freq_scores, whole.act_freq_scores)
    assert rest.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", ["saelens", "dictionary_learning"])
def test_resuming_is_bit_exact(kind, make_sae, make_config, planted_data, tmp_path):
    cfg = make_config(12, checkpoint_path=str(tmp_path))
    whole = FusedSAETrainer(cfg, make_sae(kind), planted_data(24, 64))
    run(whole, 12)
    start = FusedSAETrainer(cfg, make_sae(kind), planted_data(24, 64))
    run(start, 5)
    start.save_checkpoint(str(start.n_training_samples))
    rest = FusedSAETrainer(cfg, make_sae(kind, seed=3), planted_data(24, 64, start=5))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    resume(rest, found)
    run(rest, 7)
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(rest.sae.state_dict()[name], tensor), name


def test_files_hold_saelens_own_layout(make_sae, make_config, planted_data, tmp_path):
    trainer = FusedSAETrainer(make_config(3), make_sae("saelens"), planted_data(24, 64))
    run(trainer, 2)
    assert not trainer.sae.W_enc.is_contiguous()
    trainer.save_checkpoint("here", tmp_path)
    state = torch.load(tmp_path / "here" / "trainer_state.pt", weights_only=True)
    assert not state["optimizer"]["param_groups"][0]["fused"]
    assert all(t.is_contiguous() for entry in state["optimizer"]["state"].values() for t in entry.values())


def test_passed_checkpoint_marks_are_not_written_again(make_sae, make_config, planted_data, tmp_path):
    cfg = make_config(12, n_checkpoints=3, checkpoint_path=str(tmp_path))
    trainer = FusedSAETrainer(cfg, make_sae("saelens"), planted_data(24, 64))
    trainer.fit()
    names = sorted(int(folder.name) for folder in tmp_path.iterdir())
    assert len(names) == 3
    again = FusedSAETrainer(cfg, make_sae("saelens"), planted_data(24, 64))
    resume(again, tmp_path / str(names[1]))
    assert len(again.checkpoint_thresholds) == 1


def test_an_interrupted_write_leaves_the_old_checkpoint(
    make_sae, make_config, planted_data, tmp_path, monkeypatch
):
    """A failure while the trainer's state is written, after the weights: the older folder stays, and nothing else."""
    trainer = FusedSAETrainer(make_config(3), make_sae("saelens"), planted_data(24, 64))
    trainer.save_checkpoint("10", tmp_path)
    old = {file.name: file.read_bytes() for file in (tmp_path / "10").iterdir()}

    def fail(folder):
        assert any(Path(folder).iterdir())
        raise RuntimeError("stopped")

    monkeypatch.setattr(trainer, "save_trainer_state", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.save_checkpoint("10", tmp_path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in (tmp_path / "10").iterdir()} == old
    assert [p.name for p in tmp_path.iterdir()] == ["10"]
    trainer.save_checkpoint("10", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["10"]


def test_incomplete_folders_are_neither_found_nor_resumed(make_sae, make_config, planted_data, tmp_path):
    trainer = FusedSAETrainer(make_config(3), make_sae("saelens"), planted_data(24, 64))
    (tmp_path / "999").mkdir()
    (tmp_path / "77.0-1234.partial").mkdir()
    assert latest_checkpoint(tmp_path) is None
    trainer.save_checkpoint("64", tmp_path)
    trainer.save_checkpoint("rescue_128", tmp_path)
    trainer.save_checkpoint("final_500", tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "rescue_128"
    with pytest.raises(CheckpointError, match="lacks"):
        resume(trainer, tmp_path / "999")


def test_adam_takes_any_memory_order():
    """Against torch's plain Adam after norm clipping, with a transposed parameter and strange gradients."""
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(6, 10)), torch.nn.Parameter(torch.randn(10))]
    ours = [
        torch.nn.Parameter(plain[0].detach().T.contiguous().T),
        torch.nn.Parameter(plain[1].detach().clone()),
    ]
    reference = torch.optim.Adam(plain, lr=0.1, betas=(0.8, 0.99))
    adam = RowMajorAdam(ours, lr=0.1, betas=(0.8, 0.99))
    for step in range(6):
        gradients = [torch.randn(6, 10) * (3.0 if step % 2 else 0.01), torch.randn(10) * 0.01]
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient.clone()
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient.clone()  # contiguous, unlike the first parameter
        norm = torch.nn.utils.clip_grad_norm_(plain, 1.0)
        torch.testing.assert_close(adam.clip_(1.0), norm)
        reference.step()
        adam.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert adam.state[ours[0]]["exp_avg"].stride() == ours[0].stride()
