"""Scores h = xc W_enc + b_enc on the GPU, in full or as bounds, and the search for the n largest of them.

The first attempt uses the last step's threshold and runs asynchronously: the caller reads from `check` whether it was
right. If it was not, or without a threshold, bounds from a sample are tried until one is right.
"""

# pyright: reportCallIssue=false
# triton's own types know neither launch options (num_warps) nor that a jitted function is launched, not called.

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sae_lens_maira.kernels.comm import Communicator
from sae_lens_maira.kernels.layout import build_layout
from sae_lens_maira.kernels.problem import StepSpec, Weights
from sae_lens_maira.kernels.scores import PAD, accumulation_error, low_precision_product, storage
from sae_lens_maira.kernels.selection import Selected, lower_bounds, refuse_broken
from sae_lens_maira.kernels.triton_candidates import Encoder, Table
from sae_lens_maira.kernels.triton_select import Kept, select_rows, shortened
from sae_lens_maira.kernels.workspace import Workspace

ROOM = 2
"""Size of the candidate buffer as a multiple of the kept entries: `SAFETY` gives a factor of 1.2 to 1.4."""
SAFETY = 0.95
"""Factor of the last threshold for the first attempt's lower bound; after a miss the passes are repeated."""
TF32_SLACK = 2.0**-10
"""Relative rounding error of a sum on TF32 units."""


