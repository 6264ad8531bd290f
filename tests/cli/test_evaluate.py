"""The commands match and locate on the phantom's shipped SAEs."""

import json

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from sae_lens_maira.checksums import SUMS
from sae_lens_maira.cli import main
from sae_lens_maira.interface import load_sae_weights

FEW = ["--studies", "6", "--json"]


@pytest.mark.parametrize(
    ("name", "layer", "kind"), [("phantom-image", 3, "image"), ("phantom-text", 6, "text")]
)
def test_an_sae_without_metadata_is_located(name, layer, kind, tmp_path, capsys):
    """Its own block wins with a margin, so `hidden_states[n]` and `blocks.n` are distinguished."""
    sae = load_sae_weights(name)
    sae.save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"metadata": {}}))
    (tmp_path / SUMS).unlink()  # another program's SAE has no checksums
    rate = [] if kind == "image" else ["--image-rate", "0.02"]
    assert (
        main(["locate", "--sae", str(tmp_path), "--out", str(tmp_path / "new" / "t.csv"), *rate, *FEW]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["hook_name"], found["kind"]) == (f"blocks.{layer}.hook_resid_post", kind)
    assert found["decided"]
    assert found["low"] > 0
    assert found["hidden_states"] == layer + 1
    table = pd.read_csv(tmp_path / "new" / "t.csv")
    scores = table[table["kind"] == kind].set_index("hook_name")["explained_variance"]
    # The other reading of "layer n": hidden_states[n] is the output of block n - 1, blocks.n + 1 the one after.
    for other in (layer - 1, layer + 1):
        assert scores[f"blocks.{layer}.hook_resid_post"] > scores[f"blocks.{other}.hook_resid_post"]


def test_a_permuted_sae_is_matched(tmp_path, capsys):
    """One SAE saved with its latents in reverse order: all active latents are found with score 1."""
    sae = load_sae_weights("phantom-text")
    sae.cfg.metadata.hook_name = "blocks.6.hook_resid_post"
    sae.save_model(tmp_path / "sae")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    state = load_file(path)
    for name in ("W_dec", "b_enc", "threshold"):
        state[name] = state[name].flip(0).contiguous()
    state["W_enc"] = state["W_enc"].flip(1).contiguous()
    save_file(state, path)
    (tmp_path / "sae" / SUMS).unlink()
    words = ["match", "--sae", "phantom-text", "--other", str(tmp_path / "sae"), "--roles", "text_only"]
    assert main([*words, "--out", str(tmp_path / "found"), *FEW]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["found"] == summary["pairs"] == summary["active"]
    assert summary["means"]["matched"]["correlation"] == pytest.approx(1, abs=1e-5)
    pairs = pd.read_csv(tmp_path / "found" / "pairs.csv")
    assert (pairs["latent"] + pairs["match"] == sae.cfg.d_sae - 1).all()
    assert (tmp_path / "found" / "scores.png").stat().st_size > 1000


@pytest.mark.parametrize("words", [["--studies", "1"], ["--image-rate", "0"]])
def test_too_few_rows_are_refused(words, capsys):
    assert main(["locate", "--sae", "phantom-text", *words]) == 2
    assert "two or more studies" in capsys.readouterr().err
