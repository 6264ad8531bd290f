"""`harvest` and `train` from a recipe: one command gives an SAE; ranks come from the environment; tables are read."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from sae_lens_maira.activations import ActivationStore
from sae_lens_maira.cli import build_parser, main
from sae_lens_maira.cli.options import HarvestOptions
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import control_kind, load_matryoshka
from sae_lens_maira.studies import StudyTable, table_of_studies
from sae_lens_maira.studies.table import IMAGES

pytestmark = pytest.mark.compat

RECIPES = Path(__file__).parents[2] / "recipes"
FEW = ["--studies", "6", "--shard-studies", "4"]
SMALL = [*FEW, "--trainer.total_training_samples", "4096", "--trainer.lr_warm_up_steps", "1"]
SMALL += ["--trainer.lr_decay_steps", "1", "--trainer.n_batches_for_norm_estimate", "4"]


def test_recipe_harvests_then_trains(tmp_path, capsys):
    """The phantom's recipe, made small: a complete store, and an SAE that plain SAELens loads."""
    words = ["--config", str(RECIPES / "phantom.yaml"), "--store", str(tmp_path / "store")]
    assert main(["harvest", *words, *FEW, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    store = ActivationStore(tmp_path / "store")
    assert printed["complete"]
    assert printed["rows"] == len(store) > 0
    assert set(store.index(0)["role"]) >= {3, 10}
    words += [*SMALL, "--trainer.checkpoint_path", "null"]
    assert main(["train", *words, "--out", str(tmp_path / "sae"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(store)
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.d_sae == 1024
    words += ["--control", "frozen_decoder", "--out", str(tmp_path / "control")]
    assert main(["train", *words]) == 0
    control = load_matryoshka(tmp_path / "control")
    assert control_kind(control) == "frozen_decoder"
    assert not torch.allclose(control.W_dec, sae.W_dec)


@pytest.mark.parametrize("name", ["maira2_paper", "maira2_fast", "phantom"])
def test_recipes_parse(name):
    """Every recipe is understood by both commands, and its first line is the command."""
    path = RECIPES / f"{name}.yaml"
    assert path.read_text().startswith(f"# sae-lens-maira train --config recipes/{name}.yaml")
    for command in ("harvest", "train"):
        build_parser(command).parse_args(["--config", str(path)])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Six phantom studies as a table with absolute image paths, away from its images; two of them to test on."""
    folder = tmp_path_factory.mktemp("studies")
    made = table_of_studies(generate_studies(6, seed=9), folder)
    frame = made.frame.copy()
    for column in IMAGES:
        frame[column] = (str(folder) + "/") + frame[column]
    frame["split"] = ["train"] * 4 + ["test"] * 2
    path = tmp_path_factory.mktemp("elsewhere") / "studies.parquet"
    return StudyTable.from_frame(frame, folder).save(path)


def test_a_table_with_absolute_paths_is_harvested_by_split(table, tmp_path, capsys):
    """`--table` takes images from wherever they lie, and `--split` leaves the others unread."""
    words = ["harvest", "--table", str(table), "--hooks", "[blocks.1.hook_resid_post]", "--json"]
    assert main([*words, "--split", "train", "--store", str(tmp_path / "store")]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    assert ActivationStore(tmp_path / "store").spec.n_studies == 4
    assert main([*words, "--split", "validate", "--store", str(tmp_path / "none")]) == 2
    assert "none of them in the split validate" in capsys.readouterr().err


def test_harvest_and_train_share_their_options():
    """Every field of HarvestOptions is an option of both, with the same text; nothing is written twice."""
    names = {field.name for field in fields(HarvestOptions)}
    texts = [
        {action.dest: action.help for action in build_parser(name)._actions} for name in ("harvest", "train")
    ]
    for text in texts:
        assert names < set(text)
    assert {name: texts[0][name] for name in names} == {name: texts[1][name] for name in names}


def test_harvest_without_a_store_says_so(capsys):
    assert main(["harvest", "--hooks", "[blocks.1.hook_resid_post]"]) == 2
    assert "--store FOLDER" in capsys.readouterr().err


def test_train_straight_from_the_model(tmp_path, capsys):
    """`--direct true`: the same recipe, no store on disk, an SAE that plain SAELens loads."""
    words = ["train", "--config", str(RECIPES / "phantom.yaml"), *SMALL, "--direct", "true", "--json"]
    words += ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "sae")]
    words += ["--trainer.checkpoint_path", "null"]
    assert main([*words, "--provider", "{buffer_rows: 1024, group: 6}"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] is None
    assert not (tmp_path / "store").exists()
    assert SAE.load_from_disk(tmp_path / "sae").cfg.d_sae == 1024


def test_train_continues_from_its_newest_checkpoint(tmp_path, capsys):
    """The same command again starts at the last checkpoint and ends with the same SAE, bit for bit."""
    words = ["train", "--config", str(RECIPES / "phantom.yaml"), *SMALL, "--store", str(tmp_path / "store")]
    words += ["--trainer.checkpoint_path", str(tmp_path / "checkpoints"), "--trainer.n_checkpoints", "2"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert "continuing" not in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "two")]) == 0
    assert "continuing from" in capsys.readouterr().err
    one, two = (SAE.load_from_disk(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    (tmp_path / "store" / "shard-000000.parquet").write_bytes(b"x")
    assert main([*words, "--out", str(tmp_path / "three")]) == 2
    assert "shard 0" in capsys.readouterr().err


def test_store_commands(tmp_path, capsys):
    """show counts rows by role, validate names a damaged shard, export and import give the rows back."""
    store, cached, back = (str(tmp_path / name) for name in ("store", "cached", "back"))
    words = ["--studies", "3", "--hooks", "blocks.1.hook_resid_post", "--roles", "generated_only"]
    assert main(["harvest", *words, "--store", store]) == 0
    capsys.readouterr()
    assert main(["store", "show", "--store", store, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["roles"] == {"report": printed["rows"]}
    assert 256 < printed["bytes_per_row"] < 500
    assert main(["store", "show", "--store", store]) == 0
    assert f"report         {printed['rows']:,}" in capsys.readouterr().out
    assert main(["store", "export", "--store", store, "--out", cached, "--context-size", "1"]) == 0
    assert "d_in=128" in capsys.readouterr().out
    again = [
        "store",
        "export",
        "--store",
        store,
        "--out",
        str(tmp_path / "again"),
        "--context-size",
        "1",
        "--json",
    ]
    assert main(again) == 0
    exported = json.loads(capsys.readouterr().out)
    assert (exported["rows"], exported["left_out"], exported["d_in"]) == (printed["rows"], 0, 128)
    assert main(["store", "import", "--cached", cached, "--store", back]) == 0
    assert f"{printed['rows']:,} rows" in capsys.readouterr().out
    sums = tmp_path / "sums"
    assert main(["store", "validate", "--store", back, "--sums", str(sums), "--json"]) == 0
    listed = dict(line.split("  ")[::-1] for line in sums.read_text().splitlines())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(back).iterdir()}
    assert listed == {name: digest for name, digest in found.items() if not name.startswith(".")}
    assert json.loads(capsys.readouterr().out)["whole"] is True
    (tmp_path / "back" / "shard-000000.parquet").unlink()
    assert main(["store", "validate", "--store", back]) == 2
    assert "shard 0" in capsys.readouterr().err
