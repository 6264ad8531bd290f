"""From an edited prompt to a report: the blocks above the hook point, then greedy decoding with a cache.

    h' (B, L, d_model)  ->  blocks i+1 ..  ->  logits of the first token  ->  one token per step

Keys and values of the blocks up to i come from the stored prompts, because an intervention after block i does not
change them. Everything stays on the model's device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from sae_lens_maira.hooks._upper import only_blocks
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole
from sae_lens_maira.steering.engine import Engine
from sae_lens_maira.steering.run import edit_output

COLUMNS = ("input_ids", "attention_mask", "roles", "image_index", "view", "patch_row", "patch_col")


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one block with space for tokens to come, so that a decode step copies one token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity, self.used = capacity, 0
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, heads, T, d_head) and return all stored keys and values."""
        start, self.used = self.used, self.used + key_states.shape[2]
        if not self._buffers:
            shape = (*key_states.shape[:2], self._capacity, key_states.shape[3])
            self._buffers = [key_states.new_empty(shape), value_states.new_empty(shape)]
            self.is_initialized = True
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.used] = new
        self._expose()
        return self.keys, self.values  # pyright: ignore[reportReturnType] - set by _expose

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.used = min(self.used, length)
        self._expose()

    def keep(self, rows: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self._buffers = [buffer[rows] for buffer in self._buffers]
        self._expose()

    def get_seq_length(self, *args: Any) -> int:
        """Number of stored positions."""
        return self.used

    def _expose(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.used] for buffer in self._buffers)


@dataclass(frozen=True)
class Prompt:
    """One study's prompt, run once, without padding.

    Attributes:
        columns: Columns of the encoding, (L,) each.
        hidden: (L, d_model) stream at the hook point.
        keys, values: (heads, L, d_head) for every block up to the hook point.
    """

    columns: dict[str, torch.Tensor]
    hidden: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        tensors = (*self.columns.values(), self.hidden, *self.keys, *self.values)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class UpperModel:
    """A model seen from one hook point.

    Attributes:
        model: The whole model.
        block: Index of the block whose output is the hook point.
        module: Name of that block in the model.
        cache_keyword: Name of the cache argument in the installed transformers.
        pad, eos: Token ids.
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

    def row_bytes(self, length: int, scored: int = 0) -> int:
        """Estimate the memory of one row: keys and values of all blocks, one block's work, and scores of tokens.

        Args:
            length: Tokens of the row.
            scored: Tokens whose whole distribution is compared: five float32 tensors over the vocabulary.
        """
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = config.hidden_size // config.num_attention_heads * heads
        per_token = (
            2 * config.num_hidden_layers * width + 6 * config.hidden_size + 3 * config.intermediate_size
        )
        return length * per_token * self.model.dtype.itemsize + 20 * scored * config.vocab_size


class Continuation:
    """The upper blocks over the edited prompts of one batch, and what is written after them.

    Args:
        upper: The model above the hook point.
        parts: Prompts of the batch.
        mask: (B, L) attention mask, left-padded.
        hidden: (B, L, d_model) stream at the hook point, edited or not.
        engine: Interventions on the tokens that are written; None if there are none.
        capacity: Number of tokens that may be written.
    """

    def __init__(
        self,
        upper: UpperModel,
        parts: Sequence[Prompt],
        mask: torch.Tensor,
        hidden: torch.Tensor,
        engine: Engine | None,
        capacity: int,
    ) -> None:
        self._upper, self._engine = upper, engine
        self._mask, self._length = mask, mask.shape[1]
        lm = upper.language_model
        self._cache = Cache(
            layers=[PreallocatedLayer(self._length + capacity) for _ in range(len(lm.layers))]
        )
        below = upper.block + 1
        with only_blocks(lm, below):
            # The entries of the lower blocks are still empty, so the library builds the mask of a first pass.
            last = self._pass(inputs_embeds=hidden)[:, -1]
        self._first = upper.model.lm_head(last)
        for block in range(below):
            layer: Any = self._cache.layers[block]
            layer.update(
                left_padded([p.keys[block] for p in parts], self._length),
                left_padded([p.values[block] for p in parts], self._length),
            )
        # Written positions are steered only if a schedule reaches them; otherwise no hook is needed.
        self._hooked = engine is not None and engine.reaches(self._length + capacity)

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, d_vocab) float32 logits that predict `ids` (B, T); the state is as before afterwards."""
        with self._listening():
            hidden = self._pass(input_ids=ids[:, :-1], more=(ids[:, :-1] != self._upper.pad).long())
        self._rewind()
        return torch.cat([self._first[:, None], self._upper.model.lm_head(hidden)], 1).float()

    def kl(self, ids: torch.Tensor, base: torch.Tensor) -> list[float]:
        """Mean KL(base || steered) over the tokens of each report, in nats.

        Args:
            ids: (B, T) reports.
            base: (B, T, d_vocab) unsteered log-probabilities along them.
        """
        steered = self.score(ids).log_softmax(-1)
        kept = (ids != self._upper.pad).float()
        divergence = (base.exp() * (base - steered)).sum(-1) * kept
        return (divergence.sum(1) / kept.sum(1)).tolist()

    def decode(self, budget: int) -> torch.Tensor:
        """(B, T) ids written greedily, including the end token, padded after it."""
        head, device = self._upper.model.lm_head, self._first.device
        rows = torch.arange(len(self._mask), device=device)
        out = torch.full((len(rows), budget), self._upper.pad, device=device)
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
                        layer.keep(keep)  # pyright: ignore[reportAttributeAccessIssue] - a PreallocatedLayer
                logits = head(self._pass(input_ids=ids[:, None], more=torch.ones_like(ids)[:, None])[:, -1])
        # A row that ended but stayed in the batch went on after its end token.
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
            layer.rewind(self._length)  # pyright: ignore[reportAttributeAccessIssue] - a PreallocatedLayer
        if self._engine is not None:
            self._engine.effect.positions = self._length

    @contextmanager
    def _listening(self) -> Iterator[None]:
        if self._engine is None or not self._hooked:
            yield
            return
        handle = edit_output(self._upper.model.get_submodule(self._upper.module), self._engine)
        try:
            yield
        finally:
            handle.remove()


