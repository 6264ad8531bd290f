"""`sae-lens-maira steer`: steer one finding of the phantom by several methods, beside controls.

Latents are chosen and strengths tuned on the patients of one half, and effects are counted on those of the other. It
composes rooms and computes nothing of its own.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path


def steer(
    sae: Path,
    finding: str = "cardiomegaly",
    out: Path = Path("steer_out"),
    studies: int = 600,
    steered: int = 32,
    latents: int = 8,
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0),
    remove: bool = False,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Steer a finding into phantom reports (or out of them) by latents, and show what else it changes.

    Example: sae-lens-maira steer --sae quickstart_out/sae_image --finding cardiomegaly --out steer_out

    Args:
        sae: folder of an SAE of the phantom, trained with image positions.
        finding: what to put into reports, or to take out of them.
        out: folder of the page (index.html), the Parquet tables and the figure; made if missing.
        studies: phantom studies from which latents are chosen.
        steered: studies of each half that are steered.
        latents: latents a method uses.
        strengths: the sweep.
        remove: take the finding out of reports that have it.
        seed: of studies, halves and controls.
        as_json: print the summary as JSON instead of a table.
    """
    import numpy as np

    from sae_lens_maira.commands.steering_methods import phantom_methods
    from sae_lens_maira.errors import InterventionError
    from sae_lens_maira.latents import split_by_patient
    from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, load_phantom, read_report, truth_labels
    from sae_lens_maira.sae import load_matryoshka
    from sae_lens_maira.steering.evaluate import evaluate_steering
    from sae_lens_maira.steering.page import write_page

    if finding not in FINDING_KEYS:
        raise InterventionError(
            f"There is no finding {finding!r}; the phantom has {', '.join(FINDING_KEYS)}."
        )
    maira, dictionary = load_phantom(), load_matryoshka(sae)
    drawn = generate_studies(studies, seed=40_000 + seed)
    halves = split_by_patient([study.patient_id for study in drawn], seed)
    present = np.array([truth_labels(study)[FINDING_KEYS.index(finding)] for study in drawn])
    made = phantom_methods(maira, dictionary, drawn, halves.choose, present, finding, latents, remove, seed)
    # Without a prior film: with one, "unchanged" could be right as well.
    wanted = (present == remove) & np.array([study.prior_frontal is None for study in drawn])
    choose, report = (
        [drawn[int(i)] for i in np.flatnonzero(half & wanted)[:steered]]
        for half in (halves.choose, halves.report)
    )
    tables = evaluate_steering(
        maira,
        dictionary,
        made.hook_name,
        made.methods,
        choose,
        report,
        finding,
        lambda text: read_report(text).present,
        FINDING_KEYS,
        strengths=strengths,
        remove=remove,
        p99=made.p99,
        seed=seed,
    )
    tables.save(out)
    write_page(out, finding, report)
    shown = tables.summary.loc[
        :, ["method", "strength", "n", "on_target", "off_target", "kl", "repetition", "length", "ratio"]
    ]
    if as_json:
        sys.stdout.write(json.dumps(tables.summary.to_dict("records")) + "\n")
    else:
        sys.stdout.write(shown.to_string(index=False, float_format=lambda x: f"{x:.3f}") + f"\n{out}\n")


COMMANDS: dict[str, Callable[..., None]] = {"steer": steer}
