"""Interpret latents: explain all, then score each explanation with another latent's explanation as control.

The control of a score asks the same questions with the explanation of another latent that names none of the same
findings. Records are read one at a time in both passes, so that memory contains explanations and scores, but not the
contexts of all latents. A killed run loses only the questions that were being answered: when it is run again, the
journal has the other answers. The file of interpretations is replaced once, at the end.
"""

from __future__ import annotations

import asyncio
import bisect
import contextvars
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.examples import LatentTask, Plan, Tasks, interval_names, modality_of
from sae_lens_maira.interp.offline import (
    EXPLAINER,
    Explanation,
    contrast,
    judge_by_truth,
    judge_by_words,
    named_findings,
)
from sae_lens_maira.interp.records import Interpretation, Score, save
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.privacy import strictest

if TYPE_CHECKING:
    from sae_lens_maira.interp.judge import Judge, Server, Usage

JOURNAL = "journal.jsonl"
OFFLINE_VERSION = "contrast-1"
ESTIMATED = 64  # Number of latents read for an estimate.
TOO_RARE = Explanation(None, "other", status="too_rare")
T = TypeVar("T")
R = TypeVar("R")


def pick_controls(
    explanations: Mapping[int, str | None], keys: Sequence[str], seed: int = 0
) -> dict[int, int | None]:
    """Choose for each explained latent another one whose explanation differs and names none of the same findings.

    Latents are grouped by the findings that they name, so that the cost grows linearly with the number of latents.

    Args:
        explanations: Latent -> explanation, or None.
        keys: Finding keys.
        seed: Random seed.

    Returns:
        Latent -> control latent, for every explained latent; None if no other latent qualifies.
    """
    texts = {latent: text for latent, text in explanations.items() if text}
    groups: dict[frozenset[str], list[int]] = {}
    # Sorted by text, so that equal explanations are neighbours in their group.
    for latent in sorted(texts, key=lambda n: (texts[n], n)):
        groups.setdefault(named_findings(texts[latent], keys), []).append(latent)
    picked: dict[int, int | None] = dict.fromkeys(texts)
    for named, members in groups.items():
        others = [group for also, group in groups.items() if not named & also]
        ends = list(accumulate(map(len, others)))
        # In the group that names no finding, latents may be controls of each other, unless their texts are equal.
        own = next((i for i, group in enumerate(others) if group is members), None)
        own_texts = [texts[n] for n in members] if own is not None else []
        for latent in members:
            rng = random.Random(f"{seed}|control|{latent}")
            start = stop = 0
            if own is not None:
                before = ends[own] - len(members)
                start = before + bisect.bisect_left(own_texts, texts[latent])
                stop = before + bisect.bisect_right(own_texts, texts[latent])
            total = (ends[-1] if ends else 0) - (stop - start)
            if total:
                number = rng.randrange(total)
                number += (stop - start) if number >= start else 0
                i = bisect.bisect_right(ends, number)
                picked[latent] = others[i][number - ends[i] + len(others[i])]
    return picked


def interpret_offline(
    records: RecordSet, plan: Plan | None = None, write: bool = True
) -> list[Interpretation]:
    """Explain by contrast, and score by the known findings and by the quoted words, without a language model.

    Args:
        records: Record set to interpret.
        plan: Latents, sample sizes and seed.
        write: Write the interpretations to the record set.

    Raises:
        RecordError: The records contradict themselves or have fewer than two patients.
    """
    plan = plan or Plan()
    tasks, keys = Tasks(records, plan, offline=True), records.meta.findings
    explained: dict[int, Explanation] = {}
    for latent in tasks.latents:
        task = tasks[latent]
        explained[latent] = contrast(task.train, plan.seed) if task.enough else TOO_RARE
    controls = pick_controls({n: e.text for n, e in explained.items()}, keys, plan.seed)

    def scores(task: LatentTask, text: str | None) -> tuple[Score, ...]:
        if not text:
            return ()
        names = interval_names(task.edges)
        words = judge_by_words(text, task.test, names)
        labelled = all(e.study.labelled_by for e in task.test)
        return (judge_by_truth(text, task.test, keys, names), words) if labelled else (words,)

    done = []
    for latent in tasks.latents:
        task, one, other = tasks[latent], explained[latent], controls.get(latent)
        control = scores(task, explained[other].text) if other is not None else ()
        done.append(
            Interpretation(
                latent=latent,
                explanation=one.text,
                explainer=EXPLAINER,
                method="",
                category=one.category,
                scores=scores(task, one.text),
                control=control,
                control_latent=other,
                status=one.status,
                n_train=len(task.train),
                n_test=len(task.test),
                prompt_version=OFFLINE_VERSION,
            )
        )
    return save(records.folder, done) if write else done


