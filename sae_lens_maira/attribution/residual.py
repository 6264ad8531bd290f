"""One study and its report, run once up to a hook point and then repeatedly from there.

    h (L, d_model) at blocks.i.hook_resid_post  ->  blocks i+1 .. n-1, norm, head  ->  log P of chosen tokens

An edit of the residual stream changes nothing below the hook point, so the vision tower and the lower blocks run once
per study. Several edits of the same study run as one batch, as large as the budget of bytes allows. A backward pass
whose graph exceeds the budget runs in segments of blocks: only the input of each segment is kept, and a segment runs
again when its gradient is due.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise
from typing import Any

import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.hooks._upper import frozen_weights, only_blocks
from sae_lens_maira.maira2 import Maira2Encoding

BUDGET_BYTES = 1 << 30
"""Default budget for the activations of one batch of edits and for the graph of one backward pass."""
GRAPH_HIDDEN, GRAPH_INTERMEDIATE = 20, 4
"""Numbers per position that autograd keeps of one block, in multiples of the two widths (counted at half precision)."""


class ResidualRun:
    """The part of a model above one hook point, for one encoded study.

    Args:
        hooked: The model.
        encoding: One study with its report, without padding.
        hook_name: `blocks.{i}.hook_resid_post`.
        budget_bytes: Bytes that the activations of one batch of edits, or the graph of one backward pass, may take. At
            least one edit and one block run at a time.

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
        self._blocks = int(text.num_hidden_layers)
        size, length = self.hidden.element_size(), len(self.hidden)
        self._rows = max(
            1, budget_bytes // (length * (4 * text.hidden_size + 3 * text.intermediate_size) * size)
        )
        # What autograd keeps of one block: inputs of norms and products, some of them in float32.
        graph = (
            length * (GRAPH_HIDDEN * text.hidden_size + GRAPH_INTERMEDIATE * text.intermediate_size) * size
        )
        if hooked.forms_pattern:
            graph += 3 * text.num_attention_heads * length**2 * size
        upper = max(1, self._blocks - self._first_block)
        self._rows_with_gradient = max(1, budget_bytes // (graph * upper))
        self._segment = min(upper, max(1, budget_bytes // graph))

    def log_probabilities(self, hidden: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the encoded tokens at some positions, for several versions of the stream.

        Args:
            hidden: (B, L, d_model) residual stream at the hook point.
            positions: T positions of the sequence, each at least 1.

        Returns:
            (B, T) float32 log P(token at position | everything before it), in nats. Differentiable in `hidden`.
        """
        return self._top(hidden, self._first_block, positions)

    @torch.no_grad()
    def scores(self, deltas: Iterable[torch.Tensor], positions: Sequence[int]) -> torch.Tensor:
        """Score a span of tokens under several edits.

        Args:
            deltas: n edits, each (L, d_model), added to the stream; taken one batch at a time.
            positions: Positions of the span's tokens.

        Returns:
            (n,) float32, the summed log-probability of the span under each edit.
        """
        found, pending = [], iter(deltas)
        while batch := [self.edited(delta) for delta in islice(pending, self._rows)]:
            found.append(self.log_probabilities(torch.stack(batch), positions).sum(1).cpu())
        return torch.cat(found) if found else torch.empty(0)

    def gradients(
        self, hidden: torch.Tensor, spans: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of each span's score.

        Args:
            hidden: (L, d_model) where to take it.
            spans: Positions of each span's tokens.

        Returns:
            Scores (S,) and gradients (S, L, d_model), float32.
        """
        every = sorted({p for span in spans for p in span})
        place = {p: i for i, p in enumerate(every)}
        columns = [[place[p] for p in span] for span in spans]
        scores, gradients = self._pull_back(
            hidden.detach()[None], every, lambda logp: [logp[0, column].sum() for column in columns]
        )
        return torch.stack(scores).cpu(), torch.cat([gradient.float() for gradient in gradients])

    def path_gradient(
        self, delta: torch.Tensor, scales: Sequence[float], weights: Sequence[float], positions: Sequence[int]
    ) -> torch.Tensor:
        """Weighted sum of one span's gradients at several points h + scale * delta.

        Args:
            delta: (L, d_model) float32.
            scales: Points on the path, from 0 to 1.
            weights: Weight per point.
            positions: Positions of the span's tokens.

        Returns:
            (L, d_model) float32.
        """
        total = torch.zeros_like(delta)
        for start in range(0, len(scales), self._rows_with_gradient):
            part = slice(start, start + self._rows_with_gradient)
            points = torch.stack([self.edited(scale * delta) for scale in scales[part]])
            _, (gradient,) = self._pull_back(points, positions, lambda logp: [logp.sum()])
            for one, weight in zip(gradient, weights[part], strict=True):
                total += weight * one.float()
        return total

    def _pull_back(
        self,
        hidden: torch.Tensor,
        positions: Sequence[int],
        scores_of: Callable[[torch.Tensor], list[torch.Tensor]],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Gradients of some functions of log-probabilities with respect to the stream at the hook point.

        Args:
            hidden: (B, L, d_model) where to take them.
            positions: Positions whose log-probabilities are read.
            scores_of: Function from these, (B, T) float32, to n scalars.

        Returns:
            The n scalars and their n gradients, each (B, L, d_model) in the model's dtype.
        """
        starts = list(range(self._first_block, max(self._blocks, self._first_block + 1), self._segment))
        inputs = [hidden]
        with torch.no_grad():
            for first, stop in pairwise(starts):
                inputs.append(self._through(inputs[-1], first, stop))
        with torch.enable_grad(), frozen_weights(self.model):
            leaf = inputs[-1].detach().requires_grad_(True)
            scores = scores_of(self._top(leaf, starts[-1], positions))
            gradients = _backward(scores, [None] * len(scores), leaf)
            scores = [score.detach() for score in scores]
            for (first, stop), start in reversed(list(zip(pairwise(starts), inputs, strict=False))):
                leaf = start.detach().requires_grad_(True)
                after = self._through(leaf, first, stop)
                gradients = _backward([after] * len(gradients), gradients, leaf)
        return scores, gradients

    def _through(self, hidden: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """(B, L, d_model) the stream after block `stop` - 1, from the stream before block `first`."""
        upper = self.model.model.language_model
        with only_blocks(upper, first, stop, norm=False):
            return upper(inputs_embeds=hidden, use_cache=False).last_hidden_state

    def _top(self, hidden: torch.Tensor, first: int, positions: Sequence[int]) -> torch.Tensor:
        """(B, T) log-probabilities of the encoded tokens, from the stream before block `first`."""
        place = torch.as_tensor(positions, device=hidden.device)
        upper = self.model.model.language_model
        with only_blocks(upper, first):
            last = upper(inputs_embeds=hidden, use_cache=False).last_hidden_state
        logits = self.model.lm_head(last[:, place - 1]).float()
        targets = self.encoding.input_ids[0, place].expand(len(hidden), -1)
        return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

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
        return self._through(hidden, self._first_block, point.index + 1)

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


def _backward(
    outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], leaf: torch.Tensor
) -> list[torch.Tensor]:
    """Gradient of each output with respect to the leaf, from one graph that is freed with the last."""
    found, last = [], len(outputs) - 1
    for number, (output, gradient) in enumerate(zip(outputs, gradients, strict=True)):
        found += torch.autograd.grad(output, leaf, gradient, retain_graph=number < last)
    return found
