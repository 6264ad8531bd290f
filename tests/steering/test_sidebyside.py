"""Side by side: pieces join to the reports, equal words are unmarked, perplexity is that of the plain model."""

import math

import pytest
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.steering.sidebyside import Piece, compare_words, perplexities

pytestmark = pytest.mark.compat

PAIRS = [
    ("No effusion is seen.", "A large effusion is seen."),
    ("", "Only after."),
    ("Only before.\n\n", ""),
    ("", ""),
    ("  Odd   spacing\tand\nlines. ", "Odd spacing and  lines."),
    (" \n ", "Ends in a space. "),
    ("A 3.5 mm node, non-calcified; it's stable", "A 4.0 mm node: non-calcified (stable)!"),
    ("<b>markup</b> & more", "markup & <i>more</i>"),
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_pieces_join_to_the_reports(before, after):
    """No character is lost or added, and the unmarked words are the same on both sides."""
    left, right = compare_words(before, after)
    assert "".join(piece.text for piece in left) == before
    assert "".join(piece.text for piece in right) == after
    kept = ["".join(p.text for p in side if not p.marked).lower() for side in (left, right)]
    assert "".join(kept[0].split()) == "".join(kept[1].split())


def test_marks_by_hand():
    """What went is marked on the left, what came on the right; case alone is no difference."""
    left, right = compare_words("No effusion is seen.", "Large Effusion is seen.")
    assert left == (Piece("No", True), Piece(" effusion is seen.", False))
    assert right == (Piece("Large", True), Piece(" Effusion is seen.", False))


def test_perplexity_is_that_of_the_plain_model(phantom, few):
    """exp(-mean log P) from a forward pass by hand, one row alone; nonsense surprises more than a report."""
    texts = [study.report for study in few]
    found = perplexities(phantom, few, texts, batch=3)
    encoding = phantom.processor.encode(few[1:2], report=[texts[1]], padding_side="right")
    with torch.no_grad():
        logp = phantom.model(**encoding.model_inputs(), use_cache=False).logits.log_softmax(-1)
    where = (encoding.roles[0] == TokenRole.REPORT).nonzero()[:, 0]
    by_hand = torch.stack([logp[0, i - 1, encoding.input_ids[0, i]] for i in where])
    assert found[1] == pytest.approx(math.exp(-float(by_hand.mean())), rel=1e-3)
    shuffled = perplexities(phantom, few, [" ".join(reversed(text.split())) for text in texts])
    assert all(a > 3 * b for a, b in zip(shuffled, found, strict=True))
    assert math.isnan(perplexities(phantom, few[:1], [" "])[0])
    with pytest.raises(InterventionError, match="one a study"):
        perplexities(phantom, few, texts[:1])
