"""`interpret run`, `report`, `findings` and `published`: explain latents and score the explanations, with controls."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_lens_maira.cli.options import numbers
from sae_lens_maira.cli.parser import works_in
from sae_lens_maira.errors import ConfigError


@works_in("records")
def run(
    records: Path,
    judge: str | None = None,
    base_url: str | None = None,
    latents: str | None = None,
    methods: str = "detection,fuzzing",
    n_train: int = 40,
    n_test: int = 50,
    batch_size: int = 10,
    concurrency: int = 8,
    judge_max_tokens: int = 400,
    timeout: float = 120.0,
    retries: int = 5,
    max_tokens_total: int | None = None,
    max_requests: int | None = None,
    usd_per_mtok: str | None = None,
    allow_remote: bool = False,
    estimate_only: bool = False,
    pictures: int = 0,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Explain the latents of a record set and score the explanations on unseen patients.

    Without a judge nothing is sent: the offline explainer contrasts words and findings of active and silent studies.
    With a judge, questions go to an OpenAI-compatible server (OPENAI_BASE_URL, OPENAI_API_KEY), and a stopped run
    resumes from the journal in the record set. An estimate is printed first.

    Example: sae-lens-maira interpret run --records records --judge qwen3-8b --base-url http://127.0.0.1:8000/v1

    Args:
        records: Folder written by `sae-lens-maira latents`.
        judge: Name of the language model at the server, which explains and judges; none for the offline explainer.
        base_url: Address of the server, instead of OPENAI_BASE_URL; https://api.openai.com/v1 if neither is given.
        latents: Numbers and ranges such as "0-49,77"; all latents that are not dead if not given.
        methods: Scorers, comma-separated: detection, fuzzing, intruder, and for a model with image input
            image_detection and image_fuzzing.
        n_train: Number of active examples shown to the explainer, at least 5.
        n_test: Number of active examples in the test questions, at least 5, with as many silent ones.
        batch_size: Number of texts per question.
        concurrency: Number of questions sent at the same time.
        judge_max_tokens: Largest number of tokens of one answer; a reasoning model needs 4000 or more.
        timeout: Seconds for one whole answer, and the longest Retry-After that is respected.
        retries: Largest number of retries of a question after 429, 5xx, timeouts and lost connections.
        max_tokens_total: Budget of tokens.
        max_requests: Budget of requests.
        usd_per_mtok: Price of a million prompt tokens and of a million answer tokens in US dollars, such as
            "0.15,0.60".
        allow_remote: Allow sending text of credentialed studies to a server on another machine.
        estimate_only: Print the estimate and stop.
        pictures: Number of images with outlined patches shown to the explainer per image latent, for a model with image
            input.
        seed: Random seed of the split by patient and of all sampling.
        as_json: Print statuses, scores and costs as JSON; the estimate then goes to stderr.
    """
    from sae_lens_maira.interp.examples import Plan
    from sae_lens_maira.interp.records import statuses, summary, table
    from sae_lens_maira.interp.run import estimate, interpret, interpret_offline
    from sae_lens_maira.latents.recordset import RecordSet

    plan = Plan(
        latents=numbers(latents, "--latents"),
        methods=tuple(dict.fromkeys(word.strip() for word in methods.split(","))),
        n_train=n_train,
        n_test=n_test,
        batch=batch_size,
        pictures=pictures,
        seed=seed,
    )
    opened = RecordSet.open(records)
    facts: dict[str, Any] = {"records": str(records)}
    say = sys.stderr.write if as_json else sys.stdout.write
    if judge is None:
        done = interpret_offline(opened, plan)
        say(f"{len(done)} latents, contrast (no LLM): nothing is sent anywhere.\n")
    else:
        from sae_lens_maira.interp.judge import Server

        server = Server(
            model=judge,
            base_url=base_url,
            concurrency=concurrency,
            max_tokens=judge_max_tokens,
            timeout=timeout,
            max_retries=retries,
            max_tokens_total=max_tokens_total,
            max_requests=max_requests,
            usd_per_mtok=_prices(usd_per_mtok),
            allow_remote=allow_remote,
        )
        if estimate_only:
            guess = estimate(opened, plan, server)
            sys.stdout.write(json.dumps(facts | {"estimate": guess}) + "\n" if as_json else guess)
            return
        done, usage = interpret(opened, server, plan, say=say)
        cost = usage.price(server.usd_per_mtok)
        facts |= asdict(usage) | {"usd": cost}
        say(
            f"{usage.requests} requests ({usage.retries} retries), {usage.cached} answers from the journal, "
            f"{usage.tokens_in} prompt tokens, {usage.tokens_out} answer tokens, {usage.unusable} unusable"
            f"{'' if cost is None else f', {cost:.4f} US dollars'}.\n"
        )
        if usage.adapted:
            say(f"Adapted to this server: {', '.join(usage.adapted)}.\n")
        for reason, count in sorted(usage.problems.items(), key=lambda item: -item[1])[:5]:
            say(f"Unusable, {count} times: {reason}\n")
    scores = table(done)
    if as_json:
        means = json.loads(str(summary(scores).to_json(orient="records")))
        facts |= {"latents": len(done), "statuses": statuses(done), "scores": means}
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    counts = ", ".join(f"{number} {status}" for status, number in statuses(done).items())
    sys.stdout.write(f"Statuses: {counts}\n")
    if scores["balanced_accuracy"].notna().any():
        means = summary(scores).astype(dict.fromkeys(("asked", "answered", "unusable"), "Int64"))
        sys.stdout.write(means.to_string(index=False, float_format="%.3f") + "\n")


