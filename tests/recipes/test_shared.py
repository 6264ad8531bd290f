"""What recipes share: results are continued with their own settings only, and boxes are read on any grid."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.phantom.flaws import Flaw
from sae_lens_maira.recipes._shared import (
    box_patches,
    continue_rows,
    mean_line,
    require_run,
    require_settings,
    sae_of,
    sae_settings,
)
from sae_lens_maira.recipes.steering.steering_table import SteeringRun, run_steering
from sae_lens_maira.recipes.steering.token_filter import FilterRun, run_filters
from sae_lens_maira.studies import Finding


def settings_of(tmp_path, **other) -> SimpleNamespace:
    given = {"saes": tmp_path, "train_studies": 40, "d_sae": 64, "k": 8, "steps": 20, "flaw": Flaw()}
    return SimpleNamespace(**(given | other))


def test_rows_are_continued_and_other_settings_are_named(tmp_path):
    """A killed run goes on where it was saved; other settings are refused, also when every row is there."""
    file, starts = tmp_path / "rows.csv", []

    def made(start: int, stop_at: int | None = None):
        starts.append(start)
        for i in range(start, 7):
            if i == stop_at:
                raise KeyboardInterrupt
            yield {"i": i}

    def run(settings: dict[str, Any], n: int, stop_at: int | None = None):
        continue_rows(file, settings, n, lambda start: made(start, stop_at), "rows", 2)

    with pytest.raises(KeyboardInterrupt):
        run({"k": 8, "layer": 0}, 7, stop_at=5)
    assert pd.read_csv(file)["i"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="k 8 there, 16 now"):
        run({"k": 16, "layer": 0}, 7)
    run({"k": 8, "layer": 0}, 7)
    assert pd.read_csv(file)["i"].tolist() == list(range(7))
    with pytest.raises(ConfigError, match="layer 0 there, 3 now"):
        run({"k": 8, "layer": 3}, 7)
    run({"k": 8, "layer": 0}, 7)
    assert starts == [0, 4]
    (tmp_path / "rows.json").unlink()
    with pytest.raises(ConfigError, match="settings cannot be read"):
        run({"k": 8, "layer": 0}, 7)


def test_an_sae_of_other_settings_is_refused_before_anything_is_read(tmp_path):
    """Studies, size, k, steps, and the flaw of the flawed phantom; a clean SAE does not depend on the flaw."""
    settings: Any = settings_of(tmp_path)
    for arm in ("trained", "flawed"):
        folder = tmp_path / f"{arm}_0_1"
        require_settings(folder, sae_settings(settings, arm), exists=False)
        folder.mkdir()
        (folder / "cfg.json").write_text("{}")
    nothing: Any = None
    for name, value in (("train_studies", 50), ("d_sae", 128), ("k", 4), ("steps", 30)):
        with pytest.raises(ConfigError, match=f"{name} .* there, {value} now"):
            sae_of(nothing, settings_of(tmp_path, **{name: value}), "trained", 0, 1)
    with pytest.raises(ConfigError, match=r"confusion.*0\.9.*there.*0\.5"):
        sae_of(nothing, settings_of(tmp_path, flaw=Flaw(confusion=0.5)), "flawed", 0, 1)
    require_settings(
        tmp_path / "trained_0_1", sae_settings(settings_of(tmp_path, flaw=Flaw(loss=0.1)), "trained"), True
    )
    assert json.loads((tmp_path / "trained_0_1.json").read_text())["flaw"] is None


def test_a_box_is_widened_by_half_a_patch_of_its_own_axis():
    """On a grid of 2 rows and 8 columns half a patch is 1/4 of the height and 1/16 of the width."""
    expected = np.zeros((2, 8), bool)
    expected[1, 4:6] = True  # centres 0.5625 and 0.6875; 0.4375 and 0.8125 lie more than 1/16 outside
    assert np.array_equal(box_patches(Finding(name="mass", box=(0.51, 0.55, 0.70, 0.60)), (2, 8)), expected)
    across = box_patches(Finding(name="mass", box=(0.51, 0.45, 0.70, 0.60)), (2, 8))
    assert np.array_equal(across, np.broadcast_to(expected[1], (2, 8)))


def test_a_line_has_mean_interval_and_n():
    assert mean_line("a | b", np.ones(4)) == "| a | b | 1.000 | 1.000 to 1.000 | 4 |"


@pytest.mark.parametrize(("run", "settings"), [(run_steering, SteeringRun), (run_filters, FilterRun)])
def test_a_folder_with_a_run_of_other_settings_is_refused_before_anything_is_read(run, settings, tmp_path):
    """What may change is named by the recipe; a result whose settings are not known is refused too."""
    require_run(settings(out=tmp_path, d_sae=64), False)
    with pytest.raises(ConfigError, match="d_sae 64 there, 128 now"):
        run(settings(out=tmp_path, d_sae=128))
    (tmp_path / "settings.json").unlink()
    (tmp_path / "sae_image").mkdir()
    with pytest.raises(ConfigError, match="its settings cannot be read"):
        run(settings(out=tmp_path, d_sae=64))
    assert [path.name for path in tmp_path.iterdir()] == ["sae_image"]


def test_settings_of_a_run_that_are_free_may_change(tmp_path):
    require_run(SteeringRun(out=tmp_path, findings=("cardiomegaly",)), False, free=("findings",))
    require_run(SteeringRun(out=tmp_path, findings=("pacemaker",), progress=False), True, free=("findings",))
