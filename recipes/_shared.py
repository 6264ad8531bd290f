"""Code shared by recipes: SAEs and tables that are continued only with the same settings.

    folder of an SAE, or table.csv   +   .json of the same name: the settings that it depends on

Other settings than those stored are an error that names the differences, so that results of different runs are not
mixed.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.io import atomic_write, csv_of
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaSAE, load_matryoshka, make_control
from sae_lens_maira.stats import bootstrap_mean
from sae_lens_maira.studies import Finding

OF_AN_SAE = ("train_studies", "d_sae", "k", "steps")
"""Settings that an SAE depends on, besides its arm, layer and seed."""


def require_settings(made: Path, settings: Mapping[str, Any], exists: bool) -> None:
    """Write the settings of a result next to it, or compare them with those of an existing result.

    Args:
        made: Path of the result, a folder or a file; its settings are in `<name>.json`.
        settings: Everything that the result depends on, JSON values.
        exists: Whether the result, or a part of it, exists.

    Raises:
        ConfigError: The result was made with other settings, or its settings are not known.
    """
    file = made.with_name(f"{made.name.removesuffix('.csv')}.json")
    ours = json.loads(json.dumps(settings))
    if not exists:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(ours, indent=1, sort_keys=True))
        return
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{made} exists, but its settings cannot be read ({error}). Delete it, or name another folder."
        ) from error
    differ = [
        f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} now"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differ:
        raise ConfigError(
            f"{made} was made with other settings: {'; '.join(differ)}. Pass those to continue it, or name another "
            "folder."
        )


def require_run(settings: Any, exists: bool, free: Collection[str] = ()) -> None:
    """Apply `require_settings` to a whole run: `settings.json` in the folder `settings.out`.

    Args:
        settings: Dataclass of the run.
        exists: Whether the folder has a part of a run.
        free: Fields that may change when a run continues, besides `out` and `progress`.

    Raises:
        ConfigError: The folder has a run of other settings, or one whose settings are not known.
    """
    given = {k: v for k, v in asdict(settings).items() if k not in {"out", "progress", *free}}
    require_settings(settings.out / "settings", json.loads(json.dumps(given, default=str)), exists)


def sae_settings(settings: Any, arm: str) -> dict[str, Any]:
    """Settings that the SAE of an arm depends on; the flaw only for a flawed phantom."""
    found = {name: getattr(settings, name) for name in OF_AN_SAE}
    return found | {"flaw": asdict(settings.flaw) if arm == "flawed" else None}


def sae_of(maira: Maira2, settings: Any, arm: str, layer: int, seed: int) -> MatryoshkaSAE:
    """Read the SAE of an arm from its folder, or train it and save it there.

    Args:
        maira: The phantom whose patches it is trained on.
        settings: With `saes`, the folder of SAEs, and what `OF_AN_SAE` names; with `flaw` for the arm "flawed".
        arm: "trained", "flawed", "untrained", or the kind of a frozen control.
        layer: Decoder block whose output it reads.
        seed: Seed of its studies and its weights.

    Raises:
        ConfigError: The folder has an SAE of other settings.
    """
    from sae_lens_maira.activations import RowSettings, read_rows
    from sae_lens_maira.quickstart.sae import TrainingPlan, train_sae

    def rows(n: int) -> Any:
        studies = generate_studies(n, 91_000 + 7_000 * seed)
        hook = f"blocks.{layer}.hook_resid_post"
        return read_rows(maira, studies, hook, RowSettings(roles="image_only", batch_size=16))

    if arm == "untrained":
        trained = sae_of(maira, settings, "trained", layer, seed)
        return make_control("untrained", trained, rows(100).values, seed=seed)
    folder = settings.saes / f"{arm}_{layer}_{seed}"
    exists = (folder / "cfg.json").is_file()
    require_settings(folder, sae_settings(settings, arm), exists)
    if exists:
        return load_matryoshka(folder)
    control: Any = arm if arm.startswith("frozen") else None
    plan = TrainingPlan(folder, settings.d_sae, settings.k, settings.steps, seed, control=control)
    return train_sae(rows(settings.train_studies), plan).inference


def continue_rows(
    file: Path,
    settings: Mapping[str, Any],
    n: int,
    made: Callable[[int], Iterator[dict[str, Any]]],
    label: str,
    saved_every: int,
) -> None:
    """Extend a CSV to n rows; a killed run continues after the last saved row.

    Args:
        file: CSV file.
        settings: Everything that a row depends on.
        n: Number of rows; there are fewer if `made` ends before.
        made: Function that yields the rows from a given number on.
        label: Text of the progress bar.
        saved_every: Number of rows after which the file is written.

    Raises:
        ConfigError: The file has rows of other settings.
    """
    require_settings(file, settings, file.exists())
    rows: list[dict[str, Any]] = pd.read_csv(file).to_dict("records") if file.exists() else []  # pyright: ignore[reportAssignmentType]
    if len(rows) >= n:
        return
    for row in tqdm(made(len(rows)), total=n - len(rows), desc=label):
        rows.append(row)
        if len(rows) % saved_every == 0:
            atomic_write(file, csv_of(pd.DataFrame(rows)))
    atomic_write(file, csv_of(pd.DataFrame(rows)))


def mean_line(label: str, values: np.ndarray) -> str:
    """Format a line of a Markdown table: label, mean, 95 % bootstrap interval and n."""
    found = bootstrap_mean(values)
    return f"| {label} | {values.mean():.3f} | {found.low:.3f} to {found.high:.3f} | {len(values)} |"


def box_patches(finding: Finding, shape: tuple[int, int], margin: float = 0.5) -> np.ndarray:
    """(rows, columns) mask of patches whose centre is at most `margin` patches outside the finding's box; with 0.5 they
    touch it.
    """
    x0, y0, x1, y1 = finding.box or (0, 0, 0, 0)

    def inside(n: int, low: float, high: float) -> np.ndarray:
        centre = (np.arange(n) + 0.5) / n
        return (centre >= low - margin / n) & (centre <= high + margin / n)

    return inside(shape[0], y0, y1)[:, None] & inside(shape[1], x0, x1)[None]
