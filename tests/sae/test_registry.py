"""SAELens' own ways to a published SAE: `from_pretrained` by release and id, by converter, and `load_from_disk`."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import MatryoshkaSAE, maira2_sae_disk_loader, maira2_sae_loader, register_release

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("cache")]


def test_saelens_from_pretrained(release, published):
    """SAELens' own interface, with its list of ids, its configuration getter and its error for a wrong id."""
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
    with pytest.raises(SAEError, match="already has"):
        register_release("gpt2-small-res-jb")


def test_converters_for_saelens(release):
    """SAELens' public argument, which needs no registration."""
    by_id = SAE.from_pretrained(str(release), "expansion_4", converter=maira2_sae_loader)
    by_path = SAE.load_from_disk(release / "layer15_ef4", converter=maira2_sae_disk_loader)
    for sae in (by_id, by_path):
        assert isinstance(sae, MatryoshkaSAE)
        assert sae.level_widths == (6, 12, 24)
