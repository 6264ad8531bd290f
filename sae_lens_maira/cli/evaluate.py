"""The commands `evaluate`, `match`, `locate`: quality of an SAE, latents shared by two SAEs, hook point of an SAE."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_maira.cli.options import StudyOptions
from sae_lens_maira.cli.parser import works_in
from sae_lens_maira.interface import load_sae, load_sae_weights

if TYPE_CHECKING:
    from sae_lens_maira.activations import RowReader
    from sae_lens_maira.sae.locate import LocateBatch
    from sae_lens_maira.sae.match import LatentMatch


def evaluate(
    sae: str,
    options: StudyOptions,
    studies: int = 100,
    hook: str | None = None,
    batch_size: int = 8,
    workers: int = 1,
    as_json: bool = False,
) -> None:
    """Evaluate an SAE: explained variance, L0, dead latents and loss recovered, per level and role.

    Example: sae-lens-maira evaluate --sae quickstart_out/sae_text --studies 100

    Args:
        sae: Folder of the SAE, or a release.
        options: The model that the SAE was trained on, and the studies.
        studies: Number of phantom studies, or of studies from the start of the table.
        hook: Hook point, if the SAE does not name its own.
        batch_size: Studies per forward pass while rows are read; 1 or 2 at MAIRA-2's size on a small GPU.
        workers: Number of threads that read and preprocess images in advance.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.evaluation import evaluate as run

    dictionary = load_sae(sae, hook_name=hook, device=options.device)
    maira = options.load_model()
    chosen = options.first_studies(studies, maira.processor)
    tables = run(maira, dictionary, chosen, batch_size=batch_size, workers=workers)
    if as_json:
        rows, splice = (frame.to_dict("records") for frame in (tables.rows, tables.splice))
        sys.stdout.write(json.dumps({"rows": rows, "splice": splice}) + "\n")
        return
    for name, frame in (("reconstruction", tables.rows), ("spliced into the model", tables.splice)):
        sys.stdout.write(f"{name} at {tables.hook_name}, {tables.n_studies} studies\n")
        sys.stdout.write(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}") + "\n")


@dataclass(frozen=True, kw_only=True)
class ReadOptions(StudyOptions):
    """Options of the rows to read.

    Attributes:
        studies: Number of phantom studies, or of studies from the start of the table.
        roles: Tokens to read: content, image_only, text_only, paper, all, or a list of roles.
        image_rate: Share of image patches to read.
        batch_size: Studies per forward pass.
        seed: Random seed of the sample of patches and of the references.
    """

    studies: int = 100
    roles: str | list[str] = "content"
    image_rate: float = 0.25
    batch_size: int = 8
    seed: int = 0

    def reader(self, hook_names: list[str] | None) -> "tuple[RowReader, int]":
        """Make a reader of the rows, and return the number of studies; None for the output of every block."""
        from sae_lens_maira.activations import RowReader, RowSettings
        from sae_lens_maira.errors import StudyError

        if not 0 < self.image_rate <= 1 or self.studies < 2:
            raise StudyError(
                f"--studies was {self.studies} and --image-rate {self.image_rate:g}; give two or more studies and a "
                "share above 0 and at most 1."
            )
        maira = self.load_model(hook_names)
        if hook_names is None:
            n = maira.model.config.get_text_config().num_hidden_layers
            hook_names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(n))]
        chosen = self.first_studies(self.studies, maira.processor)
        settings = RowSettings(
            roles=self.roles, batch_size=self.batch_size, seed=self.seed, rates=self._rates()
        )
        return RowReader(maira, chosen, hook_names, settings), len(chosen)

    def _rates(self) -> "dict[Any, float] | None":
        """Share of image patches by role, if image patches are read."""
        from sae_lens_maira.activations import RowSettings
        from sae_lens_maira.maira2 import TokenRole

        read = TokenRole.IMAGE in RowSettings(roles=self.roles).kept
        return {"image": self.image_rate} if read and self.roles != "paper_last_image" else None


