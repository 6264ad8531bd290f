"""The command `latents`: its controls, and where studies, roles and activations come from."""

import socket

import pytest
import torch

from sae_lens_maira.activations import ActivationStore, layer_of
from sae_lens_maira.cli import main
from sae_lens_maira.cli.latents import _stand_in
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.interface import output_head
from sae_lens_maira.io import locked
from sae_lens_maira.latents import RecordSet
from sae_lens_maira.latents.source import ModelSource
from sae_lens_maira.maira2 import Maira2ForConditionalGeneration, OutputHead
from sae_lens_maira.phantom import generate_studies, load_phantom
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, make_control
from sae_lens_maira.studies import read_table

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def blocks():
    """40 studies in units of 8: a unit's report tokens are fewer than a covariance wants."""
    maira, studies = load_phantom(), generate_studies(40, seed=10_000)
    harvested = ModelSource(maira, studies, "blocks.3.hook_resid_post", "generated_only", 8)
    return [list(harvested[unit]) for unit in range(len(harvested))]  # read once: these run the model again


@pytest.fixture(scope="module")
def dictionary(blocks):
    rows = torch.cat([block.values for block in blocks[0]])
    config = MatryoshkaTrainingSAEConfig(d_in=128, d_sae=256, k=6, matryoshka_widths=[64, 256])
    return make_control("untrained", MatryoshkaTrainingSAE(config), rows, l0=6.0, seed=7)


@pytest.mark.parametrize("control", ["untrained", "untrained_whitened", "raw"])
def test_controls_are_as_sparse_as_the_sae(control, blocks, dictionary):
    rows = torch.cat([block.values for unit in range(len(blocks)) for block in blocks[unit]])
    control_sae = _stand_in(control, dictionary, blocks, seed=0)
    wanted, got = (float((sae.encode(rows) > 0).sum(-1).float().mean()) for sae in (dictionary, control_sae))
    assert got == pytest.approx(wanted, rel=0.35)  # set on the first rows, measured on all


def test_whitening_reads_on_until_there_are_rows_enough(blocks, dictionary):
    """One unit has fewer than eight rows a dimension; the control's directions have unit spread over all rows."""
    assert sum(len(block) for block in blocks[0]) < 8 * 128
    rows = torch.cat([block.values for unit in range(len(blocks)) for block in blocks[unit]])
    control_sae = _stand_in("untrained_whitened", dictionary, blocks, seed=0)
    spread = ((rows - rows.mean(0)) @ control_sae.W_enc).std(0)
    assert float(spread.detach().mean()) == pytest.approx(1, abs=0.15)


