"""Interventions at the image positions: exact, confined to the frontal patches, gone afterwards."""

import pytest
import torch

from sae_lens_maira.activations import harvest_rows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.phantom import generate_studies, truth_labels
from sae_lens_maira.steering import PatchMap, mean_difference_map, mean_patch_maps, steer_reports, steered

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def studies():
    return generate_studies(12, seed=321)


@pytest.fixture(scope="module")
def patch_map():
    generator = torch.Generator().manual_seed(0)
    return PatchMap(torch.randn(64, 128, generator=generator), HOOK, "test")


def layer_output(phantom, encoding, **generate):
    """Outputs of layer 3 at every call of a short generation."""
    seen = []
    handle = phantom.model.model.language_model.layers[3].register_forward_hook(
        lambda module, inputs, output: seen.append(
            (output[0] if isinstance(output, tuple) else output).clone()
        )
    )
    try:
        with torch.no_grad():
            ids = phantom.model.generate(
                **encoding.model_inputs(),
                max_new_tokens=5,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
                **generate,
            )
    finally:
        handle.remove()
    return seen, ids


def test_adds_exactly_the_map_at_the_frontal_patches(phantom, studies, patch_map):
    """h' - h is strength x delta at each row's frontal patches and 0 elsewhere, under left padding."""
    encoding = phantom.processor.encode(studies[:4])
    frontal = encoding.view == 0
    with torch.no_grad():
        plain, _ = layer_output(phantom, encoding)
        with steered(phantom, patch_map, 1.5, frontal):
            changed, _ = layer_output(phantom, encoding)
    difference = changed[0] - plain[0]
    torch.testing.assert_close(
        difference[frontal], (1.5 * patch_map.delta).repeat(4, 1), rtol=1e-4, atol=1e-4
    )
    assert difference[~frontal].abs().max() == 0


def test_strength_zero_is_bit_identical(phantom, studies, patch_map):
    """No bit of any layer output differs."""
    encoding = phantom.processor.encode(studies[:2])
    plain, ids = layer_output(phantom, encoding)
    with steered(phantom, patch_map, 0.0, encoding.view == 0):
        steered_out, steered_ids = layer_output(phantom, encoding)
    assert torch.equal(ids, steered_ids)
    assert all(torch.equal(a, b) for a, b in zip(plain, steered_out, strict=True))


def test_cache_on_and_off_write_the_same_tokens(phantom, studies, patch_map):
    """Without a cache the patches are seen again at every step, and steered again."""
    encoding = phantom.processor.encode(studies[:3])
    written = []
    for use_cache in (True, False):
        with steered(phantom, patch_map, 1.0, encoding.view == 0):
            written.append(layer_output(phantom, encoding, use_cache=use_cache)[1])
    assert torch.equal(*written)


def test_model_is_restored_after_an_exception(phantom, studies, patch_map):
    """The hooks on the layer are the ones that were there before (transformers 5 keeps one of its own)."""
    encoding = phantom.processor.encode(studies[:1])
    before = dict(phantom.model.model.language_model.layers[3]._forward_hooks)
    with pytest.raises(ZeroDivisionError), steered(phantom, patch_map, 1.0, encoding.view == 0):
        raise ZeroDivisionError
    assert phantom.model.model.language_model.layers[3]._forward_hooks == before


def test_silent_no_op_is_refused(phantom, studies, patch_map):
    """A context in which the prompt never ran raises instead of reporting an effect of nothing."""
    encoding = phantom.processor.encode(studies[:1])
    with (
        pytest.raises(InterventionError, match="did nothing"),
        steered(phantom, patch_map, 1.0, encoding.view == 0),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"strength": float("nan")}, "finite"),
        ({"delta": torch.zeros(9, 128)}, "same size"),
        ({"hook_name": "blocks.99.hook_resid_post"}, "not a residual stream"),
        ({"hook_name": "vision_encoder.hook_out"}, "not a residual stream"),
    ],
)
def test_bad_input(phantom, studies, patch_map, change, match):
    """NaN strength, a map of another image size, and hook points that are no residual stream are refused."""
    encoding = phantom.processor.encode(studies[:1])
    chosen = PatchMap(change.get("delta", patch_map.delta), change.get("hook_name", HOOK), "bad")
    with (
        pytest.raises(InterventionError, match=match),
        steered(phantom, chosen, change.get("strength", 1.0), encoding.view == 0),
    ):
        pass


def test_random_control_has_the_maps_norm_at_every_patch(patch_map):
    control = patch_map.random_like(3)
    torch.testing.assert_close(control.delta.norm(dim=1), patch_map.delta.norm(dim=1))
    assert torch.linalg.matrix_rank(control.delta) == 1


def test_mean_maps_are_means_by_hand(phantom, studies):
    """The map's patch (2, 5) is the mean of that patch's rows over positive and negative studies."""
    rows = harvest_rows(phantom, studies, HOOK, roles="image_only", progress=False)
    positive = truth_present(studies)
    present, _ = mean_patch_maps(rows, lambda x: x, positive, ~positive)
    here = rows.where((rows.kind == 0) & (rows.patch_row == 2) & (rows.patch_col == 5))
    expected = here.where(positive[here.study]).values.mean(0)
    torch.testing.assert_close(present[2 * 8 + 5], expected, rtol=1e-4, atol=1e-4)
    assert mean_difference_map(rows, positive, ~positive).delta.shape == (64, 128)
    with pytest.raises(InterventionError, match="no study"):
        mean_patch_maps(rows, lambda x: x, positive, positive & ~positive)
    with pytest.raises(InterventionError, match="frontal"):
        mean_patch_maps(rows.where(rows.kind == 9), lambda x: x, positive, ~positive)


def test_reports_come_back_in_order(phantom, studies, patch_map):
    """Strength 0 over batches of three gives the plain reports of the studies, in their order."""
    from sae_lens_maira.maira2 import generate_reports

    plain = generate_reports(phantom.model, phantom.processor, studies)
    assert [r.text for r in steer_reports(phantom, studies, patch_map, 0.0, batch_size=3)] == [
        r.text for r in plain
    ]


def truth_present(studies):
    import numpy as np

    labels = np.stack([truth_labels(study) for study in studies])
    return labels[:, labels.any(0) & ~labels.all(0)][:, 0]
