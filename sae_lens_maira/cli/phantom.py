"""The commands `quickstart` and `measure-phantom`: commands that need no data."""

import json
import sys
from pathlib import Path

from sae_lens_maira.cli.parser import works_in


@works_in("out")
def quickstart(
    out: Path = Path("quickstart_out"),
    studies: int = 1200,
    layer: int = 3,
    text_layer: int = 6,
    finding: str = "cardiomegaly",
    seed: int = 0,
    model: str = "phantom",
    as_json: bool = False,
) -> None:
    """Train Matryoshka SAEs on the phantom and show what they found, in about five minutes.

    Example: sae-lens-maira quickstart --out quickstart_out

    Args:
        out: folder of the report; made if missing.
        studies: phantom studies to read.
        layer: decoder layer whose output is read at image patches, and steered, 0 to 7.
        text_layer: decoder layer whose output is read at report tokens, 0 to 7.
        finding: finding to steer into reports that do not have it.
        seed: Random seed of the phantom studies and of all sampling.
        model: only "phantom": the quickstart needs findings that are known.
        as_json: print the main figures as JSON instead of the report's path.
    """
    from sae_lens_maira.errors import ConfigError
    from sae_lens_maira.quickstart import QuickstartConfig, run_quickstart
    from sae_lens_maira.quickstart.report import summary

    if model != "phantom":
        raise ConfigError(
            f"The quickstart was asked to run on {model!r}, and it runs on the phantom only, whose findings are known. "
            "For another model use harvest, train, latents, interpret and steer with --model and --table; see the "
            "tutorial."
        )
    config = QuickstartConfig(
        out=out, studies=studies, layer=layer, text_layer=text_layer, finding=finding, seed=seed
    )
    result = run_quickstart(config)
    sys.stdout.write((json.dumps(summary(result)) if as_json else str(result.folder / "report.md")) + "\n")


def measure_phantom(
    studies: int = 500,
    study_seed: int = 10_000,
    model: str = "phantom",
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Measure what the phantom can do: findings, change words and boxes on held-out studies.

    Example: sae-lens-maira measure-phantom --studies 500

    Args:
        studies: held-out studies.
        study_seed: Random seed of the studies; the phantom itself was trained on 0.
        model: "phantom" for the shipped one, or the folder of another phantom.
        device: auto, cpu, cuda, ...
        as_json: print JSON instead of text.
    """
    from dataclasses import asdict

    from sae_lens_maira.interface import named_model
    from sae_lens_maira.phantom import generate_studies
    from sae_lens_maira.phantom.measure import measure

    score = measure(
        named_model(model, device=device, dtype="float32"), generate_studies(studies, seed=study_seed)
    )
    if as_json:
        sys.stdout.write(json.dumps(asdict(score) | {"mean_accuracy": score.mean_accuracy}) + "\n")
        return
    sys.stdout.write(
        score.to_frame().to_string(float_format=lambda x: f"{x:.3f}") + "\n"
        f"mean accuracy {score.mean_accuracy:.3f} (n = {score.n}, greedy)\n"
        f"change words {score.change_accuracy:.3f} (n = {score.n_changes})\n"
        f"grounded boxes, mean IoU {score.box_iou:.3f} (n = {score.n_boxes})\n"
        f"reports that ended by themselves {score.complete:.3f}\n"
    )
