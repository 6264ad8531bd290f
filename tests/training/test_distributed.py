"""Two ranks of half a batch are one rank of the whole: selection, losses, weights; and what a kill -9 leaves behind."""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_maira.errors import BackendError
from sae_lens_maira.training import FusedSAETrainer, ShardedBatches, latest_checkpoint

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("torchrun_worker.py")


def torchrun(*arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(WORKER),
    ]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode == 0) == ok, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def worker():
    spec = util.spec_from_file_location("torchrun_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Folder of an undisturbed run of two ranks, both conventions, and on whitened rows."""
    out = tmp_path_factory.mktemp("two")
    torchrun(str(out), "--kind", "saelens", "dictionary_learning", "whitened")
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "done" / "sae_weights.safetensors")


@pytest.mark.parametrize("kind", ["saelens", "dictionary_learning", "whitened"])
def test_two_ranks_are_one(kind, two_ranks, worker, tmp_path):
    """Shares of 32 + 32, 31 + 32 and 0 + 1 rows, with dead latents and the auxiliary loss; one whitening of all."""
    losses = worker.train(kind, tmp_path, None, None)
    both = [json.loads((two_ranks / kind / f"losses_{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    if kind != "whitened":  # there no latent dies in so few steps
        assert max(losses[1::2]) > 0  # the auxiliary loss was on
    assert both[0] == pytest.approx(losses, rel=1e-5)
    alone, together = weights(tmp_path), weights(two_ranks / kind)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_kills_cost_no_more_than_the_steps_since_the_last_checkpoint(two_ranks, tmp_path):
    """kill -9 of one rank, then of the resumed run as a whole; resumed again, it ends in the same bits."""
    out = tmp_path / "saelens"
    torchrun(str(tmp_path), "--kill-step", "6", "--kill-ranks", "0", ok=False)
    found = latest_checkpoint(out)
    assert found is not None
    assert found.name.startswith("rescue_")  # all six steps done are kept, by the rank that survived
    assert not list(out.glob("*.partial"))

    torchrun(str(tmp_path), "--kill-step", "9", "--kill-ranks", "0", "1", ok=False)
    found = latest_checkpoint(out)
    assert found is not None
    assert found.name.isdigit()  # a scheduled one: nobody was left to write another

    torchrun(str(tmp_path))
    for name, tensor in weights(two_ranks / "saelens").items():
        assert torch.equal(weights(out)[name], tensor), name


def test_shards_are_all_rows_in_rank_order():
    batches = [torch.arange(5)[:, None], torch.arange(1)[:, None]]
    shares = [list(ShardedBatches(iter(batches), rank, 3)) for rank in range(3)]
    for index, batch in enumerate(batches):
        assert torch.equal(torch.cat([share[index] for share in shares]), batch)


def test_ranks_cannot_fall_back_to_a_dense_step(make_sae, make_config, planted_data):
    trainer = FusedSAETrainer(make_config(1), make_sae("saelens"), planted_data(24, 64))
    trainer.comm.size = 2
    trainer.sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts)
    with pytest.raises(BackendError, match="Training over 2 ranks needs the fused step"):
        trainer.step(next(trainer.data_provider))
