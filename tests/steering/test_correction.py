"""Correction: controls move the stream as much, parts of rows, counts and F1 by hand, empty images are unchanged."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.steering import Ablate, AddVectors, steered_reports, steering
from sae_lens_maira.steering.correction import (
    Correction,
    along,
    best_of,
    f1_change,
    label_counts,
    mean_step,
    micro_f1,
    random_control,
    spared,
    tied_to_errors,
)
from sae_lens_maira.steering.engine import Engine
from sae_lens_maira.steering.positions import patches

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"


def test_controls_move_the_stream_as_much():
    """Other latents, each once, of near density, and the same mean |delta|; another seed gives others."""
    generator = torch.Generator().manual_seed(0)
    acts = (torch.rand(400, 64, generator=generator) - torch.linspace(0, 0.9, 64)).clamp(min=0)
    decoder = torch.randn(64, 12, generator=generator)
    mine = Correction((3, 9), 0.5, (20, 21, 22), 3.0)
    controls = [random_control(mine, acts, decoder, seed, pool=8) for seed in (1, 2)]
    for control in controls:
        chosen = {*control.suppress, *control.boost}
        assert len(chosen) == 5
        assert not chosen & {3, 9, 20, 21, 22}
        assert control.step(acts, decoder) == pytest.approx(mine.step(acts, decoder), rel=1e-4)
    assert controls[0] != controls[1]
    with pytest.raises(InterventionError, match="never active"):
        random_control(mine, torch.zeros(10, 64), decoder, 0)


def test_ranking_leaves_the_anatomy_out(phantom, few):
    """Of three units the one that every image excites is left out, however much it differs; the specific one stays."""
    rows = read_rows(phantom, few, HOOK, RowSettings(roles="image_only"), progress=False)
    wrong = np.array([True, True, False, False])
    # What the units say of a patch replaces the stream, and the encoder returns it.
    base = torch.from_numpy(wrong[rows.study]).float()
    rows = replace(rows, values=torch.stack([10 + 8 * base, base, 1 - base], dim=1))

    def encode(values):
        return values

    decoder = torch.ones(3, 128)
    assert tied_to_errors(rows, encode, decoder, wrong, ~wrong, 3) == (1,)
    assert tied_to_errors(rows, encode, decoder, wrong, ~wrong, 3, specific=1.5) == (0, 1)
    assert tied_to_errors(rows, encode, decoder, ~wrong, wrong, 3) == (2,)


def test_step_is_what_steering_does(phantom, few, steering_sae):
    """The mean step is the mean |h' - h| over the frontal patches, measured in the model."""
    encoding = phantom.processor.encode(few)
    here = encoding.view == 0
    correction = Correction((3, 4), 0.7, (40, 41), 2.5)
    seen = []
    handle = phantom.model.model.language_model.layers[3].register_forward_hook(
        lambda m, i, o: seen.append((o[0] if isinstance(o, tuple) else o).clone())
    )
    with torch.no_grad():
        phantom.model(**encoding.model_inputs(), use_cache=False)
        # Registered first, so that the edit of `steering` (which stands before other hooks) is seen.
        with steering(phantom, steering_sae, HOOK, correction.interventions(), encoding):
            phantom.model(**encoding.model_inputs(), use_cache=False)
        acts = steering_sae.encode(seen[0][here])
    handle.remove()
    measured = float((seen[1] - seen[0])[here].norm(dim=1).mean())
    assert measured > 0
    assert measured == pytest.approx(correction.step(acts, steering_sae.W_dec.detach()), rel=1e-3)
    assert torch.equal(seen[1][~here], seen[0][~here])


def test_counts_and_f1_by_hand():
    """Two studies, three labels: 2 hits, 1 false, 1 missed is an F1 of 4/6."""
    stated = np.array([[1, 1, 0], [0, 1, 0]], dtype=bool)
    truth = np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)
    counts = label_counts(stated, truth)
    assert counts.tolist() == [[1, 1, 0], [1, 0, 1]]
    assert micro_f1(counts) == pytest.approx(4 / 6)
    assert micro_f1(np.zeros((2, 3), dtype=int)) == 1.0


def test_change_is_paired():
    """No change has an interval of no width, a change in every study one above 0; other studies are refused."""
    before = np.tile([2, 1, 1], (30, 1))
    assert f1_change(before, before) == (0.0, 0.0, 0.0)
    change, low, high = f1_change(before, np.tile([3, 0, 0], (30, 1)))
    assert change == pytest.approx(1 - 4 / 6)
    assert 0 < low <= change <= high
    with pytest.raises(InterventionError, match="same studies"):
        f1_change(before, before[:5])


def test_the_milder_of_equals_is_chosen_and_nothing_is_refused():
    counts = np.array([[1, 0, 1]])
    mild, strong = Correction((1,), 0.5), Correction((1,), 1.0)
    assert best_of([(mild, counts), (strong, counts)]) is mild
    with pytest.raises(InterventionError, match="no latent"):
        Correction().interventions()


def test_a_part_is_removed_and_the_rest_of_the_row_stays(steering_sae):
    """The change along a direction is the row's own part there; amount -1 leaves nothing of it."""
    u = torch.nn.functional.normalize(torch.randn(128), dim=0)
    made, rows = along(steering_sae, [3, 5], u, -1.0), steering_sae.W_dec.detach()[[3, 5]]
    left = rows + made.vectors
    torch.testing.assert_close(left @ u, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(left, rows - (rows @ u)[:, None] * u)
    acts = torch.zeros(2, 64)
    acts[0, 5] = 2.0
    assert mean_step([made], acts) == pytest.approx(float((rows[1] @ u).abs()), rel=1e-5)


def test_a_spared_direction_keeps_no_part_of_the_others():
    a, b, c = torch.randn(3, 16)
    left = spared(a, [b, c])
    assert float(left.norm()) == pytest.approx(1, abs=1e-5)
    assert float((left @ b).abs()) < 1e-4
    assert float((left @ c).abs()) < 1e-4
    with pytest.raises(InterventionError, match="span"):
        spared(b, [2 * b])


def test_vectors_that_are_negative_rows_ablate(phantom, few, steering_sae):
    """Latents that write the negative of their rows are ablated; without activation nothing changes."""
    encoding = phantom.processor.encode(few)
    chosen = (3, 9)
    vectors = -steering_sae.W_dec.detach()[list(chosen)]
    items = [
        AddVectors(latents=chosen, vectors=vectors, where=patches()),
        Ablate(latents=chosen, where=patches()),
    ]
    hidden = torch.randn(len(few), encoding.input_ids.shape[1], 128)
    one, other = (Engine(steering_sae, [item], encoding, None, 128)(hidden) for item in items)
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.equal(one, hidden)
    frontal = encoding.view == 0
    assert torch.equal(one[~frontal], hidden[~frontal])
    with pytest.raises(InterventionError, match="need \\(2, 128\\)"):
        Engine(steering_sae, [replace(items[0], vectors=vectors[:1])], encoding, None, 128)


def test_reports_of_many_studies(phantom, few, steering_sae):
    """No intervention gives the plain reports, in any batches; a strong one gives others."""
    plain = steered_reports(phantom, steering_sae, HOOK, [], few, 20)
    assert plain == steered_reports(phantom, None, HOOK, [], few, 20, batch_size=3)
    u = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(0)), dim=0)
    strong = AddVectors(latents=tuple(range(64)), vectors=5 * u.expand(64, 128), where=patches())
    assert steered_reports(phantom, steering_sae, HOOK, [strong], few, 20, batch_size=3) != plain
