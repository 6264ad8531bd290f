"""Published SAEs in every plausible layout: load, or are refused by saying what was seen."""

import json
import os
import pickle  # noqa: TID251 - builds the harmful file that must be refused

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

pytestmark = pytest.mark.compat

D_IN = 6
SIZES = {2: [3, 3, 6], 4: [6, 6, 12], 8: [12, 12, 24]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SAE_LENS_MAIRA_CACHE", str(folder))
    return folder


def state_of(expansion=4, seed=0):
    """A state dict as dictionary_learning's MatryoshkaBatchTopKSAE writes it."""
    generator = torch.Generator().manual_seed(seed + expansion)
    d_sae = expansion * D_IN
    return {
        "k": torch.tensor(3, dtype=torch.int),
        "threshold": torch.tensor(0.4),
        "group_sizes": torch.tensor(SIZES[expansion]),
        "W_enc": torch.randn(D_IN, d_sae, generator=generator),
        "b_enc": 0.1 * torch.randn(d_sae, generator=generator),
        "W_dec": torch.randn(d_sae, D_IN, generator=generator),
        "b_dec": torch.randn(D_IN, generator=generator),
    }


def config_of(expansion=4, **changes):
    trainer = {
        "dict_class": "MatryoshkaBatchTopKSAE", "activation_dim": D_IN, "dict_size": expansion * D_IN, "k": 3,
        "group_sizes": SIZES[expansion], "group_fractions": [0.25, 0.25, 0.5], "layer": 15, "lm_name": "maira-2",
    } | changes  # fmt: skip
    return {"trainer": {name: value for name, value in trainer.items() if value is not None}}


def reference(state, rows, scale=1.0):
    """dictionary_learning's inference: relu, strict threshold, decode."""
    b_dec, b_enc = state["b_dec"] * scale, state["b_enc"] * scale
    acts = torch.relu((rows - b_dec) @ state["W_enc"] + b_enc)
    acts = acts * (acts > state["threshold"] * scale)
    return acts, acts @ state["W_dec"] + b_dec


def without_groups(state):
    return {name: value for name, value in state.items() if name != "group_sizes"}


def write_pt(folder, state, config=None, name="ae.pt"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def library_layout(folder):
    write_pt(folder, state_of(), config_of())


def no_config(folder):
    write_pt(folder, state_of())


def safetensors_layout(folder):
    folder.mkdir()
    save_file(state_of(), folder / "model.safetensors")


def turned_round(folder):
    """nn.Linear's names and orientation, groups in the configuration only."""
    state = state_of()
    linear = {
        "encoder.weight": state["W_enc"].T.contiguous(), "encoder.bias": state["b_enc"], "b_dec": state["b_dec"],
        "decoder.weight": state["W_dec"].T.contiguous(), "threshold": state["threshold"],
    }  # fmt: skip
    write_pt(folder, linear, config_of())


def transposed_without_names(folder):
    state = state_of()
    state |= {"W_enc": state["W_enc"].T.contiguous(), "W_dec": state["W_dec"].T.contiguous()}
    write_pt(folder, state)


def fractions_only(folder):
    write_pt(folder, without_groups(state_of()), config_of(group_sizes=None))


def lists_as_strings(folder):
    """Bussmann's configuration: flat, every list a string."""
    config = {
        "act_size": D_IN,
        "dict_size": 24,
        "top_k": 3,
        "group_sizes": str(SIZES[4]),
        "input_unit_norm": False,
    }
    write_pt(folder, without_groups(state_of()), config, name="sae.pt")


def cumulative_widths(folder):
    write_pt(folder, without_groups(state_of()), {"matryoshka_widths": [6, 12]})


def wrapped(folder):
    write_pt(folder, {"state_dict": {f"module.{name}": value for name, value in state_of().items()}})


def threshold_per_latent(folder):
    write_pt(folder, state_of() | {"threshold": torch.full((24,), 0.4)})


def legacy_pickle(folder):
    folder.mkdir()
    torch.save(state_of(), folder / "ae.pt", _use_new_zipfile_serialization=False)


LAYOUTS = [
    library_layout, no_config, safetensors_layout, turned_round, transposed_without_names, fractions_only,
    lists_as_strings, cumulative_widths, wrapped, threshold_per_latent, legacy_pickle,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layout(layout, tmp_path):
    """Every layout of one SAE gives that SAE: activations, reconstructions and levels."""
    layout(tmp_path / "sae")
    sae = load_release(tmp_path / "sae", expansion=4, d_in=D_IN)
    rows = torch.randn(50, D_IN)
    acts, out = reference(state_of(), rows)
    torch.testing.assert_close(sae.encode(rows), acts)
    torch.testing.assert_close(sae(rows), out)
    assert sae.level_widths == (6, 12, 24)


def test_levels_decode_as_nested_prefixes(tmp_path):
    library_layout(tmp_path / "sae")
    sae = load_release(tmp_path)
    state, rows = state_of(), torch.randn(20, D_IN)
    acts, _ = reference(state, rows)
    for level, width in enumerate((6, 12, 24)):
        expected = acts[:, :width] @ state["W_dec"][:width] + state["b_dec"]
        torch.testing.assert_close(sae.decode(sae.encode(rows), level=level), expected)


def test_backup_of_an_interrupted_run(tmp_path):
    """Its weights live in units of norm_factor; the SAE takes raw rows."""
    state = state_of()
    backup = {
        "step": 700, "ae": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "config": config_of()["trainer"], "norm_factor": 2.5,
    }  # fmt: skip
    write_pt(tmp_path, backup)
    sae = load_release(tmp_path)
    rows = torch.randn(40, D_IN) * 2.5
    acts, out = reference(state, rows, scale=2.5)
    torch.testing.assert_close(sae.encode(rows), acts)
    torch.testing.assert_close(sae(rows), out)
    assert sae.cfg.metadata.to_dict()["release"]["interrupted_at_step"] == 700


def test_negative_threshold_passes_all_relu_outputs(tmp_path):
    """dictionary_learning marks a threshold that was never set with -1."""
    write_pt(tmp_path, state_of() | {"threshold": torch.tensor(-1.0)})
    rows = torch.randn(40, D_IN)
    acts, _ = reference(state_of() | {"threshold": torch.tensor(-1.0)}, rows)
    torch.testing.assert_close(load_release(tmp_path).encode(rows), acts)


@pytest.fixture
def release(tmp_path):
    """Three SAEs in folders, the largest as safetensors, with a run's checkpoints and tables beside them."""
    root = tmp_path / "release"
    for expansion in (2, 4):
        write_pt(root / f"layer15_ef{expansion}", state_of(expansion), config_of(expansion))
    (root / "layer15_ef8").mkdir()
    save_file(state_of(8), root / "layer15_ef8" / "ae.safetensors")
    write_pt(root / "layer15_ef8", state_of(8, seed=1), config_of(8))
    write_pt(root / "layer15_ef4" / "checkpoints", state_of(4, seed=2), name="ae_100.pt")
    (root / "README.md").write_text("---\nlibrary_name: dictionary-learning\n---\n")
    (root / "layer15_ef4" / "interpretations.csv").write_text("latent,interpretation\n0,pacemaker\n")
    return root


@pytest.mark.parametrize("expansion", [2, 4, 8])
def test_expansion_is_found_by_shape(expansion, release):
    sae = load_release(release, expansion)
    assert sae.cfg.d_sae == expansion * D_IN
    rows = torch.randn(10, D_IN)
    torch.testing.assert_close(sae.encode(rows), reference(state_of(expansion), rows)[0])


def test_metadata_tells_where_it_comes_from(release):
    metadata = load_release(release).cfg.metadata.to_dict()
    assert metadata["model_name"] == "maira-2"
    assert metadata["hook_name"] == "blocks.15.hook_resid_post"
    assert metadata["release"]["hook_assumed"] is False
    assert metadata["matryoshka"] == {"level_widths": [6, 12, 24], "k": 3.0}
    other = load_release(release, 8, hook_name="blocks.14.hook_resid_post", model_name="mine").cfg.metadata
    assert (other.hook_name, other.model_name) == ("blocks.14.hook_resid_post", "mine")


def test_assumed_hook_is_marked(tmp_path):
    write_pt(tmp_path, state_of())
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


def test_changed_file_is_converted_anew(release):
    first = load_release(release).W_enc.clone()
    write_pt(release / "layer15_ef4", state_of(4, seed=3))
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


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("where", ["whole file", "torch.save", "beside good weights"])
def test_harmful_pickle_is_refused_and_does_not_run(where, tmp_path):
    trace = tmp_path / "it-ran"
    target = tmp_path / "sae" / "ae.pt"
    target.parent.mkdir()
    if where == "whole file":
        target.write_bytes(pickle.dumps(Harmful(trace)))
    else:
        state = {"ae": Harmful(trace)} if where == "torch.save" else state_of() | {"extra": Harmful(trace)}
        torch.save(state, target)
    with pytest.raises(SAEError, match="nothing in the file was run"):
        load_release(target.parent)
    assert not trace.exists()
    torch.load(target, weights_only=False) if where == "torch.save" else None
    assert trace.exists() == (where == "torch.save")  # the payload is a live one


def test_harmful_neighbour_does_not_block_the_others(release, tmp_path):
    torch.save(Harmful(tmp_path / "it-ran"), release / "layer15_ef2" / "ae.pt")
    assert load_release(release, 4).cfg.d_sae == 24
    with pytest.raises(SAEError, match="none with expansion 2"):
        load_release(release, 2)
    assert not (tmp_path / "it-ran").exists()


def changed(**changes):
    return {name: value for name, value in (state_of() | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("state", "config", "request_", "words"),
    [
        (state_of(), None, {"d_in": 4096}, ["d_in=4096", "6 -> 24"]),
        (state_of(), None, {"expansion": 8}, ["expansion 8", "6 -> 24"]),
        (changed(W_enc=torch.full((6, 24), float("nan"))), None, {}, ["144 of 144", "W_enc"]),
        (changed(threshold=torch.tensor(float("nan"))), None, {}, ["threshold", "NaN"]),
        (changed(threshold=None), None, {}, ["Not found: threshold", "W_enc (6, 24)"]),
        (changed(b_dec=None), None, {}, ["Not found: b_dec"]),
        (changed(gate_bias=torch.zeros(24)), None, {}, ["Not understood: gate_bias"]),
        (changed(W_dec=torch.zeros(24, 5)), None, {}, ["W_dec has shape (24, 5)"]),
        (changed(threshold=torch.zeros(5)), None, {}, ["threshold"]),
        (changed(group_sizes=torch.tensor([6, 6])), None, {}, ["ends at 12", "d_sae=24"]),
        (without_groups(state_of()), None, {}, ["names no groups", "level_widths=[24]"]),
        (state_of(), config_of(dict_class="AutoEncoderTopK"), {}, ["AutoEncoderTopK"]),
        (state_of(), {"input_unit_norm": "True"}, {}, ["input_unit_norm"]),
        ({"weights": [1, 2]}, None, {}, ["no tensors"]),
        ([torch.zeros(3)], None, {}, ["list"]),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_not_understood_is_named(state, config, request_, words, tmp_path):
    write_pt(tmp_path / "sae", state, config)
    with pytest.raises(SAEError) as error:
        load_release(tmp_path / "sae", **request_)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_file(suffix, tmp_path):
    file = tmp_path / f"ae.{suffix}"
    torch.save(state_of(), file) if suffix == "pt" else save_file(state_of(), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(SAEError, match="bytes"):
        load_release(tmp_path)


def test_broken_config(tmp_path):
    library_layout(tmp_path / "sae")
    (tmp_path / "sae" / "config.json").write_text('{"trainer": ')
    with pytest.raises(SAEError, match="not valid JSON"):
        load_release(tmp_path)


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


def test_several_that_fit_need_a_folder(release):
    write_pt(release / "layer16_ef4", state_of(4, seed=9), config_of(layer=16))
    with pytest.raises(SAEError, match="Pass folder="):
        load_release(release)
    assert load_release(release, folder="layer16").cfg.metadata.hook_name == "blocks.16.hook_resid_post"


def test_level_widths_can_be_given(tmp_path):
    write_pt(tmp_path, without_groups(state_of()))
    assert load_release(tmp_path, level_widths=[24]).level_widths == (24,)
    assert load_release(tmp_path, level_widths=[4, 12]).level_widths == (4, 12, 24)


def test_a_release_in_saelens_layout(trained, make_rows, tmp_path):
    trained.save_inference_model(tmp_path / "sae")
    sae = load_release(tmp_path, expansion=4)
    assert sae.level_widths == (8, 20, 48)
    assert torch.equal(sae.encode(make_rows(10)), load_matryoshka(trained).encode(make_rows(10)))


def test_choice_on_the_hub_by_small_files_or_names():
    """Before the large files are there, configurations decide, then names."""
    names = ["README.md", "a/ae.pt", "a/config.json", "b/ae.pt", "b/config.json", "b/checkpoints/ae_5.pt"]
    configs = {"a": {"c": config_of(2)}, "b": {"c": config_of(4)}}
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


def test_saelens_from_pretrained(release):
    """SAELens' own door, with its list of ids, its configuration getter and its error for a wrong id."""
    register_release("maira-2-sae-test", release)
    sae = SAE.from_pretrained("maira-2-sae-test", "expansion_8")
    assert isinstance(sae, MatryoshkaSAE)
    assert sae.level_widths == (12, 24, 48)
    rows = torch.randn(10, D_IN)
    torch.testing.assert_close(sae.encode(rows), reference(state_of(8), rows)[0])
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
