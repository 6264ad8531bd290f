"""Two ranks of half a batch are one rank of the whole: selection, losses, weights; and what a kill -9 leaves behind."""

import json
import os
import shutil
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


KINDS = ("saelens", "dictionary_learning", "whitened", "saelens-sharded", "dictionary_learning-sharded")
CONTINUED = "saelens-sharded-continued"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, worker) -> tuple[Path, dict[str, list[float]]]:
    """Folder of one process's runs, and their losses."""
    out = tmp_path_factory.mktemp("one")
    return out, {
        k: worker.train(k, out / k, None, None) for k in ("saelens", "dictionary_learning", "whitened")
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, one_rank) -> Path:
    """Folder of undisturbed runs of two ranks; the last kind continues from a checkpoint of one process."""
    out = tmp_path_factory.mktemp("two")
    shutil.copytree(
        checkpoint_of(one_rank[0] / "saelens"), out / CONTINUED / checkpoint_of(one_rank[0] / "saelens").name
    )
    torchrun(str(out), "--kind", *KINDS, CONTINUED)
    return out


def checkpoint_of(folder: Path) -> Path:
    """The middle one of the scheduled checkpoints."""
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))[1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "done" / "sae_weights.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind, two_ranks, one_rank):
    """Shares of 32 + 32, 31 + 32 and 0 + 1 rows, with dead latents and the auxiliary loss; one whitening of all."""
    losses = one_rank[1][kind.split("-")[0]]
    both = [json.loads((two_ranks / kind / f"losses_{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    if kind != "whitened":  # there no latent dies in so few steps
        assert max(losses[1::2]) > 0  # the auxiliary loss was on
    assert both[0] == pytest.approx(losses, rel=1e-5)
    alone, together = weights(one_rank[0] / kind.split("-")[0]), weights(two_ranks / kind)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_divided_optimizer_changes_nothing_but_where_moments_are(two_ranks, one_rank, worker, tmp_path):
    """Checkpoints of one and of two ranks continue on the other number, at the exact row."""
    divided, plain = (checkpoint_of(two_ranks / kind) for kind in ("saelens-sharded", "saelens"))
    states = [torch.load(p / "trainer_state.pt")["optimizer"]["state"] for p in (divided, plain)]
    assert states[0].keys() == states[1].keys()
    for number, moments in states[1].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(states[0][number][name], tensor, rtol=1e-5, atol=1e-8, msg=name)
    out = tmp_path / "saelens"
    shutil.copytree(divided, out / divided.name)
    worker.train("saelens", out, None, None)
    for folder in (out, two_ranks / CONTINUED):
        for name, tensor in weights(one_rank[0] / "saelens").items():
            torch.testing.assert_close(weights(folder)[name], tensor, rtol=0, atol=1e-6, msg=name)


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
