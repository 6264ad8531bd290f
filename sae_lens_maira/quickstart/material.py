"""What a notebook works on, by one call: a model, an SAE of it, studies in two halves, and a reader of reports.

    bench = open_material("phantom")
    bench = open_material("microsoft/maira-2", sae="microsoft/maira-2-sae", studies="studies.parquet")

For the phantom an SAE of image patches is trained once and kept in a folder; the truth is the generator's. For another
model the SAE is a release or a folder, studies come from a table, and labels of their reports by rule stand for the
truth. It computes nothing about latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows, RowSettings, read_rows
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.interface import named_model
from sae_lens_maira.latents import Halves, split_by_patient
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, read_report, truth_labels
from sae_lens_maira.quickstart.sae import train_sae
from sae_lens_maira.sae import MatryoshkaSAE, load_matryoshka, resolve_sae
from sae_lens_maira.studies import RuleStatus, Study, read_table, rule_labels
from sae_lens_maira.studies.phrases import OBSERVATIONS

LAYER = 3
SEED = 80_000
IMAGE_ROWS = RowSettings(roles="image_only", batch_size=16)
EXTRA = 200


@dataclass(frozen=True, eq=False)
class Material:
    """What a notebook works on.

    Attributes:
        name: the model's.
        maira: model and processor.
        sae: an SAE that names its hook point.
        hook_name: that hook point.
        studies: without a prior film, since with one "unchanged" could be right as well.
        labels: names of the findings that reports are read for.
        truth: (n, F) bool.
        halves: choose on one, report on the other; no patient is in both.
        read: text -> the findings it states.
    """

    name: str
    maira: Maira2
    sae: MatryoshkaSAE
    hook_name: str
    studies: list[Study]
    labels: tuple[str, ...]
    truth: np.ndarray
    halves: Halves
    read: Callable[[str], frozenset[str]]

    def encode(self, values: torch.Tensor, /) -> torch.Tensor:
        """Latent activations (n, d_sae) float32 of rows (n, d_model), without gradients."""
        with torch.no_grad():
            return self.sae.encode(values.to(self.sae.W_dec)).float().cpu()

    @property
    def decoder(self) -> torch.Tensor:
        """(d_sae, d_model) decoder rows."""
        return self.sae.W_dec.detach().float().cpu()

    def has(self, finding: str) -> np.ndarray:
        """(n,) which studies have a finding.

        Raises:
            ConfigError: there is no such finding.
        """
        if finding not in self.labels:
            raise ConfigError(
                f"There is no finding {finding!r}; reports are read for {', '.join(self.labels)}."
            )
        return self.truth[:, self.labels.index(finding)]

    def pick(self, mask: np.ndarray, n: int) -> list[Study]:
        """The first `n` studies of a mask."""
        return [self.studies[int(i)] for i in np.flatnonzero(mask)[:n]]

    def image_rows(self) -> ActivationRows:
        """The hook point's activations at all image patches of all studies."""
        return read_rows(self.maira, self.studies, self.hook_name, IMAGE_ROWS, progress=False)


def open_material(
    model: str = "phantom",
    sae: str | Path | None = None,
    studies: str | Path | None = None,
    n: int = 240,
    folder: Path = Path("runs/notebooks"),
    seed: int = 0,
) -> Material:
    """Open what a notebook works on.

    Args:
        model: "phantom", a folder or a hub id.
        sae: a folder that SAELens wrote, or a release's name; for the phantom one is trained if it is not given.
        studies: table of studies (Parquet or CSV); the phantom draws its own if it is not given.
        n: studies to read at most, those with a prior film included.
        folder: where the phantom's SAE is kept.
        seed: of the halves, the phantom's studies and its SAE.

    Raises:
        ConfigError: another model than the phantom without an SAE or without studies, or an SAE without a hook point.
    """
    maira = named_model(model)
    if studies is None:
        if model != "phantom":
            raise ConfigError(
                f"No studies were given for {model}; give a table, as `studies import` writes it."
            )
        found: Sequence[Study] = generate_studies(n, SEED + seed)
    else:
        found = read_table(studies).studies[:n]
    kept = [study for study in found if study.prior_frontal is None and study.report]
    drawn = studies is None
    labels = FINDING_KEYS if drawn else OBSERVATIONS
    truth = np.stack(
        [truth_labels(s) if drawn else np.isin(labels, list(_by_rule(s.report or ""))) for s in kept]
    )
    halves = split_by_patient([study.patient_id for study in kept], seed)
    dictionary = _sae(
        model, maira, sae, [s for s, mine in zip(kept, halves.choose, strict=True) if mine], folder, seed
    )
    hook_name = dictionary.cfg.metadata.hook_name
    if not hook_name:
        raise ConfigError(
            "The SAE's metadata name no hook point. Load it with load_release(..., hook_name=...) and save it."
        )
    read = (lambda text: read_report(text).present) if drawn else _by_rule
    return Material(model, maira, dictionary, hook_name, kept, labels, truth, halves, read)


def _sae(
    model: str, maira: Maira2, sae: str | Path | None, learn: Sequence[Study], folder: Path, seed: int
) -> MatryoshkaSAE:
    if sae is not None:
        return load_matryoshka(resolve_sae(sae))
    if model != "phantom":
        raise ConfigError(
            f"No SAE was given for {model}; give a folder that SAELens wrote, or a release's name."
        )
    kept = folder / f"phantom_sae_{seed}"
    if not (kept / "cfg.json").is_file():
        # More films than the halves hold: with few of them, and few steps, every latent fires in every film.
        more = generate_studies(EXTRA, SEED + 1000 + seed)
        hook_name = f"blocks.{LAYER}.hook_resid_post"
        rows = read_rows(maira, [*learn, *more], hook_name, IMAGE_ROWS, progress=False)
        train_sae(rows, d_sae=1024, k=8, steps=2000, seed=seed, folder=kept)
    return load_matryoshka(kept)


def _by_rule(text: str) -> frozenset[str]:
    return frozenset(name for name, label in rule_labels(text).items() if label.status is RuleStatus.PRESENT)
