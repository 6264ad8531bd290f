"""One prompt, many interventions: the part below the hook point runs once and is shared by a whole sweep.

    once per study         h (L, d_model) at blocks.i.hook_resid_post, keys and values of the blocks up to i
    per intervention       blocks i+1.. over the edited h, then greedy decoding with a cache

An intervention on the residual stream changes nothing below it, so a sweep needs the images, the projector and the
lower blocks only once. The tokens are those that `generate` writes under the same interventions. Memory is bounded in
bytes: prompts beyond the budget are dropped, the least recently used first, and run again when they are needed.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from sae_lens import SAE
from torch import nn

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.hooks import PointTable
from sae_lens_maira.maira2 import Maira2, Maira2Encoding
from sae_lens_maira.maira2.versions import cache_keyword
from sae_lens_maira.memory import free_bytes
from sae_lens_maira.stats import perplexity
from sae_lens_maira.steering.continuation import (
    Continuation,
    Prompt,
    UpperModel,
    padded,
    read_prompts,
    stacked,
)
from sae_lens_maira.steering.engine import Effect, Engine
from sae_lens_maira.steering.interventions import Intervention
from sae_lens_maira.steering.positions import VIEWS
from sae_lens_maira.steering.run import check_point

Value = TypeVar("Value")


@dataclass(frozen=True)
class Job:
    """Studies to steer, and how.

    Attributes:
        which: Indices of studies among the shared prompts.
        interventions: What to do; none writes the unsteered reports.
        control_seed: Replace every change by a random direction of the same norm, drawn with this seed.
    """

    which: Sequence[int]
    interventions: Sequence[Intervention] = ()
    control_seed: int | None = None


@dataclass(frozen=True)
class Written:
    """Reports of one job, in the order of its studies.

    Attributes:
        texts: A report per study.
        ids: Tokens of each report with the end token; a report that was cut has none.
        ratio: Mean |delta| / |h| over the positions that were changed.
        kl: Mean KL(unsteered || steered) over the tokens of the unsteered report, nats; NaN where not measured.
    """

    texts: list[str]
    ids: list[torch.Tensor]
    ratio: float
    kl: list[float]


class ByteCache(Generic[Value]):
    """Values by study index, the least recently used dropped beyond a number of bytes; the newest always stays."""

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self.limit, self.used = limit, 0
        self._size = size
        self._values: OrderedDict[int, Value] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._values

    def get(self, key: int) -> Value | None:
        """The value, or None if it was dropped or never stored."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: int, value: Value) -> None:
        """Store a value and drop old ones."""
        self._values[key] = value
        self.used += self._size(value)
        while self.used > self.limit and len(self._values) > 1:
            self.used -= self._size(self._values.popitem(last=False)[1])