@works_in("out")
def report_scores(
    records: Path,
    out: Path | None = None,
    untrained: Path | None = None,
    raw: Path | None = None,
    frozen_decoder: Path | None = None,
    frozen_encoder: Path | None = None,
    model_id: str | None = None,
    set_name: str | None = None,
    as_json: bool = False,
) -> None:
    """Report the scores of a record set's interpretations: table, histogram with controls, counts per category.

    If the records have boxes of findings, it also scores where the best image latents fire: whether the strongest patch
    touches the box (pointing), the share of activation inside (energy) and the IoU of the map. The control of each
    score is the latent's map from another study.

    Example: sae-lens-maira interpret report --records records --untrained records_untrained --out report

    Args:
        records: Record set with interpretations.
        out: Folder for `scores.csv`, `space.csv`, `scores.png` and `explanations.jsonl`; nothing is written if not
            given.
        untrained: Interpreted records of an untrained SAE, drawn in the same figure.
        raw: Interpreted records of raw residual dimensions, drawn in the same figure.
        frozen_decoder: Interpreted records of an SAE trained with a frozen random decoder.
        frozen_encoder: Interpreted records of an SAE trained with a frozen random encoder.
        model_id: Name of the model on Neuronpedia, for `explanations.jsonl`; phantom for records of the phantom, else
            maira-2.
        set_name: Name of the source set on Neuronpedia, lower case with single hyphens; the SAE's name if not given.
        as_json: Print JSON instead of text.
    """
    import pandas as pd

    from sae_lens_maira.dashboards.target import Target, name_of
    from sae_lens_maira.interp.records import (
        categories,
        load,
        neuronpedia_rows,
        statuses,
        summary,
        table,
        write_figure,
        write_neuronpedia,
    )
    from sae_lens_maira.io import atomic_write, csv_of
    from sae_lens_maira.latents.recordset import RecordSet
    from sae_lens_maira.latents.space import MEASURES as SPATIAL
    from sae_lens_maira.latents.space import spatial_of_records

    opened = RecordSet.open(records)
    done = load(records)
    controls = {
        "frozen decoder": frozen_decoder,
        "frozen encoder": frozen_encoder,
        "untrained SAE": untrained,
        "raw dimensions": raw,
    }
    sets = {"explanations": done} | {
        name: load(folder) for name, folder in controls.items() if folder is not None
    }
    scores = table(done)
    means = {name: summary(table(each)) for name, each in sets.items()}
    space = {
        name: spatial_of_records(opened if folder is records else RecordSet.open(folder))
        for name, folder in {"trained": records, **controls}.items()
        if folder is not None
    }
    space = {name: frame for name, frame in space.items() if len(frame)}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "scores.csv", csv_of(scores))
        if space:
            joined = pd.concat([frame.assign(set=name) for name, frame in space.items()])
            atomic_write(out / "space.csv", csv_of(joined))
        write_figure(sets, out / "scores.png")
        source = opened.meta.sae if set_name is None else Target(set_name=set_name).source(opened.meta.layer)
        name = name_of(opened.meta.model, model_id)
        write_neuronpedia(neuronpedia_rows(done, opened.meta, name, source), out / "explanations.jsonl")
    if as_json:
        found = {
            "statuses": statuses(done),
            "categories": categories(done),
            "scores": {
                name: json.loads(mean.to_json(None, orient="records") or "[]") for name, mean in means.items()
            },
            "space": {
                name: json.loads(frame.to_json(None, orient="records") or "[]")
                for name, frame in space.items()
            },
        }
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    for name, mean in means.items():
        sys.stdout.write(f"{name}\n{mean.to_string(index=False, float_format='%.3f')}\n\n")
    for name, frame in space.items():
        columns = ["finding", "latent", "f1", "n", "fired", *SPATIAL, *(f"elsewhere_{m}" for m in SPATIAL)]
        text = frame[columns].to_string(index=False, float_format="%.2f")
        sys.stdout.write(f"Where image latents fire, {name}\n{text}\n\n")
    sys.stdout.write(f"Categories: {categories(done)}\nStatuses: {statuses(done)}\n\n")
    best = scores.sort_values("balanced_accuracy", ascending=False, na_position="last").head(40)
    shown = best[["latent", "method", "judge", "balanced_accuracy", "control", "category", "explanation"]]
    sys.stdout.write(shown.to_string(index=False, float_format="%.2f", max_colwidth=80) + "\n")


