"""The whole path on a model folder and a table, through the command line alone, ends like the phantom's own."""

import json

import pandas as pd
import pytest

from sae_lens_maira.cli import main

pytestmark = pytest.mark.slow
HOOK = "blocks.3.hook_resid_post"
SAE = "{d_sae: 256, k: 16, matryoshka_widths: [64, 256], normalize_activations: expected_average_only_in}"
TRAINER = (
    "{total_training_samples: 200000, train_batch_size_samples: 512, lr: 0.002, lr_end: 0.0, "
    "lr_scheduler_name: constant, lr_warm_up_steps: 10, lr_decay_steps: 50}"
)


@pytest.fixture(scope="module")
def folder(phantom, tmp_path_factory):
    """The phantom saved as a checkpoint, and its studies exported with the command that users have."""
    root = tmp_path_factory.mktemp("any_model")
    phantom.model.save_pretrained(root / "model")
    phantom.processor.save_pretrained(root / "model")
    words = ["--source", "phantom", "--studies", "60", "--study-seed", "20000"]
    assert main(["studies", "import", *words, "--out", str(root / "studies.parquet")]) == 0
    return root


def test_every_command_runs_on_a_folder_and_a_table(folder, capsys):
    """harvest, train, evaluate, latents, interpret, page, attribute, steer; the steering table is the phantom's."""
    table, model = ["--table", str(folder / "studies.parquet")], ["--model", str(folder / "model")]
    dtype = ["--model-dtype", "float32"]
    sae, records = str(folder / "sae"), str(folder / "records")

    def run(*words: str) -> str:
        assert main(list(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    kept = ["--hooks", f"[{HOOK}]", "--roles", "image_only", "--store", str(folder / "store")]
    run("harvest", *model, *table, *dtype, *kept)
    run("train", *model, *table, *dtype, *kept, "--sae", SAE, "--trainer", TRAINER, "--out", sae)
    rows = json.loads(run("evaluate", "--sae", sae, *model, *table, "--studies", "4", "--json"))["rows"]
    assert max(row["explained_variance"] for row in rows) > 0.5
    run(
        "latents",
        "--sae",
        sae,
        *model,
        *table,
        "--latents",
        "0-63",
        "--out",
        records,
    )
    run("interpret", "run", "--records", records)
    run("dashboards", "html", "--records", records, "--out", str(folder / "page"))
    assert (folder / "page" / "index.html").is_file()
    words = ["--studies", "1", "--sentences", "[0]", "--candidates", "32", "--roles", "image_only"]
    run("attribute", "--sae", sae, *model, *table, *words, "--out", str(folder / "attribution"))
    size = ["--finding", "cardiomegaly", "--studies", "60", "--steered", "4", "--strengths", "[2.0]"]
    run("steer", "--sae", sae, *model, *table, *dtype, *size, "--out", str(folder / "steered"))
    run("steer", "--sae", sae, "--study-seed", "20000", *size, "--out", str(folder / "on_phantom"))
    ours, theirs = (pd.read_parquet(folder / name / "summary.parquet") for name in ("steered", "on_phantom"))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5)
