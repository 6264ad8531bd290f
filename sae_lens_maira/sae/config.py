"""Configuration of a Matryoshka BatchTopK SAE under training.

Three conventions of the same idea are in use, and they give different SAEs from the same numbers:

    saelens               L = sum_i L_i + aux                     aux: raw residual, coefficient 1
    dictionary_learning   L = (1/G) sum_i w_i L_i + aux / 32      aux: variance-normalised; |W_dec[j]| = 1
    explicit              L = sum_i w_i L_i + aux                 aux as saelens

L_i is the squared error of the reconstruction from the first level_widths()[i] latents. What is left at None
takes the value of the convention.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.sae.levels import (
    CONTROL_KEY,
    METADATA_KEY,
    TEXT_CONTEXT,
    check_widths,
    remember_text_context,
    sizes_from_widths,
    widths_from_fractions,
)

ARCHITECTURE = "matryoshka"
"""Name of both classes, training and inference, in SAELens' registries."""

LossConvention = Literal["saelens", "dictionary_learning", "explicit"]
Frozen = Literal["frozen_decoder", "soft_frozen_decoder", "frozen_encoder"]


@dataclass
class MatryoshkaSAEConfig(JumpReLUSAEConfig):
    """Configuration of a trained Matryoshka SAE that is saved with its levels.

    Args:
        matryoshka_widths: Cumulative widths of the levels; empty means one level; a missing d_sae is added.
        k: Mean number of active latents it was trained with, None where unknown.
    """

    matryoshka_widths: list[int] = field(default_factory=list)
    k: float | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.matryoshka_widths = list(check_widths(self.matryoshka_widths or [self.d_sae], self.d_sae))

    def level_widths(self) -> tuple[int, ...]:
        """Cumulative widths, the last one d_sae."""
        return tuple(self.matryoshka_widths)

    def level_sizes(self) -> tuple[int, ...]:
        """Number of latents that each level adds."""
        return sizes_from_widths(self.matryoshka_widths)


