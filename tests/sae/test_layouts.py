"""Published SAEs in every plausible layout load, or are refused by saying what was seen; no pickle runs."""

import pickle  # noqa: TID251 - builds the harmful file that must be refused

import pytest
import torch
from safetensors.torch import save_file

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import load_release

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("cache")]


def library_layout(published, folder):
    published.write_pt(folder, published.state_of(), published.config_of())


def no_config(published, folder):
    published.write_pt(folder, published.state_of())


def safetensors_layout(published, folder):
    folder.mkdir()
    save_file(published.state_of(), folder / "model.safetensors")


def turned_round(published, folder):
    """nn.Linear's names and orientation, groups in the configuration only."""
    state = published.state_of()
    linear = {
        "encoder.weight": state["W_enc"].T.contiguous(), "encoder.bias": state["b_enc"], "b_dec": state["b_dec"],
        "decoder.weight": state["W_dec"].T.contiguous(), "threshold": state["threshold"],
    }  # fmt: skip
    published.write_pt(folder, linear, published.config_of())


def transposed_without_names(published, folder):
    state = published.state_of()
    state |= {"W_enc": state["W_enc"].T.contiguous(), "W_dec": state["W_dec"].T.contiguous()}
    published.write_pt(folder, state)


def fractions_only(published, folder):
    published.write_pt(
        folder, published.without_groups(published.state_of()), published.config_of(group_sizes=None)
    )


def lists_as_strings(published, folder):
    """Bussmann's configuration: flat, every list a string."""
    config = {
        "act_size": published.d_in,
        "dict_size": 24,
        "top_k": 3,
        "group_sizes": str(published.sizes[4]),
        "input_unit_norm": False,
    }
    published.write_pt(folder, published.without_groups(published.state_of()), config, name="sae.pt")


def cumulative_widths(published, folder):
    published.write_pt(folder, published.without_groups(published.state_of()), {"matryoshka_widths": [6, 12]})


def wrapped(published, folder):
    published.write_pt(
        folder, {"state_dict": {f"module.{name}": value for name, value in published.state_of().items()}}
    )


def threshold_per_latent(published, folder):
    published.write_pt(folder, published.state_of() | {"threshold": torch.full((24,), 0.4)})


def legacy_pickle(published, folder):
    folder.mkdir()
    torch.save(published.state_of(), folder / "ae.pt", _use_new_zipfile_serialization=False)


