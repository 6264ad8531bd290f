"""`harvest` and `train` from a recipe: one command gives an SAE; ranks come from the environment; tables are read."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sae_lens import SAE

from sae_lens_maira.activations import ActivationStore
from sae_lens_maira.cli import build_parser, main
from sae_lens_maira.commands.harvest import rank_of, studies_of
from sae_lens_maira.errors import StudyError

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--studies", "6", "--shard_studies", "4", "--trainer.total_training_samples", "4096"]
SMALL += ["--trainer.lr_warm_up_steps", "1", "--trainer.lr_decay_steps", "1"]


def test_recipe_harvests_then_trains(tmp_path, capsys):
    """The phantom's recipe, made small: a complete store, and an SAE that plain SAELens loads."""
    words = ["--config", str(RECIPES / "phantom.yaml"), "--store", str(tmp_path / "store"), *SMALL]
    assert main(["harvest", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    store = ActivationStore(tmp_path / "store")
    assert told["complete"]
    assert told["rows"] == len(store) > 0
    assert set(store.index(0)["role"]) >= {3, 10}
    assert main(["train", *words, "--out", str(tmp_path / "sae"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(store)
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.d_sae == 1024


@pytest.mark.parametrize("name", ["maira2_paper", "maira2_fast", "phantom"])
def test_recipes_parse(name):
    """Every recipe is understood by both commands, and its first line is the command."""
    path = RECIPES / f"{name}.yaml"
    assert path.read_text().startswith(f"# sae-lens-maira train --config recipes/{name}.yaml")
    for command in ("harvest", "train"):
        build_parser().parse_args([command, "--config", str(path)])


def test_ranks_of_torchrun_and_slurm():
    assert rank_of({}) == (0, 1)
    assert rank_of({"RANK": "2", "WORLD_SIZE": "4"}) == (2, 4)
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "4"}
    assert rank_of(array | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == (1, 3)
    assert rank_of({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == (1, 2)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_table_of_studies(tmp_path, ending):
    """Paths are relative to the root, empty cells are None."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    frame = pd.DataFrame(
        {
            "study_id": ["1", "2"],
            "patient_id": ["p", "q"],
            "frontal": ["a.png"] * 2,
            "report": ["Clear.", None],
        }
    )
    path = tmp_path / f"t.{ending}"
    frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    one, two = studies_of(path, tmp_path)
    assert (one.frontal, one.report, one.lateral, two.report) == (tmp_path / "a.png", "Clear.", None, None)
    with pytest.raises(StudyError, match="no table"):
        studies_of(tmp_path / "none.csv", tmp_path)
