"""A recipe's command line: its YAML file fits its settings, options override it, and the path comes back on stdout."""

from pathlib import Path

import pytest

from sae_lens_maira.cli.parser import run_recipe
from sae_lens_maira.recipes.steering.clinical_steering import Clinical
from sae_lens_maira.recipes.steering.steering_table import SteeringRun
from sae_lens_maira.recipes.steering.token_filter import FilterRun

RECIPES = Path(__file__).parents[2] / "recipes" / "steering"


@pytest.mark.parametrize(
    ("name", "settings"),
    [("steering_table", SteeringRun), ("token_filter", FilterRun), ("clinical_steering", Clinical)],
)
def test_the_file_fits_and_options_override_it(name, settings, capsys):
    seen = []

    def run(chosen):
        seen.append(chosen)
        return chosen.out

    arguments = ["--config", str(RECIPES / f"{name}.yaml"), "--seed", "7", "--out", "elsewhere"]
    assert run_recipe(settings, run, "about", arguments) == 0
    assert (seen[0].seed, seen[0].out) == (7, Path("elsewhere"))
    assert capsys.readouterr().out == "elsewhere\n"


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_recipe(FilterRun, lambda chosen: chosen.out, "about", ["--sedes", "3"])
    assert stopped.value.code == 2
    assert "sedes" in capsys.readouterr().err
