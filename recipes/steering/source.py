"""Model, studies and report reader of a steering recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.interface import chosen_studies, finding_reader, load_sae, named_model
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.steering.cohort import Cohort


@dataclass(frozen=True)
class Source:
    """Settings of model, studies and SAE.

    Attributes:
        model: "phantom", a folder or a hub id.
        sae: SAE of image positions, a folder or a release; None trains one, on the phantom only.
        table: Parquet or CSV with one study per row; None for phantom studies.
        root: Folder that the table's image paths are relative to; None for the table's folder.
        split: Split of the table to read; None for all.
        reader: Reader of findings in reports: auto, phantom or rules.
        max_new_tokens: Maximum length of a report.
        device: Device of the model: auto, cpu, cuda, ...
    """

    model: str = "phantom"
    sae: str | None = None
    table: Path | None = None
    root: Path | None = None
    split: str | None = None
    reader: Literal["auto", "phantom", "rules"] = "auto"
    max_new_tokens: int = 76
    device: str = "auto"

    def cohort(self, studies: int, layer: int, seed: int, pool: tuple[int, int]) -> Cohort:
        """Load the model and the studies; phantom studies are not those that the phantom was trained on.

        Args:
            studies: Number of studies to read.
            layer: Decoder layer whose output is steered, if no SAE names its hook point.
            seed: Random seed of halves and phantom studies.
            pool: Numbers of studies of the selection and of the reporting half that may be steered.
        """
        if self.sae is None and self.model != "phantom":
            raise ConfigError(
                f"The recipe trains SAEs on the phantom only, and the model is {self.model}; give --sae with an SAE of "
                "that model."
            )
        maira = named_model(self.model, device=self.device)
        side = maira.processor.recipe.crop
        chosen = chosen_studies(studies, 20_000 + seed, side, self.table, self.root, self.split)
        hook_name = f"blocks.{layer}.hook_resid_post"
        if self.sae is not None:
            hook_name = str(self.image_sae().cfg.metadata.hook_name)
        reader = finding_reader(chosen, self.reader)
        return Cohort(maira, chosen, hook_name, reader, seed, pool, max_new_tokens=self.max_new_tokens)

    def image_sae(self) -> MatryoshkaSAE:
        """Load the given SAE of image positions."""
        if self.sae is None:
            raise ConfigError("No SAE was given; pass --sae.")
        return load_sae(self.sae, device=self.device)
