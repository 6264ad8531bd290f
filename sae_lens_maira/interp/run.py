"""Latents in, `interpretations.jsonl` out: explain all, then score each beside another latent's explanation.

The control of a score is the same questions with the explanation of another latent, one that names none of the same
findings. A killed run loses only questions in flight: the journal answers the rest when it is run again, and the
file of interpretations is replaced at the end as a whole. It knows nothing about commands.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sae_lens_maira.interp.findings import named_findings
from sae_lens_maira.interp.lookup import by_truth, by_words, interval_names
from sae_lens_maira.interp.offline import EXPLAINER, Explanation, contrast
from sae_lens_maira.interp.records import Interpretation, Score, save
from sae_lens_maira.interp.subjects import Plan, Subject, subjects
from sae_lens_maira.latents.recordset import RecordSet

if TYPE_CHECKING:
    from sae_lens_maira.interp.judge import Judge, Server, Usage

JOURNAL = "journal.jsonl"
OFFLINE_VERSION = "contrast-1"
T = TypeVar("T")


def pick_controls(told: dict[int, Explanation], keys: Sequence[str], seed: int = 0) -> dict[int, int | None]:
    """Another latent for each, whose explanation differs and names none of the same findings; None if there is none."""
    rng = random.Random(f"{seed}|control")
    usable = {n: (e.text, named_findings(e.text, keys)) for n, e in told.items() if e.text}
    picked: dict[int, int | None] = {}
    for latent, (text, named) in usable.items():
        others = [
            n for n, (other, also) in usable.items() if n != latent and other != text and not named & also
        ]
        picked[latent] = rng.choice(others) if others else None
    return picked


def interpret_offline(
    records: RecordSet, plan: Plan | None = None, write: bool = True
) -> list[Interpretation]:
    """Explain by contrast and score by the known findings and by the quoted words; no language model.

    Raises:
        RecordError: the records contradict themselves or have fewer than two patients.
    """
    plan = plan or Plan()
    found = subjects(records, plan, offline=True)
    told = {
        s.latent: contrast(s.train, plan.seed) if s.enough else Explanation(None, "other", status="too_rare")
        for s in found
    }
    keys = records.meta.findings
    controls = pick_controls(told, keys, plan.seed)

    def scores(subject: Subject, text: str) -> tuple[Score, ...]:
        names = interval_names(subject.edges)
        labelled = all(e.study.labelled_by for e in subject.test)
        by_words_score = by_words(text, subject.test, names)
        return (by_truth(text, subject.test, keys, names), by_words_score) if labelled else (by_words_score,)

    done = []
    for s in found:
        one, other = told[s.latent], controls.get(s.latent)
        text = told[other].text if other is not None else None
        own = scores(s, one.text) if one.text else ()
        done.append(
            _interpretation(s, one, EXPLAINER, "", own, scores(s, text) if text else (), other, (), "")
        )
    return save(records.folder, done) if write else done


def estimate(records: RecordSet, plan: Plan, server: Server) -> str:
    """What a run will ask, in a sentence for the user, with where the text goes.

    Raises:
        PrivacyError: credentialed text would leave the machine.
    """
    from sae_lens_maira.interp.explain import question
    from sae_lens_maira.interp.privacy import check_destination
    from sae_lens_maira.interp.prompts import tokens_of

    found = [s for s in subjects(records, plan, offline=False) if s.enough]
    licences = {licence for s in found for licence in s.licences}
    where = check_destination(licences, server.url, server.allow_remote)
    calls = tokens = 0
    for s in found:
        size = tokens_of(question(s.train, s.tokens, plan.seed, plan.pictures, records.folder))
        each = max(1, tokens_of(question(s.train, s.tokens, plan.seed)) // max(1, len(s.train)))
        questions = {
            "detection": -(-len(s.test) // plan.batch),
            "fuzzing": -(-sum(e.active for e in s.test) // plan.batch),
            "intruder": sum(e.active for e in s.test) // 4,
        }
        asked = 2 * sum(questions[m] for m in plan.methods)
        calls += 1 + asked
        tokens += size + asked * (200 + plan.batch * (each + 5)) + 60
    price = ""
    if server.usd_per_mtok is not None:
        price = f", about {tokens * server.usd_per_mtok[0] / 1e6:.2f} US dollars for what is asked"
    return (
        f"{len(found)} latents, at most {calls} calls with their controls, about {tokens / 1e6:.2f} million tokens"
        f"{price}. {where}\n"
    )


def interpret(
    records: RecordSet,
    server: Server,
    plan: Plan | None = None,
    journal: Path | str | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[list[Interpretation], Usage]:
    """Explain and score by a language model.

    Args:
        records: the record set; interpretations are written beside it.
        server: whom to ask.
        plan: what to ask.
        journal: file of the journal; `journal.jsonl` beside the records if not given.
        say: receives the estimate before anything is sent.

    Raises:
        PrivacyError: credentialed text would leave the machine; nothing was sent.
        ServerError: the server answers no question at all.
    """
    from sae_lens_maira.interp.journal import Journal
    from sae_lens_maira.interp.judge import Judge

    plan = plan or Plan()
    say(estimate(records, plan, server))

    async def go(book: Journal) -> tuple[list[Interpretation], Usage]:
        async with Judge(server, book) as judge:
            return await _interpret(records, judge, plan), judge.usage

    with Journal(journal or records.folder / JOURNAL) as book:
        done, usage = asyncio.run(go(book))
    return save(records.folder, done), usage


async def _interpret(records: RecordSet, judge: Judge, plan: Plan) -> list[Interpretation]:
    from sae_lens_maira.interp.explain import explain

    found, keys = subjects(records, plan, offline=False), records.meta.findings

    async def tell(s: Subject) -> Explanation:
        if not s.enough:
            return Explanation(None, "other", status="too_rare")
        return await explain(judge, s.train, s.tokens, keys, plan.seed, plan.pictures, records.folder)

    told = dict(zip([s.latent for s in found], await _all([tell(s) for s in found]), strict=True))
    controls = pick_controls(told, keys, plan.seed)

    async def finish(s: Subject) -> Interpretation:
        one, other = told[s.latent], controls.get(s.latent)
        text = told[other].text if other is not None else None
        nothing = ((), (), False)
        own, own_keys, short = await _scores(judge, s, one.text, plan) if one.text else nothing
        against, against_keys, also = await _scores(judge, s, text, plan, True) if text else nothing
        if short or also:
            one = replace(one, status="over_budget")
        calls = (*one.journal_keys, *own_keys, *against_keys)
        method = f"eleuther_acts_top{plan.n_train}"
        return _interpretation(s, one, judge.server.model, method, own, against, other, calls, None)

    return await _all([finish(s) for s in found])


async def _scores(
    judge: Judge, s: Subject, text: str, plan: Plan, control: bool = False
) -> tuple[tuple[Score, ...], tuple[str, ...], bool]:
    from sae_lens_maira.interp import score

    names, scored = interval_names(s.edges), []
    for method in plan.methods:
        rng = random.Random(f"{plan.seed}|{s.latent}|{method}")
        if method == "intruder":
            sets = score.intruder_sets(s.test, names, rng, null=control)
            scored.append(await score.ask_intruder(judge, sets, s.licences))
            continue
        make = score.detection_items if method == "detection" else score.fuzzing_items
        items = make(s.test, names, rng)
        scored.append(await score.ask_verdicts(judge, method, text, items, plan.batch, s.licences))
    return (
        tuple(one.score for one in scored),
        tuple(key for one in scored for key in one.journal_keys),
        any(one.over_budget for one in scored),
    )


async def _all(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first error stops the others, so that no question is sent after it."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _interpretation(
    s: Subject,
    one: Explanation,
    explainer: str,
    method: str,
    own: tuple[Score, ...],
    against: tuple[Score, ...],
    other: int | None,
    calls: tuple[str, ...],
    version: str | None,
) -> Interpretation:
    if version is None:
        from sae_lens_maira.interp.prompts import PROMPT_VERSION

        version = PROMPT_VERSION
    return Interpretation(
        latent=s.latent,
        explanation=one.text,
        explainer=explainer,
        method=method,
        category=one.category,
        scores=own,
        control=against,
        control_latent=other,
        status=one.status,
        n_train=len(s.train),
        n_test=len(s.test),
        prompt_version=version or OFFLINE_VERSION,
        journal_keys=calls,
    )
