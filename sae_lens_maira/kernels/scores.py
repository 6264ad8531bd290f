"""Where scores h = xc W_enc + b_enc come from: computed in full, or bounded first and computed where it
matters.

`DenseScores` holds h. `BoundedScores` holds an upper bound U >= h from a low-precision product and computes h
in full precision for the candidates only. With x~, w~ the rounded operands,

    x.w <= x~.w~ + |x - x~| |w| + |x~| |w - w~| + c |x~| |w~|      (Cauchy-Schwarz; c bounds the accumulation)

and the norms are measured, not worst cases, except that |x~| and |w~| are bounded by |x| + |x - x~| and
|w| + |w - w~|. The margin is two more columns of the same product,
rounded up, so it costs nothing. An entry whose U is below the threshold cannot be selected: the selection
stays exact.
"""

from collections.abc import Callable

import torch

from sae_lens_maira.kernels.layout import sort_by_latent
from sae_lens_maira.kernels.problem import StepSpec, Weights
from sae_lens_maira.kernels.selection import compact, refuse_broken
from sae_lens_maira.kernels.sparse import sampled_product
from sae_lens_maira.kernels.workspace import Workspace

PAD = 32
"""Extra columns of the augmented product: two hold the margin, the rest keep rows aligned to 64 bytes."""
USED = 8
"""Extra columns that a product on a CPU reads; without the others it took 0.5 to 0.9 of 42 ms less at d_in 1,024."""


Buffer = Callable[[str, tuple[int, ...], torch.Tensor], torch.Tensor]
"""Gives a tensor by name and shape, of the type of another; its contents are whatever was there."""


