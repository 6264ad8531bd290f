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
    """Errors e_l (B, d_in): of the last level only, or of every level if they were requested."""


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
    gradient = suffix.reshape(layout.batch * layout.levels, xc.shape[1])
    order, pointers = layout.by_latent, layout.pointers
    bags = bags_of(layout.rows, layout.cols, layout.widths)[order]
    # Latent by latent, each row of W_dec is read once and from the next place in memory.
    dh = sampled_product(pointers, bags, W_dec, gradient.T)
    nothing = W_dec.new_empty(0)
    W_dec_grad, W_enc_grad = out if out is not None else (nothing, nothing)
    if "W_dec" in frozen:
        W_dec_grad = nothing
    else:
        W_dec_grad = W_dec_grad if out is not None else torch.empty_like(W_dec)
        _sum_of_rows(pointers, bags, h[order], gradient, W_dec_grad)
    if "W_enc" in frozen:
        W_enc_grad = nothing
    else:
        W_enc_grad = W_enc_grad if out is not None else torch.empty_like(W_dec)
        _sum_of_rows(pointers, layout.rows[order], dh, xc, W_enc_grad)
    b_enc = torch.zeros(layout.d_sae, dtype=h.dtype, device=h.device).index_add_(0, layout.latents, dh)
    return LatentGradients(W_dec_grad, W_enc_grad, b_enc)


def sampled_product(
    offsets: torch.Tensor, cols: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Entries of left @ right, row by row, (nnz,).

    Args:
        offsets: (m + 1,) first entry of each row.
        cols: (nnz,) columns of the entries, ascending within a row.
        left: (m, d).
        right: (d, n); may be a transposed view.
    """
    if len(cols) == 0:
        return left.new_zeros(0)
    pattern = _csr(offsets, cols, left.new_zeros(len(cols)), (left.shape[0], right.shape[1]))
    return torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()


def _sum_of_rows(
    pointers: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, out: torch.Tensor
) -> None:
    """Row j of out becomes the weighted sum of the table's rows index[pointers[j]:pointers[j + 1]]."""
    matrix = _csr(pointers, index, weights, (len(out), len(table)))
    torch.addmm(out, matrix, table, beta=0.0, out=out)


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