@dataclass
class MatryoshkaTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Configuration for training a `MatryoshkaTrainingSAE`.

    Args:
        matryoshka_widths: Levels as cumulative widths, [1024, 4096, 16384]; a missing d_sae is added.
        group_fractions: Levels as shares of d_sae that sum to 1, [0.0625, 0.0625, 0.125, 0.25, 0.5].
            Exactly one of the two is to be given.
        loss_convention: "saelens", "dictionary_learning" or "explicit"; see the module's table.
        level_weights: One weight per level. Required with "explicit", where they are used as given;
            optional with "dictionary_learning" (its group_weights, default 1/G each); must be empty with
            "saelens".
        use_matryoshka_aux_loss: Dead latents reconstruct the error of their own level. Not with
            "dictionary_learning".
        aux_loss_coefficient: None means 1 ("saelens", "explicit") or 1/32 ("dictionary_learning").
        rescale_acts_by_decoder_norm: None means True, or False with "dictionary_learning", whose decoder
            rows have norm 1.
        topk_threshold_lr: Rate of the threshold's moving average. None means 0.01, or 0.001 with
            "dictionary_learning".
        threshold_start_step: "dictionary_learning" only: the threshold is first set one step later.
        dead_after_tokens: "dictionary_learning" only: a latent silent for this many activation rows is dead.
        control: Trains a control SAE (arXiv 2602.14111) instead: "frozen_decoder" keeps the random W_dec,
            "frozen_encoder" the random W_enc and b_enc, "soft_frozen_decoder" keeps every row of W_dec within a cosine
            of 0.8 of its first direction.
        inference_architecture: "jumprelu" saves what plain SAELens loads; "matryoshka" is read by this
            package only.

    Raises:
        ConfigError: Two fields contradict each other; the message names both.
    """

    matryoshka_widths: list[int] = field(default_factory=list)
    group_fractions: list[float] = field(default_factory=list)
    loss_convention: LossConvention = "saelens"
    level_weights: list[float] = field(default_factory=list)
    use_matryoshka_aux_loss: bool = False
    # None means "as the convention has it" until __post_init__ puts a number there: readers see numbers.
    aux_loss_coefficient: float = None  # pyright: ignore[reportAssignmentType]
    rescale_acts_by_decoder_norm: bool = None  # pyright: ignore[reportAssignmentType]
    topk_threshold_lr: float = None  # pyright: ignore[reportAssignmentType]
    threshold_start_step: int = 1000
    dead_after_tokens: int = 10_000_000
    control: Frozen | None = None
    inference_architecture: Literal["jumprelu", "matryoshka"] = "jumprelu"

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        if self.loss_convention not in ("saelens", "dictionary_learning", "explicit"):
            raise ConfigError(
                f"loss_convention={self.loss_convention!r} is unknown. "
                "Choose saelens, dictionary_learning or explicit."
            )
        if self.control is not None and self.control not in get_args(Frozen):
            raise ConfigError(
                f"control={self.control!r} is unknown. Choose {', '.join(get_args(Frozen))}, or leave it out."
            )
        unit_decoder = self.loss_convention == "dictionary_learning"
        if self.aux_loss_coefficient is None:
            self.aux_loss_coefficient = 1 / 32 if unit_decoder else 1.0
        if self.rescale_acts_by_decoder_norm is None:
            self.rescale_acts_by_decoder_norm = not unit_decoder
        if self.topk_threshold_lr is None:
            self.topk_threshold_lr = 0.001 if unit_decoder else 0.01
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(
                f"k={self.k} active latents of d_sae={self.d_sae}: k must be above 0 and at most d_sae."
            )
        self._check_levels()
        self._check_normalisation()
        super().__post_init__()

    def level_widths(self) -> tuple[int, ...]:
        """Cumulative widths of the levels, the last one d_sae."""
        if self.group_fractions:
            return widths_from_fractions(self.group_fractions, self.d_sae)
        return check_widths(self.matryoshka_widths, self.d_sae)

    def level_sizes(self) -> tuple[int, ...]:
        """Number of latents that each level adds."""
        return sizes_from_widths(self.level_widths())

    def effective_level_weights(self) -> tuple[float, ...]:
        """Factor of each level's squared error in the loss, in the order of `level_widths()`."""
        n_levels = len(self.level_widths())
        if self.loss_convention == "saelens":
            return (1.0,) * n_levels
        if self.loss_convention == "explicit":
            return tuple(self.level_weights)
        group_weights = self.level_weights or [1.0 / n_levels] * n_levels
        return tuple(weight / n_levels for weight in group_weights)

    def _check_levels(self) -> None:
        if bool(self.matryoshka_widths) == bool(self.group_fractions):
            raise ConfigError(
                f"matryoshka_widths={self.matryoshka_widths} and group_fractions={self.group_fractions}: "
                "give exactly one of the two."
            )
        n_levels = len(self.level_widths())
        needs_weights = self.loss_convention == "explicit"
        if self.loss_convention == "saelens" and self.level_weights:
            raise ConfigError(
                'loss_convention="saelens" weighs every level with 1, yet level_weights='
                f'{self.level_weights} was given. Use loss_convention="explicit".'
            )
        if (needs_weights or self.level_weights) and len(self.level_weights) != n_levels:
            raise ConfigError(
                f"level_weights={self.level_weights} has {len(self.level_weights)} entries for {n_levels} "
                f"levels {self.level_widths()}. Give one weight per level, the full width included."
            )

    def _check_normalisation(self) -> None:
        if self.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            raise ConfigError(
                f"normalize_activations={self.normalize_activations!r} does not work with nested "
                "reconstructions: SAELens forgets its per-row state after the first of them. Use none, "
                "expected_average_only_in or covariance_whitening."
            )
        if self.loss_convention != "dictionary_learning":
            return
        wanted = {
            "normalize_activations": ("none", "expected_average_only_in"),
            "rescale_acts_by_decoder_norm": (False,),
            "apply_b_dec_to_input": (True,),
            "use_matryoshka_aux_loss": (False,),
        }
        for name, allowed in wanted.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f'loss_convention="dictionary_learning" and {name}={getattr(self, name)!r}: that '
                    f"library has only {' or '.join(map(repr, allowed))}. Leave {name} out, or use "
                    'loss_convention="explicit".'
                )

    def matryoshka_metadata(self) -> dict[str, Any]:
        """What a saved SAE should remember of its levels, as plain JSON values."""
        return {
            "level_widths": list(self.level_widths()),
            "k": self.k,
            "loss_convention": self.loss_convention,
            "level_weights": list(self.effective_level_weights()),
        }

    @override
    def add_training_info_to_metadata(self) -> None:
        super().add_training_info_to_metadata()
        remember_text_context(self.metadata)
        self.metadata[METADATA_KEY] = self.matryoshka_metadata()
        if self.control is not None:
            self.metadata[CONTROL_KEY] = {"kind": self.control}

    @override
    def _metadata_with_training_info(self) -> dict[str, Any]:
        control = {} if self.control is None else {CONTROL_KEY: {"kind": self.control}}
        facts = super()._metadata_with_training_info()
        context = {key: value for key, value in TEXT_CONTEXT.items() if facts.get(key) is None}
        return facts | context | {METADATA_KEY: self.matryoshka_metadata()} | control

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return MatryoshkaSAEConfig if self.inference_architecture == ARCHITECTURE else JumpReLUSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        result = super().get_inference_sae_cfg_dict()
        if self.inference_architecture == ARCHITECTURE:
            result["matryoshka_widths"] = list(self.level_widths())
        return result
