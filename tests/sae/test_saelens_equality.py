"""With loss_convention="saelens" the class is SAELens' own `matryoshka_batchtopk`, to 1e-12 in float64."""

import itertools
import warnings

import pytest
import torch
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)

from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig

pytestmark = pytest.mark.compat

D_IN, D_SAE = 12, 48
LEVELS = {"one": [48], "last missing": [8, 20], "many": [1, 3, 8, 20, 31, 48]}


def make_pair(**fields):
    """SAELens' SAE and ours, in float64 with equal weights away from their initial values."""
    common = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64"} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                **common | {"matryoshka_widths": list(fields["matryoshka_widths"])}
            )
        )
    ours = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**common))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def dead_mask(kind):
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    if kind == "few":
        mask[[0, 25, 26]] = True
    if kind == "most":
        mask[4:] = True
    return None if kind == "unknown" else mask


def assert_same_step(theirs, ours, step):
    expected, got = theirs.training_forward_pass(step), ours.training_forward_pass(step)
    assert list(got.losses) == list(expected.losses)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    for name, value in expected.losses.items():
        close(got.losses[name], value)
    close(got.loss, expected.loss)
    close(got.sae_out, expected.sae_out)
    assert torch.equal(got.feature_acts, expected.feature_acts)
    assert torch.equal(got.hidden_pre, expected.hidden_pre)
    assert torch.equal(ours.topk_threshold, theirs.topk_threshold)
    expected.loss.backward()
    got.loss.backward()
    assert {name for name, _ in ours.named_parameters()} == {"W_enc", "b_enc", "W_dec", "b_dec"}
    for name, parameter in theirs.named_parameters():
        close(ours.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize(
    ("levels", "rescale", "level_aux", "dead"),
    list(itertools.product(LEVELS, [True, False], [True, False], ["unknown", "none", "few", "most"])),
)
def test_losses_and_gradients(levels, rescale, level_aux, dead, make_rows, step_input):
    theirs, ours = make_pair(
        matryoshka_widths=LEVELS[levels],
        k=4,
        rescale_acts_by_decoder_norm=rescale,
        use_matryoshka_aux_loss=level_aux,
    )
    assert_same_step(theirs, ours, step_input(make_rows(33, dtype=torch.float64), dead_mask(dead)))


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 4.35},
        {"k": 0.29},
        {"k": 40.0},
        {"apply_b_dec_to_input": False},
        {"aux_loss_coefficient": 0.25},
        {"aux_loss_coefficient": 0.0},
        {"decoder_init_norm": None},
        {"topk_threshold_lr": 0.5},
        {"normalize_activations": "expected_average_only_in"},
        {"normalize_activations": "covariance_whitening"},
        {"use_sparse_activations": True},
    ],
    ids=str,
)
def test_other_flags(fields, make_rows, step_input):
    """A step equals that of SAELens' class under every other setting."""
    theirs, ours = make_pair(matryoshka_widths=[8, 20, 48], **({"k": 4} | fields))
    for seed in range(3):
        rows = make_rows(33, seed=seed, dtype=torch.float64)
        assert_same_step(theirs, ours, step_input(rows, dead_mask("few"), seed))


def test_same_first_weights_from_the_same_seed():
    torch.manual_seed(3)
    theirs = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, matryoshka_widths=[8, 48])
    )
    torch.manual_seed(3)
    ours = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, matryoshka_widths=[8, 48])
    )
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_a_whole_training_run_agrees(make_trainer):
    theirs, ours = make_pair(matryoshka_widths=[8, 20, 48], k=4)
    for sae in (theirs, ours):
        make_trainer(sae, steps=25, dead_feature_window=3).fit()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_autocast_agrees_to_bfloat16(make_rows, step_input):
    theirs, ours = make_pair(matryoshka_widths=[8, 20, 48], k=4)
    theirs, ours = theirs.to(torch.float32), ours.to(torch.float32)
    step = step_input(make_rows(64), dead_mask("few"))
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = theirs.training_forward_pass(step), ours.training_forward_pass(step)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-2, atol=1e-2)
    got.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_explicit_weights_of_one_equal_saelens(make_rows, step_input):
    theirs, _ = make_pair(matryoshka_widths=[8, 20, 48], k=4)
    ours = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, k=4, dtype="float64", matryoshka_widths=[8, 20, 48],
            loss_convention="explicit", level_weights=[1.0, 1.0, 1.0],
        )
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    assert_same_step(theirs, ours, step_input(make_rows(33, dtype=torch.float64), dead_mask("few")))


def test_explicit_weights_weigh_levels(make_config, make_rows, step_input):
    """The loss is sum_i w_i L_i of the unweighted losses that are reported."""
    sae = MatryoshkaTrainingSAE(
        make_config(dtype="float64", loss_convention="explicit", level_weights=[0.5, 0.0, 2.0])
    )
    out = sae.training_forward_pass(step_input(make_rows(33, dtype=torch.float64)))
    expected = 0.5 * out.losses["inner_mse_loss_8"] + 2.0 * out.losses["mse_loss"]
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