class TritonScores:
    """Scores of one batch; `norms` are the norms of the decoder rows, or None for 1."""

    def __init__(
        self,
        table: Table,
        weights: Weights,
        xc: torch.Tensor,
        encoder: Encoder | None,
        poison: torch.Tensor | None = None,
    ) -> None:
        self.norms = table.norms
        self.shape = (table.table.shape[0], table.table.shape[1])
        self.like = weights.b_enc.new_empty(0)
        self._table, self._weights, self._xc, self._encoder, self._poison = (
            table,
            weights,
            xc,
            encoder,
            poison,
        )

    def sample(self, rows: int) -> torch.Tensor:
        """Return h * norm of evenly spaced rows, flattened."""
        every = max(1, self.shape[0] // rows)
        if self._encoder is None:
            h = self._with_bias(self._table.table[::every], slice(None))
        else:
            h = torch.addmm(self._weights.b_enc, self._xc[::every], self._weights.W_enc)
        return (h if self.norms is None else h * self.norms).flatten()

    def columns(self, latents: torch.Tensor) -> torch.Tensor:
        """Return h (rows, latents) of some latents."""
        if self._encoder is None:
            return self._with_bias(self._table.table.index_select(1, latents), latents)
        rows = self._encoder.W_enc_t.index_select(0, latents)
        return torch.addmm(self._weights.b_enc[latents], self._xc, rows.T)

    def poison(self) -> torch.Tensor:
        """0-d float64: NaN if a score or a weight of the encoder is not finite, else 0."""
        assert self._poison is not None, "dense scores are searched before their poison is known"
        return self._poison

    def select(
        self,
        n: int,
        widths: tuple[int, ...],
        comm: Communicator,
        threshold: torch.Tensor,
        safety: float,
        room: int,
    ) -> Kept:
        """Try to select with the lower bound threshold * safety and a buffer of `room` candidates."""
        table = self._table
        if self._encoder is not None:
            least = (threshold * safety).expand(self.shape[1])
            # Besides the products, the subtraction of b_enc and the division by norms round once each.
            least = least if self.norms is None else least / self.norms
            bounds = least - self._weights.b_enc
            bounds -= (least + self._weights.b_enc.abs()) * 2.0**-22
            table = table._replace(bounds=bounds.to(table.table.dtype))
        kept = select_rows(table, n, widths, comm, threshold, safety, room, self._encoder)
        if self._encoder is None:
            self._poison = kept.poison
        return kept

    def _with_bias(self, table: torch.Tensor, latents: torch.Tensor | slice) -> torch.Tensor:
        return table if self._table.bias is None else table + self._table.bias[latents]


def encode(
    weights: Weights,
    xc: torch.Tensor,
    operand: torch.Tensor,
    norms: torch.Tensor | None,
    spec: StepSpec,
    workspace: Workspace,
) -> TritonScores:
    """Compute scores of centred rows xc (B, d_in), also as the bfloat16 `operand`; with candidates, upper bounds of
    them.
    """
    rows, d_sae = xc.shape[0], weights.W_dec.shape[0]
    if spec.candidates != "off":
        return _bounded(weights, xc, norms, spec, workspace)
    if spec.autocast:
        half = xc.new_empty(0, dtype=torch.bfloat16)
        product = workspace.buffer("h", (rows, d_sae), half)
        torch.mm(operand, workspace.bf16("W_enc", weights.W_enc.T).T, out=product)
        return TritonScores(Table(product, weights.b_enc, norms), weights, xc, None)
    h = torch.addmm(weights.b_enc, xc, weights.W_enc, out=workspace.buffer("h", (rows, d_sae), xc))
    return TritonScores(Table(h, None, norms), weights, xc, None)


def _bounded(
    weights: Weights, xc: torch.Tensor, norms: torch.Tensor | None, spec: StepSpec, workspace: Workspace
) -> TritonScores:
    W_enc_t = weights.W_enc.T.contiguous()
    d_sae, d_in = W_enc_t.shape
    kind = spec.candidates
    like = xc.new_empty(0, dtype=storage(kind))
    left = workspace.buffer("left", (xc.shape[0], d_in + PAD), like)
    right = workspace.buffer("right", (d_sae, d_in + PAD), like)
    for values, out, is_weight in ((xc, left, False), (W_enc_t, right, True)):
        round_rows_kernel[(len(values),)](
            out,
            values,
            d_in,
            d_in + PAD,
            accumulation_error(d_in),
            BF16=kind == "bf16",
            WEIGHT=is_weight,
            PAD=PAD,
            BLOCK=triton.next_power_of_2(d_in),
            num_warps=8,
        )
    upper = low_precision_product(left, right, kind, workspace.buffer)
    poison = (right[:, d_in].sum(dtype=torch.float64) + weights.b_enc.sum()) * 0
    if norms is not None:
        poison = poison + norms.sum() * 0
    table = Table(upper, None, norms, slack=0.0 if kind == "bf16" else TF32_SLACK)
    return TritonScores(table, weights, xc, Encoder(xc, W_enc_t, weights.b_enc), poison)


@triton.jit
def round_rows_kernel(
    out,
    values,
    width,
    stride,
    accumulation,
    BF16: tl.constexpr,
    WEIGHT: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    full = tl.load(values + row * width + place, mask=inside, other=0.0)
    if BF16:
        stored = full.to(tl.bfloat16)
        up = 1.0 + 0.015625
    else:
        stored = (full.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        up = 1.0 + 0.00390625
    tl.store(out + row * stride + place, stored, mask=inside)
    kept = stored.to(tl.float32)
    lost = kept - full
    norm_lost = tl.sqrt(tl.sum(lost * lost, 0))
    norm_kept = tl.sqrt(tl.sum(kept * kept, 0))
    norm_full = tl.sqrt(tl.sum(full * full, 0))
    # Two more columns turn the product into an upper bound: |x - x~| |w| and |x~| (|w - w~| + c |w~|).
    if WEIGHT:
        one = norm_full * up
        two = (norm_lost + accumulation * norm_kept) * up
    else:
        one = norm_lost * up
        two = norm_kept * up
    pad = tl.arange(0, PAD)
    margin = tl.where(pad == 0, one, tl.where(pad == 1, two, 0.0))
    if BF16:
        tl.store(out + row * stride + width + pad, margin.to(tl.bfloat16))
    else:
        margin = (margin.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        tl.store(out + row * stride + width + pad, margin)


def select(
    scores: TritonScores,
    n: int,
    tokens: int,
    comm: Communicator,
    workspace: Workspace,
    widths: tuple[int, ...],
) -> Iterator[Selected]:
    """Yield attempts to find the n largest entries; the first whose `check` is true is the selection."""
    like = scores.like
    if n == 0:
        layout = build_layout(like.new_empty(0, dtype=torch.int64), scores.shape[0], widths)
        scores.select(1, widths, comm, like.new_zeros(()), 1.0, 1)  # counts scores that are not finite
        yield Selected(layout, like, like, workspace.threshold, like.new_full((), torch.inf))
        return
    room = min(max(1, scores.shape[0] * scores.shape[1]), ROOM * n + 1024)
    hint = workspace.threshold
    if hint is not None and comm.size == 1:
        if not isinstance(hint, torch.Tensor):
            hint = like.new_tensor(hint)
        kept = scores.select(n, widths, comm, hint, SAFETY, room)
        yield Selected(kept.layout, kept.h, kept.values, kept.threshold, kept.threshold, kept.check)
        hint = None  # its check failed
    for lo in lower_bounds(scores, n, tokens, comm, None if hint is None else float(hint)):
        while True:
            kept = scores.select(n, widths, comm, like.new_tensor(lo), 1.0, room)
            right, found, number, broken = kept.check.tolist()
            refuse_broken(broken)
            most = max(comm.counts(found))
            if most <= room:
                break
            room = most
        if right:
            kept = shortened(kept, number)
            smallest = kept.values.min() if number else like.new_full((), torch.inf)
            threshold = kept.threshold if number == n or comm.size > 1 else None
            yield Selected(kept.layout, kept.h, kept.values, threshold, smallest)
            return
    raise AssertionError("the last bound is 0, where every positive entry is a candidate")
