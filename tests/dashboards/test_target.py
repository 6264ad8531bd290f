"""Names of dashboards in an SAE's metadata: SAELens' own Neuronpedia helpers find the latents, without a network."""

import json
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from sae_lens import SAE
from sae_lens.analysis import neuronpedia_integration
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_maira.cli import main
from sae_lens_maira.dashboards.target import Target, model_of, save_metadata
from sae_lens_maira.errors import ConfigError

SITE = neuronpedia_integration.NEURONPEDIA_DOMAIN
RECIPE = Path(__file__).parents[2] / "recipes" / "dashboards.yaml"


@pytest.fixture
def opened(monkeypatch):
    """Addresses that the helpers open or ask for."""
    seen: list[str] = []

    def get(url: str) -> SimpleNamespace:
        seen.append(url)
        return SimpleNamespace(json=lambda: {"index": "7"})

    monkeypatch.setattr(neuronpedia_integration.webbrowser, "open", seen.append)
    monkeypatch.setattr(neuronpedia_integration.requests, "get", get)
    return seen


def tiny(d_sae: int = 6) -> JumpReLUSAE:
    return JumpReLUSAE(JumpReLUSAEConfig(d_in=4096, d_sae=d_sae, device="cpu"))


@pytest.mark.compat
def test_saelens_helpers_open_our_latents(make_set, target, tmp_path, opened):
    """The configuration alone changes; plain SAELens loads it and its helpers follow it."""
    tiny().save_model(tmp_path / "sae")
    weights = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()
    save_metadata(tmp_path / "sae", target, make_set().meta)
    assert (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == weights
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.metadata.hook_name == "blocks.15.hook_resid_post"
    neuronpedia_integration.open_neuronpedia_feature_dashboard(sae, 3)
    assert opened == [f"{SITE}/maira-2/15-res-matryoshka-16k/3"]
    url = neuronpedia_integration.get_neuronpedia_quick_list(sae, [3, 5], "two")
    assert json.loads(urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)["features"][0]) == [
        {"modelId": "maira-2", "layer": "15-res-matryoshka-16k", "index": index} for index in ("3", "5")
    ]
    names = sae.cfg.metadata
    layer, dataset = names["neuronpedia_id"].split("/")[1].split("-", 1)
    found = neuronpedia_integration.get_neuronpedia_feature(7, int(layer), names["model_name"], dataset)
    assert found["index"] == 7
    assert opened[-1] == f"{SITE}/api/feature/maira-2/15-res-matryoshka-16k/7"


def test_an_sae_that_was_not_recorded_is_refused(make_set, target, tmp_path):
    tiny(d_sae=8).save_model(tmp_path / "sae")
    before = (tmp_path / "sae" / "cfg.json").read_bytes()
    with pytest.raises(ConfigError, match=r"\(4096, 8\)"):
        save_metadata(tmp_path / "sae", target, make_set().meta)
    assert (tmp_path / "sae" / "cfg.json").read_bytes() == before
    with pytest.raises(ConfigError, match="not an SAE configuration"):
        save_metadata(tmp_path, target, make_set().meta)


def test_the_recipe_runs_as_its_first_line_says(make_set, tmp_path, capsys):
    assert RECIPE.read_text().startswith(
        "# sae-lens-maira dashboards neuronpedia --config recipes/dashboards.yaml\n"
    )
    tiny().save_model(tmp_path / "sae")
    words = [
        "--records",
        str(make_set().folder),
        "--out",
        str(tmp_path / "out"),
        "--sae",
        str(tmp_path / "sae"),
    ]
    assert main(["dashboards", "neuronpedia", "--config", str(RECIPE), *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    name = yaml.safe_load(RECIPE.read_text())["set_name"]
    assert (printed["neuronpedia_id"], printed["issues"]) == (f"maira-2/15-{name}", 0)
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.neuronpedia_id == printed["neuronpedia_id"]


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://localhost:99999", "http://localhost:port", "localhost:8000", "ftp://x"]
)
def test_addresses_that_are_none_are_refused(url):
    """Also those that the standard library cannot take apart."""
    with pytest.raises(ConfigError, match=r"address|url|scheme"):
        Target(model_id="maira-2", set_name="res-1k", url=url)


def test_records_of_the_phantom_are_never_published_as_maira_2():
    """The name comes from the records; another name needs its number of layers."""
    assert model_of("phantom", None, None) == ("phantom", 8)
    assert model_of("microsoft/maira-2", None, None) == ("maira-2", 32)
    assert model_of("phantom", "small-vlm", 12) == ("small-vlm", 12)
    with pytest.raises(ConfigError, match="--layers"):
        model_of("phantom", "small-vlm", None)
