"""`steer` on any model and table: the same summary as on the phantom, saved interventions, records, refusals."""

import json

import pandas as pd
import pytest

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.cli import main
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.quickstart.sae import TrainingPlan, train_sae
from sae_lens_maira.studies import table_of_studies

HOOK = "blocks.3.hook_resid_post"
SIZE = ["--studies", "48", "--steered", "4", "--strengths", "[2.0]", "--seed", "0"]
FINDING = ["--finding", "cardiomegaly"]


@pytest.fixture(scope="module")
def sae(phantom, tmp_path_factory):
    """A small SAE of image patches, trained for a few seconds."""
    folder = tmp_path_factory.mktemp("sae")
    rows = read_rows(
        phantom, generate_studies(60, seed=5), HOOK, RowSettings(roles="image_only"), progress=False
    )
    train_sae(rows, TrainingPlan(folder, 256, 16, 300, 0))
    return folder


@pytest.fixture(scope="module")
def elsewhere(phantom, tmp_path_factory):
    """The phantom as a folder, and 48 of its studies as a table with image files."""
    root = tmp_path_factory.mktemp("elsewhere")
    phantom.model.save_pretrained(root / "model")
    phantom.processor.save_pretrained(root / "model")
    table_of_studies(generate_studies(48, seed=20_000), root).save(root / "studies.parquet")
    return root


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(["steer", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def on_phantom(sae, tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom_run")
    assert main(["steer", "--sae", str(sae), *FINDING, *SIZE, "--out", str(out)]) == 0
    return out


def test_a_folder_and_a_table_give_the_same_summary(sae, elsewhere, on_phantom, tmp_path, capsys):
    """Model and studies by path: every number of the summary and every report equal those of `--model phantom`."""
    words = [
        "--model",
        elsewhere / "model",
        "--table",
        elsewhere / "studies.parquet",
        "--model-dtype",
        "float32",
    ]
    code, _, err = run(capsys, "--sae", sae, *FINDING, *SIZE, *words, "--out", tmp_path)
    assert code == 0, err
    for name in ("summary", "studies"):
        ours, theirs = (pd.read_parquet(folder / f"{name}.parquet") for folder in (tmp_path, on_phantom))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5)
    assert pd.read_parquet(tmp_path / "summary.parquet").on_target.max() > 0, "nothing was steered"
    errors = pd.read_csv(tmp_path / "errors.csv").set_index(["method", "measure"])
    pd.testing.assert_frame_equal(
        errors, pd.read_csv(on_phantom / "errors.csv").set_index(["method", "measure"])
    )
    assert set(errors.against) == {"truth"}
    assert errors.before.groupby("measure").nunique().max() == 1  # one set of unsteered reports
    assert errors.before.notna().all()


def test_maps_of_control_saes_are_in_the_table(phantom, sae, tmp_path, capsys):
    """A frozen control and an untrained SAE have rows; tests/steering/test_methods.py compares norms."""
    frozen = tmp_path / "frozen"
    rows = read_rows(
        phantom, generate_studies(30, seed=5), HOOK, RowSettings(roles="image_only"), progress=False
    )
    train_sae(rows, TrainingPlan(frozen, 256, 16, 60, 0, control="frozen_decoder"))
    words = ["--controls", f"untrained,{frozen}", "--strengths", "[1.0]", "--out", tmp_path / "out"]
    code, _, err = run(capsys, "--sae", sae, *FINDING, *SIZE, *words)
    assert code == 0, err
    summary = pd.read_parquet(tmp_path / "out" / "summary.parquet").set_index("method")
    kinds = [f"latents by map difference, {kind}" for kind in ("untrained", "frozen_decoder")]
    assert set(summary.loc[kinds].control_of) == {"latents by map difference"}
    assert summary.loc[kinds].on_target.notna().all()
    code, _, err = run(capsys, "--sae", sae, *FINDING, *SIZE, "--controls", "frozen_decoder")
    assert code == 2
    assert "train --control frozen_decoder" in " ".join(err.split())


def test_the_saved_intervention_writes_the_same_reports(sae, elsewhere, on_phantom, tmp_path, capsys):
    """`--intervention` with the file of a run writes the reports that the run reported for its best method."""
    file = on_phantom / "intervention.json"
    summary = pd.read_parquet(on_phantom / "summary.parquet")
    note = json.loads(file.read_text(encoding="utf-8"))["note"]
    best = note.split(": ")[1].split(", strength")[0]
    assert pd.isna(summary.set_index("method").control_of[best])
    words = [
        "--model",
        elsewhere / "model",
        "--table",
        elsewhere / "studies.parquet",
        "--model-dtype",
        "float32",
    ]
    code, _, err = run(
        capsys, "--sae", sae, *FINDING, *SIZE, *words, "--intervention", file, "--out", tmp_path
    )
    assert code == 0, err
    ran = pd.read_parquet(on_phantom / "studies.parquet").query("half == 'report' and method == @best")
    again = pd.read_parquet(tmp_path / "studies.parquet").query("method == 'saved intervention'")
    assert again.text.tolist() == ran.text.tolist()
    assert (again.text != again.unsteered).any()
    control = pd.read_parquet(tmp_path / "summary.parquet").set_index("method")
    row = control.loc["random direction, norm of the saved intervention"]
    assert row.ratio == pytest.approx(control.loc["saved intervention"].ratio, rel=0.02), (
        "the control moves as far"
    )
    assert "index.html" in {path.name for path in tmp_path.iterdir()}


def test_records_choose_latents_without_reading_activations(sae, tmp_path, capsys, monkeypatch):
    """With `--records` latents and maps come from the record set; reading activations would fail the test."""
    records, out = tmp_path / "records", tmp_path / "out"
    words = ["--sae", sae, "--out", records, "--studies", "40", "--roles", "image_only"]
    assert main(["latents", *map(str, words)]) == 0
    capsys.readouterr()

    def refuse(*_args, **_kwargs):
        raise AssertionError("activations were read")

    monkeypatch.setattr("sae_lens_maira.steering.statistics.read_rows", refuse)
    code, _, err = run(capsys, "--sae", sae, *FINDING, *SIZE, "--records", records, "--out", out)
    assert code == 0, err
    summary = pd.read_parquet(out / "summary.parquet").set_index("method")
    own = summary.index[summary.control_of.isna()]
    assert list(own) == ["latents by recorded map difference"]
    assert summary.ratio.to_numpy() == pytest.approx(summary.ratio.iloc[0], rel=0.02), "controls move as far"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No --finding"),
        (["--finding", "measles"], "no finding 'measles'"),
        (["--finding", "cardiomegaly", "--reader", "rules", "--remove", "true"], "4 are needed"),
        (["--finding", "cardiomegaly", "--records", "a", "--intervention", "b"], "Give one of them"),
    ],
)
def test_refusals(sae, tmp_path, capsys, words, message):
    """Each ends with one message and exit code 2."""
    code, _, err = run(capsys, "--sae", sae, "--studies", "12", "--out", tmp_path, *words)
    assert code == 2
    assert message in err
