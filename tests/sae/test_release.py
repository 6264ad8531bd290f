"""The right SAE of a release is found, converted once, and opened through every door of SAELens."""

import os

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from safetensors.torch import save_file

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import (
    MatryoshkaSAE,
    load_matryoshka,
    load_release,
    maira2_sae_disk_loader,
    maira2_sae_loader,
    register_release,
)
from sae_lens_maira.sae.cache import cache_root
from sae_lens_maira.sae.candidates import choose_by_name, weight_files

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("cache")]


@pytest.fixture
def release(tmp_path, published):
    """Three SAEs in folders, the largest as safetensors, with a run's checkpoints and tables beside them."""
    root = tmp_path / "release"
    for expansion in (2, 4):
        published.write_pt(
            root / f"layer15_ef{expansion}", published.state_of(expansion), published.config_of(expansion)
        )
    (root / "layer15_ef8").mkdir()
    save_file(published.state_of(8), root / "layer15_ef8" / "ae.safetensors")
    published.write_pt(root / "layer15_ef8", published.state_of(8, seed=1), published.config_of(8))
    published.write_pt(root / "layer15_ef4" / "checkpoints", published.state_of(4, seed=2), name="ae_100.pt")
    (root / "README.md").write_text("---\nlibrary_name: dictionary-learning\n---\n")
    (root / "layer15_ef4" / "interpretations.csv").write_text("latent,interpretation\n0,pacemaker\n")
    return root


@pytest.mark.parametrize("expansion", [2, 4, 8])
def test_expansion_is_found_by_shape(expansion, release, published):
    sae = load_release(release, expansion)
    assert sae.cfg.d_sae == expansion * published.d_in
    rows = torch.randn(10, published.d_in)
    torch.testing.assert_close(sae.encode(rows), published.reference(published.state_of(expansion), rows)[0])


def test_metadata_tells_where_it_comes_from(release):
    metadata = load_release(release).cfg.metadata.to_dict()
    assert metadata["model_name"] == "maira-2"
    assert metadata["hook_name"] == "blocks.15.hook_resid_post"
    assert metadata["release"]["hook_assumed"] is False
    assert metadata["matryoshka"] == {"level_widths": [6, 12, 24], "k": 3.0}
    other = load_release(release, 8, hook_name="blocks.14.hook_resid_post", model_name="mine").cfg.metadata
    assert (other.hook_name, other.model_name) == ("blocks.14.hook_resid_post", "mine")


def test_assumed_hook_is_marked(tmp_path, published):
    published.write_pt(tmp_path, published.state_of())
    metadata = load_release(tmp_path).cfg.metadata.to_dict()
    assert metadata["hook_name"] == "blocks.15.hook_resid_post"
    assert metadata["release"]["hook_assumed"] is True


def test_conversion_happens_once(release, cache):
    load_release(release)
    (converted,) = (cache / "saes").iterdir()
    assert {file.name for file in converted.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    before = (converted / "sae_weights.safetensors").stat().st_mtime_ns
    load_release(release)
    assert (converted / "sae_weights.safetensors").stat().st_mtime_ns == before
    assert load_matryoshka(converted).level_widths == (6, 12, 24)
    load_release(release, force_download=True)
    assert len(list((cache / "saes").iterdir())) == 1
    assert (converted / "sae_weights.safetensors").stat().st_mtime_ns > before


def test_changed_file_is_converted_anew(release, published):
    first = load_release(release).W_enc.clone()
    published.write_pt(release / "layer15_ef4", published.state_of(4, seed=3))
    os.utime(release / "layer15_ef4" / "ae.pt", (1, 1))
    assert not torch.equal(load_release(release).W_enc, first)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("SAE_LENS_MAIRA_CACHE")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert str(cache_root()) == "/hf/sae-lens-maira"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_root()) == "/xdg/sae-lens-maira"


def test_harmful_neighbour_does_not_block_the_others(release, tmp_path, published):
    torch.save(published.harmful(tmp_path / "it-ran"), release / "layer15_ef2" / "ae.pt")
    assert load_release(release, 4).cfg.d_sae == 24
    with pytest.raises(SAEError, match="none with expansion 2"):
        load_release(release, 2)
    assert not (tmp_path / "it-ran").exists()


def test_empty_folder_and_unknown_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SAEError, match="no weights file"):
        load_release(tmp_path / "empty")
    with pytest.raises(SAEError, match="neither a path"):
        load_release(tmp_path / "absent")


