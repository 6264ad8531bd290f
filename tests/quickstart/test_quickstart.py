"""The main job as a user runs it: one command, a folder to read, and the figures that the phantom promises."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_maira.activations import ActivationRows, RowSettings, read_rows
from sae_lens_maira.cli.parser import run_recipe
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, load_phantom
from sae_lens_maira.quickstart import QuickstartConfig, run_quickstart
from sae_lens_maira.quickstart.run import stored_rows, text_folder
from sae_lens_maira.quickstart.sae import TrainingPlan, level_widths, train_saes
from sae_lens_maira.stats import wilson

RECIPE = Path(__file__).parents[2] / "recipes" / "controls_table.py"


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"finding": "pleural_efusion"}, "finding"),
        ({"layer": 8}, "layers 0 to 7"),
        ({"text_layer": -1}, "text_layer"),
        ({"studies": 3}, "at least 40"),
        ({"text_seeds": 0}, "text_seeds is 0; it must be at least 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(setting, match):
    with pytest.raises(ConfigError, match=match):
        QuickstartConfig(**setting)


def test_levels_are_nested_and_end_at_d_sae():
    assert level_widths(2048) == (128, 384, 1024, 2048)


def test_wilson_interval_by_hand():
    """0 of 10 and 10 of 10 mirror each other, and the interval is that of the formula (0 to 0.2775)."""
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    low, high = wilson(10, 10)
    assert (1 - high, 1 - low) == pytest.approx(wilson(0, 10), abs=1e-9)


@pytest.mark.slow
def test_workers_do_not_change_the_weights(tmp_path):
    """SAEs trained in two processes equal those trained in this one, bit by bit."""
    values = torch.randn(2_000, 16, generator=torch.Generator().manual_seed(0))
    zeros = np.zeros(2_000, dtype=np.int64)
    rows = ActivationRows(values, zeros, zeros, zeros, zeros, zeros, zeros, zeros, "blocks.3.hook_resid_post")
    weights = {}
    for workers in (1, 2):
        plans = [TrainingPlan(tmp_path / f"{workers}_{seed}", 64, 4, 20, seed) for seed in (0, 1)]
        trained = train_saes([(rows, plan) for plan in plans], workers, progress=False)
        weights[workers] = [sae.inference.W_dec.detach() for sae in trained]
    assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
    assert not torch.equal(*weights[1])


@pytest.mark.slow
def test_small_run_writes_everything(tmp_path):
    """A run of 60 studies leaves report, tables, one heatmap per finding, and SAEs for plain SAELens."""
    config = QuickstartConfig(
        out=tmp_path / "out",
        studies=60,
        steps=40,
        text_steps=40,
        text_seeds=2,
        seed=3,
        d_sae=256,
        steer_studies=4,
        progress=False,
    )
    result = run_quickstart(config)
    figures = {file.name for file in (config.out / "figures").iterdir()}
    assert figures == {"agreement.png", "steering.png"} | {f"latent_{key}.png" for key in FINDING_KEYS}
    report = (config.out / "report.md").read_text(encoding="utf-8")
    assert "nothing here is a result about\nmedicine" in report
    for name in figures:
        assert f"figures/{name}" in report
    for name in ("page", "page_text"):
        assert f"({name}/index.html)" in report
        assert (config.out / name / "index.html").is_file()
        assert len(list((config.out / name / "data" / "latents").rglob("*.js"))) > 40
    assert list((config.out / "page" / "images").glob("*-frontal.png"))
    code = (
        "import sys; sys.modules['sae_lens_maira'] = None\n"
        "from sae_lens import SAE\n"
        f"sae = SAE.load_from_disk({str(config.out / 'sae_image')!r})\n"
        "assert sae.cfg.metadata.hook_name == 'blocks.3.hook_resid_post', sae.cfg.metadata\n"
        "assert sae.cfg.d_sae == 256\n"
        f"text = SAE.load_from_disk({str(config.out / 'sae_text')!r})\n"
        "assert text.cfg.metadata.hook_name == 'blocks.6.hook_resid_post', text.cfg.metadata\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert result.text.trained.n + int(result.image.trained.n) == 2 * result.text.trained.n
    # Of two text SAEs the one that agrees best on the selection half was taken, and its control by the same rule.
    draws = result.text.draws
    assert [draw.seed for draw in draws] == [6, 7]  # seeds of other runs are others
    taken = max(draws, key=lambda draw: draw.choose_f1)
    assert taken.seed == result.text.sae.seed
    assert taken.f1 == pytest.approx(result.text.trained.f1.mean())
    assert taken.explained_variance == result.text.explained_variance
    control = max(draws, key=lambda draw: draw.untrained_choose_f1)
    assert control.untrained_f1 == pytest.approx(result.text.untrained.f1.mean())
    copied = (config.out / "sae_text" / "sae_weights.safetensors").read_bytes()
    assert copied == (text_folder(config, taken.seed) / "sae_weights.safetensors").read_bytes()
    assert f"| {taken.seed} | yes |" in report
    assert len(result.image.draws) == 1
    labels = [row.label for row in result.steering.rows]
    assert [label.split(", ")[1] for label in labels if ", " in label] == [
        "frozen decoder",
        "frozen encoder",
        "untrained",
    ]
    check_controls_table(config, result, tmp_path / "table")


def check_controls_table(config, result, out):
    """The recipe scores the run's SAEs: its F1 are the run's, every control has every measure."""
    recipe = runpy.run_path(str(RECIPE), run_name="recipe")
    few = ["--splice_studies=4", "--steer_studies=4", "--text_seeds=2", "--seed=3", "--studies=60"]
    arguments = [
        "--config",
        str(RECIPE.with_suffix(".yaml")),
        "--quickstart",
        str(config.out),
        "--out",
        str(out),
    ]
    assert run_recipe(recipe["Settings"], recipe["run"], None, [*arguments, *few]) == 0
    table = pd.read_csv(out / "controls.csv").set_index(["place", "kind"])
    for place in (result.text, result.image):
        rows = table.loc[place.place]
        assert list(rows.index) == ["trained", "frozen_decoder", "frozen_encoder", "untrained", "raw"]
        assert rows.loc["trained", "F1 of firing"] == pytest.approx(place.trained.f1.mean())
        assert rows.loc["trained", "explained variance"] == pytest.approx(place.explained_variance)
        for kind in ("frozen_decoder", "frozen_encoder", "untrained", "raw"):
            gain = place.gains[kind]
            assert rows.loc[kind, "F1 of firing trained minus"] == pytest.approx(gain.mean)
            assert rows.loc[kind, "F1 of firing low"] == pytest.approx(gain.low)
        assert rows["loss recovered"].notna().all()
    image = table.loc["image"]
    assert image[["pointing", "energy", "iou", "steering"]].notna().all().all()
    assert (image.loc["trained", [f"{m} trained minus" for m in ("pointing", "energy", "iou")]] == 0).all()
    assert image["steered n"].eq(4).all()
    assert {"detection", "detection shuffled"} <= set(table.columns)
    assert "| detection |" in (out / "controls.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_rows_come_from_a_store_that_a_second_run_finds(tmp_path):
    """Rows equal those harvested in memory (padding differs, so to rounding); a second run adds nothing."""
    config = QuickstartConfig(out=tmp_path, studies=40, progress=False)
    maira, studies = load_phantom(), generate_studies(40, seed=20_000)
    hook_name = "blocks.3.hook_resid_post"
    rows = stored_rows(maira, studies, hook_name, config)
    memory = read_rows(maira, studies, hook_name, RowSettings(batch_size=16), progress=False)
    torch.testing.assert_close(rows.values, memory.values, rtol=1e-4, atol=1e-4)
    for name in ("study", "position", "role", "token", "view", "patch_row", "patch_col"):
        assert (getattr(rows, name) == getattr(memory, name)).all()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("shard-*")}
    again = stored_rows(maira, studies, hook_name, config)
    assert torch.equal(again.values, rows.values)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("shard-*")} == written


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Figures of the default run, as a user gets them."""
    out = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, "-m", "sae_lens_maira", "quickstart", "--out", str(out), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the default run, on one core that others may share
def test_trained_latents_beat_untrained_ones_at_text_positions(found):
    """The gain is at least 0.10 with its interval above zero, and the latents explain the rows."""
    text = found["agreement"]["text"]
    assert text["gain"] >= 0.10
    assert text["gain_low"] > 0
    assert text["explained_variance"] > 0.9


@pytest.mark.slow
def test_text_latents_agree_with_findings(found):
    """Mean F1 of firing on the half that neither latents nor the SAE were chosen on."""
    text = found["agreement"]["text"]
    assert text["mean_f1"] >= 0.8  # 0.831 to 0.875 over five seeds (docs/log.md)
    assert text["mean_f1"] in [draw["f1"] for draw in text["draws"]]


@pytest.mark.slow
def test_latents_steer_and_a_random_direction_does_not(found):
    """The finding appears in at least 80 % of negative studies, under the control in at most 5 %."""
    rows = {row["label"]: row for row in found["steering"]["rows"]}
    latents = next(row for label, row in rows.items() if label.endswith("latents"))
    control = next(row for label, row in rows.items() if label.startswith("random direction"))
    assert latents["on_target"] >= 0.80
    assert control["on_target"] <= 0.05
