"""A step whose latents are divided over ranks: every rank has all rows of the batch and its share of the latents.

    latent j belongs to rank j mod N, so that every level is divided evenly
    e_l = b_dec - x + sum over ranks of (sum of own entries of levels <= l: h W_dec[col])    one sum of (L, B, d_in)

With e_l known everywhere, gradients of the own latents need no other rank's weights. Fire counts are those of all
latents on every rank. Ties at the threshold go to the lowest rank first, then to the lowest flat index there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels.comm import Communicator
from sae_lens_maira.kernels.layout import Layout
from sae_lens_maira.kernels.problem import StepSpec
from sae_lens_maira.kernels.sparse import Decoded

ROWS_AT_ONCE = 512
"""Rows whose largest entries are exchanged at once: 34 MB of float32 for 8 ranks and 2,048 entries per row."""


def latents_of(rank: int, size: int) -> slice:
    """Latents of a rank."""
    return slice(rank, None, size)


def own_spec(spec: StepSpec, comm: Communicator) -> StepSpec:
    """The step of this rank's latents: widths count own latents.

    Raises:
        BackendError: A level has fewer latents than there are ranks.
    """
    if comm.size == 1:
        return spec
    check_levels(spec.widths, comm.size)
    own = latents_of(comm.rank, comm.size)
    return replace(spec, widths=tuple(len(range(width)[own]) for width in spec.widths))


def check_levels(widths: Sequence[int], size: int) -> None:
    """Refuse levels of which a rank would have nothing.

    Raises:
        BackendError: A level has fewer latents than there are ranks.
    """
    sizes = [after - before for before, after in zip((0, *widths), widths, strict=False)]
    if min(sizes) < size:
        raise BackendError(
            f"Latents are to be divided over {size} ranks, and the smallest of the levels with widths {tuple(widths)} "
            f"has {min(sizes)}. Expected at least one latent of each level per rank: use fewer ranks or larger levels, "
            "or do not divide latents."
        )


def of_all_latents(counts: torch.Tensor, d_sae: int, comm: Communicator) -> torch.Tensor:
    """Counts (d_sae,) of all ranks' latents, from those of this rank's."""
    if comm.size == 1:
        return counts
    every = counts.new_zeros(d_sae)
    every[latents_of(comm.rank, comm.size)] = counts
    return comm.sum_(every)


def decode_over_ranks(
    prefix_decode: Callable[..., Decoded],
    layout: Layout,
    h: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    x: torch.Tensor,
    scales: tuple[float, ...],
    comm: Communicator,
) -> Decoded:
    """`prefix_decode` of all ranks' entries; errors of every level are kept."""
    if comm.rank > 0:  # b_dec - x enters the sum once
        b_dec, x = torch.zeros_like(b_dec), torch.zeros_like(x)
    errors = comm.sum_(torch.stack(prefix_decode(layout, h, W_dec, b_dec, x, scales, True).errors))
    squared = torch.linalg.vector_norm(errors, dim=2).double().square_().sum(dim=1)
    suffix = torch.empty_like(errors)
    running = torch.zeros_like(errors[0])
    for level in range(len(scales) - 1, -1, -1):
        suffix[level] = running.add_(errors[level], alpha=scales[level])
    return Decoded(suffix.to(W_dec.dtype).transpose(0, 1), squared, list(errors))


def own_dead(dead: torch.Tensor, spec: StepSpec, comm: Communicator) -> tuple[torch.Tensor, list[int]]:
    """The part of a mask (d_sae,) for this rank's latents, and how many they are.

    The latter are those below each level's own width for auxiliary losses per level, else one number.
    """
    own = dead[latents_of(comm.rank, comm.size)]
    widths = own_spec(spec, comm).widths if spec.aux.kind == "matryoshka" else (len(own),)
    below = own.cumsum(0).tolist()
    return own, [below[width - 1] for width in widths]


def largest(values: torch.Tensor, k: int, comm: Communicator) -> torch.Tensor:
    """Mask of the k largest entries of each row over all ranks' columns.

    Args:
        values: (rows, columns) of this rank, which may have fewer than k columns or none.
        k: Entries per row over all ranks, at most the columns of all ranks.
        comm: The ranks that have other columns.
    """
    if comm.size == 1:
        top = values.topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, top, True)
    masks = []
    for part in values.split(ROWS_AT_ONCE):
        own = part.topk(min(k, part.shape[1]), dim=1, sorted=False).values
        own = pad(own, (0, k - own.shape[1]), value=-torch.inf)
        every = comm.gather_rows(own).view(comm.size, len(part), k)
        kth = every.transpose(0, 1).flatten(1).topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        above, equal = (every > kth).sum(dim=(0, 2)), (every[: comm.rank] == kth).sum(dim=(0, 2))
        tied = part == kth
        masks.append((part > kth) | (tied & (tied.cumsum(dim=1) <= (k - above - equal)[:, None])))
    return torch.cat(masks)
