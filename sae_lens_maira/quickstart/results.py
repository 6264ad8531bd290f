"""Settings of a quickstart run, and what it found: plain records that the report is written from."""

from dataclasses import dataclass
from pathlib import Path

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.latents import Agreement, Difference
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.quickstart.sae import TrainedSAE
from sae_lens_maira.quickstart.steer import SteeringResult
from sae_lens_maira.sae.config import Frozen


@dataclass(frozen=True)
class QuickstartConfig:
    """Settings of a quickstart run.

    Attributes:
        out: Folder of the report; created if missing.
        studies: Phantom studies to read, none of which the phantom was trained on.
        layer: Decoder layer whose output is read at image patches, and steered, 0 to 7.
        text_layer: Decoder layer whose output is read at report tokens, 0 to 7.
        d_sae: Latents of either SAE.
        k: Mean active latents per patch.
        text_k: Mean active latents per report token; few, so that one latent must hold finding and side.
        text_seeds: Text SAEs to train from different initial weights; the one that agrees best on the selection half
            of the studies is taken, and the untrained SAE is drawn as often.
        steps: Training steps of 1,024 patches.
        text_steps: Training steps of 1,024 report tokens.
        finding: The finding to steer into reports that do not have it.
        steer_studies: Negative studies to steer, from either half.
        frozen: Controls to train next to the SAEs, as often and taken by the same rule: "frozen_decoder" and
            "frozen_encoder" (arXiv 2602.14111).
        seed: Random seed of everything sampled here.
        progress: Show progress bars.
    """

    out: Path = Path("quickstart_out")
    studies: int = 1200
    layer: int = 3
    text_layer: int = 6
    d_sae: int = 1024
    k: int = 8
    text_k: float = 2.5
    text_seeds: int = 3
    steps: int = 1500
    text_steps: int = 1500
    finding: str = "cardiomegaly"
    steer_studies: int = 60
    frozen: tuple[Frozen, ...] = ("frozen_decoder", "frozen_encoder")
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.finding not in FINDING_KEYS:
            raise ConfigError(
                f"Unknown finding {self.finding!r}; the phantom's are {', '.join(FINDING_KEYS)}."
            )
        for name in ("layer", "text_layer"):
            if not 0 <= getattr(self, name) <= 7:
                raise ConfigError(f"{name} is {getattr(self, name)}; the phantom has decoder layers 0 to 7.")
        least = {"studies": 40, "d_sae": 64, "steer_studies": 4} | dict.fromkeys(
            ("k", "text_k", "text_seeds", "steps", "text_steps"), 1
        )
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {lowest}.")


@dataclass(frozen=True)
class Draw:
    """One of the trained SAEs, of which one is chosen.

    Attributes:
        seed: Random seed of its initial weights.
        choose_f1: Mean F1 of its best units on the half they were chosen on; the highest is taken.
        f1: Of the same units on the other half.
        untrained_choose_f1, untrained_f1: The same of the untrained control SAE, chosen by the same rule.
        explained_variance: On the other half's rows.
    """

    seed: int
    choose_f1: float
    f1: float
    untrained_choose_f1: float
    untrained_f1: float
    explained_variance: float


@dataclass(frozen=True)
class PlaceResult:
    """Agreement with the findings in one modality ("text" or "image").

    Attributes:
        place: "text" or "image".
        sae: The SAE trained on positions of this kind, taken from `draws`.
        trained, untrained, raw, supervised: Best units of each dictionary.
        frozen: Best units of each frozen control, by kind.
        gains: Trained minus each control, by the control's kind: mean over the findings, paired over studies.
        l0: Active latents per row of the trained SAE here.
        explained_variance: Explained variance of the trained SAE on the held-out half's rows here.
        n_rows: Rows of this kind.
        draws: Every SAE that was trained.
    """

    place: str
    sae: TrainedSAE
    trained: Agreement
    untrained: Agreement
    raw: Agreement
    supervised: Agreement
    frozen: dict[str, Agreement]
    gains: dict[str, Difference]
    l0: float
    explained_variance: float
    n_rows: int
    draws: tuple[Draw, ...]

    @property
    def gain(self) -> Difference:
        """Trained minus untrained."""
        return self.gains["untrained"]


@dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart found, and the folder where it is written."""

    config: QuickstartConfig
    text: PlaceResult
    image: PlaceResult
    steering: SteeringResult
    folder: Path
