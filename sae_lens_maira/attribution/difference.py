"""Difference between the scores of two continuations of one report, for attribution.

    score = log P(tokens of a span | prompt, report before) - log P(tokens of another text | prompt, report before)

Tokens that both continuations begin with cancel. Only positions that both sequences share are edited or attributed to:
the prompt, the report before the span, and those common tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.attribution.sentences import Sentence, report_text
from sae_lens_maira.errors import PromptError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding, TokenRole


class DifferenceRun:
    """Two continuations of the same prompt, used like the `ResidualRun` of the first one.

    Args:
        first: The study with the report that is explained.
        second: The study with the other continuation, at the same hook point.
        span: Positions of the other continuation in the second sequence.

    Attributes:
        hidden: (L, d_model) stream of the first sequence.
        encoding: Encoding of the first sequence.
        hook_name: The hook point.
        shared: Number of leading positions that have the same tokens in both sequences.
    """

    def __init__(self, first: ResidualRun, second: ResidualRun, span: Sequence[int]) -> None:
        self._first, self._second, self._span = first, second, tuple(span)
        self.hidden, self.encoding, self.hook_name = first.hidden, first.encoding, first.hook_name
        self.shared = shared_positions(first.encoding, second.encoding)

    def scores(self, deltas: Iterable[torch.Tensor], positions: Sequence[int]) -> torch.Tensor:
        """(n,) difference of both scores under n edits (L, d_model) of the shared positions."""
        edits = list(deltas)
        second = self._second.scores((self._moved(edit) for edit in edits), self._span)
        return self._first.scores((self._kept(edit) for edit in edits), positions) - second

    def gradients(
        self, hidden: torch.Tensor, spans: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Differences (S,) and their gradients (S, L, d_model), 0 after the shared positions."""
        scores, gradients = self._first.gradients(hidden, spans)
        moved = self._second.hidden.clone()
        moved[: self.shared] = hidden[: self.shared]
        score, (gradient,) = self._second.gradients(moved, [self._span])
        gradients[:, : self.shared] -= gradient[: self.shared]
        gradients[:, self.shared :] = 0
        return scores - score, gradients

    def path_gradient(
        self, delta: torch.Tensor, scales: Sequence[float], weights: Sequence[float], positions: Sequence[int]
    ) -> torch.Tensor:
        """(L, d_model) weighted sum of the difference's gradients at h + scale * delta."""
        total = self._kept(self._first.path_gradient(self._kept(delta), scales, weights, positions))
        other = self._second.path_gradient(self._moved(delta), scales, weights, self._span)
        total[: self.shared] -= other[: self.shared]
        return total

    def _kept(self, delta: torch.Tensor) -> torch.Tensor:
        """An edit of the shared positions only."""
        kept = torch.zeros_like(delta)
        kept[: self.shared] = delta[: self.shared]
        return kept

    def _moved(self, delta: torch.Tensor) -> torch.Tensor:
        """The same edit in the second sequence."""
        moved = torch.zeros(self._second.hidden.shape, dtype=delta.dtype, device=delta.device)
        moved[: self.shared] = delta[: self.shared]
        return moved


def shared_positions(first: Maira2Encoding, second: Maira2Encoding) -> int:
    """Number of leading positions with equal tokens."""
    a, b = first.input_ids[0].cpu(), second.input_ids[0].cpu()
    n = min(len(a), len(b))
    different = (a[:n] != b[:n]).nonzero()
    return int(different[0, 0]) if len(different) else n


def compared_with(
    hooked: HookedMaira2, study: Any, run: ResidualRun, span: Sentence, instead: str, budget_bytes: int
) -> DifferenceRun:
    """The run that compares a span with another text in its place.

    Args:
        hooked: The model.
        study: The study.
        run: The study with its report.
        span: A sentence, or words of one.
        instead: The other text; nothing follows it.
        budget_bytes: Bytes that one batch may take.

    Raises:
        PromptError: The other text is empty, equals the span, or changes how the report before it is tokenised.
    """
    whole = report_text(run.encoding, hooked.tokenizer)
    before = report_text(run.encoding, hooked.tokenizer, stop=span.positions[0])
    gap = " " if whole[len(before) : len(before) + 1] == " " else ""
    processor: Any = hooked.processor
    other = processor.encode([study], report=[before + gap + instead], padding_side="right")
    shared = shared_positions(run.encoding, other)
    places = (other.roles[0] == TokenRole.REPORT).nonzero()[:, 0].tolist()
    tokens = [
        p for p in places if p >= span.positions[0] and int(other.input_ids[0, p]) != other.eos_token_id
    ]
    if shared < span.positions[0] or not tokens or tokens[-1] < shared:
        raise PromptError(
            f"{span.text!r} cannot be compared with {instead!r}: both continuations must follow the same tokens and "
            "then differ. Pass another text, or compare the whole sentence."
        )
    return DifferenceRun(run, ResidualRun(hooked, other, run.hook_name, budget_bytes), tokens)


__all__ = ["DifferenceRun", "compared_with", "shared_positions"]