@works_in("records")
def published(
    records: Path,
    file: Path,
    name: str = "published",
    latent_column: str | None = None,
    text_column: str | None = None,
    score_column: str | None = None,
    as_json: bool = False,
) -> None:
    """Add published interpretations of the same SAE to a record set, for the report and the dashboards.

    Example: sae-lens-maira interpret published --records records --file interpretations.csv

    Args:
        records: Record set of that SAE.
        file: CSV, TSV, Parquet, JSON or JSON lines with one interpretation per row, or a folder of such tables.
        name: Name for the explainer of these interpretations.
        latent_column: Column with the latent's index; found by its name if not given.
        text_column: Column with the explanation; found by its name if not given.
        score_column: Column with a score from 0 to 1 or in percent; found by its name if not given. "none" for no
            score.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.interp.published import read_published
    from sae_lens_maira.interp.records import save
    from sae_lens_maira.latents.recordset import RecordSet

    opened = RecordSet.open(records)
    rows, notes = read_published(file, name, latent_column, text_column, score_column)
    for note in notes:
        sys.stderr.write(f"{note}\n")
    kept = [one for one in rows if one.latent in opened]
    save(opened.folder, kept)
    if as_json:
        facts = {"records": str(records), "rows": len(rows), "kept": len(kept), "notes": notes}
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    sys.stdout.write(
        f"{len(kept)} of {len(rows)} interpretations are of latents of {records} and are stored there\n"
    )


@works_in("out")
def findings(
    records: list[Path],
    untrained: list[Path] | None = None,
    raw: list[Path] | None = None,
    frozen_decoder: list[Path] | None = None,
    frozen_encoder: list[Path] | None = None,
    out: Path | None = None,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Show the best latent of each finding, selected on train patients, with its detection score on unseen patients.

    This needs record sets with known findings that `interpret run` has explained without a language model. Several sets
    of one model, such as those of a text and an image SAE, are searched together.

    Example: sae-lens-maira interpret findings --records "[text, image]" --untrained "[text_u, image_u]" --out best

    Args:
        records: Interpreted record sets.
        untrained: Interpreted record sets of untrained SAEs, treated in the same way.
        raw: Interpreted record sets of raw residual dimensions.
        frozen_decoder: Interpreted record sets of SAEs trained with a frozen random decoder.
        frozen_encoder: Interpreted record sets of SAEs trained with a frozen random encoder.
        out: Folder for `best_latents.csv` and `best_latents.png`; nothing is written if not given.
        seed: Random seed of the split by patient; use that of `interpret run`.
        as_json: Print JSON instead of text.
    """
    import pandas as pd

    from sae_lens_maira.interp.best import best_latents, best_table, paired_detection, write_best_figure
    from sae_lens_maira.io import atomic_write, csv_of

    named = {
        "trained": records,
        "frozen decoder": frozen_decoder,
        "frozen encoder": frozen_encoder,
        "untrained SAE": untrained,
        "raw dimensions": raw,
    }
    sets = {
        name: best_latents({folder.name: folder for folder in folders}, seed)
        for name, folders in named.items()
        if folders
    }
    tables = {name: best_table(best) for name, best in sets.items()}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        joined = pd.concat([table.assign(set=name) for name, table in tables.items()])
        atomic_write(out / "best_latents.csv", csv_of(joined))
        write_best_figure(sets, out / "best_latents.png")
    if as_json:
        found = {name: json.loads(str(table.to_json(orient="records"))) for name, table in tables.items()}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    for name, table in tables.items():
        good = table.loc[table["named"]]
        text = table.drop(columns="explanation").to_string(index=False, float_format="%.2f")
        sys.stdout.write(
            f"{name}: {len(good)} of {len(table)} findings named, {(good['detection'] >= 0.85).sum()} of them "
            f"detected at 0.85 or more; mean {good['detection'].mean():.3f}, shuffled {good['control'].mean():.3f}\n"
            f"{text}\n\n"
        )
    trained = tables["trained"]
    for name, table in tables.items():
        pair = paired_detection(trained, table) if name != "trained" else None
        if pair is not None:
            mean, low, high, n = pair
            sys.stdout.write(
                f"detection, trained minus {name}: {mean:+.3f} ({low:+.3f} to {high:+.3f}, {n} findings named by "
                "both)\n"
            )
    for finding, explanation in zip(trained["finding"], trained["explanation"], strict=True):
        sys.stdout.write(f"{finding}: {explanation}\n")


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        asked, answered = map(float, text.split(","))
    except ValueError:
        raise ConfigError(
            f'--usd-per-mtok {text!r} is not two prices; write for example "0.15,0.60".'
        ) from None
    return asked, answered
