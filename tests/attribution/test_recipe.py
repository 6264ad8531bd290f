"""The recipe that checks attribution on the phantom, at a size of seconds."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sae_lens_maira.cli.parser import run_recipe
from sae_lens_maira.recipes.counterfactual_prior import Site, flips

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_recipe_writes_its_tables(tmp_path):
    """A few statements of one seed: every map points somewhere, every check is there."""
    words = ["--seeds", "[5]", "--arms", '["trained","untrained"]', "--statements", "4", "--layers", "[0]"]
    words += [
        "--train_studies",
        "40",
        "--steps",
        "150",
        "--d_sae",
        "128",
        "--out",
        str(tmp_path),
        "--saes",
        str(tmp_path / "saes"),
    ]
    recipe = ROOT / "recipes" / "attribution"
    subprocess.run(
        [
            sys.executable,
            str(recipe.with_suffix(".py")),
            "--config",
            str(recipe.with_suffix(".yaml")),
            *words,
        ],
        check=True,
    )
    given = pd.concat([pd.read_csv(tmp_path / f"given-0-5-{arm}.csv") for arm in ("trained", "untrained")])
    assert given.groupby("arm").size().to_dict() == {"trained": 4, "untrained": 4}
    assert (given["completeness error"] < 0.2).all()
    assert given.loc[given["arm"] == "trained", "point gradient norm"].isin([0, 1]).all()
    assert "causal efficiency" in (tmp_path / "attribution.md").read_text()


@pytest.mark.slow
def test_image_evidence_is_compared_with_probability(tmp_path):
    """Both phantoms, both scores, an area under the curve for each."""
    recipe = ROOT / "recipes" / "image_evidence"
    words = [
        "--config",
        str(recipe.with_suffix(".yaml")),
        "--studies",
        "12",
        "--teaching",
        "60",
        "--out",
        str(tmp_path),
    ]
    subprocess.run([sys.executable, str(recipe.with_suffix(".py")), *words], check=True)
    table = (tmp_path / "image_evidence.md").read_text()
    assert table.count("| clean |") == table.count("| planted errors |") == 5
    columns = set(pd.read_csv(tmp_path / "clean.csv"))
    assert {"true", "image evidence per token, block 0", "image evidence per token, block 3"} <= columns


@pytest.mark.slow
def test_change_words_are_counted_with_the_prior_swapped(tmp_path):
    """Both arms count change words; a study keeps its findings, so both arms hold the same studies."""
    recipe = ROOT / "recipes" / "counterfactual_prior"
    words = ["--config", str(recipe.with_suffix(".yaml")), "--studies", "6", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(recipe.with_suffix(".py")), *words], check=True, timeout=1000)
    counted = pd.read_csv(tmp_path / "words.csv")
    assert set(counted["arm"]) == {"own prior", "swapped prior"}
    assert counted["word"].isin(["new", "larger", "smaller", "unchanged"]).all()
    own = counted[counted["arm"] == "own prior"]
    assert own["follows"].mean() > 0.5
    assert "change words that follow it" in (tmp_path / "counterfactual_prior.md").read_text()


def test_latents_that_follow_the_prior_are_chosen_on_one_half_and_counted_on_the_other():
    """Latent 0 is active for "new", 1 for its opposite, 2 for the finding, 3 always; 4 flips at random."""
    generator = np.random.default_rng(0)
    sites = []
    for number in range(40):
        new = ((True, False), (False, True), (False, False), (True, True))[number % 4]
        key = ("cardiomegaly", "consolidation")[number // 4 % 2]
        fires = np.array([[n, not n, key == "cardiomegaly", True, generator.random() < 0.5] for n in new])
        sites.append(Site(str(number // 2), key, new, fires))
    found = {name: float(values.mean()) for name, values in flips(sites, 2).items()}
    assert found["latents of change that flip in the expected direction"] == 1
    assert found['latents of change that flip, where "new" comes or goes'] == 1
    assert found["latents of change that flip, where it does not"] == 0
    assert found['latents of findings that flip, where "new" comes or goes'] < 0.5
    assert flips([], 2) == {}


@pytest.mark.slow
def test_statements_of_generated_reports_are_removed(tmp_path, capsys):
    """A row per statement, next to random entries; rows of other settings are refused."""
    script = ROOT / "recipes" / "attribution_generated"
    recipe = runpy.run_path(str(script.with_suffix(".py")), run_name="recipe")
    small = ["--seeds=[5]", '--arms=["trained"]', "--statements=1", "--max_rounds=1", "--step=8"]
    small += ["--train_studies=20", "--d_sae=64", "--steps=50"]
    folders = ["--out", str(tmp_path), "--saes", str(tmp_path / "saes")]
    arguments = ["--config", str(script.with_suffix(".yaml")), *small, *folders]

    def ran(*more: str) -> int:
        return run_recipe(recipe["Settings"], recipe["run"], None, [*arguments, *more])

    file = tmp_path / "generated-trained-5.csv"
    assert ran() == 0
    rows = pd.read_csv(file)
    assert len(rows) == 1
    assert rows["rounds"].eq(1).all()
    assert rows["entries"].between(1, 8).all()
    assert "| trained | gone attributed |" in (tmp_path / "generated.md").read_text()
    assert ran("--protect=0.5") == 2
    assert "protect 0.3 there, 0.5 now" in capsys.readouterr().err


@pytest.mark.slow
def test_the_planted_cause_is_looked_for(tmp_path):
    """One false sentence: every map is measured at both margins, and the wider one covers more."""
    recipe = ROOT / "recipes" / "planted_cause"
    words = ["--seeds", "[5]", "--statements", "1", "--teaching", "60", "--out", str(tmp_path)]
    words += ["--train_studies", "20", "--d_sae", "64", "--steps", "50", "--saes", str(tmp_path / "saes")]
    script = [sys.executable, str(recipe.with_suffix(".py")), "--config", str(recipe.with_suffix(".yaml"))]
    subprocess.run([*script, *words], check=True, timeout=1000)
    (row,) = pd.read_csv(tmp_path / "planted-5.csv").to_dict("records")
    assert "nasogastric" in row["sentence"]
    assert 0 < row["area, 0.5 patch"] <= row["area, 1.0 patch"] < 0.5
    for name in ("attribution", "gradient norm", "planted coefficient", "random"):
        assert row[f"point {name}, 0.5 patch"] <= row[f"point {name}, 1.0 patch"]
    assert "point attribution, 1.0 patch" in (tmp_path / "planted_cause.md").read_text()
