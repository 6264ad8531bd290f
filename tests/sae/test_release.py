"""Published SAEs: found in a folder or on the hub with the same answer, converted once, opened by every loader."""

import fnmatch
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lens_maira.errors import SAEError
from sae_lens_maira.interface import load_sae
from sae_lens_maira.sae import (
    load_matryoshka,
    load_release,
    register_release,
    resolve_sae,
)
from sae_lens_maira.sae import release as release_module
from sae_lens_maira.sae.release import cache_root, hook_of

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("cache")]


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
    assert metadata["release"]["hook_assumed"] is True  # a layer number does not say how it counts
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
    assert {file.name for file in converted.iterdir()} == {
        "cfg.json",
        "checksums.json",
        "sae_weights.safetensors",
    }
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
    published.write_pt(
        tmp_path,
        published.without_groups(published.state_of()),
        published.config_of(group_sizes=None, group_fractions=None),
    )
    assert load_release(tmp_path, level_widths=[24]).level_widths == (24,)
    assert load_release(tmp_path, level_widths=[4, 12]).level_widths == (4, 12, 24)


def test_a_release_in_saelens_layout(trained, make_rows, tmp_path):
    trained.save_inference_model(tmp_path / "sae")
    sae = load_release(tmp_path, expansion=4)
    assert sae.level_widths == (8, 20, 48)
    assert torch.equal(sae.encode(make_rows(10)), load_matryoshka(trained).encode(make_rows(10)))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository, "someone/saes": the files of the folder `hub.source`.

    `hub.downloaded` lists the files that were fetched.
    """

    class Hub:
        source = tmp_path / "hub-source"
        snapshot = tmp_path / "hub-cache" / "snapshots" / "abc"
        downloaded: list[str] = []  # noqa: RUF012 - one hub per test

        def names(self):
            return sorted(
                p.relative_to(self.source).as_posix() for p in self.source.rglob("*") if p.is_file()
            )

    hub = Hub()
    hub.downloaded = []
    hub.source.mkdir()

    class Api:
        def list_repo_files(self, repo, revision=None):
            assert repo == "someone/saes"
            return hub.names()

    def snapshot_download(repo, *, revision, local_files_only, force_download, allow_patterns=None):
        for name in hub.names():
            wanted = allow_patterns is None or any(fnmatch.fnmatch(name, each) for each in allow_patterns)
            if wanted and not local_files_only:
                target = hub.snapshot / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(hub.source / name, target)
                hub.downloaded.append(name)
        return str(hub.snapshot)

    monkeypatch.setattr(release_module, "HfApi", Api)
    monkeypatch.setattr(release_module, "snapshot_download", snapshot_download)
    return hub


def flat(pattern, configs=None):
    """Write three SAEs, named by expansion or width; `configs` is the name of the JSON file of each, if any."""

    def write(root, published):
        for expansion in (2, 4, 8):
            path = root / pattern.format(expansion, expansion * published.d_in)
            path.parent.mkdir(parents=True, exist_ok=True)
            state = published.state_of(expansion)
            save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
            if configs is not None:
                config = published.config_of(expansion, layer=10 + expansion)
                (root / configs.format(expansion)).write_text(json.dumps(config))

    return write


NAMINGS = {
    "ef_2.pt": flat("ef_{0}.pt"),
    "sae_ef4.safetensors": flat("sae_ef{0}.safetensors"),
    "maira2_sae_x4.pt": flat("maira2_sae_x{0}.pt"),
    "sae_ef4.pt and config_ef4.json": flat("sae_ef{0}.pt", "config_ef{0}.json"),
    "sae_ef4.pt and sae_ef4.json": flat("sae_ef{0}.pt", "sae_ef{0}.json"),
    "dict_24/ae.pt": flat("dict_{1}/ae.pt"),
    "4x/sae.pt": flat("{0}x/sae.pt"),
    "names that say nothing": lambda root, published: [
        published.write_pt(root / name, published.state_of(expansion))
        for name, expansion in (("one", 2), ("two", 4), ("three", 8))
    ],
    "names that mislead": lambda root, published: [
        published.write_pt(root / f"x{name}", published.state_of(expansion))
        for name, expansion in ((4, 2), (8, 4), (2, 8))
    ],
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("expansion", [2, 4, 8])
def test_the_hub_and_a_folder_give_the_same_sae(naming, expansion, hub, published):
    NAMINGS[naming](hub.source, published)
    local = load_release(hub.source, expansion)
    remote = load_release("someone/saes", expansion)
    rows = torch.randn(10, published.d_in)
    torch.testing.assert_close(
        local.encode(rows), published.reference(published.state_of(expansion), rows)[0]
    )
    assert torch.equal(remote.encode(rows), local.encode(rows))
    facts = [sae.cfg.metadata.to_dict() for sae in (local, remote)]
    for one in facts:
        one["release"].pop("source")
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    "naming", [name for name in NAMINGS if not name.startswith("names that") and not name.startswith("dict_")]
)
def test_only_the_wanted_weights_are_downloaded(naming, hub, published):
    NAMINGS[naming](hub.source, published)
    load_release("someone/saes", 4)
    assert len([name for name in hub.downloaded if not name.endswith(".json")]) == 1


def test_a_width_in_a_name_needs_d_in(hub, published):
    NAMINGS["dict_24/ae.pt"](hub.source, published)
    load_release("someone/saes", 4, d_in=published.d_in)
    assert hub.downloaded == ["dict_24/ae.pt"]


def test_each_file_takes_its_own_configuration(hub, published):
    """config_ef4.json belongs to sae_ef4.pt, not to its neighbours."""
    NAMINGS["sae_ef4.pt and config_ef4.json"](hub.source, published)
    for expansion in (2, 4, 8):
        for place in (hub.source, "someone/saes"):
            assert load_release(place, expansion).cfg.metadata.hook_name == (
                f"blocks.{10 + expansion}.hook_resid_post"
            )


@pytest.mark.parametrize("where", ["local", "hub"])
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"expansion": 3}, ["none with expansion 3", "6 -> 12", "6 -> 48"]),
        ({"expansion": None}, ["several SAEs that fit", "folder="]),
        ({"expansion": 4, "d_in": 4096}, ["d_in=4096", "6 -> 24"]),
        ({"expansion": 4, "folder": "absent"}, ["folder='absent'"]),
    ],
    ids=["no such expansion", "several fit", "another width", "no such folder"],
)
def test_refusals_are_the_same(where, request_, words, hub, published):
    NAMINGS["ef_2.pt"](hub.source, published)
    with pytest.raises(SAEError) as error:
        load_release(hub.source if where == "local" else "someone/saes", **request_)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_bare_state_dict_needs_its_class(hub, published):
    """JumpReLU and TopK SAEs of one library have the same tensors, and a level width does not tell the formula."""
    published.write_pt(hub.source, published.without_groups(published.state_of()))
    for place in (hub.source, "someone/saes"):
        with pytest.raises(SAEError, match="dict_class="):
            load_release(place, level_widths=[24])
    rows, state = torch.randn(10, published.d_in), published.state_of()
    batch = load_release(hub.source, level_widths=[24], dict_class="BatchTopKSAE")
    torch.testing.assert_close(batch.encode(rows), published.reference(state, rows)[0])
    jump = load_release(hub.source, level_widths=[24], dict_class="JumpReluAutoEncoder")
    uncentred = torch.relu(rows @ state["W_enc"] + state["b_enc"])
    torch.testing.assert_close(jump.encode(rows), uncentred * (uncentred > state["threshold"]))
    with pytest.raises(SAEError, match="AutoEncoderTopK"):
        load_release(hub.source, level_widths=[24], dict_class="AutoEncoderTopK")
    with pytest.raises(SAEError) as printed:
        load_release(hub.source)
    path, content = re.findall(r"write (.*?config\.json) with ({.*})", str(printed.value))[0]
    Path(path).write_text(content)
    assert load_release(hub.source).level_widths == (24,)


def test_levels_that_contradict_the_file_are_refused(hub, published):
    published.write_pt(hub.source, published.state_of())
    with pytest.raises(SAEError, match="Leave level_widths out"):
        load_release(hub.source, level_widths=[7, 24])
    own = load_release(hub.source).level_widths
    assert load_release(hub.source, level_widths=list(own)).level_widths == own


@pytest.mark.parametrize(
    ("facts", "hook_name", "assumed"),
    [
        ({}, "blocks.15.hook_resid_post", True),
        ({"layer": 7}, "blocks.7.hook_resid_post", True),
        ({"submodule_name": "mlp_out_layer_6"}, "blocks.6.hook_mlp_out", True),
        ({"submodule_name": "attn_out_layer_3", "layer": 3}, "blocks.3.hook_attn_out", True),
        ({"submodule_name": "resid_post_layer_6"}, "blocks.6.hook_resid_post", True),
        ({"hook_name": "blocks.9.hook_mlp_out", "layer": 3}, "blocks.9.hook_mlp_out", False),
    ],
)
def test_hook_point_and_its_assumption(facts, hook_name, assumed):
    found, source = hook_of(facts, "a file")
    assert found == hook_name
    assert ("assumed" in source) == assumed


def test_an_unknown_submodule_is_refused(tmp_path, published):
    published.write_pt(tmp_path, published.state_of(), published.config_of(submodule_name="q_proj_4"))
    with pytest.raises(SAEError, match="hook_name="):
        load_release(tmp_path)
    given = load_release(tmp_path, hook_name="blocks.4.hook_resid_post").cfg.metadata.to_dict()
    assert given["release"]["hook_source"] == "given"


def test_load_sae_takes_every_name(hub, published):
    """A hub id, a folder of releases, SAELens' name and a folder that SAELens wrote give one SAE."""
    NAMINGS["ef_2.pt"](hub.source, published)
    register_release("maira-2-sae-named", hub.source)
    folder = resolve_sae("someone/saes")
    rows = torch.randn(10, published.d_in)
    expected = load_sae("someone/saes").encode(rows)
    for name in (hub.source, folder, "maira-2-sae-named/expansion_4"):
        sae = load_sae(name)
        assert torch.equal(sae.encode(rows), expected)
        assert (sae.p99, sae.latent_names) == (None, {})
    assert load_sae("someone/saes", expansion=8).cfg.d_sae == 8 * published.d_in
    other = load_sae(folder, hook_name="blocks.2.hook_resid_post")
    assert other.cfg.metadata.hook_name == "blocks.2.hook_resid_post"


def test_load_sae_refuses_what_does_not_fit(hub, published):
    NAMINGS["ef_2.pt"](hub.source, published)
    with pytest.raises(SAEError, match="apply to a release"):
        load_sae(resolve_sae("someone/saes"), folder="x")
    with pytest.raises(SAEError, match="no argument layer for a release"):
        load_sae("someone/saes", layer=3)
