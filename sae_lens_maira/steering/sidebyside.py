"""Two reports side by side, with the words marked that one has and the other has not.

    before   No [pleural effusion] is seen.          perplexity 1.3
    after    [Moderate right] pleural effusion.      perplexity 4.9

Words and marks are compared without case; pieces of a report join to the report itself, character for character. The
perplexity is exp(-mean log P) of a report's tokens under the model as it is, unsteered: text that steering broke
surprises it. It knows nothing about findings or pages.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import Maira2, TokenRole

_WORDS = re.compile(r"\s*\d+\.\d+|\s*\w+(?:[-'’]\w+)*|\s*[^\w\s]|\s+$")


@dataclass(frozen=True)
class Piece:
    """A run of words: `marked` if the other report does not have them there."""

    text: str
    marked: bool


def compare_words(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both reports in pieces; the unmarked ones are the same words in the same order.

    Args:
        before: one report.
        after: the other.

    Returns:
        Pieces of `before` and of `after`.
    """
    words = [_WORDS.findall(text) for text in (before, after)]
    keys = [[word.strip().lower() for word in side] for side in words]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    found: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        for side, part in zip(found, (words[0][a0:a1], words[1][b0:b1]), strict=True):
            if part:
                side.append(Piece("".join(part), tag != "equal"))
    return tuple(found[0]), tuple(found[1])


def perplexities(maira: Maira2, studies: Sequence[Any], texts: Sequence[str], batch: int = 32) -> list[float]:
    """Perplexity of a text for each study under the unsteered model; NaN for an empty text.

    Args:
        maira: the model, with no intervention in force.
        studies: whose films and sections stand before the text.
        texts: one for each study.
        batch: studies at a time.

    Raises:
        InterventionError: their numbers differ.
    """
    if len(studies) != len(texts):
        raise InterventionError(
            f"{len(studies)} studies and {len(texts)} texts were given; give one a study."
        )
    found = [math.nan] * len(texts)
    written = [i for i, text in enumerate(texts) if text.strip()]
    for start in range(0, len(written), batch):
        part = written[start : start + batch]
        encoding = maira.processor.encode(
            [studies[i] for i in part], report=[texts[i] for i in part], padding_side="right"
        ).to(maira.model.device, maira.model.dtype)
        with torch.no_grad():
            logits = maira.model(**encoding.model_inputs(), use_cache=False).logits
        report = (encoding.roles == TokenRole.REPORT).to(logits.device)
        for row, i in enumerate(part):
            here = report[row].nonzero()[:, 0]
            # Only the report's rows of the logits are made float: the prompt is most of a sequence.
            logp = logits[row, here - 1].float().log_softmax(-1)
            nats = -logp.gather(1, encoding.input_ids[row, here, None].to(logits.device)).mean()
            found[i] = math.exp(float(nats))
    return found
