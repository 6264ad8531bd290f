"""Two ranks of half a batch are one rank of the whole: selection, losses, weights; and what a kill -9 leaves behind."""

import json
import os
import re
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


PLAIN = ("saelens", "dictionary_learning", "whitened")
ALONE = (*PLAIN, "saelens-init")
DIVIDED = ("saelens-sharded", "dictionary_learning-sharded", *(f"{kind}-latents" for kind in ALONE))
CONTINUED = ("saelens-sharded-continued", "dictionary_learning-latents-continued")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, worker) -> tuple[Path, dict[str, list[float]]]:
    """Folder of one process's runs, and their losses."""
    out = tmp_path_factory.mktemp("one")
    return out, {kind: worker.train(kind, out / kind, None, None) for kind in ALONE}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, one_rank) -> Path:
    """Folder of undisturbed runs of two ranks; those of CONTINUED start from a checkpoint of one process."""
    out = tmp_path_factory.mktemp("two")
    for kind in CONTINUED:
        checkpoint = checkpoint_of(one_rank[0] / undivided(kind))
        shutil.copytree(checkpoint, out / kind / checkpoint.name)
    torchrun(str(out), "--kind", *PLAIN, *DIVIDED, *CONTINUED)
    return out


def undivided(kind: str) -> str:
    """The kind of one process that a kind of several ranks has to equal."""
    return re.sub("-(sharded|latents|continued)", "", kind)


def checkpoint_of(folder: Path) -> Path:
    """The middle one of the scheduled checkpoints."""
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))[1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "done" / "sae_weights.safetensors")


@pytest.mark.parametrize("kind", PLAIN + DIVIDED)
def test_two_ranks_are_one(kind, two_ranks, one_rank):
    """Shares of 32 + 32, 31 + 32 and 0 + 1 rows, with dead latents and the auxiliary loss; one whitening of all."""
    losses = one_rank[1][undivided(kind)]
    both = [json.loads((two_ranks / kind / f"losses_{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    if not kind.startswith("whitened"):  # there no latent dies in so few steps
        assert max(losses[1::2]) > 0  # the auxiliary loss was on
    assert both[0] == pytest.approx(losses, rel=1e-5)
    alone, together = weights(one_rank[0] / undivided(kind)), weights(two_ranks / kind)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("kind", "continued"), [("saelens-sharded", CONTINUED[0]), ("dictionary_learning-latents", CONTINUED[1])]
)
def test_what_is_divided_is_saved_whole(kind, continued, two_ranks, one_rank, worker, tmp_path):
    """Checkpoints of one and of two ranks continue on the other number, at the exact row."""
    convention = undivided(kind)
    divided, plain = checkpoint_of(two_ranks / kind), checkpoint_of(one_rank[0] / convention)
    states = [torch.load(p / "trainer_state.pt") for p in (divided, plain)]
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys()
    for number, expected in moments[1].items():
        for name, tensor in expected.items():
            torch.testing.assert_close(moments[0][number][name], tensor, rtol=1e-4, atol=1e-8, msg=name)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(states[0][name], states[1][name]), name
    out = tmp_path / convention
    shutil.copytree(divided, out / divided.name)
    worker.train(convention, out, None, None)
    for folder in (out, two_ranks / continued):
        for name, tensor in weights(one_rank[0] / convention).items():
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
