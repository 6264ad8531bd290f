"""Correction: twins move the stream as much, counts and F1 by hand, multiplied latents leave empty images alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.steering import steering
from sae_lens_maira.steering.correction import (
    Correction,
    best_of,
    f1_change,
    label_counts,
    micro_f1,
    random_control,
    tied_to_errors,
)

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"


def test_twins_move_the_stream_as_much():
    """Other latents, each once, of near density, and the same mean |delta|; another seed gives others."""
    generator = torch.Generator().manual_seed(0)
    acts = (torch.rand(400, 64, generator=generator) - torch.linspace(0, 0.9, 64)).clamp(min=0)
    decoder = torch.randn(64, 12, generator=generator)
    mine = Correction((3, 9), 0.5, (20, 21, 22), 3.0)
    twins = [random_control(mine, acts, decoder, seed, pool=8) for seed in (1, 2)]
    for twin in twins:
        chosen = {*twin.suppress, *twin.boost}
        assert len(chosen) == 5
        assert not chosen & {3, 9, 20, 21, 22}
        assert twin.step(acts, decoder) == pytest.approx(mine.step(acts, decoder), rel=1e-4)
    assert twins[0] != twins[1]
    with pytest.raises(InterventionError, match="never active"):
        random_control(mine, torch.zeros(10, 64), decoder, 0)


def test_ranking_leaves_the_anatomy_out(phantom, few):
    """Of three units the one that every image excites is left out, however much it differs; the specific one stays."""
    rows = read_rows(phantom, few, HOOK, RowSettings(roles="image_only"), progress=False)
    wrong = np.array([True, True, False, False])
    # What the units say of a patch stands in for the stream, and the encoder hands it on.
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