@works_in("out")
def match(
    sae: str,
    other: str,
    options: ReadOptions,
    hook: str | None = None,
    other_hook: str | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Find the latents of one SAE in another, for example of another seed, level, release, layer or modality.

    Both SAEs read the same positions, each at its own hook point. Latents are paired one to one by the correlation of
    their activations and the cosine of their decoder rows. The controls are the same pairing with a shuffled and with
    an untrained SAE: a pair counts as found if it scores above 99 % of the pairs of both.

    Example: sae-lens-maira match --sae phantom-image --other phantom-text --studies 20

    Args:
        sae: Folder of the SAE whose latents are searched for, or a release.
        other: Folder of the SAE that is searched, or a release.
        options: The model, its studies and the rows to read.
        hook: Hook point of --sae, if the SAE does not name its own.
        other_hook: Hook point of --other, if the SAE does not name its own.
        out: Folder for pairs.csv, summary.json and scores.png; created if missing.
        as_json: Print the summary as JSON instead of a table.
    """
    import torch

    from sae_lens_maira.sae.match import match_latents

    first: Any = load_sae(sae, hook_name=hook, device=options.device)
    second: Any = load_sae(other, hook_name=other_hook, device=options.device)
    names = [str(one.cfg.metadata.hook_name) for one in (first, second)]
    reader, n = options.reader(list(dict.fromkeys(names)))
    parts = list(reader.batches(range(n)))
    rows = {name: torch.cat([part.values[name] for part in parts]) for name in dict.fromkeys(names)}
    found = match_latents(first, second, rows[names[0]], rows[names[1]], seed=options.seed)
    if out is not None:
        _write_match(found, out)
    if as_json:
        sys.stdout.write(json.dumps(found.to_json()) + "\n")
        return
    sys.stdout.write(f"{sae} at {names[0]} in {other} at {names[1]}\n{found}\n")


def locate(
    sae: str,
    options: ReadOptions,
    hooks: list[str] | str | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Find the hook point at which an SAE was trained, by explained variance over all layers.

    The metadata of the SAE are not used. The margin to the second best hook point has an interval over studies; if it
    includes 0, the result is undecided. Use this to find out how a layer number was counted, such as "layer 15" as
    blocks.15 or as hidden_states[15].

    Example: sae-lens-maira locate --sae phantom-text --studies 20

    Args:
        sae: Folder of the SAE, or a release.
        options: The model, its studies and the rows to read.
        hooks: Hook points to compare; the input of the first block and the output of every block if not given.
        out: CSV file for the table.
        as_json: Print JSON instead of a table.
    """
    from sae_lens_maira.io import atomic_write, csv_of
    from sae_lens_maira.sae.locate import locate_sae

    dictionary: Any = load_sae_weights(sae, options.device)
    reader, n = options.reader([hooks] if isinstance(hooks, str) else hooks)
    found = locate_sae(dictionary, _located(reader, n), seed=options.seed)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, csv_of(found.table))
    sys.stdout.write((json.dumps(found.to_json()) if as_json else str(found)) + "\n")


def _located(reader: "RowReader", n: int) -> "Iterator[LocateBatch]":
    import numpy as np

    from sae_lens_maira.maira2 import TokenRole

    for batch in reader.batches(range(n)):
        image = batch.index["role"].to_numpy() == TokenRole.IMAGE
        yield batch.values, batch.index["study"].to_numpy(), np.where(image, "image", "text")


def _write_match(found: "LatentMatch", folder: Path) -> None:
    """Write the pairs, the summary and a histogram of the scores."""
    from matplotlib.figure import Figure

    from sae_lens_maira.io import atomic_write, csv_of, save_figure, write_json

    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "pairs.csv", csv_of(found.pairs))
    write_json(folder / "summary.json", found.to_json())
    figure = Figure(figsize=(6, 3))
    axis = figure.subplots()
    scores = {"matched": found.pairs["score"].dropna(), **found.references}
    colours = ["#0072B2", "#999999", "#D55E00"]
    axis.hist([*scores.values()], bins=30, label=[*scores], color=colours, histtype="step")
    axis.axvline(found.summary.threshold, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("score of a pair: mean of activation correlation and decoder cosine")
    axis.set_ylabel("pairs")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, folder / "scores.png", dpi=110)