def test_a_rank_that_comes_too_late_finds_complete_records(tmp_path, monkeypatch, capsys):
    """Its error names the rank that is gone and says that nothing is left to do."""
    (tmp_path / "meta.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in (address | {"RANK": "1", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    words = ["latents", "--sae", "phantom-image", "--studies", "1", "--out", str(tmp_path)]
    assert main([*words, "--rank-timeout", "1"]) == 2
    error = capsys.readouterr().err
    assert "Rank 1 of 2 could not reach rank 0" in error
    assert f"{tmp_path} is already complete" in error


def test_a_control_without_rows_is_refused(blocks, dictionary):
    """A control cannot be fitted to a source without rows: ConfigError."""
    empty = ModelSource(load_phantom(), [], "blocks.3.hook_resid_post", "generated_only", 8)
    with pytest.raises(ConfigError, match="no rows"):
        _stand_in("raw", dictionary, empty, seed=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Twelve exported studies, a store of the first eight of them, and an SAE whose metadata name it."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["--studies", "12", "--study-seed", "41", "--out", str(folder / "studies.parquet")]
    assert main(["studies", "import", "--source", "phantom", *words]) == 0
    table = read_table(folder / "studies.parquet")
    table.frame["split"] = ["train"] * 8 + ["test"] * 4
    table.frame.to_parquet(folder / "studies.parquet")
    names = ["--table", str(folder / "studies.parquet"), "--split", "train", "--roles", "image_only"]
    assert main(["harvest", *names, "--hooks", HOOK, "--store", str(folder / "store")]) == 0
    sizes = "{total_training_samples: 2048, train_batch_size_samples: 512, lr: 0.001, lr_end: 0.0, lr_warm_up_steps: 1}"
    words = ["--sae", "{d_sae: 64, k: 4, matryoshka_widths: [16, 64]}", "--trainer", sizes]
    words += ["--hooks", HOOK, "--store", str(folder / "store"), "--out", str(folder / "sae")]
    assert main(["train", *names, *words]) == 0
    return folder


def collect(folder, *words):
    table = ["--table", str(folder / "studies.parquet")]
    sizes = ["--top", "3", "--zero", "1", "--per-interval", "1"]
    return main(["latents", "--sae", str(folder / "sae"), *table, *sizes, *words])


def test_the_training_store_is_read_without_the_model(trained, monkeypatch, capsys):
    """Store and roles come from the SAE's metadata; of the model only the output head is loaded."""
    with monkeypatch.context() as patch:
        patch.setattr(Maira2ForConditionalGeneration, "from_pretrained", None)
        assert collect(trained, "--split", "train", "--out", str(trained / "stored")) == 0
    assert "which the SAE was trained on" in capsys.readouterr().err
    meta = RecordSet.open(trained / "stored").meta
    assert (meta.studies, meta.rows_text, meta.sae) == (8, 0, "sae")
    assert meta.rows_image == len(ActivationStore(trained / "store"))


def test_other_studies_are_read_by_the_model_and_that_is_reported(trained, capsys):
    assert collect(trained, "--split", "test", "--out", str(trained / "read"), "--latents", "0-3") == 0
    assert "lacks 8 of the 8 studies" in capsys.readouterr().err
    meta = RecordSet.open(trained / "read").meta
    assert (meta.studies, meta.rows_text) == (4, 0)
    words = ["--store", str(trained / "store"), "--out", str(trained / "refused")]
    assert collect(trained, "--split", "test", *words) == 2
    assert "the table and the split that were harvested" in capsys.readouterr().err


def test_a_store_of_other_texts_or_another_model_is_refused(trained, capsys):
    """A report that was edited after the harvest, and a model in another dtype; without --store the model reads."""
    table = read_table(trained / "studies.parquet")
    table.frame.loc[3, "report"] = "Edited after the harvest."
    table.frame.to_parquet(trained / "edited.parquet")
    edited = [
        "--table",
        str(trained / "edited.parquet"),
        "--split",
        "train",
        "--out",
        str(trained / "edited"),
    ]
    store = ["--store", str(trained / "store")]
    words = ["latents", "--sae", str(trained / "sae"), "--top", "1", "--zero", "1", "--latents", "0-3"]
    assert main([*words, *edited, *store]) == 2
    assert f"Study {table.frame.loc[3, 'study_id']} has other texts or images" in capsys.readouterr().err
    assert main([*words, *edited]) == 0
    assert "The model reads the studies" in capsys.readouterr().err
    same = ["--split", "train", "--model-dtype", "bfloat16", "--out", str(trained / "other")]
    assert collect(trained, *same, *store) == 2
    assert "model dtype is 'float32' in the store and 'bfloat16' here" in capsys.readouterr().err


def test_a_folder_that_another_process_collects_into_is_refused(trained, capsys):
    with locked(trained / "busy"):
        assert collect(trained, "--split", "train", "--out", str(trained / "busy")) == 2
    assert "busy is in use" in capsys.readouterr().err


def test_the_output_head_is_the_models_own():
    """Both tensors, the vocabulary and the layer are those of the loaded model."""
    maira = load_phantom()
    ours, theirs = output_head("phantom"), OutputHead.of(maira)
    assert torch.equal(ours.norm, theirs.norm)
    assert torch.equal(ours.lm_head, theirs.lm_head)
    assert layer_of(ours.config, HOOK) == layer_of(theirs.config, HOOK) == 3
    assert ours.processor.tokenizer.get_vocab() == theirs.processor.tokenizer.get_vocab()
