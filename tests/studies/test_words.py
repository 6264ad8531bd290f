"""Comparison of two reports: pieces join to the reports, and equal words are unmarked."""

import pytest

from sae_lens_maira.studies.words import Piece, compare_words

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
