"""Interventions in `generate`: exact, the same with and without cache and in three libraries, gone afterwards."""

import pytest
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.hooks import HookedMaira2, Maira2NNsight
from sae_lens_maira.steering import Ablate, Add, AtLeast, AtMost, Direction, Scale, SetTo, steering
from sae_lens_maira.steering.positions import everywhere, patches, prompt, report, window

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"
NEW = 8
STRONG = Add(latents=(3, 40), strength=4.0)


@pytest.fixture(scope="module")
def encoding(phantom, few):
    found = phantom.processor.encode(few)
    assert bool((found.attention_mask == 0).any()), "no row is padded"
    return found


@pytest.fixture(scope="module")
def plain(phantom, encoding):
    return phantom.model.generate(
        **encoding.model_inputs(), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=2
    )


def stream(phantom, encoding):
    """The stream at the hook point in one forward pass."""
    seen = []
    handle = phantom.model.model.language_model.layers[3].register_forward_hook(
        lambda m, i, o: seen.append((o[0] if isinstance(o, tuple) else o).clone())
    )
    try:
        with torch.no_grad():
            phantom.model(**encoding.model_inputs(), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def same_width(a, b):
    width = max(a.shape[1], b.shape[1])
    return tuple(torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (a, b))


@pytest.mark.parametrize(
    "item",
    [
        Add(latents=(1, 2), strength=0.0),
        Scale(latents=(1, 2), strength=1.0),
        AtLeast(level=0, strength=0.0),
        Ablate(latents=(5,), strength=0.0),
        Direction(vector=torch.ones(128), strength=0.0),
    ],
)
def test_strength_zero_is_bit_identical(phantom, encoding, steering_sae, p99, item):
    """Every bit of the stream and of the logits is that of the plain model."""
    before = stream(phantom, encoding)
    with torch.no_grad():
        logits = phantom.model(**encoding.model_inputs(), use_cache=False).logits
    with steering(phantom, steering_sae, HOOK, item, encoding, p99) as run:
        assert torch.equal(stream(phantom, encoding), before)
        assert torch.equal(run.logits(), logits)
    assert run.effect.changed == 0


@pytest.mark.parametrize(
    "where", [everywhere(), prompt(), patches(), report(), report(2, 5), window(10, 400)]
)
def test_cache_on_and_off_write_the_same_tokens(phantom, encoding, steering_sae, p99, where):
    """Positions are absolute: a schedule means the same tokens whether they pass once or again and again."""
    item = Add(latents=(3, 40), strength=4.0, where=where)
    written, effects = [], []
    for use_cache in (True, False):
        with steering(phantom, steering_sae, HOOK, item, encoding, p99) as run:
            written.append(run.generate(NEW, use_cache=use_cache))
        effects.append(run.effect.positions)
    assert torch.equal(*written)
    assert effects[0] == effects[1]


@pytest.mark.parametrize("gate", [{}, {"if_active": True}, {"if_latent": (9, 0.5)}])
def test_backends_write_the_same_tokens(phantom, encoding, steering_sae, p99, plain, gate):
    """transformers, TransformerLens and nnsight: equal tokens and equal effects, and not the plain ones."""
    item = Add(latents=(3, 40), strength=6.0, **gate)
    written, effects = [], []
    for backend in (phantom, HookedMaira2(phantom), Maira2NNsight(phantom)):
        with steering(backend, steering_sae, HOOK, item, encoding, p99) as run:
            written.append(run.generate(NEW))
        effects.append(run.effect)
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])
    assert effects[0] == effects[1] == effects[2]
    if not gate:
        assert not torch.equal(*same_width(written[0], plain))


def test_firings_are_prompt_plus_new_tokens(phantom, encoding, steering_sae, p99):
    """Each position passes once with a cache; the last written token never enters the model."""
    with steering(phantom, steering_sae, HOOK, STRONG, encoding, p99) as run:
        ids = run.generate(NEW, eos_token_id=None)
    length, rows = encoding.input_ids.shape[1], len(encoding)
    assert ids.shape[1] == length + NEW
    assert run.effect.calls == NEW
    assert run.effect.positions == length + NEW - 1
    assert run.effect.fired == [int(encoding.attention_mask.sum()) + rows * (NEW - 1)]


def test_rows_do_not_leak(phantom, encoding, steering_sae, p99, plain):
    """Strengths (0, 6, 0, 6): rows of strength 0 are the plain ones, the others those of a batch steered by 6."""
    item = Add(latents=(3, 40), strength=(0.0, 6.0, 0.0, 6.0))
    with steering(phantom, steering_sae, HOOK, item, encoding, p99) as run:
        mixed = stream(phantom, encoding)
        ids = run.generate(NEW)
    with steering(phantom, steering_sae, HOOK, Add(latents=(3, 40), strength=6.0), encoding, p99) as run:
        all_ids = run.generate(NEW)
        every = stream(phantom, encoding)
    before = stream(phantom, encoding)
    assert torch.equal(mixed[0::2], before[0::2])
    assert torch.equal(mixed[1::2], every[1::2])
    for row, reference in ((0, plain), (1, all_ids), (2, plain), (3, all_ids)):
        assert torch.equal(*same_width(ids[row : row + 1], reference[row : row + 1]))