LAYOUTS = [
    library_layout, no_config, safetensors_layout, turned_round, transposed_without_names, fractions_only,
    lists_as_strings, cumulative_widths, wrapped, threshold_per_latent, legacy_pickle,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layout(layout, tmp_path, published):
    """Every layout of one SAE gives that SAE: activations, reconstructions and levels."""
    layout(published, tmp_path / "sae")
    sae = load_release(tmp_path / "sae", expansion=4, d_in=published.d_in)
    rows = torch.randn(50, published.d_in)
    acts, out = published.reference(published.state_of(), rows)
    torch.testing.assert_close(sae.encode(rows), acts)
    torch.testing.assert_close(sae(rows), out)
    assert sae.level_widths == (6, 12, 24)


def test_levels_decode_as_nested_prefixes(tmp_path, published):
    library_layout(published, tmp_path / "sae")
    sae = load_release(tmp_path)
    state, rows = published.state_of(), torch.randn(20, published.d_in)
    acts, _ = published.reference(state, rows)
    for level, width in enumerate((6, 12, 24)):
        expected = acts[:, :width] @ state["W_dec"][:width] + state["b_dec"]
        torch.testing.assert_close(sae.decode(sae.encode(rows), level=level), expected)


def test_backup_of_an_interrupted_run(tmp_path, published):
    """Its weights live in units of norm_factor; the SAE takes raw rows."""
    state = published.state_of()
    backup = {
        "step": 700, "ae": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "config": published.config_of()["trainer"], "norm_factor": 2.5,
    }  # fmt: skip
    published.write_pt(tmp_path, backup)
    sae = load_release(tmp_path)
    rows = torch.randn(40, published.d_in) * 2.5
    acts, out = published.reference(state, rows, scale=2.5)
    torch.testing.assert_close(sae.encode(rows), acts)
    torch.testing.assert_close(sae(rows), out)
    assert sae.cfg.metadata.to_dict()["release"]["interrupted_at_step"] == 700


def test_negative_threshold_passes_all_relu_outputs(tmp_path, published):
    """dictionary_learning marks a threshold that was never set with -1."""
    published.write_pt(tmp_path, published.state_of() | {"threshold": torch.tensor(-1.0)})
    rows = torch.randn(40, published.d_in)
    acts, _ = published.reference(published.state_of() | {"threshold": torch.tensor(-1.0)}, rows)
    with pytest.warns(UserWarning, match="24 of 24 latents have a negative threshold"):
        loaded = load_release(tmp_path)
    torch.testing.assert_close(loaded.encode(rows), acts)


@pytest.mark.parametrize(
    ("changes", "config", "request_", "words"),
    [
        ({}, None, {"d_in": 4096}, ["d_in=4096", "6 -> 24"]),
        ({}, None, {"expansion": 8}, ["expansion 8", "6 -> 24"]),
        ({"W_enc": torch.full((6, 24), float("nan"))}, None, {}, ["144 of 144", "W_enc"]),
        ({"threshold": torch.tensor(float("nan"))}, None, {}, ["threshold", "NaN"]),
        ({"threshold": None}, None, {}, ["Not found: threshold", "W_enc (6, 24)"]),
        ({"b_dec": None}, None, {}, ["Not found: b_dec"]),
        ({"gate_bias": torch.zeros(24)}, None, {}, ["Not understood: gate_bias"]),
        ({"W_dec": torch.zeros(24, 5)}, None, {}, ["W_dec has shape (24, 5)"]),
        ({"threshold": torch.zeros(5)}, None, {}, ["threshold", "neither 1 nor"]),
        ({"group_sizes": torch.tensor([6, 6])}, None, {}, ["ends at 12", "d_sae=24"]),
        ({"group_sizes": None}, None, {}, ["names no groups", "level_widths=[24]"]),
        ({}, {"trainer": {"dict_class": "AutoEncoderTopK"}}, {}, ["AutoEncoderTopK"]),
        ({}, {"input_unit_norm": "True"}, {}, ["input_unit_norm"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_understood_is_named(changes, config, request_, words, published, tmp_path):
    state = published.state_of() | changes
    published.write_pt(tmp_path, {name: value for name, value in state.items() if value is not None}, config)
    with pytest.raises(SAEError) as error:
        load_release(tmp_path, **request_)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("content", "word"), [({"weights": [1, 2]}, "no tensors"), ([torch.zeros(3)], "list")]
)
def test_other_files_are_named(content, word, published, tmp_path):
    published.write_pt(tmp_path, content)
    with pytest.raises(SAEError, match=word):
        load_release(tmp_path)


@pytest.mark.parametrize("where", ["whole file", "torch.save", "next to good weights"])
def test_harmful_pickle_is_refused_and_does_not_run(where, tmp_path, published):
    trace = tmp_path / "it-ran"
    target = tmp_path / "sae" / "ae.pt"
    target.parent.mkdir()
    if where == "whole file":
        target.write_bytes(pickle.dumps(published.harmful(trace)))
    else:
        state = (
            {"ae": published.harmful(trace)}
            if where == "torch.save"
            else published.state_of() | {"extra": published.harmful(trace)}
        )
        torch.save(state, target)
    with pytest.raises(SAEError, match="nothing in the file was run"):
        load_release(target.parent)
    assert not trace.exists()
    torch.load(target, weights_only=False) if where == "torch.save" else None
    assert trace.exists() == (where == "torch.save")  # the payload is a live one


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_file(suffix, tmp_path, published):
    """A file that lacks its last bytes is an SAEError, not a wrong SAE."""
    file = tmp_path / f"ae.{suffix}"
    torch.save(published.state_of(), file) if suffix == "pt" else save_file(published.state_of(), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(SAEError, match="bytes"):
        load_release(tmp_path)


def test_broken_config(published, tmp_path):
    """A configuration that is not JSON is an SAEError."""
    library_layout(published, tmp_path / "sae")
    (tmp_path / "sae" / "config.json").write_text('{"trainer": ')
    with pytest.raises(SAEError, match="not valid JSON"):
        load_release(tmp_path)