def estimate(records: RecordSet, plan: Plan, server: Server) -> str:
    """Estimate the questions of a run, as a sentence for the user that also names where the text is sent.

    Sizes are measured on at most `ESTIMATED` latents and scaled to all.

    Raises:
        PrivacyError: Credentialed text would leave the machine.
    """
    from sae_lens_maira.interp.prompts import PICTURE_TOKENS, question, tokens_of
    from sae_lens_maira.interp.score import IMAGES_PER_QUESTION
    from sae_lens_maira.privacy import check_destination

    where = check_destination(_licences(records), server.url, server.allow_remote)
    tasks = Tasks(records, plan, offline=False)
    step = max(1, -(-len(tasks) // ESTIMATED))
    calls = tokens = enough = read = 0
    for latent in tasks.latents[::step]:
        task, read = tasks[latent], read + 1
        if not task.enough:
            continue
        enough += 1
        size = tokens_of(question(task.train, task.tokens, plan.seed, plan.pictures, records.folder))
        each = max(1, tokens_of(question(task.train, task.tokens, plan.seed)) // max(1, len(task.train)))
        active = sum(e.active for e in task.test)
        shown = active if modality_of(task.test) == "image" else 0
        questions = {
            "detection": -(-len(task.test) // plan.batch),
            "fuzzing": -(-active // plan.batch),
            "intruder": active // 4,
            "image_detection": -(-len(task.test) // IMAGES_PER_QUESTION) if shown else 0,
            "image_fuzzing": -(-shown // IMAGES_PER_QUESTION),
        }
        calls += 1 + 2 * sum(questions[m] for m in plan.methods)
        tokens += size + 60
        for method in plan.methods:
            image = IMAGES_PER_QUESTION * PICTURE_TOKENS
            text = plan.batch * (each + 5)
            tokens += 2 * questions[method] * (200 + (image if method.startswith("image") else text))
    scale = len(tasks) / max(1, read)
    price = ""
    if server.usd_per_mtok is not None:
        price = f", about {scale * tokens * server.usd_per_mtok[0] / 1e6:.2f} US dollars for the prompts"
    sampled = "" if step == 1 else f" (estimated from {read})"
    return (
        f"{round(scale * enough)} latents{sampled}, at most {round(scale * calls)} calls with their controls, about "
        f"{scale * tokens / 1e6:.2f} million tokens{price}. {where}\n"
    )


def interpret(
    records: RecordSet,
    server: Server,
    plan: Plan | None = None,
    journal: Path | str | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[list[Interpretation], Usage]:
    """Explain and score by a language model; also works in a running event loop, as in a notebook.

    Args:
        records: Record set to interpret; the interpretations are written to its folder.
        server: Model to ask, and the limits of the run.
        plan: Latents, sample sizes and seed.
        journal: Path of the journal; `journal.jsonl` of the record set if not given.
        say: Function that receives the estimate before anything is sent.

    Returns:
        The interpretations as they are stored (see `save`), and the counts of the run.

    Raises:
        PrivacyError: Credentialed text would leave the machine; nothing was sent.
        ServerError: The server does not answer, or no answer was usable; only the journal was written.
        RecordError: No latent has enough active and silent studies, or images are needed and the record set has none.
    """
    from sae_lens_maira.interp.judge import Judge
    from sae_lens_maira.interp.transport import Journal

    plan = plan or Plan()
    looks = sorted(m for m in plan.methods if m.startswith("image"))
    if looks and not any(study.images for study in records.studies.values()):
        raise RecordError(
            f"{records.folder} keeps no images, which {' and '.join(looks)} need. Write the records again with "
            "--keep-images true, or leave out these methods."
        )
    say(estimate(records, plan, server))

    async def go(book: Journal) -> tuple[list[Interpretation], Usage]:
        async with Judge(server, book) as judge:
            done = await _interpret(records, judge, plan)
            nothing = judge.nothing_usable()
            if nothing is not None:
                raise nothing
            return done, judge.usage

    origin = {"fingerprint": records.fingerprint, "licence": strictest(_licences(records))}
    with Journal(journal or records.folder / JOURNAL) as book:
        if book.note("records") != origin:
            book.set_note("records", origin)
        done, usage = run_async(go(book))
    return save(records.folder, done), usage


async def _interpret(records: RecordSet, judge: Judge, plan: Plan) -> list[Interpretation]:
    from sae_lens_maira.interp.prompts import PROMPT_VERSION, explain

    tasks, keys = Tasks(records, plan, offline=False), records.meta.findings
    licences, at_once = _licences(records), 2 * judge.server.concurrency

    async def first(latent: int) -> Explanation:
        task = tasks[latent]
        if not task.enough:
            return TOO_RARE
        return await explain(judge, task, keys, plan, records.folder, licences)

    firsts = await _in_order(tasks.latents, first, at_once)
    explained = dict(zip(tasks.latents, firsts, strict=True))
    if explained and all(one is TOO_RARE for one in firsts):
        raise RecordError(
            f"None of the {len(firsts)} latents has {plan.least} active studies and a silent one in both halves of the "
            "patients, so none can be explained. Write records of more studies, or of more contexts per latent."
        )
    controls = pick_controls({n: e.text for n, e in explained.items()}, keys, plan.seed)

    async def second(latent: int) -> Interpretation:
        task, one, other = tasks[latent], explained[latent], controls.get(latent)
        text = explained[other].text if other is not None else None
        own, own_keys, short = await _scores(judge, task, one.text, plan, records.folder, licences)
        control, control_keys, also = await _scores(
            judge, task, text, plan, records.folder, licences, control=True
        )
        return Interpretation(
            latent=latent,
            explanation=one.text,
            explainer=judge.server.model,
            method=f"acts_top{plan.n_train}",
            category=one.category,
            scores=own,
            control=control,
            control_latent=other,
            status="over_budget" if short or also else one.status,
            n_train=len(task.train),
            n_test=len(task.test),
            prompt_version=PROMPT_VERSION,
            journal_keys=(*one.journal_keys, *own_keys, *control_keys),
        )

    return await _in_order(tasks.latents, second, at_once)


async def _scores(
    judge: Judge,
    task: LatentTask,
    text: str | None,
    plan: Plan,
    folder: Path,
    licences: frozenset[str],
    control: bool = False,
) -> tuple[tuple[Score, ...], tuple[str, ...], bool]:
    """Score an explanation: (scores, journal keys, whether the budget ended early); empty without an explanation."""
    from sae_lens_maira.interp import score

    if not text:
        return (), (), False
    names, scored = interval_names(task.edges), []
    for method in plan.methods:
        rng = random.Random(f"{plan.seed}|{task.latent}|{method}")
        if method == "intruder":
            sets = score.intruder_sets(task.test, names, rng, null=control)
            scored.append(await score.ask_intruder(judge, sets, licences))
            continue
        batch = plan.batch
        if method.startswith("image"):
            batch = score.IMAGES_PER_QUESTION
            make = score.image_detection_items if method == "image_detection" else score.image_fuzzing_items
            items = make(task.test, names, rng, folder)
            if not items:
                continue  # A latent of text positions has no images to show.
        else:
            items = (score.detection_items if method == "detection" else score.fuzzing_items)(
                task.test, names, rng
            )
        scored.append(await score.ask_verdicts(judge, method, text, items, batch, licences))
    return (
        tuple(one.score for one in scored),
        tuple(key for one in scored for key in one.journal_keys),
        any(one.over_budget for one in scored),
    )


async def _in_order(items: Iterable[T], work: Callable[[T], Awaitable[R]], at_once: int) -> list[R]:
    """Run work on items, at most `at_once` at a time; return results in order. The first error stops the others."""
    results: dict[int, R] = {}
    running: dict[asyncio.Future[R], int] = {}

    async def collect(when: str) -> None:
        done, _ = await asyncio.wait(running, return_when=when)
        for task in done:
            results[running.pop(task)] = task.result()

    try:
        for number, item in enumerate(items):
            if len(running) >= at_once:
                await collect(asyncio.FIRST_COMPLETED)
            running[asyncio.ensure_future(work(item))] = number
        while running:
            await collect(asyncio.FIRST_COMPLETED)
    except BaseException:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise
    return [results[number] for number in range(len(results))]


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a new thread if this thread already runs an event loop.

    Args:
        work: Coroutine to run.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []

    async def observed() -> T:
        started.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await work

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(contextvars.copy_context().run, asyncio.run, observed())
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in started:
                if task is not None:
                    loop.call_soon_threadsafe(task.cancel)
            raise


def _licences(records: RecordSet) -> frozenset[str]:
    """Licence classes of the record set's studies, which also apply to sentences made from them."""
    return frozenset(str(study.licence) for study in records.studies.values())