def test_unreachable_hub_says_what_to_do(monkeypatch):
    """Tests run without a network: the real client is asked, and its failure explained."""
    with pytest.raises(SAEError, match="pass its folder"):
        load_release("microsoft/maira-2-sae", local_files_only=True, revision="0" * 40)


def test_several_that_fit_need_a_folder(release, published):
    published.write_pt(release / "layer16_ef4", published.state_of(4, seed=9), published.config_of(layer=16))
    with pytest.raises(SAEError, match="Pass folder="):
        load_release(release)
    assert load_release(release, folder="layer16").cfg.metadata.hook_name == "blocks.16.hook_resid_post"


def test_level_widths_can_be_given(tmp_path, published):
    published.write_pt(tmp_path, published.without_groups(published.state_of()))
    assert load_release(tmp_path, level_widths=[24]).level_widths == (24,)
    assert load_release(tmp_path, level_widths=[4, 12]).level_widths == (4, 12, 24)


def test_a_release_in_saelens_layout(trained, make_rows, tmp_path):
    trained.save_inference_model(tmp_path / "sae")
    sae = load_release(tmp_path, expansion=4)
    assert sae.level_widths == (8, 20, 48)
    assert torch.equal(sae.encode(make_rows(10)), load_matryoshka(trained).encode(make_rows(10)))


def test_choice_on_the_hub_by_small_files_or_names(published):
    """Before the large files are there, configurations decide, then names."""
    names = ["README.md", "a/ae.pt", "a/config.json", "b/ae.pt", "b/config.json", "b/checkpoints/ae_5.pt"]
    configs = {"a": {"c": published.config_of(2)}, "b": {"c": published.config_of(4)}}
    assert choose_by_name(names, configs, "repo", expansion=4, folder=None) == "b/ae.pt"
    assert choose_by_name(names, {}, "repo", expansion=None, folder="a/") == "a/ae.pt"
    for pattern in ("layer15_ef{}", "x{}", "expansion-{}", "{}x", "expansion_factor_{}", "sae_exp{}_k64"):
        folders = [f"{pattern.format(e)}/ae.pt" for e in (2, 4, 8, 14, 40)]
        assert choose_by_name(folders, {}, "repo", expansion=4, folder=None) == folders[1], pattern
    with pytest.raises(SAEError, match="Pass folder="):
        choose_by_name(["one/ae.pt", "two/ae.pt"], {}, "repo", expansion=4, folder=None)


def test_one_weights_file_per_folder():
    names = [
        "a/ae.pt",
        "a/ae.safetensors",
        "a/sparsity.safetensors",
        "a/checkpoints/ae_1.pt",
        "b/x.bin",
        "c.csv",
    ]
    assert weight_files(names) == ["a/ae.safetensors", "b/x.bin"]
    assert weight_files(["a/checkpoints/ae_1.pt"]) == ["a/checkpoints/ae_1.pt"]


def test_saelens_from_pretrained(release, published):
    """SAELens' own door, with its list of ids, its configuration getter and its error for a wrong id."""
    register_release("maira-2-sae-test", release)
    sae = SAE.from_pretrained("maira-2-sae-test", "expansion_8")
    assert isinstance(sae, MatryoshkaSAE)
    assert sae.level_widths == (12, 24, 48)
    rows = torch.randn(10, published.d_in)
    torch.testing.assert_close(sae.encode(rows), published.reference(published.state_of(8), rows)[0])
    config = load_sae_config_from_huggingface("maira-2-sae-test", "expansion_2")
    assert config["d_sae"] == 12
    assert config["metadata"]["hook_name"] == "blocks.15.hook_resid_post"
    with pytest.raises(ValueError, match="expansion_2"):
        SAE.from_pretrained("maira-2-sae-test", "expansion_3")
    half = SAE.from_pretrained("maira-2-sae-test", "expansion_4", dtype="bfloat16")
    assert half.W_enc.dtype == torch.bfloat16


def test_published_release_is_registered():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    lookup = get_pretrained_saes_directory()["maira-2-sae"]
    assert lookup.repo_id == "microsoft/maira-2-sae"
    assert set(lookup.saes_map) == {"expansion_2", "expansion_4", "expansion_8"}
    with pytest.raises(SAEError, match="already knows"):
        register_release("gpt2-small-res-jb")


def test_converters_for_saelens(release):
    """The public way in, which needs no registration."""
    by_id = SAE.from_pretrained(str(release), "expansion_4", converter=maira2_sae_loader)
    by_path = SAE.load_from_disk(release / "layer15_ef4", converter=maira2_sae_disk_loader)
    for sae in (by_id, by_path):
        assert isinstance(sae, MatryoshkaSAE)
        assert sae.level_widths == (6, 12, 24)
