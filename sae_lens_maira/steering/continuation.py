"""From an edited prompt to a report: the blocks above the hook point, then greedy decoding with a cache.

    h' (B, L, d_model)  ->  blocks i+1..  ->  logits of the first token  ->  one token a step

The entries of the blocks below come from the prompts, which an intervention at block i does not change. It knows
nothing about which interventions there are: whoever edits h and whatever follows is an `Engine`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from sae_lens_maira.steering.apply import listen
from sae_lens_maira.steering.engine import Engine
from sae_lens_maira.steering.prompt_cache import Prompt, Room, left_padded, position_ids_of


@dataclass(frozen=True)
class UpperModel:
    """A model as seen from one hook point.

    Attributes:
        model: the whole model.
        block: the block whose output is the hook point.
        module: that block's name in the model.
        cache_keyword: what the library calls the cache.
        pad, eos: token ids.
    """

    model: Any
    block: int
    module: str
    cache_keyword: str
    pad: int
    eos: int

    @property
    def language_model(self) -> Any:
        """The decoder without its head."""
        return self.model.model.language_model


class Continuation:
    """The upper blocks over one batch's edited prompt, and what is written behind it.

    `hidden` (B, L, d_model) is edited already; `engine` is asked again for what is written. Without `hidden` the
    prompt's own keys and values are taken for every block: nothing is steered.
    """

    def __init__(
        self,
        upper: UpperModel,
        parts: Sequence[Prompt],
        mask: torch.Tensor,
        hidden: torch.Tensor | None,
        engine: Engine | None,
        room: int,
    ) -> None:
        self._upper, self._engine = upper, engine
        self._mask, self._length = mask, mask.shape[1]
        lm = upper.language_model
        self._cache = Cache(layers=[Room(self._length + room) for _ in range(len(lm.layers))])
        below = upper.block + 1 if hidden is not None else len(lm.layers)
        self._first = torch.stack([part.first for part in parts])
        if hidden is not None:
            with _only(lm, below):
                # The lower blocks' entries are still empty, so the library builds the mask of a first pass.
                last = self._pass(inputs_embeds=hidden)[:, -1]
            self._first = upper.model.lm_head(last)
        for block in range(below):
            room_of: Any = self._cache.layers[block]
            room_of.update(
                left_padded([p.keys[block] for p in parts], self._length),
                left_padded([p.values[block] for p in parts], self._length),
            )
        # Positions written later are steered only if a schedule reaches them; otherwise no hook is needed.
        self._hooked = engine is not None and engine.reaches(self._length + room)

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, d_vocab) logits that predict `ids` (B, T), as if they had been written; nothing is kept of it."""
        with self._listening():
            hidden = self._pass(input_ids=ids[:, :-1], more=(ids[:, :-1] != self._upper.pad).long())
        self._rewind()
        return torch.cat([self._first[:, None], self._upper.model.lm_head(hidden)], 1).float()

    def kl(self, ids: torch.Tensor, base: torch.Tensor) -> list[float]:
        """Per row, mean KL(base || steered) over the report's tokens."""
        moved = self.score(ids).log_softmax(-1)
        kept = (ids != self._upper.pad).float()
        divergence = (base.exp() * (base - moved)).sum(-1) * kept
        return (divergence.sum(1) / kept.sum(1)).tolist()

    def decode(self, budget: int) -> torch.Tensor:
        """(B, T) ids written greedily, closing token included, padded behind it."""
        head = self._upper.model.lm_head
        rows = torch.arange(len(self._mask))
        out = torch.full((len(rows), budget), self._upper.pad)
        logits, written = self._first, 0
        with self._listening():
            for step in range(budget):
                ids = logits.argmax(-1)
                out[rows, step] = ids
                written = step + 1
                going = ids != self._upper.eos
                if not bool(going.any()) or written == budget:
                    break
                if not self._hooked and int(going.sum()) <= 0.8 * len(going):
                    keep = going.nonzero()[:, 0]
                    rows, ids, self._mask = rows[keep], ids[keep], self._mask[keep]
                    for layer in self._cache.layers:
                        layer.keep(keep)  # pyright: ignore[reportAttributeAccessIssue] - a Room
                logits = head(self._pass(input_ids=ids[:, None], more=torch.ones_like(ids)[:, None])[:, -1])
        # A row that ended but stayed in the batch wrote on behind its closing token.
        ended = ((out == self._upper.eos).int().cumsum(1) - (out == self._upper.eos).int()) > 0
        return out.masked_fill(ended, self._upper.pad)[:, :written]

    def _pass(self, more: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        if more is not None:
            self._mask = torch.cat([self._mask, more], 1)
        n = next(iter(inputs.values())).shape[1]
        return self._upper.language_model(
            **inputs,
            attention_mask=self._mask,
            position_ids=position_ids_of(self._mask)[:, -n:],
            use_cache=True,
            **{self._upper.cache_keyword: self._cache},
        ).last_hidden_state

    def _rewind(self) -> None:
        self._mask = self._mask[:, : self._length]
        for layer in self._cache.layers:
            layer.rewind(self._length)  # pyright: ignore[reportAttributeAccessIssue] - a Room
        if self._engine is not None:
            self._engine.effect.positions = self._length

    @contextmanager
    def _listening(self) -> Iterator[None]:
        if self._engine is None or not self._hooked:
            yield
            return
        module = self._upper.model.get_submodule(self._upper.module)
        handle = listen(module, self._engine)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _only(lm: Any, first: int) -> Iterator[None]:
    """The language model with only its blocks from `first` on."""
    layers = lm.layers
    lm.layers = nn.ModuleList(list(layers)[first:])
    try:
        yield
    finally:
        lm.layers = layers
