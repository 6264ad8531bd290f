"""Locating an SAE: explained variance per hook point, a margin over studies, and counting of layers."""

import numpy as np
import pytest
import torch

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.locate import hidden_state_of, locate_sae
from sae_lens_maira.stats import explained_variance

HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(4)]


def layers_of(make_rows, n=600, seed=0):
    """Rows that turn a little from layer to layer, as a residual stream does."""
    x = make_rows(n, seed=seed)
    turn = torch.linalg.matrix_exp(
        0.3 * torch.triu(torch.ones(12, 12), 1) - 0.3 * torch.tril(torch.ones(12, 12), -1)
    )
    values = {}
    for hook in HOOKS:
        values[hook] = x
        x = x @ turn
    return values


def batches_of(values, n_studies=12, kind="text"):
    n = len(next(iter(values.values())))
    study = np.arange(n) % n_studies
    for start in range(0, n, 100):
        part = slice(start, start + 100)
        yield (
            {hook: rows[part] for hook, rows in values.items()},
            study[part],
            np.full(len(study[part]), kind),
        )


def test_the_place_of_training_is_found_with_a_margin(make_rows, trained):
    """An SAE of layer 0's rows is located there, and the figures are stats.explained_variance."""
    from sae_lens_maira.sae import load_matryoshka

    sae = load_matryoshka(trained)
    values = layers_of(make_rows)
    found = locate_sae(sae, batches_of(values))
    assert found.hook_name == HOOKS[0]
    assert found.decided
    assert found.low <= found.margin <= found.high
    assert "hidden_states[1]" in str(found)
    for hook in HOOKS:
        with torch.no_grad():
            expected = explained_variance(values[hook], lambda x: sae.decode(sae.encode(x)))
        row = found.table[found.table["hook_name"] == hook].iloc[0]
        assert row["explained_variance"] == pytest.approx(expected, abs=1e-6)
        assert row["l0"] == pytest.approx(float((sae.encode(values[hook]) != 0).sum(1).float().mean()))
    assert found.to_json()["hidden_states"] == 1


def test_the_better_explained_kind_decides(make_rows, trained):
    from sae_lens_maira.sae import load_matryoshka

    values = layers_of(make_rows)
    noise = {
        hook: 5 * torch.randn(100, 12, generator=torch.Generator().manual_seed(i))
        for i, hook in enumerate(HOOKS)
    }
    found = locate_sae(load_matryoshka(trained), [*batches_of(noise, kind="image"), *batches_of(values)])
    assert (found.kind, found.hook_name) == ("text", HOOKS[0])
    assert set(found.table["kind"]) == {"image", "text"}


def test_equal_places_are_not_decided(make_rows, trained):
    from sae_lens_maira.sae import load_matryoshka

    x = make_rows(300)
    found = locate_sae(load_matryoshka(trained), batches_of({HOOKS[0]: x, HOOKS[1]: x.clone()}))
    assert found.margin == 0
    assert not found.decided
    assert "not decided" in str(found)


def test_two_countings_of_layers():
    """The output of block 14 is hidden_states[15], that of block 15 is hidden_states[16]."""
    assert hidden_state_of("blocks.14.hook_resid_post") == 15
    assert hidden_state_of("blocks.15.hook_resid_post") == 16
    assert hidden_state_of("blocks.15.hook_resid_pre") == 15
    assert hidden_state_of("blocks.15.hook_mlp_out") is None


def test_wrong_inputs_are_refused(make_rows, trained):
    from sae_lens_maira.sae import load_matryoshka

    sae = load_matryoshka(trained)
    with pytest.raises(SAEError, match="two or more"):
        locate_sae(sae, batches_of({HOOKS[0]: make_rows(50)}))
    with pytest.raises(SAEError, match="two or more studies"):
        locate_sae(sae, batches_of(layers_of(make_rows, 50), n_studies=1))
    with pytest.raises(SAEError, match="12 numbers"):
        locate_sae(sae, batches_of({HOOKS[0]: make_rows(50)[:, :6], HOOKS[1]: make_rows(50)}))