class SharedPrompts:
    """Prompts of studies for the findings report, run up to a hook point when they are first needed.

    Args:
        maira: The model.
        hook_name: `blocks.{i}.hook_resid_post`, where interventions will act.
        studies: The studies.
        budget: Bytes for prompts and batches together, on the model's device; half of the free memory if not given.
            Below the need of one study, studies are steered one at a time.

    Raises:
        InterventionError: The hook point is not a residual stream after a block.
    """

    def __init__(
        self, maira: Maira2, hook_name: str, studies: Sequence[Any], budget: int | None = None
    ) -> None:
        point = PointTable(maira.model.config).resolve(hook_name)
        if not point.name.endswith("hook_resid_post") or point.index is None:
            raise InterventionError(
                f"{hook_name!r} leaves other parts of its own block unchanged, so more than the blocks below it would "
                "have to run again; use blocks.{i}.hook_resid_post, or `steering` without shared prompts."
            )
        self.maira, self.hook_name, self._studies = maira, hook_name, studies
        tokenizer = maira.processor.tokenizer
        self._pad, self._eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
        self._upper = UpperModel(
            maira.model, point.index, point.module, cache_keyword(), self._pad, self._eos
        )
        self.budget = free_bytes(maira.model.device) // 2 if budget is None else budget
        # Two thirds of the budget are stored, one third is for the batch that runs.
        self.prompts: ByteCache[Prompt] = ByteCache(self.budget // 3, lambda prompt: prompt.nbytes)
        self._plain_ids: dict[int, torch.Tensor] = {}
        self._plain_scores: ByteCache[torch.Tensor] = ByteCache(
            self.budget // 3, lambda scores: scores.numel() * scores.element_size()
        )
        self._lengths: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._studies)

    def frontal(self, number: int) -> torch.Tensor:
        """(patches, d_model) stream at the frontal image's patches of one study, row by row."""
        prompt = self._read([number])[0]
        return prompt.hidden[prompt.columns["view"] == VIEWS["frontal"]]

    def write(
        self, which: Sequence[int], interventions: Sequence[Intervention] = (), **options: Any
    ) -> Written:
        """Write the reports of one job; see `write_all`."""
        return self.write_all([Job(which, interventions)], **options)[0]

    @torch.no_grad()
    def write_all(
        self,
        jobs: Sequence[Job],
        sae: SAE[Any] | None = None,
        p99: torch.Tensor | None = None,
        max_new_tokens: int = 120,
        measure_kl: bool = False,
    ) -> list[Written]:
        """Write a report for every study of every job, greedily; rows of several jobs share a batch.

        Args:
            jobs: Studies and interventions.
            sae: SAE whose latents are meant.
            p99: (d_sae,) units.
            max_new_tokens: Maximum length of a report.
            measure_kl: Also compare next-token distributions along the unsteered reports.

        Returns:
            The reports of each job.

        Raises:
            InterventionError: An intervention is impossible, or its schedule never fires.
        """
        if any(job.interventions for job in jobs):
            check_point(self.maira.model, self.hook_name, sae)
        found: list[dict[int, tuple[str, torch.Tensor, float]]] = [{} for _ in jobs]
        effects: list[list[Effect]] = [[] for _ in jobs]
        for batch in self._batches(jobs, sae, p99, max_new_tokens, max_new_tokens if measure_kl else 0):
            segments: list[tuple[int, list[int], Engine | None]] = []
            hidden, masks = [], []
            for number, places in batch:
                job = jobs[number]
                encoding, h = self._padded([job.which[i] for i in places])
                engine = self._engine(job, encoding, sae, p99) if job.interventions else None
                edited = engine(h) if engine is not None else None
                hidden.append(h if edited is None else edited)
                masks.append(encoding.attention_mask)
                segments.append((number, places, engine))
            rows = [jobs[number].which[i] for number, places in batch for i in places]
            # A schedule that reaches the report needs its hook at every step, and has a batch of its own.
            only = segments[0][2] if len(segments) == 1 else None
            run = self._continue(rows, stacked(masks), stacked(hidden), only, max_new_tokens)
            kl = [float("nan")] * len(rows)
            if measure_kl:
                kl = run.kl(*self._unsteered_scores(rows, max_new_tokens))
            texts = iter(zip(run.decode(max_new_tokens).cpu(), kl, strict=True))
            for number, places, engine in segments:
                if engine is not None:
                    engine.require(False)
                    effects[number].append(engine.effect)
                for place in places:
                    ids, divergence = next(texts)
                    text = self.maira.processor.decode_report(ids).text
                    found[number][place] = (text, ids[ids != self._pad], divergence)
        return [_written(parts, moved) for parts, moved in zip(found, effects, strict=True)]

    def _batches(
        self, jobs: Sequence[Job], sae: SAE[Any] | None, p99: torch.Tensor | None, budget: int, scored: int
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Batches as (job, places in it), studies of similar length together."""
        shared: list[tuple[int, int, int]] = []
        for number, job in enumerate(jobs):
            order = sorted((self._length(row), i) for i, row in enumerate(job.which))
            if job.interventions and order:
                first, _ = self._padded([job.which[order[-1][1]]])
                if self._engine(job, first, sae, p99, probe=True).reaches(first.input_ids.shape[1] + budget):
                    for part in self._by_bytes(order, budget, scored):
                        yield [(number, [i for _, i in part])]
                    continue
            shared += [(length, number, i) for length, i in order]
        shared.sort()
        for part in self._by_bytes(shared, budget, scored):
            parts: dict[int, list[int]] = {}
            for _, number, i in part:
                parts.setdefault(number, []).append(i)
            yield list(parts.items())

    def _by_bytes(self, rows: Sequence[Any], budget: int, scored: int = 0) -> Iterator[Sequence[Any]]:
        """Cut rows (length, ...), shortest first, into batches within a third of the budget; one row at least.

        Args:
            rows: Tuples whose first entry is the length of a prompt.
            budget: Tokens that are written after it.
            scored: Tokens whose whole distribution is compared.
        """
        start = 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows):
                needed = (stop + 1 - start) * self._upper.row_bytes(rows[stop][0] + budget, scored)
                if needed > self.budget // 3 or stop - start >= MOST_ROWS:
                    break
                stop += 1
            yield rows[start:stop]
            start = stop

    def _engine(
        self,
        job: Job,
        encoding: Maira2Encoding,
        sae: SAE[Any] | None,
        p99: torch.Tensor | None,
        probe: bool = False,
    ) -> Engine:
        items = list(job.interventions)
        if probe:  # strengths per row belong to the batch that will run, not to this one study
            items = [replace(item, strength=1.0) for item in items]
        width = self.maira.model.config.get_text_config().hidden_size
        return Engine(sae, items, encoding, p99, width, job.control_seed)

    @torch.no_grad()
    def perplexity(
        self, which: Sequence[int], reports: Sequence[str] | Sequence[torch.Tensor]
    ) -> list[float]:
        """Perplexity of a report for each study under the unsteered model.

        A text gets an end token; ids are used unchanged, because a report that was cut has no end token.
        """
        found: dict[int, float] = {}
        ids_of = [self._tokens(report) for report in reports]
        order = sorted((self._length(row) + len(ids_of[i]), i) for i, row in enumerate(which))
        for part in self._by_bytes(order, 0, max(map(len, ids_of), default=0)):
            rows, ids = [which[i] for _, i in part], self._batch([ids_of[i] for _, i in part])
            logp = self._score(rows, ids).gather(-1, ids[..., None])[..., 0]
            found |= dict(zip((i for _, i in part), perplexity(logp, ids != self._pad).tolist(), strict=True))
        return [found[i] for i in range(len(which))]

    @torch.no_grad()
    def unsteered(self, which: Sequence[int], max_new_tokens: int = 120) -> list[str]:
        """The reports without steering; each is written once and kept."""
        return [
            self.maira.processor.decode_report(ids).text for ids in self._unsteered(which, max_new_tokens)
        ]

    @torch.no_grad()
    def unsteered_perplexity(self, which: Sequence[int], max_new_tokens: int = 120) -> list[float]:
        """Perplexity of the unsteered reports."""
        return self.perplexity(which, self._unsteered(which, max_new_tokens))

    def _unsteered(self, which: Sequence[int], budget: int) -> list[torch.Tensor]:
        """Ids of the unsteered reports."""
        missing = sorted(
            (self._length(row), row) for row in dict.fromkeys(which) if row not in self._plain_ids
        )
        for part in self._by_bytes(missing, budget):
            rows = [row for _, row in part]
            encoding, hidden = self._padded(rows)
            run = self._continue(rows, encoding.attention_mask, hidden, None, budget)
            for row, ids in zip(rows, run.decode(budget).cpu(), strict=True):
                self._plain_ids[row] = ids[ids != self._pad]
        return [self._plain_ids[row] for row in which]

    def _unsteered_scores(self, rows: Sequence[int], budget: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T) of the unsteered reports and the log-probabilities (B, T, d_vocab) along them."""
        ids = self._unsteered(rows, budget)
        scores = {row: self._plain_scores.get(row) for row in rows}
        missing = sorted((self._length(row), row) for row, known in scores.items() if known is None)
        for part in self._by_bytes(missing, budget, budget):
            numbers = [row for _, row in part]
            reports = [self._plain_ids[row] for row in numbers]
            for row, report, values in zip(
                numbers, reports, self._score(numbers, self._batch(reports)), strict=True
            ):
                scores[row] = values[: len(report)].clone()
                self._plain_scores.put(row, scores[row])  # pyright: ignore[reportArgumentType] - set above
        kept: list[Any] = [scores[row] for row in rows]
        return self._batch(ids), nn.utils.rnn.pad_sequence(kept, batch_first=True)

    def _score(self, rows: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        """(B, T, d_vocab) unsteered log-probabilities along reports (B, T)."""
        encoding, hidden = self._padded(rows)
        return (
            self._continue(rows, encoding.attention_mask, hidden, None, ids.shape[1])
            .score(ids)
            .log_softmax(-1)
        )

    def _tokens(self, report: str | torch.Tensor) -> torch.Tensor:
        if not isinstance(report, str):
            return report
        tokenizer = self.maira.processor.tokenizer
        return torch.tensor([*tokenizer(report, add_special_tokens=False).input_ids, self._eos])

    def _batch(self, reports: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, T) ids on the model's device, padded on the right."""
        ids = nn.utils.rnn.pad_sequence(list(reports), batch_first=True, padding_value=self._pad)
        return ids.to(self.maira.model.device)

    def _length(self, row: int) -> int:
        if row not in self._lengths:
            self._read(range(row, min(len(self), row + READ_AT_ONCE)))
        return self._lengths[row]

    def _read(self, rows: Sequence[int]) -> list[Prompt]:
        """Prompts of some studies, run where they are not stored."""
        prompts = {row: self.prompts.get(row) for row in rows}
        missing = [row for row, known in prompts.items() if known is None]
        # The length of a prompt is known once it has run: a first study tells how many fit in a batch.
        size = READ_AT_ONCE if self._lengths else 1
        while missing:
            longest = max(self._lengths.values(), default=1)
            fits = max(1, self.budget // 3 // self._upper.row_bytes(longest))
            part, missing = missing[: min(size, fits)], missing[min(size, fits) :]
            size = READ_AT_ONCE
            read = read_prompts(self.maira, [self._studies[row] for row in part], self._upper)
            for row, prompt in zip(part, read, strict=True):
                prompts[row] = prompt
                self._lengths[row] = len(prompt.hidden)
                self.prompts.put(row, prompt)
        return [prompts[row] for row in rows]  # pyright: ignore[reportReturnType] - all are read by now

    def _padded(self, rows: Sequence[int]) -> tuple[Maira2Encoding, torch.Tensor]:
        return padded(self._read(rows), self._pad, self._eos)

    def _continue(
        self,
        rows: Sequence[int],
        mask: torch.Tensor,
        hidden: torch.Tensor,
        engine: Engine | None,
        capacity: int,
    ) -> Continuation:
        return Continuation(self._upper, self._read(rows), mask, hidden, engine, capacity)


MOST_ROWS = 256
"""Rows in a batch at most; larger batches are not faster."""
READ_AT_ONCE = 32
"""Prompts that are run at once at most."""


def _written(parts: dict[int, tuple[str, torch.Tensor, float]], effects: Sequence[Effect]) -> Written:
    rows = [parts[i] for i in range(len(parts))]
    changed = sum(effect.changed for effect in effects)
    ratio = sum(effect.changed * effect.ratio for effect in effects) / max(1, changed)
    return Written([r[0] for r in rows], [r[1] for r in rows], ratio, [r[2] for r in rows])
