"""Files that reproduce a run outside the workbench: `run.py`, `intervention.json` and `session.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens_maira.studies import Study
from sae_lens_maira.workbench.spec import RunSpec

FORMAT = "workbench-1"


@dataclass(frozen=True)
class Opening:
    """Python expressions that open what a workbench works on.

    Attributes:
        model, sae: Calls of `sae_lens_maira.load` and `load_sae`.
        studies: A sequence of studies; None where the workbench was given studies of unknown origin.
    """

    model: str
    sae: str
    studies: str | None = None

    @classmethod
    def of(cls, hooked: Any, sae: Any) -> "Opening":
        """The opening of a model and an SAE that `sae_lens_maira.load` and `load_sae` returned."""
        device = quoted(str(hooked.W_E.device))
        source = getattr(sae, "source", None)
        opened = "sm.load_sae(SAE)" if source is None else f"sm.load_sae({quoted(source)}, device={device})"
        return cls(f"sm.load({quoted(hooked.cfg.model_name)}, device={device})", opened)


def quoted(value: Any) -> str:
    """A Python string literal."""
    return repr(str(value))


def python_code(spec: RunSpec, opening: Opening, study: Study, uploaded: bool, steered: bool) -> str:
    """A script that prints the report of a run.

    Args:
        spec: The run.
        opening: How model, SAE and studies are opened.
        study: The study as it was chosen.
        uploaded: Whether it was dropped on the page, so that its file is unknown.
        steered: Whether an `intervention.json` belongs to the run; it is read from the script's folder.
    """
    missing = []
    if uploaded:
        missing.append("FILE, your image")
        text = "" if study.indication is None else ", indication=INDICATION"
        source = f'sm.Study(study_id="1", patient_id="1", frontal=FILE{text})'
        missing += [] if study.indication is None else ["INDICATION, the text that you gave"]
    else:
        missing += [] if opening.studies else ["STUDIES, the studies that you gave to the workbench"]
        source = f"next(s for s in {opening.studies or 'STUDIES'} if s.study_id == {quoted(spec.study)})"
    if "(SAE)" in opening.sae:
        missing.append("SAE, the folder of your SAE")
    lines = [f"# Fill in: {name}." for name in missing]
    lines += ["from pathlib import Path", ""] if steered else []
    lines.append("import sae_lens_maira as sm")
    if spec.without:
        lines.append("from sae_lens_maira.attribution.counterfactual import counterfactual")
    if steered:
        lines.append("from sae_lens_maira.steering import load_interventions")
    lines += ["", f"m = {opening.model}", f"study = {source}"]
    if spec.without:
        lines.append(f"study = counterfactual(study, {', '.join(f'{part}=None' for part in spec.without)})")
    budget = "" if spec.max_new_tokens is None else f", max_new_tokens={spec.max_new_tokens}"
    if not steered:
        return "\n".join([*lines, f'print(m.generate(study, return_type="reports"{budget})[0].text)']) + "\n"
    control = "" if spec.control_seed is None else f", control_seed={spec.control_seed}"
    lines += [
        f"sae = {opening.sae}",
        'saved = load_interventions(Path(__file__).with_name("intervention.json"), sae)',
        "p99 = saved.units(sae.cfg.d_sae)",
        f"print(m.steer(study, sae, saved.interventions, p99=p99{budget}{control}).after)",
    ]
    return "\n".join(lines) + "\n"


def session_text(spec: RunSpec, history: Sequence[Mapping[str, Any]], allowed: Any) -> tuple[str, int]:
    """The session as JSON, and the number of runs whose texts were left out.

    Args:
        spec: The run on the page.
        history: Runs with "spec" and, where known, the texts "before" and "after".
        allowed: Function from a study's id to whether its texts may be exported.
    """
    kept, left_out = [], 0
    for entry in history:
        run = RunSpec.of(entry.get("spec"))
        texts = {side: str(entry[side]) for side in ("before", "after") if entry.get(side)}
        shown = allowed(run.study)
        left_out += bool(texts) and not shown
        kept.append({"spec": run.plain()} | (texts if shown else {}))
    return json.dumps({"format": FORMAT, "spec": spec.plain(), "history": kept}, indent=1), left_out


__all__ = ["FORMAT", "Opening", "python_code", "quoted", "session_text"]
