"""Which files of a release are downloaded: configurations decide, then names; one weights file per folder."""

import pytest

from sae_lens_maira.sae.candidates import weight_files, worth_downloading

pytestmark = pytest.mark.compat


def test_what_a_name_says_about_the_expansion(published):
    """Before the large files are downloaded, configurations decide, then names."""
    names = ["README.md", "a/ae.pt", "a/config.json", "b/ae.pt", "b/config.json", "b/checkpoints/ae_5.pt"]
    configs = {"a/ae.pt": published.config_of(2), "b/ae.pt": published.config_of(4)}
    wanted = {"expansion": 4, "d_in": None, "folder": None}
    assert worth_downloading(names, configs, **wanted) == ["b/ae.pt"]
    assert worth_downloading(names, {}, expansion=None, d_in=None, folder="a/") == ["a/ae.pt"]
    for pattern in ("layer15_ef{}", "x{}", "expansion-{}", "{}x", "expansion_factor_{}", "sae_exp{}_k64"):
        folders = [f"{pattern.format(e)}/ae.pt" for e in (2, 4, 8, 14, 40)]
        assert worth_downloading(folders, {}, **wanted) == [folders[1]], pattern
    assert worth_downloading(["one/ae.pt", "two/ae.pt"], {}, **wanted) == ["one/ae.pt", "two/ae.pt"]


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
