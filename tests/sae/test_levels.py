"""Arithmetic of levels, and what a MatryoshkaSAE answers about them."""

import pytest
import torch

from sae_lens_maira.errors import ConfigError, SAEError
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig, level_widths_of, load_matryoshka

pytestmark = pytest.mark.compat


def test_fractions_and_widths_name_the_same_levels(make_config):
    by_fractions = make_config(matryoshka_widths=[], group_fractions=[1 / 6, 1 / 4, 7 / 12])
    assert by_fractions.level_widths() == make_config().level_widths() == (8, 20, 48)
    assert by_fractions.level_sizes() == (8, 12, 28)


def test_last_group_takes_the_remainder(make_config):
    """dictionary_learning's rounding: int() of every fraction but the last."""
    assert make_config(matryoshka_widths=[], group_fractions=[0.3, 0.3, 0.4]).level_sizes() == (14, 14, 20)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"group_fractions": [0.5, 0.5]}, ["matryoshka_widths", "group_fractions"]),
        ({"matryoshka_widths": []}, ["matryoshka_widths", "group_fractions"]),
        ({"k": 0}, ["k=0"]),
        ({"k": 49}, ["k=49", "d_sae=48"]),
        ({"loss_convention": "mean"}, ["'mean'", "dictionary_learning"]),
        ({"level_weights": [1, 1, 1]}, ["saelens", "level_weights"]),
        ({"loss_convention": "explicit"}, ["level_weights", "3 levels"]),
        ({"loss_convention": "explicit", "level_weights": [1, 1]}, ["2 entries for 3 levels"]),
        ({"normalize_activations": "layer_norm"}, ["layer_norm"]),
        (
            {"loss_convention": "dictionary_learning", "use_matryoshka_aux_loss": True},
            ["use_matryoshka_aux_loss"],
        ),
        ({"loss_convention": "dictionary_learning", "rescale_acts_by_decoder_norm": True}, ["rescale_acts"]),
        (
            {"loss_convention": "dictionary_learning", "normalize_activations": "covariance_whitening"},
            ["whitening"],
        ),
    ],
    ids=str,
)
def test_contradictions_name_the_fields(changes, named, make_config):
    with pytest.raises(ConfigError) as error:
        make_config(**changes)
    assert all(word in str(error.value) for word in named)


@pytest.mark.parametrize("widths", [[0, 48], [8, 8, 48], [20, 8], [8, 60], [8.5, 48], [-3]], ids=str)
def test_impossible_widths(widths, make_config):
    """Widths that do not increase to d_sae are refused."""
    with pytest.raises(SAEError, match="matryoshka_widths"):
        make_config(matryoshka_widths=widths)


@pytest.mark.parametrize("fractions", [[0.5, 0.4], [0.001, 0.999]], ids=str)
def test_impossible_fractions(fractions, make_config):
    with pytest.raises(SAEError, match="group_fractions"):
        make_config(matryoshka_widths=[], group_fractions=fractions)


def test_defaults_follow_the_convention(make_config):
    saelens, theirs = make_config(), make_config(loss_convention="dictionary_learning")
    assert (
        saelens.aux_loss_coefficient,
        saelens.rescale_acts_by_decoder_norm,
        saelens.topk_threshold_lr,
    ) == (1, True, 0.01)
    assert (theirs.aux_loss_coefficient, theirs.rescale_acts_by_decoder_norm, theirs.topk_threshold_lr) == (
        1 / 32,
        False,
        0.001,
    )
    assert saelens.effective_level_weights() == (1, 1, 1)
    assert theirs.effective_level_weights() == pytest.approx((1 / 9,) * 3)


def test_level_of(trained):
    """`level_of` and `latents_of` are inverse to each other."""
    sae = load_matryoshka(trained)
    assert [sae.level_of(i) for i in (0, 7, 8, 19, 20, 47)] == [0, 0, 1, 1, 2, 2]
    every = sae.level_of(torch.arange(48))
    assert torch.equal(every, torch.tensor([sae.level_of(i) for i in range(48)]))
    for level in range(3):
        assert list(sae.latents_of(level)) == torch.where(every == level)[0].tolist()
    with pytest.raises(SAEError, match="0 to 47"):
        sae.level_of(48)
    with pytest.raises(SAEError, match="0 to 47"):
        sae.level_of(torch.tensor([-1]))
    with pytest.raises(SAEError, match="Levels run from 0 to 2"):
        sae.width_of(3)


def test_decode_of_a_level_is_decode_without_the_other_latents(trained, make_rows):
    sae = load_matryoshka(trained)
    acts = sae.encode(make_rows(30).reshape(5, 6, 12))
    for level, width in enumerate(sae.level_widths):
        prefix = acts.clone()
        prefix[..., width:] = 0
        torch.testing.assert_close(sae.decode(acts, level=level), sae.decode(prefix))
        torch.testing.assert_close(sae.decode(acts[..., :width], level=level), sae.decode(prefix))
    torch.testing.assert_close(sae.decode(acts, level=-1), sae.decode(acts))


@pytest.mark.parametrize("level", [0, 1, 2, -2])
def test_truncate_is_the_prefix(level, trained, make_rows, tmp_path):
    sae = load_matryoshka(trained)
    small = sae.truncate(level)
    width = sae.width_of(level)
    assert small.cfg.d_sae == width
    assert small.level_widths == tuple(w for w in sae.level_widths if w <= width)
    assert small.cfg.metadata.to_dict()["matryoshka"]["truncated_from"] == 48
    rows = make_rows(30)
    torch.testing.assert_close(small.encode(rows), sae.encode(rows)[:, :width])
    torch.testing.assert_close(small(rows), sae.decode(sae.encode(rows), level=level))
    small.save_model(tmp_path)
    assert torch.equal(load_matryoshka(tmp_path).encode(rows), small.encode(rows))
    with torch.no_grad():
        small.W_dec.zero_()
    assert sae.W_dec.norm() > 0
    assert sae.cfg.d_sae == 48
    assert "truncated_from" not in sae.cfg.metadata.to_dict()["matryoshka"]


def test_level_widths_of_any_sae(trained, tmp_path):
    from sae_lens import SAE
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    assert level_widths_of(trained) == (8, 20, 48)
    trained.save_inference_model(tmp_path)
    assert level_widths_of(SAE.load_from_disk(tmp_path)) == (8, 20, 48)
    assert level_widths_of(load_matryoshka(tmp_path)) == (8, 20, 48)
    assert level_widths_of(StandardSAE(StandardSAEConfig(d_in=4, d_sae=8))) == (8,)


def test_an_sae_without_widths_has_one_level():
    assert MatryoshkaSAE(MatryoshkaSAEConfig(d_in=4, d_sae=8)).level_widths == (8,)
