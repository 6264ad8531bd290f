"""Schedules: which positions they mean, and what boxes and masks weigh."""

import numpy as np
import pytest
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.steering.positions import (
    Layout,
    activation_grid,
    box_grid,
    everywhere,
    mask_grid,
    mirrored,
    patches,
    prompt,
    report,
    roles,
    window,
)

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def encodings(phantom, few):
    """The same four studies padded on the left and on the right, with their reports."""
    return [phantom.processor.encode(few, report="teacher", padding_side=side) for side in ("left", "right")]


@pytest.mark.parametrize(
    "schedule",
    [everywhere(), prompt(), patches(), report(1, 6), window(3, 90), roles("paper"), roles("indication")],
)
def test_padding_moves_nothing(encodings, schedule):
    """The scheduled tokens of every row are the same ids whichever side is padded."""
    chosen = []
    for encoding in encodings:
        weights = schedule.weights(Layout.of(encoding))
        assert not bool(weights[encoding.attention_mask == 0].any())
        chosen.append([row[w > 0].tolist() for row, w in zip(encoding.input_ids, weights, strict=True)])
    assert chosen[0] == chosen[1]


def test_written_tokens_are_report_tokens(phantom, few):
    """Positions behind the prompt count as report tokens 0, 1, 2, ..."""
    encoding = phantom.processor.encode(few)
    length = encoding.input_ids.shape[1]
    weights = report(1, 3).weights(Layout.of(encoding, length + 5))
    assert weights[:, length:].tolist() == [[0, 1, 1, 0, 0]] * 4
    assert not bool(weights[:, :length].any())


def test_views_are_apart(encodings):
    """Weights of the three views cover the image positions, each once."""
    layout = Layout.of(encodings[0])
    total = torch.stack([patches(view).weights(layout) for view in ("frontal", "lateral", "prior")]).sum(0)
    assert torch.equal(total, (encodings[0].roles == TokenRole.IMAGE).float())


def test_combinations(encodings):
    """prompt | report is everywhere, and prompt & report is nowhere."""
    layout = Layout.of(encodings[0])
    assert torch.equal((prompt() | report()).weights(layout), everywhere().weights(layout))
    assert not bool((prompt() & report()).weights(layout).any())


def test_grid_lands_on_its_patches(encodings):
    """A weight at (2, 5) reaches the token of row 2, column 5 of the frontal image only."""
    grid = torch.zeros(8, 8)
    grid[2, 5] = 0.7
    encoding = encodings[0]
    weights = patches("frontal", grid).weights(Layout.of(encoding))
    here = (encoding.view == 0) & (encoding.patch_row == 2) & (encoding.patch_col == 5)
    assert torch.equal(weights, here.float() * 0.7)


def test_boxes_and_masks():
    """Shares of patches by hand: a quarter box, a half-covered column, a box on a wide image, a painted corner."""
    assert torch.equal(box_grid((0.0, 0.0, 0.5, 0.5), (2, 2)), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(box_grid((0.25, 0.0, 0.75, 1.0), (1, 2)), torch.tensor([[0.5, 0.5]]))
    # A image twice as wide as high: its central half is what the model sees.
    torch.testing.assert_close(
        box_grid((0.25, 0, 0.5, 1), (1, 2), image=(100, 200)), torch.tensor([[1.0, 0.0]])
    )
    painted = np.zeros((8, 8), dtype=bool)
    painted[:4, 4:] = True
    grid = mask_grid(painted, (2, 2))
    assert torch.equal(grid, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(mirrored(grid), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(
        activation_grid(torch.tensor([0.0, 2.0, 1.0, 0.0]), (2, 2))[0], torch.tensor([0.0, 1.0])
    )


def test_bad_input():
    """Empty boxes, zero grids, unknown views and values that are not finite are errors."""
    with pytest.raises(InterventionError, match="covers no patch"):
        box_grid((0.5, 0.5, 0.5, 0.9), (4, 4))
    with pytest.raises(InterventionError, match="0 everywhere"):
        activation_grid(torch.zeros(4), (2, 2))
    with pytest.raises(InterventionError, match="view"):
        patches("oblique")  # pyright: ignore[reportArgumentType] - the point of the test
    with pytest.raises(InterventionError, match="finite"):
        patches(grid=torch.full((2, 2), float("nan")))