@torch.no_grad()
def read_prompts(maira: Maira2, studies: Sequence[Any], upper: UpperModel) -> list[Prompt]:
    """Run the prompts of one batch of studies up to the hook point and store them without padding.

    Args:
        maira: The model.
        studies: Studies; their prompts for the findings report are run.
        upper: The model above the hook point.
    """
    encoding = maira.processor.encode(studies, padding_side="left").to(maira.model.device, maira.model.dtype)
    length, below = encoding.input_ids.shape[1], upper.block + 1
    cache = Cache(layers=[PreallocatedLayer(length) for _ in range(below)])
    stream: list[torch.Tensor] = []

    def store(_module: nn.Module, _inputs: Any, output: Any) -> None:
        stream.append(output[0] if isinstance(output, tuple) else output)

    handle = maira.model.get_submodule(upper.module).register_forward_hook(store, prepend=True)
    try:
        with only_blocks(upper.language_model, 0, below):
            maira.model(
                **encoding.model_inputs(),
                position_ids=position_ids_of(encoding.attention_mask),
                use_cache=True,
                logits_to_keep=1,
                **{upper.cache_keyword: cache},
            )
    finally:
        handle.remove()
    prompts = []
    for row in range(len(encoding)):
        real = encoding.attention_mask[row].bool()
        layers: list[Any] = list(cache.layers)
        prompts.append(
            Prompt(
                {name: getattr(encoding, name)[row, real] for name in COLUMNS},
                stream[0][row, real],
                tuple(layer.keys[row][:, real] for layer in layers),
                tuple(layer.values[row][:, real] for layer in layers),
            )
        )
    return prompts


def padded(parts: Sequence[Prompt], pad_id: int, eos_id: int) -> tuple[Maira2Encoding, torch.Tensor]:
    """Join prompts into a left-padded encoding (without pixels) and the stream (B, L, d_model)."""
    length = max(len(part.hidden) for part in parts)
    fill = {"input_ids": pad_id, "attention_mask": 0, "roles": int(TokenRole.PAD)}

    def pad(value: torch.Tensor, number: int) -> torch.Tensor:
        return nn.functional.pad(value, (length - len(value), 0), value=number)

    columns = {
        name: torch.stack([pad(part.columns[name], fill.get(name, -1)) for part in parts]) for name in COLUMNS
    }
    hidden = torch.stack([nn.functional.pad(p.hidden, (0, 0, length - len(p.hidden), 0)) for p in parts])
    encoding = Maira2Encoding(
        **columns,
        pixel_values=None,
        images_per_row=(0,) * len(parts),
        pad_token_id=pad_id,
        eos_token_id=eos_id,
    )
    return encoding, hidden


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows (B_i, L_i, ...) of several batches in one, padded with 0 on the left."""
    length = max(part.shape[1] for part in parts)

    def pad(part: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (length - part.shape[1], 0))

    return torch.cat([pad(part) for part in parts])


def left_padded(parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """(B, heads, length, d_head) of (heads, l, d_head), padded on the left."""
    return torch.stack([nn.functional.pad(part, (0, 0, length - part.shape[1], 0)) for part in parts])


def position_ids_of(mask: torch.Tensor) -> torch.Tensor:
    """(B, n) place of every real token in its row, 0 at padding: the position ids that `generate` uses."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
