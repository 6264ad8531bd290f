"""The sweep: chosen on one half, reported on the other, controls at their method's strength, 0 changes nothing."""

import pandas as pd
import pytest
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.phantom import FINDING_KEYS, read_report
from sae_lens_maira.steering import Add, map_directions, steering
from sae_lens_maira.steering.evaluate import Method, evaluate_steering, repetition
from sae_lens_maira.steering.positions import patches

HOOK = "blocks.3.hook_resid_post"


def read(text):
    return read_report(text).present


def run(phantom, sae, p99, few, methods, **more):
    return evaluate_steering(
        phantom,
        sae,
        HOOK,
        methods,
        few[:2],
        few[2:],
        "oedema",
        read,
        FINDING_KEYS,
        p99=p99,
        max_new_tokens=12,
        progress=False,
        **more,
    )


def test_sweep_and_tables(phantom, few, steering_sae, p99, tmp_path):
    """Strength 0 has KL 0 and no label changed; a strong one moves the distribution; files are read back."""
    methods = [
        Method("latents", lambda s: [Add(latents=(3, 40), strength=s, where=patches())]),
        Method("flipped sign", lambda s: [Add(latents=(3, 40), strength=-s, where=patches())], "latents"),
    ]
    tables = run(phantom, steering_sae, p99, few, methods, strengths=(0.0, 8.0))
    zero = tables.studies.loc[tables.studies.strength == 0]
    # Divergence is measured where it is reported.
    assert zero.kl[zero.half == "choose"].isna().all()
    reported = zero[zero.half == "report"]
    assert (reported.kl.abs() < 1e-5).all()
    assert reported.perplexity.to_numpy() == pytest.approx(reported.unsteered_perplexity.to_numpy(), rel=1e-3)
    assert (zero.text == zero.unsteered).all()
    assert (zero.off_target == 0).all()
    strong = run(phantom, steering_sae, p99, few, methods[:1], strengths=(8.0,)).studies
    assert (strong.kl[strong.half == "report"] > 1e-3).all()
    assert tables.summary.strength.nunique() == 1
    assert set(tables.summary.n) == {2}
    tables.save(tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "summary.parquet"), tables.summary)
    assert (tmp_path / "dose_response.png").stat().st_size > 5000


def test_bad_input(phantom, few, steering_sae, p99):
    """An unknown finding, an empty half and a control without its method are refused."""
    method = Method("latents", lambda s: [Add(latents=(3,), strength=s)])
    with pytest.raises(InterventionError, match="both halves"):
        evaluate_steering(phantom, steering_sae, HOOK, [method], few, [], "oedema", read, FINDING_KEYS)
    with pytest.raises(InterventionError, match="belongs to"):
        run(phantom, steering_sae, p99, few, [Method("control", method.make, "latents")])


def test_a_map_as_directions_is_the_map(phantom, few):
    """The decomposed map adds what a hook adds that is written by hand, to rounding."""
    encoding = phantom.processor.encode(few)
    delta = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    with steering(phantom, None, HOOK, map_directions(delta, (8, 8), 0.5), encoding) as changed:
        logits = changed.logits()

    def add(_module, _inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[encoding.view == 0] += (0.5 * delta).repeat(len(few), 1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = phantom.model.model.language_model.layers[3].register_forward_hook(add)
    try:
        with torch.no_grad():
            expected = phantom.model(**encoding.model_inputs(), use_cache=False).logits
    finally:
        handle.remove()
    real = encoding.attention_mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-3, atol=1e-3)


def test_repetition_by_hand():
    """Eight words hold five 4-grams, one of them a repeat."""
    assert repetition("a b c d") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("short") == 0
