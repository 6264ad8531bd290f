"""The passes over kept entries, in PyTorch operators that exist on every device.

    prefix_decode:     e_l = b_dec - x + sum_{levels <= l} h W_dec[col],   S_m = sum_{l >= m} s_l e_l
    latent_backward:   dh = S_{level} . W_dec[col],   dW_dec[j] = sum h S,   dW_enc_t[j] = sum dh xc

All levels cost one gather, since a level only adds to the one before, and the gradient of a latent needs only
the suffix sum S of its level. Norms do not appear: their gradients cancel exactly (h n times 1/n).
"""

import warnings
from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag

from sae_lens_maira.kernels.layout import Layout, bags_of


class Decoded(NamedTuple):
    """Suffix gradients S (B, L, d_in), squared errors (L,) float64 summed over rows, and errors."""

    suffix: torch.Tensor
    squared: torch.Tensor
    errors: list[torch.Tensor]
    """Errors e_l (B, d_in): of the last level only, or of every level if they were asked for."""


class LatentGradients(NamedTuple):
    """dW_dec (d_sae, d_in), dW_enc transposed (d_sae, d_in), db_enc (d_sae,); empty where a matrix is frozen."""

    W_dec: torch.Tensor
    W_enc_t: torch.Tensor
    b_enc: torch.Tensor
    squares: torch.Tensor | None = None
    """(2,) sums of squares of dW_dec and dW_enc, from backends that get them on the way."""


def prefix_decode(
    layout: Layout,
    h: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    x: torch.Tensor,
    scales: tuple[float, ...],
    keep_errors: bool = False,
) -> Decoded:
    """Decodes every level in one pass; `scales` are 2 c_l / tokens."""
    batch, levels, d_in = layout.batch, layout.levels, x.shape[1]
    if batch == 0:
        empty = x.new_zeros(0, levels, d_in)
        return Decoded(
            empty, x.new_zeros(levels, dtype=torch.float64), [empty[:, 0]] * (levels if keep_errors else 1)
        )
    added = _bags(layout.cols, W_dec, layout.offsets, h).view(batch, levels, d_in)
    error = added.unbind(dim=1)
    error[0].add_(b_dec - x)
    for level in range(1, levels):
        error[level].add_(error[level - 1])
    squared = torch.linalg.vector_norm(added, dim=2).double().square_().sum(dim=0)
    errors = [e.clone() for e in (error if keep_errors else error[-1:])]
    error[-1].mul_(scales[-1])
    for level in range(levels - 2, -1, -1):
        if scales[level] == 1.0:
            error[level].add_(error[level + 1])
        else:
            torch.add(error[level + 1], error[level], alpha=scales[level], out=error[level])
    return Decoded(added, squared, errors)


def latent_backward(
    layout: Layout,
    h: torch.Tensor,
    suffix: torch.Tensor,
    xc: torch.Tensor,
    W_dec: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    frozen: frozenset[str] = frozenset(),
) -> LatentGradients:
    """Gradients of the latents' weights from the suffix gradients (B, L, d_in).

    Args:
        layout: Kept entries.
        h: (nnz,) their coefficients.
        suffix: S of `prefix_decode`.
        xc: (B, d_in) centred input.
        W_dec: (d_sae, d_in).
        out: Buffers for dW_dec and dW_enc_t, (d_sae, d_in) each, overwritten.
        frozen: Matrices whose gradient is left out and returned as an empty tensor.
    """
    d_in = xc.shape[1]
    gradient = suffix.reshape(layout.batch * layout.levels, d_in)
    bags = bags_of(layout.rows, layout.cols, layout.widths)
    dh = sampled_product(bags, layout.cols, gradient, W_dec.T, layout.offsets)
    nothing = W_dec.new_empty(0)
    W_dec_grad, W_enc_grad = out if out is not None else (nothing, nothing)
    order, pointers = layout.by_latent, layout.pointers
    if "W_dec" in frozen:
        W_dec_grad = nothing
    else:
        W_dec_grad = W_dec_grad if out is not None else torch.empty_like(W_dec)
        _bags_into(W_dec_grad, bags[order], gradient, pointers, h[order])
    if "W_enc" in frozen:
        W_enc_grad = nothing
    else:
        W_enc_grad = W_enc_grad if out is not None else torch.empty_like(W_dec)
        _bags_into(W_enc_grad, layout.rows[order], xc, pointers, dh[order])
    b_enc = torch.zeros(layout.d_sae, dtype=h.dtype, device=h.device).index_add_(0, layout.cols, dh)
    return LatentGradients(W_dec_grad, W_enc_grad, b_enc)


def sampled_product(
    rows: torch.Tensor,
    cols: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """(left @ right)[rows, cols] for row-major entries, (nnz,); right may be a transposed view.

    Args:
        rows: (nnz,) ascending.
        cols: (nnz,) ascending within a row.
        left: (m, d).
        right: (d, n).
        offsets: (m + 1,) first entry of each row, if known.
    """
    if len(cols) == 0:
        return left.new_zeros(0)
    if offsets is None:
        counts = torch.bincount(rows, minlength=left.shape[0])
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    pattern = _csr(offsets, cols, left.new_zeros(len(cols)), (left.shape[0], right.shape[1]))
    return torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()


ROWS_AT_ONCE = 1 << 20
"""Elements of one slice of a (d_sae, d_in) gradient: 4 MB of float32, which the allocator reuses.

A fresh (d_sae, d_in) tensor per step costs more in page faults than the arithmetic that fills it.
"""


def _bags_into(
    out: torch.Tensor, index: torch.Tensor, table: torch.Tensor, pointers: torch.Tensor, weights: torch.Tensor
) -> None:
    number = len(pointers) - 1
    if len(index) == 0:
        out.zero_()
        return
    step = max(1, ROWS_AT_ONCE // max(1, table.shape[1]))
    edges = pointers[::step].tolist() + ([] if number % step == 0 else [int(pointers[-1])])
    for place, start in enumerate(range(0, number, step)):
        stop, first, last = min(start + step, number), edges[place], edges[place + 1]
        if first == last:
            out[start:stop].zero_()
            continue
        out[start:stop] = _bags(
            index[first:last], table, pointers[start : stop + 1] - first, weights[first:last]
        )


def _bags(
    index: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    if len(index) == 0:
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _csr(
    offsets: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|.* CSR)")
        return torch.sparse_csr_tensor(offsets, cols, values, size, check_invariants=False)