def fresh(name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A new tensor every time."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


MASK_AT_ONCE = 1 << 20
"""Booleans of one slice of the comparison: 1 MB stays in a core's cache until it is searched."""


class DenseScores:
    """Scores that were computed in full: h (rows, d_sae) and norms (d_sae,); None means 1.

    h may be stored latent by latent (the transpose of a contiguous tensor): a CPU's matrix product is faster so.
    """

    def __init__(self, h: torch.Tensor, norms: torch.Tensor | None) -> None:
        self.h = h
        self.norms = norms
        self.shape = (h.shape[0], h.shape[1])
        self.by_latent = h.T.is_contiguous() and not h.is_contiguous()

    def sample(self, rows: int) -> torch.Tensor:
        """H * norm of evenly spaced rows, flattened."""
        h = self.h[:: max(1, self.shape[0] // rows)]
        return (h if self.norms is None else h * self.norms).flatten()

    def above(self, lo: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flat indices, h and h * norm of the entries above lo."""
        bound = lo if self.norms is None or lo == 0 else lo / self.norms
        if not self.by_latent:
            index = _above_in_blocks(self.h, bound)
            return _with_values(index, self.h.view(-1)[index], self.norms, self.shape[1])
        stored = _above_in_blocks(self.h.T, bound[:, None] if isinstance(bound, torch.Tensor) else bound)
        rows, d_sae = self.shape
        index, order = (stored % rows * d_sae + stored // rows).sort()
        return _with_values(index, self.h.T.view(-1)[stored[order]], self.norms, d_sae)

    def columns(self, latents: torch.Tensor) -> torch.Tensor:
        """H (rows, latents) of some latents."""
        return self.h.T.index_select(0, latents).T if self.by_latent else self.h.index_select(1, latents)

    def poison(self) -> torch.Tensor:
        """0, or NaN if a weight of the encoder is not finite; such a latent shows in every row."""
        poison = self.h[:1].sum() * 0
        return poison if self.norms is None else poison + self.norms.sum() * 0


def _above_in_blocks(table: torch.Tensor, bound: torch.Tensor | float) -> torch.Tensor:
    """Flat indices, ascending, of the entries of a contiguous table above a bound; a bound (n, 1) holds row by row."""
    rows, width = table.shape
    block = max(1, MASK_AT_ONCE // max(1, width)) if table.device.type == "cpu" else max(1, rows)
    by_row = isinstance(bound, torch.Tensor) and bound.ndim == 2
    parts = []
    for start in range(0, rows, block):
        limit = bound[start : start + block] if isinstance(bound, torch.Tensor) and by_row else bound
        parts.append(compact(table[start : start + block] > limit) + start * width)
    return torch.cat(parts) if parts else compact(table > bound)


class BoundedScores:
    """Scores bounded by a bfloat16 or TF32 product; exact where the bound reaches the threshold."""

    def __init__(
        self,
        xc: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        norms: torch.Tensor | None,
        kind: str,
        buffer: Buffer = fresh,
    ) -> None:
        self.xc, self.W_enc, self.b_enc, self.norms = xc, W_enc, b_enc, norms
        self.shape = (xc.shape[0], W_enc.shape[1])
        left, right = augment(xc, W_enc, kind, buffer)
        used = xc.shape[1] + USED
        self.upper = low_precision_product(left[:, :used], right[:, :used], kind, buffer)
        if kind == "tf32":
            self.upper = self.upper + self.upper.abs() * 2.0**-10
        self._checksum = right[:, W_enc.shape[0]].sum(dtype=torch.float32) + b_enc.sum()

    def sample(self, rows: int) -> torch.Tensor:
        """H * norm of evenly spaced rows, computed exactly, flattened."""
        h = torch.addmm(self.b_enc, self.xc[:: max(1, self.shape[0] // rows)], self.W_enc)
        return (h if self.norms is None else h * self.norms).flatten()

    def above(self, lo: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flat indices, exact h and h * norm of every entry whose bound lets it exceed lo.

        Raises:
            BackendError: an exact score lies above its bound, so the low-precision product of this machine is
                not what the proof assumes.
        """
        bound = lo - self.b_enc if self.norms is None or lo == 0 else lo / self.norms - self.b_enc
        # Rounding is monotone: U >= bound implies round(U) >= round(bound), so nothing is lost by rounding
        # the bound.
        index = compact(reaches(self.upper, bound.to(self.upper.dtype)))
        rows = torch.div(index, self.shape[1], rounding_mode="floor")
        cols = index - rows * self.shape[1]
        # Latent by latent, each row of the encoder is read once and from the next place in memory.
        order, _, pointers = sort_by_latent(cols.to(torch.int32), self.shape[1])
        products = self.xc.new_empty(len(index))
        products[order] = sampled_product(pointers, rows[order], self.W_enc.T, self.xc.T)
        refuse_broken(int((products.to(self.upper.dtype) > self.upper.view(-1)[index]).sum()))
        h = products.add_(self.b_enc[cols])
        values = h if self.norms is None else h * self.norms[cols]
        inside = (values > lo).nonzero().squeeze(1)
        return index[inside], h[inside], values[inside]

    def columns(self, latents: torch.Tensor) -> torch.Tensor:
        """Exact h (rows, latents) of some latents."""
        return torch.addmm(self.b_enc[latents], self.xc, self.W_enc.T.index_select(0, latents).T)

    def poison(self) -> torch.Tensor:
        """0, or NaN if a weight of the encoder is not finite."""
        return self._checksum * 0 if self.norms is None else (self._checksum + self.norms.sum()) * 0


def reaches(table: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Mask of table >= bound for a table (rows, n) and bounds (n,) of one type, with 0.0 above -0.0; a NaN may pass.

    Numbers that are not negative order as their bits do, and a CPU compares integers faster: 8 million bfloat16
    numbers in 2.1 ms instead of 3.6 ms.
    """
    bits = torch.int16 if table.dtype == torch.bfloat16 else torch.int32
    mask = table.view(bits) >= bound.clamp(min=0).view(bits)
    below = (bound < 0).nonzero().squeeze(1)
    if len(below):
        mask[:, below] = table[:, below] >= bound[below]
    return mask


def augment(
    xc: torch.Tensor, W_enc: torch.Tensor, kind: str, buffer: Buffer = fresh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded (rows, d_in + PAD) and (d_sae, d_in + PAD) whose product bounds xc @ W_enc from above."""
    d_in = xc.shape[1]
    accumulation = accumulation_error(d_in)
    like = xc.new_empty(0, dtype=storage(kind))
    left = buffer("left", (xc.shape[0], d_in + PAD), like)
    right = buffer("right", (W_enc.shape[1], d_in + PAD), like)
    left[:, d_in:], right[:, d_in:] = 0, 0
    lost_x, full_x = _round_rows(xc, left, kind)
    lost_w, full_w = _round_rows(W_enc.T, right, kind)
    kept_x, kept_w = full_x + lost_x, full_w + lost_w  # at least the norms of the rounded rows
    left[:, d_in], right[:, d_in] = _up(lost_x, kind), _up(full_w, kind)
    left[:, d_in + 1], right[:, d_in + 1] = _up(kept_x, kind), _up(lost_w + accumulation * kept_w, kind)
    return left, right


def accumulation_error(d_in: int) -> float:
    """Bound c: one rounding error of 2^-23 per term covers fused and unfused float32 accumulation in any order."""
    return (d_in + PAD) * 2.0**-23


def storage(kind: str) -> torch.dtype:
    """Type that holds rounded operands."""
    return torch.bfloat16 if kind == "bf16" else torch.float32


def round_to(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Values as the low-precision product reads them: bfloat16, or float32 with TF32's 10 explicit bits."""
    if kind == "bf16":
        return values.to(torch.bfloat16)
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def low_precision_product(
    left: torch.Tensor, right: torch.Tensor, kind: str, buffer: Buffer = fresh
) -> torch.Tensor:
    """The product left @ right.T on matrix units: bfloat16 anywhere, TF32 on CUDA.

    The last step of TF32 units may round the sum, by up to 2^-10 of it.
    """
    if kind == "bf16":
        return torch.mm(left, right.T, out=buffer("upper", (left.shape[0], right.shape[0]), left))
    # torch 2.9 renamed the switch, and mixing the two names is an error there.
    matmul = torch.backends.cuda.matmul
    name, on = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, on)
    try:
        # The operands are already rounded, so it does not matter whether the hardware truncates or rounds.
        return torch.mm(left, right.T, out=buffer("upper", (left.shape[0], right.shape[0]), left))
    finally:
        setattr(matmul, name, before)


def _round_rows(values: torch.Tensor, out: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Write rounded rows into out; norms of what rounding lost and of the rows."""
    rows, width = values.shape
    lost, full = values.new_empty(rows), values.new_empty(rows)
    block = max(1, (1 << 20) // max(width, 1))  # 4 MB of float32: the temporary stays in cache
    back = values.new_empty(min(block, rows), width)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        part, rounded = values[start:stop], out[start:stop, :width]
        rounded.copy_(part if kind == "bf16" else round_to(part, kind))
        torch.linalg.vector_norm(part, dim=1, out=full[start:stop])
        error = back[: stop - start].copy_(rounded).sub_(part)
        torch.linalg.vector_norm(error, dim=1, out=lost[start:stop])
    return lost, full


def _up(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Rounds non-negative values up: 2^-6 covers the rounding to storage and the float32 norm's own error."""
    return round_to(values * (1 + (2.0**-6 if kind == "bf16" else 2.0**-8)), kind)


def _with_values(
    index: torch.Tensor, h: torch.Tensor, norms: torch.Tensor | None, d_sae: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = h if norms is None else h * norms[index % d_sae]
    return index, h, values


def encode(
    weights: Weights,
    xc: torch.Tensor,
    operand: torch.Tensor,
    norms: torch.Tensor | None,
    spec: StepSpec,
    workspace: Workspace,
) -> DenseScores | BoundedScores:
    """Scores of centred rows xc (B, d_in), `operand` in the type of the passes; bounded ones with candidates."""
    if spec.candidates != "off":
        return BoundedScores(xc, weights.W_enc, weights.b_enc, norms, spec.candidates, workspace.buffer)
    rows, d_sae = xc.shape[0], weights.W_dec.shape[0]
    if xc.device.type == "cpu" and not spec.autocast:
        # Stored latent by latent, the product takes a sixth less time with MKL (Zen 3).
        by_latent = workspace.buffer("h", (d_sae, rows), xc)
        torch.addmm(weights.b_enc[:, None], weights.W_enc.T, xc.T, out=by_latent)
        return DenseScores(by_latent.T, norms)
    h = workspace.buffer("h", (rows, d_sae), xc)
    if spec.autocast:
        product = operand.to(torch.bfloat16) @ workspace.bf16("W_enc", weights.W_enc.T).T
        torch.add(product, weights.b_enc, out=h)
    else:
        torch.addmm(weights.b_enc, xc, weights.W_enc, out=h)
    return DenseScores(h, norms)