def test_error_of_the_sae_is_kept(phantom, encoding, steering_sae, p99):
    """h' - h = (a' - a) W_dec for every kind, at the scheduled positions and nowhere else."""
    before = stream(phantom, encoding)
    here = encoding.view == 0
    with torch.no_grad():
        a = steering_sae.encode(before[here])[:, 7]
    unit = p99[7]
    cases = [
        (Add(latents=(7,), strength=0.5, where=patches()), a + 0.5 * unit),
        (SetTo(latents=(7,), strength=0.5, where=patches()), torch.full_like(a, 0.5) * unit),
        (AtLeast(latents=(7,), strength=0.5, where=patches()), a.clamp(min=float(0.5 * unit))),
        (AtMost(latents=(7,), strength=0.1, where=patches()), a.clamp(max=float(0.1 * unit))),
        (Scale(latents=(7,), strength=3.0, where=patches()), 3 * a),
        (Ablate(latents=(7,), where=patches()), torch.zeros_like(a)),
        (Add(latents=(7,), strength=2.0, unit="raw", if_active=True, where=patches()), a + 2.0 * (a > 0)),
    ]
    for item, wanted in cases:
        with steering(phantom, steering_sae, HOOK, item, encoding, p99):
            after = stream(phantom, encoding)
        expected = (wanted - a)[:, None] * steering_sae.W_dec[7].detach()
        torch.testing.assert_close(after[here] - before[here], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(after[~here], before[~here])


def test_beams_and_sampling(phantom, encoding, steering_sae, p99):
    """Beams are steered as their study is: row strengths 0 give the plain beams; sampling runs too."""
    item = Add(latents=(3, 40), strength=(0.0, 6.0, 0.0, 6.0))
    beams = {"num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    wanted = phantom.model.generate(**encoding.model_inputs(), max_new_tokens=NEW, **beams)
    with steering(phantom, steering_sae, HOOK, item, encoding, p99) as run:
        found = run.generate(NEW, num_beams=3)
    for row in (0, 2):
        assert torch.equal(*same_width(found[row : row + 1], wanted[row : row + 1]))
    sampled = []
    for _ in range(2):
        torch.manual_seed(4)
        with steering(phantom, steering_sae, HOOK, item, encoding, p99) as run:
            sampled.append(run.generate(NEW, do_sample=True, num_return_sequences=2))
    assert torch.equal(*sampled)
    assert len(sampled[0]) == 2 * len(encoding)


@pytest.mark.parametrize("door", [lambda maira: maira, HookedMaira2])
def test_model_is_restored_after_an_exception(phantom, encoding, steering_sae, p99, door):
    """Logits after the exception are those before it, bit for bit, and no hook is left."""
    layer = phantom.model.model.language_model.layers[3]
    before = stream(phantom, encoding)
    hooks = dict(layer._forward_hooks)

    def fail():
        with steering(door(phantom), steering_sae, HOOK, STRONG, encoding, p99):
            stream(phantom, encoding)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert dict(layer._forward_hooks) == hooks
    assert torch.equal(stream(phantom, encoding), before)


@pytest.mark.parametrize(
    ("item", "match"),
    [
        (lambda: Add(latents=(64,)), "0 to 63"),
        (lambda: Add(latents=(-1,)), "0 to 63"),
        (lambda: Add(latents=(1,), if_latent=(900, 0.1)), "0 to 63"),
        (lambda: Add(latents=(1,), strength=float("nan")), "finite"),
        (lambda: Add(latents=(1,), strength=(1.0, 2.0)), "2 strengths"),
        (lambda: Add(), "and not both"),
        (lambda: Add(latents=(1, 1)), "twice"),
        (lambda: Direction(vector=torch.ones(64)), "64 dimensions"),
        (lambda: Add(latents=(1,), where=window(5000)), "never fired"),
        (lambda: Add(latents=(1,), where=report(0, 0)), "no position"),
        (lambda: Add(latents=(1,), where=patches(grid=torch.ones(3, 3))), "3, 3"),
        (lambda: Add(latents=(1,), if_latent=(2, 1e6)), "gate stayed closed"),
    ],
)
def test_bad_input(phantom, encoding, steering_sae, p99, item, match):
    """Latents out of range, NaN, wrong numbers, schedules that never fire and shut gates are refused."""
    with (
        pytest.raises(InterventionError, match=match),
        steering(phantom, steering_sae, HOOK, item(), encoding, p99),
    ):
        stream(phantom, encoding)


def test_what_does_not_belong_together(phantom, encoding, steering_sae, p99, few):
    """Another point, another width, no unit, nothing run, another batch: refused, on every backend."""
    from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig

    other = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=32, d_sae=8, matryoshka_widths=[8], device="cpu"))
    attempts = [
        (steering_sae, "blocks.2.hook_resid_post", p99, "trained at"),
        (steering_sae, "vision_encoder.hook_out", p99, "cannot be steered"),
        (steering_sae, "blocks.3.resid", p99, "no stream"),
        (other, HOOK, torch.ones(8), "reads 32"),
        (steering_sae, HOOK, None, "units of p99"),
        (None, HOOK, p99, "no SAE"),
    ]
    for sae, name, units, match in attempts:
        with (
            pytest.raises(InterventionError, match=match),
            steering(phantom, sae, name, STRONG, encoding, units),
        ):
            stream(phantom, encoding)
    for backend in (phantom, HookedMaira2(phantom), Maira2NNsight(phantom)):
        with (
            pytest.raises(InterventionError, match="never ran"),
            steering(backend, steering_sae, HOOK, STRONG, encoding, p99),
        ):
            pass
    with (
        pytest.raises(InterventionError, match="were expected"),
        steering(phantom, steering_sae, HOOK, STRONG, encoding, p99),
    ):
        stream(phantom, phantom.processor.encode(few[:1]))
