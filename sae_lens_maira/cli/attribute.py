"""The command `attribute`: attribute each sentence of a report to latents and image patches."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_lens_maira.cli.options import StudyOptions
from sae_lens_maira.cli.parser import works_in

if TYPE_CHECKING:
    from sae_lens_maira.studies import Study


@works_in("out")
def attribute(
    sae: str = "phantom-image",
    options: StudyOptions = StudyOptions(),
    out: Path = Path("attribution_out"),
    study: list[str] | None = None,
    studies: int = 4,
    records: Path | None = None,
    text_sae: str | None = None,
    report: Literal["generated", "teacher"] = "generated",
    sentences: list[int] | None = None,
    method: Literal["integrated", "gradient"] = "integrated",
    roles: str | list[str] | None = None,
    candidates: int = 256,
    n_check: int = 32,
    regenerate: bool = True,
    max_rounds: int = 8,
    max_new_tokens: int | None = None,
    allow_credentialed: bool = False,
    as_json: bool = False,
) -> None:
    """Attribute each sentence of a report to latents and patches, check it by ablation, and write a page per study.

    Example: sae-lens-maira attribute --studies 2 --out attribution_out

    Args:
        sae: Folder of an SAE, a release, or phantom-image.
        options: Model and studies.
        out: Folder of the pages; created if missing.
        study: Ids of the studies to explain; the first ones if not given.
        studies: Number of studies to explain.
        records: Folder of latent records, for the names of latents.
        text_sae: SAE of report tokens at a later block, such as phantom-text: measures the graph from image latents
            to text latents to each sentence.
        report: Explain the report that the model generates, or the study's report.
        sentences: Numbers of the sentences to explain, from 0; all if not given.
        method: Attribution method: the values of "integrated" sum to the true effect of removing the candidates; those
            of "gradient" do not, but it is faster.
        roles: Token roles whose positions are used; those that the SAE was trained on if not given.
        candidates: Number of entries (latent, position) per sentence that are integrated over.
        n_check: Number of entries that the ablation check removes.
        regenerate: Generate the report again without the entries that cause each sentence.
        max_rounds: Largest number of times that entries are removed and the report is generated again, until it no
            longer contains the statement.
        max_new_tokens: Largest number of tokens of a generated report.
        allow_credentialed: Also write pages of studies that are not known to be public or synthetic.
        as_json: Print JSON instead of text.
    """
    from tqdm.auto import tqdm

    from sae_lens_maira.attribution import attribute as explain
    from sae_lens_maira.attribution.edges import sentence_graph
    from sae_lens_maira.attribution.page import StudyPage, write_pages
    from sae_lens_maira.attribution.regenerate import remove_statement, same_statement
    from sae_lens_maira.errors import InterventionError
    from sae_lens_maira.interface import finding_reader, load, load_sae
    from sae_lens_maira.privacy import check_shareable

    # Studies of a table are found and their licences checked before any weights are read.
    listed = options.table_studies()
    chosen = None if listed is None else _chosen(listed, study, studies)
    if chosen is not None:
        licences = [one.licence for one in chosen]
        check_shareable(licences, "writing attribution pages", allow=allow_credentialed)
    dictionary: Any = load_sae(sae, records=records, device=options.device)
    later: Any = None if text_sae is None else load_sae(text_sae, device=options.device)
    hooked: Any = load(options.model, options.device, options.model_dtype)
    if chosen is None:
        drawn = options.first_studies(studies if study is None else 200, hooked.processor)
        chosen = _chosen(drawn, study, studies)
    reader = finding_reader(chosen).read
    pages = []
    for one in tqdm(chosen, desc="attribute", unit="study"):
        answer = explain(
            hooked,
            one,
            dictionary,
            sentences,
            report=report,
            roles=roles,
            method=method,
            candidates=candidates,
            n_check=n_check,
            names=dict(dictionary.latent_names),
            max_new_tokens=max_new_tokens,
        )
        removals = []
        for item in answer.sentences if regenerate else ():
            try:
                removals.append(
                    remove_statement(
                        hooked,
                        one,
                        dictionary,
                        same_statement(item.sentence.text, reader),
                        report=answer.report,
                        roles=roles,
                        max_rounds=max_rounds,
                        max_new_tokens=max_new_tokens,
                    )
                )
            except InterventionError:
                removals.append(None)
        graphs = []
        for item in answer.sentences if later is not None else ():
            graphs.append(
                sentence_graph(
                    hooked,
                    one,
                    dictionary,
                    later,
                    item.sentence.number,
                    answer.report,
                    image_names=dict(dictionary.latent_names),
                    text_names=dict(later.latent_names),
                )
            )
        pages.append(StudyPage(one, answer, removals, graphs))
    page = write_pages(out, pages, f"model {options.model}, SAE {sae}", allow_credentialed)
    if as_json:
        facts = [
            {
                "study": p.found.study_id,
                "sentences": json.loads(p.found.table().to_json(orient="records")),
                "graphs": [graph.to_dict() for graph in p.graphs if graph is not None],
            }
            for p in pages
        ]
        sys.stdout.write(json.dumps({"page": str(page), "studies": facts}) + "\n")
        return
    for p in pages:
        sys.stdout.write(f"{p.found}\n\n")
    sys.stdout.write(f"{page}\n")


def _chosen(found: "Sequence[Study]", names: list[str] | None, n: int) -> "list[Study]":
    """Select the studies with these ids, or the first `n`. Raises StudyError for an unknown id."""
    from sae_lens_maira.errors import StudyError

    if names is None:
        return list(found[:n])
    wanted = {one.study_id: one for one in found if one.study_id in set(names)}
    missing = [name for name in names if name not in wanted]
    if missing:
        raise StudyError(
            f"{', '.join(missing)} is not among the {len(found):,} studies that were read. `studies show` lists ids."
        )
    return [wanted[name] for name in names]
