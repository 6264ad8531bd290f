"""Frozen controls see the SAE's own data and schedule, and start from its weights."""

import pytest
import torch

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, control_kind
from sae_lens_maira.training import train_control

pytestmark = pytest.mark.compat


def test_a_control_keeps_the_saes_first_decoder(make_config, planted_data):
    config = MatryoshkaTrainingSAEConfig(d_in=24, d_sae=64, k=4.0, matryoshka_widths=[16, 64])
    torch.manual_seed(3)
    first = MatryoshkaTrainingSAE(config).W_dec.detach().clone()
    control = train_control(
        "frozen_decoder", config, make_config(5), lambda: planted_data(24, 64), seed=3, backend="sparse"
    )
    # Saved SAEs have decoder rows of norm 1.
    torch.testing.assert_close(control.W_dec, torch.nn.functional.normalize(first, dim=1))
    assert control_kind(control) == "frozen_decoder"
    assert config.control is None
    assert "control" not in config.metadata
    with pytest.raises(ConfigError, match=r"sae\.make_control"):
        train_control("untrained", config, make_config(5), lambda: planted_data(24, 64))
