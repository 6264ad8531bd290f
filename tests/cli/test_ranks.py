"""`train` over two processes: the SAE of one process, and a killed rank ends the other with an error that names it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_maira.cli import main

pytestmark = pytest.mark.slow

HOOK = "blocks.1.hook_resid_post"
TRAINER = (
    "{total_training_samples: 6144, train_batch_size_samples: 512, lr: 0.001, n_batches_for_norm_estimate: 3}"
)
SHARED = "d_sae: 96, k: 6, matryoshka_widths: [16, 96], dtype: float64"
CONVENTIONS = {
    "saelens": f"{{{SHARED}, normalize_activations: expected_average_only_in}}",
    "dictionary_learning": f"{{{SHARED}, loss_convention: dictionary_learning, threshold_start_step: 3}}",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """The phantom's rows of 120 studies in 4 shards."""
    folder = tmp_path_factory.mktemp("rows") / "store"
    words = ["harvest", "--hooks", HOOK, "--studies", "120", "--shard-studies", "30", "--roles", "content"]
    assert main([*words, "--rates", "{image: 0.3}", "--store", str(folder)]) == 0
    return folder


def words(store: Path, out: Path, sae: str, trainer: str = TRAINER) -> list[str]:
    shared = ["train", "--hooks", HOOK, "--studies", "120", "--shard-studies", "30", "--roles", "content"]
    shared += ["--rates", "{image: 0.3}", "--store", str(store), "--out", str(out), "--device", "cpu"]
    return [*shared, "--sae", sae, "--trainer", trainer, "--provider", "{buffer_rows: 8192}"]


@pytest.fixture(scope="module")
def one_process(store, tmp_path_factory) -> dict[str, Path]:
    """SAEs of one process, by convention."""
    folder = tmp_path_factory.mktemp("one")
    for convention, sae in CONVENTIONS.items():
        assert main(words(store, folder / convention, sae)) == 0
    return {convention: folder / convention for convention in CONVENTIONS}


@pytest.mark.parametrize(
    ("convention", "options"),
    [
        ("saelens", []),
        ("dictionary_learning", ["--shard-optimizer", "true"]),
        ("saelens", ["--shard-latents", "true"]),
    ],
)
def test_torchrun_trains_the_sae_of_one_process(convention, options, store, one_process, tmp_path):
    """`torchrun --nproc-per-node 2 -m sae_lens_maira train` is one training over shares of the store."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sae_lens_maira", *words(store, tmp_path, CONVENTIONS[convention]), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Rank 0 of 2, from torchrun" in done.stderr
    assert done.stdout.count("trained at") == 1  # rank 0 alone reports
    one, two = (
        load_file(folder / "sae_weights.safetensors") for folder in (one_process[convention], tmp_path)
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_killed_rank_ends_the_other(store, tmp_path):
    """kill -9 of rank 1 of two that were started without torchrun: rank 0 names it and exits with code 2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    long = "{total_training_samples: 100000000, train_batch_size_samples: 512, n_checkpoints: 10000, checkpoint_path: "
    command = words(store, tmp_path / "sae", CONVENTIONS["saelens"], f"{long}{tmp_path / 'checkpoints'}}}")
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "sae_lens_maira", *command, "--rank-timeout", "20"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **meeting, "RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        until = time.monotonic() + 120
        while not list((tmp_path).glob("checkpoints/*/sae_weights.safetensors")):
            assert time.monotonic() < until
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        os.kill(ranks[1].pid, signal.SIGKILL)
        _, error = ranks[0].communicate(timeout=300)
        assert ranks[0].returncode == 2
        assert "Rank 1 of 2 has sent no heartbeat" in error
        assert list((tmp_path / "checkpoints").glob("rescue_*/trainer_state.pt"))
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
