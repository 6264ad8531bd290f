"""Maps of control SAEs: the same rule of choice, the same norm, a choice of strength of their own."""

import pytest
import torch
from safetensors import safe_open

from sae_lens_maira.interface import load_sae_weights
from sae_lens_maira.sae import make_control
from sae_lens_maira.steering.interventions import Add
from sae_lens_maira.steering.methods import MAPS, SUBTRACT, MethodFactory
from sae_lens_maira.steering.positions import Patches
from sae_lens_maira.steering.statistics import SteeringStatistics

SHAPE = (2, 3)


def factory(sae, seed: int, scale: float = 1.0) -> MethodFactory:
    """A factory whose present and absent maps are random numbers."""
    generator = torch.Generator().manual_seed(seed)
    latents, patches = sae.cfg.d_sae, SHAPE[0] * SHAPE[1]

    def maps(width: int) -> torch.Tensor:
        return scale * torch.rand(1, patches, width, generator=generator)

    stream = torch.zeros(1, patches, sae.cfg.d_in)
    statistics = SteeringStatistics(
        ("opacity",),
        maps(latents),
        maps(latents),
        stream,
        stream,
        torch.zeros(1, patches),
        torch.ones(latents),
        torch.rand(latents, generator=generator),
        torch.rand(latents, 1, generator=generator),
        SHAPE,
    )
    return MethodFactory(sae, statistics, n_latents=4, strengths=(1.0, 2.5))


def delta(interventions, sae) -> torch.Tensor:
    """(P, d_model) what the interventions add."""
    found = torch.zeros(SHAPE[0] * SHAPE[1], sae.cfg.d_in)
    for item in interventions:
        assert isinstance(item, Add)
        assert isinstance(item.where, Patches)
        grid = torch.as_tensor(item.where.grid).flatten()
        found += item.strength * grid[:, None] * sae.W_dec[list(item.latents)].detach().sum(0)
    return found


@pytest.mark.parametrize("remove", [False, True])
def test_control_maps_have_the_norm_of_the_own_map(remove):
    """At every strength both changes have one norm over all patches; the control's latents are its own best ones."""
    sae = load_sae_weights("phantom-image")
    control = make_control("untrained", sae, torch.randn(500, sae.cfg.d_in), l0=8.0)
    own, other = factory(sae, 0), factory(control, 1, scale=7.0)
    (method,) = own.on_controls("opacity", {"untrained": other}, remove)
    assert method.control_of == (SUBTRACT if remove else MAPS)
    assert method.strengths == own.strengths
    assert method.sae is control
    reference = next(
        m for m in (own.removal if remove else own.insertion)("opacity") if m.name == method.control_of
    )
    for strength in own.strengths:
        ours, theirs = delta(reference.make(strength), sae), delta(method.make(strength), control)
        assert theirs.norm() == pytest.approx(float(ours.norm()), rel=1e-4)
    used = {j for item in method.make(1.0) if isinstance(item, Add) for j in item.latents}
    assert used == set(other.chosen("opacity", MAPS))


def test_a_control_without_a_map_is_left_out_with_a_warning():
    sae = load_sae_weights("phantom-image")
    with pytest.warns(UserWarning, match="No latent of the control 'silent' differs"):
        assert factory(sae, 0).on_controls("opacity", {"silent": factory(sae, 1, scale=0.0)}) == []


def test_saved_statistics_are_read_back_and_equal_ones_are_equal_files(tmp_path):
    """The metadata is one entry, since safetensors orders several at random."""
    tensors = [torch.rand(1, 4, 8) for _ in range(8)]
    made = SteeringStatistics(("a", "b"), *tensors, shape=(2, 2))
    made.save(tmp_path / "s.safetensors")
    read = SteeringStatistics.load(tmp_path / "s.safetensors")
    assert (read.findings, read.shape) == (("a", "b"), (2, 2))
    assert torch.equal(read.gradient, made.gradient)
    with safe_open(tmp_path / "s.safetensors", "pt") as opened:
        assert list(opened.metadata()) == ["about"]
