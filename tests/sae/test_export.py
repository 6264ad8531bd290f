"""A dictionary_learning folder written from our SAE is that SAE: in our reader, in SAELens', in the library."""

import json

import pytest
import torch
from sae_lens import SAE

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import export_dictionary_learning, load_matryoshka, load_release

pytestmark = pytest.mark.compat


def test_round_trip(trained, make_rows, tmp_path, monkeypatch):
    """An exported SAE reads back with the same encodings and levels, bit for bit."""
    monkeypatch.setenv("SAE_LENS_MAIRA_CACHE", str(tmp_path / "cache"))
    sae = load_matryoshka(trained)
    folder = export_dictionary_learning(sae, tmp_path / "out", layer=15, lm_name="maira-2")
    back = load_release(folder)
    rows = make_rows(30)
    assert torch.equal(back.encode(rows), sae.encode(rows))
    assert back.level_widths == sae.level_widths
    assert back.cfg.k == 4
    assert back.cfg.metadata.hook_name == "blocks.15.hook_resid_post"


def test_state_dict_is_the_librarys(trained, tmp_path):
    state = torch.load(export_dictionary_learning(trained, tmp_path) / "ae.pt", weights_only=True)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    assert shapes == {
        "W_enc": ((12, 48), torch.float32), "b_enc": ((48,), torch.float32), "W_dec": ((48, 12), torch.float32),
        "b_dec": ((12,), torch.float32), "k": ((), torch.int32), "threshold": ((), torch.float32),
        "group_sizes": ((3,), torch.int64),
    }  # fmt: skip


def test_the_library_loads_it(their_trainer_module, trained, make_rows, tmp_path):
    sae = load_matryoshka(trained)
    export_dictionary_learning(sae, tmp_path)
    theirs = their_trainer_module.MatryoshkaBatchTopKSAE.from_pretrained(tmp_path / "ae.pt", k=4)
    rows = make_rows(30)
    torch.testing.assert_close(theirs.encode(rows), sae.encode(rows))
    torch.testing.assert_close(theirs(rows), sae(rows))


def test_saelens_own_reader_of_such_folders(trained, make_rows, tmp_path, monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder = export_dictionary_learning(trained, tmp_path, layer=1, lm_name="tiny")
    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo_id, filename, **_: str(folder / filename))
    config, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1("repo", ".")
    assert config["architecture"] == "jumprelu"
    plain = SAE.from_dict(loaders.handle_config_defaulting(config))
    plain.load_state_dict(state)
    rows = make_rows(30)
    torch.testing.assert_close(plain.encode(rows), load_matryoshka(trained).encode(rows))


def test_different_thresholds(trained, make_rows, tmp_path, monkeypatch):
    """Refused, or with rescale_latents: same reconstruction, activations in proportion."""
    monkeypatch.setenv("SAE_LENS_MAIRA_CACHE", str(tmp_path / "cache"))
    sae = load_matryoshka(trained)
    with torch.no_grad():
        sae.threshold.mul_(torch.rand(48) + 0.5)
    with pytest.raises(SAEError, match="rescale_latents"):
        export_dictionary_learning(sae, tmp_path / "out")
    export_dictionary_learning(sae, tmp_path / "out", rescale_latents=True)
    back, rows = load_release(tmp_path / "out"), make_rows(30)
    assert torch.equal(back.encode(rows) > 0, sae.encode(rows) > 0)
    torch.testing.assert_close(back(rows), sae(rows), rtol=1e-4, atol=1e-5)


def test_b_dec_that_is_not_subtracted_is_folded(make_config, make_trainer, make_rows, tmp_path, monkeypatch):
    from sae_lens_maira.sae import MatryoshkaTrainingSAE

    monkeypatch.setenv("SAE_LENS_MAIRA_CACHE", str(tmp_path / "cache"))
    training = MatryoshkaTrainingSAE(make_config(apply_b_dec_to_input=False))
    make_trainer(training, steps=30).fit()
    sae = load_matryoshka(training)
    assert sae.b_dec.norm() > 0
    back = load_release(export_dictionary_learning(sae, tmp_path / "out"))
    torch.testing.assert_close(back.encode(make_rows(30)), sae.encode(make_rows(30)), rtol=1e-4, atol=1e-5)


def test_layer_comes_from_the_hook(trained, tmp_path):
    sae = load_matryoshka(trained)
    sae.cfg.metadata.hook_name = "blocks.7.hook_resid_post"
    config = json.loads((export_dictionary_learning(sae, tmp_path) / "config.json").read_text())
    assert config["trainer"]["layer"] == 7
    assert config["trainer"]["group_sizes"] == [8, 12, 28]


def test_unfolded_normalisation_is_refused(make_config, tmp_path):
    from sae_lens_maira.sae import MatryoshkaTrainingSAE

    sae = MatryoshkaTrainingSAE(make_config(normalize_activations="expected_average_only_in"))
    with pytest.raises(SAEError, match="Fold"):
        export_dictionary_learning(sae, tmp_path)
