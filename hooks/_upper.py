"""Repeat the upper part of MAIRA-2's forward pass with other values at one hook point.

    residual (1, L, d_model) at the start of block i  ->  blocks i .. n  ->  logits of the scored positions

The vision tower, the projector and the blocks below the hook point run once per study. Where the replaced positions
come late in the prompt, keys and values of the positions before them are kept, and only the rest runs again. Studies
run one by one, so there is no padding.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding
from sae_lens_maira.maira2.versions import cache_keyword
from sae_lens_maira.stats import IGNORED_LABEL

WORTH_KEEPING = 4
"""Keys and values are kept where at most one position in so many runs again."""


@contextmanager
def only_blocks(
    language_model: Any, first: int, stop: int | None = None, norm: bool = True
) -> Iterator[None]:
    """Reduce a decoder to its blocks `first` to `stop` (exclusive), and without `norm` leave out the final norm."""
    layers, final = language_model.layers, language_model.norm
    language_model.layers = nn.ModuleList(list(layers)[first:stop])
    if not norm:
        language_model.norm = nn.Identity()
    try:
        yield
    finally:
        language_model.layers, language_model.norm = layers, final


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of weights: autograd then keeps only what the gradient of activations needs."""
    changed = [p for p in model.parameters() if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


class UpperCache(DynamicCache):
    """A cache for the blocks from `first` on; the library asks for the length of block 0, which has no entry here."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        """Number of stored positions."""
        return super().get_seq_length(max(layer_idx, self._first), *args)

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Number of positions that a query sees, and the offset of the first."""
        return super().get_mask_sizes(query, max(layer_idx, self._first))

    def shorten(self, length: int) -> None:
        """Forget all positions from `length` on; `crop` takes other numbers in other versions of transformers."""
        for layer in self.layers[self._first :]:
            stored: Any = layer
            stored.keys, stored.values = stored.keys[:, :, :length], stored.values[:, :, :length]


class UpperRun:
    """One study's forward pass that can be repeated from a hook point on; a `SpliceRun` of `sae.splice`.

    Attributes:
        values: (1, L, d_in) at the hook point.
        labels: (1, L) token ids of the targets, -100 elsewhere.
        roles: (1, L).
        real: (1, L), all True.
    """

    def __init__(
        self, hooked: HookedMaira2, encoding: Maira2Encoding, labels: torch.Tensor, hook_name: str
    ) -> None:
        """Run the part below the hook point.

        Args:
            hooked: The model.
            encoding: One study without padding, on the model's device.
            labels: (1, L) token ids of the targets, -100 elsewhere.
            hook_name: A point of the decoder with one vector per token.

        Raises:
            HookError: The point is unknown.
        """
        self._hooked, self._lm = hooked, hooked.model.get_submodule("model.language_model")
        self.labels, self.roles = labels, encoding.roles
        self.real = torch.ones_like(labels, dtype=torch.bool)
        point = hooked.points.resolve(hook_name)
        self._name, stop, blocks = point.name, point.stop, hooked.cfg.n_layers
        whole = self._name.endswith("hook_resid_post")
        self._start = blocks if stop is None else stop if whole else max(0, stop - 1)
        entry = (
            f"blocks.{self._start}.hook_resid_pre"
            if self._start < blocks
            else f"blocks.{blocks - 1}.hook_resid_post"
        )
        # The input of a block is the output of the one before, whose name lets the run end earlier.
        self._whole = whole or self._name == entry
        names = [self._name] if self._whole else [entry, self._name]
        _, cache = hooked.run_with_cache(encoding.forward_inputs(), names_filter=names, stop_at_layer=stop)
        self._shape = cache[self._name].shape
        self.values = cache[self._name].flatten(2)
        self._residual = self.values if self._whole else cache[entry]
        self._predicting = (labels[0, 1:] != IGNORED_LABEL).nonzero()[:, 0]
        self._cache: UpperCache | None = None

    def logits(self, values: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        """See `SpliceRun`: (targets, vocabulary)."""
        length = self._residual.shape[1]
        first = min(first, int(self._predicting.min())) if len(self._predicting) else first
        if values is None or (length - first) * WORTH_KEEPING > length:
            return self._run(values, 0, None)
        if self._cache is None:
            self._cache = UpperCache(self._start)
            with only_blocks(self._lm, self._start):
                self._forward(self._residual[:, :first], self._cache)
        self._cache.shorten(first)
        if self._cache.get_seq_length() < first and self._start < self._hooked.cfg.n_layers:
            at = self._cache.get_seq_length()
            with only_blocks(self._lm, self._start):
                self._forward(self._residual[:, at:first], self._cache)
        return self._run(values, first, self._cache)

    @torch.no_grad()
    def _run(self, values: torch.Tensor | None, first: int, cache: UpperCache | None) -> torch.Tensor:
        residual = self._residual if values is None or not self._whole else values
        hooks = nullcontext()
        if values is not None and not self._whole:
            new = values.view(self._shape)[:, first:]
            hooks = self._hooked.hooks(fwd_hooks=[(self._name, lambda value, hook: new)])
        with only_blocks(self._lm, self._start), hooks:
            hidden = self._forward(residual[:, first:], cache)
        head: Any = self._hooked.model.get_submodule("lm_head")
        return head(hidden[0, self._predicting - first])

    @torch.no_grad()
    def _forward(self, residual: torch.Tensor, cache: UpperCache | None) -> torch.Tensor:
        kept = {} if cache is None else {cache_keyword(): cache}
        return self._lm(inputs_embeds=residual, use_cache=cache is not None, **kept).last_hidden_state
