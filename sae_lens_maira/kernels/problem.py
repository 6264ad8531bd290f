"""Data classes of the training step: settings (`StepSpec`), parameters (`Weights`) and result (`StepResult`).

With xc = x - b_dec (or x), h = xc W_enc + b_enc and n_j = |W_dec[j]| (or 1), the int(k B) largest positive
entries of h n over the whole batch are kept. Level l decodes the kept latents below widths[l]:
r_l = b_dec + sum h_j W_dec[j].

    loss = sum_l level_weights[l] mean_b |r_l - x|^2 + aux

The activation that is reported, thresholded and logged is h n; the coefficient that multiplies W_dec is h.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from sae_lens_maira.errors import ConfigError

AuxKind = Literal["none", "topk", "matryoshka", "dictionary_learning"]
Candidates = Literal["off", "bf16", "tf32"]
AskedCandidates = Literal["auto", "off", "bf16", "tf32"]
DeadMask = torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None
"""A mask (d_sae,), a function from this batch's fire counts (d_sae,) to a mask, or None for no dead latents."""


@dataclass(frozen=True, kw_only=True)
class AuxSpec:
    """Settings of the auxiliary loss, in which dead latents reconstruct the residual.

    Kind "topk" is that of SAELens (raw pre-activations, residual of the last level, scaled by min(dead / k_aux, 1)).
    Kind "matryoshka" is the same once per level, with that level's residual and dead latents. Kind
    "dictionary_learning" uses rectified pre-activations and divides by the variance of the residual.
    """

    kind: AuxKind = "none"
    coefficient: float = 1.0
    k_aux: int | None = None
    """Number of dead latents per token; None means d_in // 2."""


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Settings of the step, without tensors."""

    k: float
    """Mean number of latents kept per token; int(k * tokens) are kept per batch."""
    widths: tuple[int, ...]
    """Cumulative level widths; the last one is d_sae."""
    level_weights: tuple[float, ...] | None = None
    """Weight of each level's loss; None means 1 each."""
    rescale: bool = True
    """Whether entries are ranked by h |W_dec[j]| (True) or by h."""
    centre: bool = True
    """Whether b_dec is subtracted from the input."""
    aux: AuxSpec = field(default_factory=AuxSpec)
    autocast: bool = False
    """Whether the encoder product rounds its operands to bfloat16, as torch.autocast does."""
    candidates: Candidates = "off"
    """Type of a low-precision product that finds candidates, which are then scored and selected exactly."""
    frozen: frozenset[str] = frozenset()
    """Names of matrices that are not trained ("W_enc", "W_dec"); their gradients are not computed."""

    def __post_init__(self) -> None:
        """Check that the values are consistent.

        Raises:
            ConfigError: Widths are not increasing, there is not one weight per level, or an unknown name is frozen.
        """
        pairs = zip((0, *self.widths), self.widths, strict=False)
        if not self.widths or any(after <= before for before, after in pairs):
            raise ConfigError(f"Level widths are {self.widths}; they must be positive and increase.")
        if self.level_weights is not None and len(self.level_weights) != len(self.widths):
            raise ConfigError(
                f"There are {len(self.level_weights)} level weights for {len(self.widths)} level widths; "
                "give one each."
            )
        if not self.frozen <= {"W_enc", "W_dec"}:
            raise ConfigError(
                f"Frozen parameters are {sorted(self.frozen)}; expected W_enc, W_dec, both or none."
            )
        if self.autocast and self.candidates != "off":
            raise ConfigError(
                "Both autocast and exact low-precision candidates were requested. Autocast rounds the "
                "encoder product anyway, so there is nothing exact to recover; switch one of them off."
            )

    @property
    def weights_of_levels(self) -> tuple[float, ...]:
        """Weight of each level."""
        return self.level_weights if self.level_weights is not None else (1.0,) * len(self.widths)

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.widths)

    def count(self, tokens: int) -> int:
        """Number of entries kept in a batch of this many tokens; rounded down as in SAELens."""
        return int(self.k * tokens)


class Weights(NamedTuple):
    """Parameters: W_enc (d_in, d_sae) in any memory order, b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,)."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor


class Gradients(NamedTuple):
    """Gradients of the total loss; that of W_enc is transposed, (d_sae, d_in).

    The gradient of a frozen matrix is an empty tensor.
    """

    W_enc_t: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor


class SparseActs(NamedTuple):
    """The kept positive entries in row-major order: rows, cols (nnz,) int64 and values h n (nnz,)."""

    rows: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor
    shape: tuple[int, int]

    def to_coo(self) -> torch.Tensor:
        """Convert to a coalesced sparse (batch, d_sae) tensor."""
        indices = torch.stack((self.rows, self.cols))
        return torch.sparse_coo_tensor(
            indices, self.values, self.shape, is_coalesced=True, check_invariants=False
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Losses, gradients and sparse activations of one batch, over all ranks unless noted.

    Attributes:
        loss: Total loss, 0-d.
        level_losses: (levels,) squared error of each level, summed over d_in, averaged over rows, not weighted.
        aux_loss: Auxiliary loss with its coefficient, 0-d.
        sae_out: (rows of this rank, d_in) reconstruction of the last level.
        acts: Kept entries of this rank's rows; with `own_latents`, of its latents, numbered as in the whole SAE.
        gradients: Gradients of `loss`, summed over ranks. With `own_rows`, those of the two matrices are defined only
            for this rank's share of the latents. With `own_latents` they have the shapes of its weights.
        squares: (2,) sums of squares of the gradients of W_dec and W_enc, if the backend computes them; else None.
        fired: (d_sae,) number of tokens on which each latent fired.
        min_positive: Smallest kept activation, 0-d; inf if no latent fired.
        tokens: Number of rows of the whole batch.
        n_dead: Number of dead latents in the auxiliary loss.
        backend: Name of the backend that ran.
    """

    loss: torch.Tensor
    level_losses: torch.Tensor
    aux_loss: torch.Tensor
    sae_out: torch.Tensor
    acts: SparseActs
    gradients: Gradients
    squares: torch.Tensor | None = None
    fired: torch.Tensor
    min_positive: torch.Tensor
    tokens: int
    n_dead: int = 0
    backend: str
