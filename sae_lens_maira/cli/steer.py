"""The command `steer`: insert a finding into reports or remove it, by several methods with controls.

Latents and strengths are chosen on one half of the patients; effects are measured on the other half.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_lens_maira.cli.options import StudyOptions
from sae_lens_maira.cli.parser import works_in

if TYPE_CHECKING:
    import pandas as pd

    from sae_lens_maira.maira2 import Maira2
    from sae_lens_maira.sae import MatryoshkaSAE
    from sae_lens_maira.steering.cohort import Cohort
    from sae_lens_maira.steering.evaluate import Method, SteeringTables
    from sae_lens_maira.studies import FindingReader, Study


@works_in("out")
def steer(
    sae: str,
    finding: str | None = None,
    out: Path = Path("steer_out"),
    options: StudyOptions = StudyOptions(study_seed=20_000),
    studies: int = 600,
    hook: str | None = None,
    records: Path | None = None,
    intervention: Path | None = None,
    controls: str | None = None,
    reader: Literal["auto", "phantom", "rules"] = "auto",
    views: Literal["frontal", "all"] = "frontal",
    steered: int = 32,
    n_latents: int = 16,
    strengths: tuple[float, ...] = (1.0, 2.0, 3.0),
    remove: bool = False,
    max_new_tokens: int = 76,
    seed: int = 0,
    allow_credentialed: bool = False,
    estimate: bool = False,
    as_json: bool = False,
) -> None:
    """Steer a finding into reports (or out of them) by latents, and measure what else changes.

    The best method that is not a control is saved as intervention.json. With --intervention you apply such a file to
    other studies.

    Example: sae-lens-maira steer --sae quickstart_out/sae_image --finding cardiomegaly --out steer_out

    Args:
        sae: SAE of image positions: a folder, a release, or phantom-image.
        finding: Finding to insert into reports, or to remove from them.
        out: Folder of the page (index.html), the Parquet tables, the figure, intervention.json and errors.csv (false
            findings, omissions, wrong sides, places and changes, before and after); created if missing.
        options: The model that the SAE was trained on, and the studies. Findings come from the table's truth, or from
            rule labels.
        studies: Number of phantom studies, or of studies from the start of the table.
        hook: Hook point, if the SAE does not name its own.
        records: Folder of latent records of the SAE, as the source of latents, p99 and maps; no activations are read.
        intervention: Saved interventions to apply instead of choosing latents.
        controls: Control SAEs whose latents are steered at equal norm, separated by commas: untrained,
            untrained_whitened, raw, or folders of frozen controls (train --control). By default untrained, and none
            with --records or --intervention; "" for none.
        reader: Reader of findings in reports: phantom, rules (rule labels), or auto for the one that fits the studies.
        views: Studies to steer: frontal for those with one image and no prior, all for all with a frontal image.
        steered: Number of studies of each half that are steered.
        n_latents: Number of latents per method.
        strengths: Strengths of the sweep of maps.
        remove: Remove the finding from reports that state it, instead of inserting it.
        max_new_tokens: Largest number of tokens of a report; use 300 for MAIRA-2.
        seed: Random seed of halves and controls.
        allow_credentialed: Show images and text of credentialed studies on the page.
        estimate: Print memory, disk and time for these options and stop; only the configuration and the table are read.
        as_json: Print the summary as JSON instead of a table.
    """
    from sae_lens_maira.errors import ConfigError, InterventionError
    from sae_lens_maira.interface import finding_reader, load_sae
    from sae_lens_maira.io import atomic_write, csv_of
    from sae_lens_maira.privacy import mark_folder, private_files, strictest
    from sae_lens_maira.steering import load_interventions, save_interventions
    from sae_lens_maira.steering.cohort import Cohort
    from sae_lens_maira.steering.evaluate import Method
    from sae_lens_maira.steering.page import PageOptions, write_page

    if records is not None and intervention is not None:
        raise ConfigError(
            "--records and --intervention were both given, but both define the latents to steer. "
            "Give one of them."
        )
    if controls and (records is not None or intervention is not None):
        raise ConfigError(
            f"--controls {controls} were given with --{'records' if records else 'intervention'}; controls "
            "choose latents from activations. Leave out one of the two."
        )
    wanted = () if records is not None or intervention is not None else ("untrained",)
    if controls is not None:
        wanted = tuple(name.strip() for name in controls.split(",") if name.strip())
    dictionary = load_sae(sae, hook_name=hook, records=records, device=options.device)
    if estimate:
        from sae_lens_maira.cli.estimate import of_steer, write_estimate

        cost = of_steer(options, dictionary, studies, steered, len(strengths), max_new_tokens, len(wanted))
        return write_estimate(cost, as_json)
    maira = options.load_model()
    hook_name = str(dictionary.cfg.metadata.hook_name)
    chosen = options.first_studies(studies, maira.processor)
    read = finding_reader(chosen, reader)
    if finding is None:
        raise ConfigError(f"No --finding was given; reports are read for {', '.join(read.names)}.")
    if finding not in read.names:
        raise InterventionError(
            f"There is no finding {finding!r}; reports are read for {', '.join(read.names)}. Name one of these."
        )
    pool = (8 * steered, 8 * steered)
    cohort = Cohort(maira, chosen, hook_name, read, seed, pool, views, max_new_tokens)
    units = getattr(dictionary, "p99", None)
    if intervention is not None:
        saved = load_interventions(intervention, dictionary)
        if saved.hook_name != hook_name:
            raise InterventionError(
                f"{intervention} acts at {saved.hook_name} and the SAE belongs to {hook_name}; give the SAE that it "
                "was saved for."
            )
        units, items, name = saved.units(dictionary.cfg.d_sae), saved.interventions, "saved intervention"
        control = f"random direction, norm of the {name}"
        methods = [
            Method(name, lambda _: items, strengths=(1.0,)),
            Method(control, lambda _: items, name, (1.0,), control_seed=seed),
        ]
    elif records is not None:
        methods = _recorded(records, dictionary, finding, n_latents, strengths, seed, remove)
    else:
        others = _control_saes(wanted, dictionary, hook_name, options.device)
        methods, units = _collected(
            maira, dictionary, others, cohort, finding, n_latents, strengths, seed, remove
        )
    tables, report = _evaluate(
        cohort, dictionary, methods, finding, steered, strengths, remove, units, max_new_tokens, seed
    )
    steered_studies = [cohort.study(number) for number in report]
    errors = _errors(tables, steered_studies, read, seed)
    out.mkdir(parents=True, exist_ok=True)
    with private_files(out):
        # The tables contain reports, so the folder is marked before they are written.
        mark_folder(
            out,
            strictest(getattr(study.licence, "value", study.licence) for study in steered_studies),
            "steer",
        )
    tables.save(out)
    with private_files(out):
        atomic_write(out / "errors.csv", csv_of(errors))
    if intervention is None:
        method = next(m for m in methods if m.name == tables.best)
        strength = float(tables.summary.set_index("method").loc[tables.best, "strength"])  # pyright: ignore[reportArgumentType]
        note = f"{'remove' if remove else 'insert'} {finding}: {method.name}, strength {strength:g}"
        save_interventions(
            out / "intervention.json", method.make(strength), dictionary, hook_name, units, note
        )
    about = (
        f"Model {Path(options.model).name}, {hook_name}; findings by {cohort.source}, reports read by {read.source}."
        + (f" {cohort.left_out} studies left out: their reports cannot be read." if cohort.left_out else "")
    )
    shown_page = PageOptions(credentialed=allow_credentialed, about=about)
    write_page(out, finding, steered_studies, shown_page)
    shown = ["method", "strength", "n", "on_target", "off_target", "kl", "perplexity", "repetition", "length"]
    if as_json:
        sys.stdout.write(f"{tables.summary.to_json(orient='records')}\n")
    else:
        text = tables.summary.loc[:, shown].to_string(index=False, float_format=lambda x: f"{x:.3f}")
        best = errors.set_index(["method", "measure"]).loc[(tables.best, "errors_per_report")]
        change = f"change {best['change']:+.2f}, {best['low']:+.2f} to {best['high']:+.2f}"
        sys.stdout.write(
            f"{text}\nErrors per report in other findings, against the {best['against']}: "
            f"{best['before']:.2f} unsteered, {best['after']:.2f} with {tables.best} ({change})\n{out}\n"
        )


def _errors(
    tables: "SteeringTables", studies: "list[Study]", reader: "FindingReader", seed: int
) -> "pd.DataFrame":
    """Count the errors of the reported half per method, and those of its unsteered reports."""
    from sae_lens_maira.steering.report_errors import error_changes

    reported = tables.studies.loc[tables.studies["half"] == "report"].sort_values("study")
    texts = {str(name): list(part["text"]) for name, part in reported.groupby("method", sort=False)}
    first = reported.loc[reported["method"] == reported["method"].iloc[0], "unsteered"]
    return error_changes(texts, list(first), studies, reader, tables.finding, seed)


def _recorded(
    folder: Path,
    dictionary: "MatryoshkaSAE",
    finding: str,
    n_latents: int,
    strengths: tuple[float, ...],
    seed: int,
    remove: bool,
) -> "list[Method]":
    """Make methods from latent records. Raises RecordError if they belong to another SAE."""
    from sae_lens_maira.latents import RecordSet
    from sae_lens_maira.steering.methods import recorded_methods

    opened = RecordSet.open(folder)
    opened.require_sae(dictionary)
    decoder = dictionary.W_dec.detach().float()
    return recorded_methods(opened, finding, decoder, n_latents, seed, remove, strengths)


def _collected(
    maira: "Maira2",
    dictionary: "MatryoshkaSAE",
    others: "dict[str, MatryoshkaSAE | None]",
    cohort: "Cohort",
    finding: str,
    n_latents: int,
    strengths: tuple[float, ...],
    seed: int,
    remove: bool,
) -> "tuple[list[Method], Any]":
    """Make methods, with control SAEs, from activations of the selection half; also return the p99 of all latents."""
    from itertools import chain

    import numpy as np

    from sae_lens_maira.sae import make_control
    from sae_lens_maira.steering.methods import MethodFactory
    from sae_lens_maira.steering.statistics import collect_of_several, encoder_of, image_rows

    learn = [
        int(i) for i in np.flatnonzero(cohort.halves.choose) if cohort.studies[int(i)].frontal is not None
    ]
    blocks = image_rows(maira, cohort.studies, learn, cohort.hook_name)
    first = next(blocks, None)
    blocks = blocks if first is None else chain([first], blocks)
    controls = {
        name: make_control(name, dictionary, first.values, seed) if sae is None else sae
        for name, sae in others.items()
        if first is not None
    }
    statistics, *theirs = collect_of_several(
        blocks,
        [encoder_of(one) for one in (dictionary, *controls.values())],
        cohort.studies,
        cohort.known,
        cohort.reader,
        (finding,),
        maira,
    )
    factory, *factories = (
        MethodFactory(sae, own, n_latents, seed=seed, strengths=strengths)
        for sae, own in zip((dictionary, *controls.values()), (statistics, *theirs), strict=True)
    )
    methods = factory.removal(finding) if remove else factory.insertion(finding)
    named = dict(zip(controls, factories, strict=True))
    return [*methods, *factory.on_controls(finding, named, remove)], statistics.p99


def _control_saes(
    controls: Sequence[str], dictionary: "MatryoshkaSAE", hook_name: str, device: str
) -> "dict[str, MatryoshkaSAE | None]":
    """Load control SAEs by name; None for one that is made from activations.

    Raises:
        ConfigError: A folder contains an SAE of another hook point or width.
    """
    from sae_lens_maira.errors import ConfigError
    from sae_lens_maira.interface import load_sae
    from sae_lens_maira.sae import CONTROLS, control_kind

    found: dict[str, MatryoshkaSAE | None] = {}
    for control in controls:
        if control in CONTROLS and not control.startswith("frozen"):
            found[control] = None
            continue
        if control in CONTROLS:
            raise ConfigError(
                f"The control {control!r} is trained, not made from activations. Train it with `sae-lens-maira train "
                f"--control {control}`, and give its folder."
            )
        sae = load_sae(control, device=device)
        own = str(sae.cfg.metadata.hook_name)
        if own != hook_name or sae.cfg.d_in != dictionary.cfg.d_in:
            raise ConfigError(
                f"The control {control} is an SAE at {own} with d_in {sae.cfg.d_in}; the steered SAE is at "
                f"{hook_name} with d_in {dictionary.cfg.d_in}. Give a control of the same hook point."
            )
        kind = control_kind(sae) or Path(control).name
        if kind in found:
            raise ConfigError(f"Two controls are called {kind!r}; give one of them.")
        found[kind] = sae
    return found


def _evaluate(
    cohort: "Cohort",
    dictionary: "MatryoshkaSAE",
    methods: "list[Method]",
    finding: str,
    steered: int,
    strengths: Sequence[float],
    remove: bool,
    units: Any,
    max_new_tokens: int,
    seed: int,
) -> "tuple[SteeringTables, list[int]]":
    """Make the tables, and return the studies of the reported half."""
    from sae_lens_maira.steering.evaluate import evaluate_steering

    has, lacks = ([finding], []) if remove else ([], [finding])
    choose, report = (cohort.pick(half, has, lacks, steered) for half in ("choose", "report"))
    tables = evaluate_steering(
        cohort.maira,
        dictionary,
        cohort.hook_name,
        methods,
        choose,
        report,
        finding,
        cohort.reader.stated,
        cohort.reader.names,
        strengths=strengths,
        remove=remove,
        p99=units,
        max_new_tokens=max_new_tokens,
        seed=seed,
        prompts=cohort.prompts,
    )
    return tables, report
