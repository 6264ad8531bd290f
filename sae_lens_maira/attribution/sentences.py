"""Sentences of a report as spans of tokens, so that each can be scored by the model.

score(sentence) = sum over its tokens t of log P(t | prompt, report before t)        in nats
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sae_lens_maira.errors import PromptError
from sae_lens_maira.maira2 import Maira2Encoding, TokenRole

# A sentence ends at . ! or ? before white space and something that can begin a sentence, or at a line break.
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(\[])|\s*\n+\s*")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a report.

    Attributes:
        number: Place in the report, from 0.
        text: The sentence without surrounding white space.
        positions: Positions of its tokens in the encoded sequence, ascending.
    """

    number: int
    text: str
    positions: tuple[int, ...]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Split a report into sentences.

    Args:
        text: The report.

    Returns:
        (start, end) character offsets of every sentence, without surrounding white space, in order.
    """
    spans, start = [], 0
    for end, following in [*((m.start(), m.end()) for m in _END.finditer(text)), (len(text), len(text))]:
        piece = text[start:end]
        if piece.strip():
            left = start + len(piece) - len(piece.lstrip())
            spans.append((left, left + len(piece.strip())))
        start = following
    return spans


def report_sentences(encoding: Maira2Encoding, tokenizer: Any) -> list[Sentence]:
    """Find the sentences of an encoded report and the tokens of each.

    A token belongs to the sentence that contains its last character. The token that closes the report belongs to none.

    Args:
        encoding: One study with its report.
        tokenizer: The processor's tokenizer.

    Raises:
        PromptError: The encoding has several rows, or no report.
    """
    if len(encoding) != 1:
        raise PromptError(f"{len(encoding)} studies were encoded together; expected one. Encode it alone.")
    place = _report_positions(encoding)
    if not place:
        raise PromptError(
            "The encoding has no report, so there is no sentence to explain. Encode the study with a report."
        )
    tokens = encoding.input_ids[0][place].tolist()
    ends = _character_ends(tokens, tokenizer)
    text = _decode(tokens, tokenizer)
    found = []
    for start, end in split_sentences(text):
        mine = tuple(p for p, e in zip(place, ends, strict=True) if start < e <= end)
        if mine:
            found.append(Sentence(len(found), text[start:end], mine))
    return found


def report_text(encoding: Maira2Encoding, tokenizer: Any, stop: int | None = None) -> str:
    """The encoded report as text, up to but not including position `stop`."""
    place = [p for p in _report_positions(encoding) if stop is None or p < stop]
    return _decode(encoding.input_ids[0][place].tolist(), tokenizer)


def words_of(sentence: Sentence, words: str, encoding: Maira2Encoding, tokenizer: Any) -> Sentence:
    """Narrow a sentence to the tokens of some of its words.

    Args:
        sentence: The sentence.
        words: Words that occur in it; the first occurrence counts, and case does not.
        encoding: The encoded study.
        tokenizer: The processor's tokenizer.

    Raises:
        PromptError: The words do not occur in the sentence.
    """
    tokens = encoding.input_ids[0][list(sentence.positions)].tolist()
    text, ends = _decode(tokens, tokenizer), _character_ends(tokens, tokenizer)
    start = text.lower().find(words.lower())
    if start < 0 or not words.strip():
        raise PromptError(
            f"The words {words!r} do not occur in the sentence {sentence.text!r}. Copy them from it."
        )
    end = start + len(words)
    spans = zip(sentence.positions, [0, *ends], ends, strict=False)
    mine = tuple(p for p, low, high in spans if low < end and high > start)
    return Sentence(sentence.number, text[start:end], mine)


def pick_sentences(sentences: Sequence[Sentence], wanted: int | Sequence[int] | None) -> list[Sentence]:
    """The sentences of the given numbers (negative: from the end); all of them for None.

    Raises:
        PromptError: There is no sentence of that number, or none is named.
    """
    if wanted is None:
        return list(sentences)
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    if not numbers:
        raise PromptError("The list of sentences is empty; name at least one, or leave it out for all.")
    try:
        return [sentences[number] for number in numbers]
    except IndexError:
        raise PromptError(
            f"Sentences {numbers} were requested, but the report has {len(sentences)}, numbered from 0: "
            + " | ".join(f"{s.number}: {s.text}" for s in sentences)
        ) from None


def _report_positions(encoding: Maira2Encoding) -> list[int]:
    """Positions of the report's tokens without the one that closes it."""
    place = (encoding.roles[0] == TokenRole.REPORT).nonzero()[:, 0].tolist()
    return [p for p in place if int(encoding.input_ids[0, p]) != encoding.eos_token_id]


def _character_ends(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    """For every token, the length of the decoded text up to and including it."""
    return [len(_decode(tokens[: i + 1], tokenizer)) for i in range(len(tokens))]


def _decode(tokens: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(
        torch.as_tensor(list(tokens)), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
