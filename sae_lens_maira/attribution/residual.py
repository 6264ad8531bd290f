"""One study and its report, read once up to a hook point, and run from there as often as wanted.

    h (L, d_model) at blocks.i.hook_resid_post  ->  blocks i+1 .. n-1, norm, head  ->  log P of chosen tokens

An edit of the residual stream changes nothing below the hook point, so the vision tower and the lower blocks run once
per study. Several edits of the same study run as one batch, as large as the budget of bytes allows.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.hooks._upper import frozen_weights, only_blocks
from sae_lens_maira.maira2 import Maira2Encoding

BUDGET_BYTES = 1 << 30
"""Default budget for the activations of one batch of edits."""


class ResidualRun:
    """The part of a model above one hook point, for one encoded study.

    Args:
        hooked: The model.
        encoding: One study with its report, without padding.
        hook_name: `blocks.{i}.hook_resid_post`.
        budget_bytes: Bytes that the activations of one batch of edits may take; at least one edit runs at a time.

    Attributes:
        hidden: (L, d_model) residual stream at the hook point, in the model's dtype and on its device.
        encoding: The encoding, on the model's device.

    Raises:
        HookError: Another kind of hook point, or several studies.
    """

    def __init__(
        self,
        hooked: HookedMaira2,
        encoding: Maira2Encoding,
        hook_name: str,
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        point = hooked.points.resolve(hook_name)
        if not point.name.endswith("hook_resid_post") or point.index is None:
            raise HookError(
                f"{hook_name!r} is not the output of a decoder block, so the blocks above it do not depend on it "
                "alone. Use an SAE at blocks.{i}.hook_resid_post."
            )
        if len(encoding) != 1 or not bool(encoding.attention_mask.all()):
            raise HookError(
                f"The encoding has {len(encoding)} rows and {int((encoding.attention_mask == 0).sum())} padded "
                "positions; expected one study without padding."
            )
        self.model: Any = hooked.model
        self._points = hooked.points
        self._first_block = point.index + 1
        self.hook_name = point.name
        self.encoding = encoding.to(hooked.W_E.device, hooked.W_E.dtype)
        with torch.no_grad():
            _, cache = hooked.run_with_cache(
                self.encoding, names_filter=[point.name], stop_at_layer=point.stop
            )
        self.hidden: torch.Tensor = cache[point.name][0]
        text: Any = self.model.config.get_text_config()
        widest = 4 * text.hidden_size + 3 * text.intermediate_size
        row = len(self.hidden) * widest * self.hidden.element_size()
        self._rows = max(1, budget_bytes // row)
        # A backward pass keeps activations of every block above the hook point: 9 d_model + 3 d_mlp per position.
        blocks = max(1, text.num_hidden_layers - self._first_block)
        kept = len(self.hidden) * (9 * text.hidden_size + 3 * text.intermediate_size) * blocks
        self._rows_with_gradient = max(1, budget_bytes // (kept * self.hidden.element_size()))

    def log_probabilities(self, hidden: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the encoded tokens at some positions, for several versions of the stream.

        Args:
            hidden: (B, L, d_model) residual stream at the hook point.
            positions: T positions of the sequence, each at least 1.

        Returns:
            (B, T) float32 log P(token at position | everything before it), in nats. Differentiable in `hidden`.
        """
        place = torch.as_tensor(positions, device=hidden.device)
        upper = self.model.model.language_model
        with only_blocks(upper, self._first_block):
            last = upper(inputs_embeds=hidden, use_cache=False).last_hidden_state
        logits = self.model.lm_head(last[:, place - 1]).float()
        targets = self.encoding.input_ids[0, place].expand(len(hidden), -1)
        return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    @torch.no_grad()
    def scores(self, deltas: Sequence[torch.Tensor], positions: Sequence[int]) -> torch.Tensor:
        """Score a span of tokens under several edits.

        Args:
            deltas: Edits, each (L, d_model), added to the stream.
            positions: Positions of the span's tokens.

        Returns:
            (len(deltas),) float32, the summed log-probability of the span under each edit.
        """
        found = []
        for start in range(0, len(deltas), self._rows):
            batch = torch.stack([self.edited(delta) for delta in deltas[start : start + self._rows]])
            found.append(self.log_probabilities(batch, positions).sum(1).cpu())
        return torch.cat(found) if found else torch.empty(0)

    def gradients(
        self, hidden: torch.Tensor, spans: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of each span's score, from one forward pass.

        Args:
            hidden: (L, d_model) where to take it.
            spans: Positions of each span's tokens.

        Returns:
            Scores (S,) and gradients (S, L, d_model), float32.
        """
        leaf = hidden.detach()[None].clone().requires_grad_(True)
        every = sorted({p for span in spans for p in span})
        place = {p: i for i, p in enumerate(every)}
        gradients, scores = [], []
        with torch.enable_grad(), frozen_weights(self.model):
            logp = self.log_probabilities(leaf, every)[0]
            for number, span in enumerate(spans):
                score = logp[[place[p] for p in span]].sum()
                more = number + 1 < len(spans)
                gradients.append(torch.autograd.grad(score, leaf, retain_graph=more)[0][0].float())
                scores.append(score.detach())
        return torch.stack(scores).cpu(), torch.stack(gradients)

    def path_gradient(
        self, delta: torch.Tensor, scales: Sequence[float], weights: Sequence[float], positions: Sequence[int]
    ) -> torch.Tensor:
        """Weighted sum of one span's gradients at several points h + scale * delta.

        Args:
            delta: (L, d_model) float32.
            scales: Where on the path.
            weights: Weight per point.
            positions: Positions of the span's tokens.

        Returns:
            (L, d_model) float32.
        """
        total = torch.zeros_like(delta)
        with torch.enable_grad(), frozen_weights(self.model):
            for start in range(0, len(scales), self._rows_with_gradient):
                part = slice(start, start + self._rows_with_gradient)
                leaf = torch.stack([self.edited(scale * delta) for scale in scales[part]]).requires_grad_(
                    True
                )
                scores = self.log_probabilities(leaf, positions).sum(1)
                (gradient,) = torch.autograd.grad(scores.sum(), leaf)
                for one, weight in zip(gradient, weights[part], strict=True):
                    total += weight * one.float()
        return total

    def stream(self, hidden: torch.Tensor, hook_name: str) -> torch.Tensor:
        """The residual stream at a later hook point.

        Args:
            hidden: (B, L, d_model) residual stream at this run's hook point.
            hook_name: `blocks.{i}.hook_resid_post` of a later block.

        Returns:
            (B, L, d_model), differentiable in `hidden`.

        Raises:
            HookError: The block is not above this run's hook point.
        """
        point = self._points.resolve(hook_name)
        if (
            not point.name.endswith("hook_resid_post")
            or point.index is None
            or point.index < self._first_block
        ):
            raise HookError(
                f"{hook_name!r} is not the output of a block above {self.hook_name}, so it does not depend on it alone."
            )
        upper = self.model.model.language_model
        with only_blocks(upper, self._first_block, point.index + 1, norm=False):
            return upper(inputs_embeds=hidden, use_cache=False).last_hidden_state

    @torch.no_grad()
    def streams(
        self, deltas: Sequence[torch.Tensor], hook_name: str, positions: torch.Tensor
    ) -> torch.Tensor:
        """(len(deltas), P, d_model) the stream at some positions of a later hook point, under several edits."""
        found = []
        for start in range(0, len(deltas), self._rows):
            batch = torch.stack([self.edited(delta) for delta in deltas[start : start + self._rows]])
            found.append(self.stream(batch, hook_name)[:, positions])
        return torch.cat(found)

    def edit(self, delta: torch.Tensor) -> None:
        """Add an edit (at most L positions from the first, d_model) to the stream for everything that follows."""
        hidden = self.hidden.clone()
        hidden[: len(delta)] = (hidden[: len(delta)].float() + delta).to(hidden.dtype)
        self.hidden = hidden

    def edited(self, delta: torch.Tensor) -> torch.Tensor:
        """(L, d_model) the stream with an edit added in float32."""
        return (self.hidden.float() + delta).to(self.hidden.dtype)
