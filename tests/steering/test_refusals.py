"""What cannot be meant is refused, one case at a time, and an exception inside nnsight leaves the model as it was."""

import math

import pytest
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.hooks import Maira2NNsight
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig
from sae_lens_maira.steering import Add, Direction, SetTo, steering
from sae_lens_maira.steering.positions import patches, report, window

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def encoding(phantom, few):
    return phantom.processor.encode(few)


def sae_of(d_in, d_sae, hook):
    config = MatryoshkaSAEConfig(d_in=d_in, d_sae=d_sae, matryoshka_widths=[d_sae], device="cpu")
    config.metadata.hook_name = hook
    return MatryoshkaSAE(config)


def refused(phantom, sae, encoding, item, p99, match, hook=HOOK):
    with (
        pytest.raises(InterventionError, match=match),
        steering(phantom, sae, hook, item, encoding, p99) as run,
    ):
        run.generate(2)


@pytest.mark.parametrize("latent", [-1, 64, 10**6])
def test_a_latent_out_of_range(phantom, steering_sae, encoding, p99, latent):
    """The message names the latent and the range."""
    refused(phantom, steering_sae, encoding, Add(latents=(3, latent)), p99, rf"\[{latent}\].*0 to 63")


def test_a_latent_of_another_sae(phantom, steering_sae, encoding, p99):
    """A number that only a larger SAE has, units of a larger SAE, an SAE of another width and one of another point."""
    refused(phantom, steering_sae, encoding, Add(latents=(500,)), p99, "may belong to another SAE")
    refused(
        phantom,
        steering_sae,
        encoding,
        Add(latents=(5,)),
        torch.ones(1024),
        r"\(1024,\).*\(64,\) values of this",
    )
    refused(
        phantom, sae_of(64, 16, HOOK), encoding, Add(latents=(5,)), torch.ones(16), "another model or point"
    )
    other = sae_of(128, 64, "blocks.5.hook_resid_post")
    refused(phantom, other, encoding, Add(latents=(5,)), p99, "trained at 'blocks.5.hook_resid_post'")


@pytest.mark.parametrize(
    ("hook", "match"),
    [
        ("blocks.2.hook_resid_post", "its latents have no meaning"),
        ("blocks.3.hook_mlp_out", "its latents have no meaning"),
        ("blocks.3.attn.hook_z", "cannot be steered"),
        ("blocks.99.hook_resid_post", "no stream to steer"),
    ],
)
def test_the_wrong_hook_point_for_the_sae(phantom, steering_sae, encoding, p99, hook, match):
    """Another block, another point of the block, a point of another shape, a point that is not there."""
    refused(phantom, steering_sae, encoding, Add(latents=(5,)), p99, match, hook)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, (1.0, math.nan, 1.0, 1.0)])
def test_a_strength_that_is_no_number(strength):
    """Alone or in one row of many, for latents and for directions, before anything runs."""
    for make in (
        lambda: Add(latents=(1,), strength=strength),
        lambda: SetTo(latents=(1,), strength=strength),
    ):
        with pytest.raises(InterventionError, match="finite"):
            make()
    with pytest.raises(InterventionError, match="finite"):
        Direction(vector=torch.ones(128), strength=strength)


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_gate_that_is_no_number(threshold):
    with pytest.raises(InterventionError, match="must be finite"):
        Add(latents=(1,), if_latent=(2, threshold))


@pytest.mark.parametrize(
    "where", [report(50, 60), window(4000), patches("prior"), patches(grid=torch.zeros(8, 8))]
)
def test_a_schedule_that_never_fires(phantom, steering_sae, few, p99, where):
    """Places behind the last token, a view that no study has, a map of zeros: an error, and not an unsteered report."""
    alone = [study for study in few if study.prior_frontal is None]
    batch = phantom.processor.encode(alone)
    refused(phantom, steering_sae, batch, Add(latents=(5,), where=where), p99, "never fired")


@pytest.mark.parametrize("place", ["trace", "edit", "block"])
def test_an_exception_under_nnsight_leaves_the_model_as_it_was(phantom, steering_sae, encoding, p99, place):
    """Raised in a trace, in an edit during generation, or in the block: bits, hooks and later runs are as before."""
    traced = Maira2NNsight(phantom)

    def state():
        with torch.no_grad():
            logits = phantom.model(**encoding.model_inputs(), use_cache=False).logits
        hooks = {name: len(module._forward_hooks) for name, module in phantom.model.named_modules()}
        return logits, hooks

    def edit(value, step):
        if step == 1:
            raise ZeroDivisionError("planted")
        return value + 1.0

    traced.read(encoding, [HOOK])  # nnsight's own hooks, if it leaves any, are there before
    before, hooks = state()
    item = Add(latents=(3, 40), strength=6.0)

    def fail():
        if place == "trace":
            with traced.trace(encoding):
                traced.at[HOOK] = traced.at[HOOK] + 1.0
                raise ZeroDivisionError
        elif place == "edit":
            traced.generate_edited(encoding, {HOOK: edit}, 4)
        else:
            with steering(traced, steering_sae, HOOK, item, encoding, p99) as run:
                run.generate(2)
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    after, left = state()
    assert torch.equal(after, before)
    assert left == hooks
    with steering(traced, steering_sae, HOOK, item, encoding, p99) as run:
        under_nnsight = run.generate(3)
    with steering(phantom, steering_sae, HOOK, item, encoding, p99) as run:
        assert torch.equal(run.generate(3), under_nnsight)
