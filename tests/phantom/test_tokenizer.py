"""The phantom's tokenizer: MAIRA-2's added tokens in one block, words whole, any text encodable."""

import pytest

from sae_lens_maira.maira2 import ADDED_TOKENS
from sae_lens_maira.phantom.tokenizer import build_tokenizer

pytestmark = pytest.mark.compat

TEXTS = [
    "Given the current frontal image only<image> Provide a structured description.",
    "There is a small left pleural effusion. No pneumothorax.",
    "<obj>The heart is enlarged.<box><x10><y20><x30><y40></box></obj>",
] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, vocab_size=600)


def test_added_tokens_are_one_block_in_order(tokenizer):
    """All 207 added tokens have consecutive ids behind the learned pieces, also those seen in the texts."""
    ids = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
    assert ids == list(range(len(tokenizer) - len(ADDED_TOKENS), len(tokenizer)))
    assert len(ADDED_TOKENS) == 207


def test_special_ids_are_vicunas(tokenizer):
    """<unk> 0 (and padding), <s> 1, </s> 2, as MAIRA-2 has them."""
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == 0


def test_words_are_whole_wherever_they_stand(tokenizer):
    """A word before a full stop, in a sentence and behind a marker is the same single piece."""
    pieces = [tokenizer.tokenize(text)[-2] for text in ("a pleural effusion.", "effusion.", "<obj>effusion.")]
    assert pieces == ["▁effusion"] * 3


@pytest.mark.parametrize("text", ["There is a pneumothorax.", "Größe 5 µm?", "日本", "a  b"])
def test_any_text_survives(tokenizer, text):
    """Encoding and decoding gives the text back, unseen characters through bytes."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_added_tokens_survive_skip_special_tokens(tokenizer):
    """Boxes are text to the tokenizer, so a decoded report keeps them."""
    ids = tokenizer("<obj>heart<box><x1><y2><x3><y4></box></obj>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).count("<x") == 2
