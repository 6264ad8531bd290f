"""The hook interfaces on the shipped phantom: bit-equal values, equal reports, an SAE trained on its activations."""

from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig

from sae_lens_maira.hooks import HookedMaira2, Maira2NNsight, maira2_runner
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.maira2.versions import has_transformer_bridge
from sae_lens_maira.phantom import generate_studies, load_phantom

pytestmark = [
    pytest.mark.slow,
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:All samples in the training dataset:UserWarning"),
]


@pytest.fixture(scope="module")
def phantom() -> Maira2:
    loaded = load_phantom()
    loaded.model.set_attn_implementation("eager")
    return loaded


@pytest.fixture(scope="module")
def cases() -> list[Any]:
    """Studies with one, two and three images among them."""
    studies = generate_studies(24, seed=5)
    chosen = {(s.lateral is not None) + (s.prior_frontal is not None): s for s in studies}
    return [chosen[key] for key in sorted(chosen)]


def test_every_door_gives_the_same_values(phantom: Maira2, cases: list[Any]) -> None:
    encoding = phantom.processor.encode(cases, report="teacher")
    hooked, traced = HookedMaira2(phantom), Maira2NNsight(phantom)
    with torch.no_grad():
        plain = phantom.model(**encoding.model_inputs(), output_hidden_states=True)
        logits, cache = hooked.run_with_cache(encoding)
        values = traced.read(encoding, hooked.points.names)
    assert torch.equal(logits, plain.logits)
    assert set(values) == set(cache) == set(hooked.points.names)
    assert all(torch.equal(values[name], cache[name]) for name in cache)
    assert all(torch.equal(cache[f"blocks.{i}.hook_resid_pre"], plain.hidden_states[i]) for i in range(8))
    if has_transformer_bridge():
        from sae_lens_maira.hooks import to_bridge

        with torch.no_grad():
            _, bridged = to_bridge(phantom).run_with_cache(encoding)
        assert all(torch.equal(bridged[name], cache[name]) for name in cache)


def test_reports_are_equal_and_move_with_the_images(phantom: Maira2, cases: list[Any]) -> None:
    """Greedy reports through the interfaces equal transformers'; without its image tokens the model writes another."""
    prompt = phantom.processor.encode(cases)
    hooked = HookedMaira2(phantom)
    with torch.no_grad():
        expected = phantom.model.generate(**prompt.model_inputs(), max_new_tokens=40, do_sample=False)
    assert torch.equal(hooked.generate(prompt, 40), expected)
    assert torch.equal(Maira2NNsight(phantom).generate(prompt, max_new_tokens=40), expected)
    for name in ("vision_encoder.blocks.1.hook_resid_post", "vision_projector.hook_out"):
        with hooked.hooks([(name, lambda x, hook: torch.zeros_like(x))]):
            assert not torch.equal(hooked.generate(prompt, 40), expected), name


def test_saelens_trains_on_the_phantom(phantom: Maira2) -> None:
    """200 steps of SAELens' runner on image and text rows; the error term keeps the logits."""
    hooked = HookedMaira2(phantom)
    sae = maira2_runner(
        hooked,
        generate_studies(32, seed=1),
        BatchTopKTrainingSAEConfig(d_in=128, d_sae=512, k=16),
        "blocks.4.hook_resid_post",
        training_tokens=200 * 256,
        train_batch_size_tokens=256,
        context_size=256,
        n_batches_in_buffer=16,
        lr=1e-3,
    ).run()
    held_out = phantom.processor.encode(generate_studies(4, seed=2), report="teacher")
    with torch.no_grad():
        plain = hooked(held_out)
        kept = hooked.run_with_saes(held_out, saes=sae, use_error_term=True)
    assert (kept - plain).abs().max() <= 1e-5 * plain.abs().max()
