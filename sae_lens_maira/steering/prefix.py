"""One prompt, many interventions: what lies below the hook point is computed once and shared by a whole sweep.

    once a study      h (L, d_model) at blocks.i.hook_resid_post, keys and values of every block over the prompt
    an intervention   blocks i+1.. over the edited h, then greedy decoding with a cache

An intervention on a residual stream changes nothing below it, so a sweep needs the films, the projector and the lower
blocks only once. The tokens are those that `generate` writes under the same interventions. Rows that have ended leave
the batch. It holds 2 L layers d_model numbers a study and knows nothing about what reports say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens import SAE
from torch import nn

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.hooks import PointTable
from sae_lens_maira.maira2 import Maira2, Maira2Encoding
from sae_lens_maira.maira2.versions import cache_keyword
from sae_lens_maira.stats import perplexity
from sae_lens_maira.steering.apply import check_point
from sae_lens_maira.steering.continuation import Continuation, UpperModel
from sae_lens_maira.steering.engine import Effect, Engine
from sae_lens_maira.steering.interventions import Intervention
from sae_lens_maira.steering.prompt_cache import Prompt
from sae_lens_maira.steering.prompt_reading import padded, read_prompts, stacked
from sae_lens_maira.steering.schedule import KINDS


@dataclass(frozen=True)
class Job:
    """Studies to steer, and how.

    Attributes:
        which: numbers of studies among the shared prompts.
        interventions: what to do; none writes the unsteered reports.
    """

    which: Sequence[int]
    interventions: Sequence[Intervention] = ()


@dataclass(frozen=True)
class Written:
    """What one job wrote, in the order of its studies.

    Attributes:
        texts: a report a study.
        ids: the tokens of each, the closing one included; a report that was cut has none.
        ratio: mean |delta| / |h| over the positions that were changed.
        kl: mean KL(unsteered || steered) over the unsteered report's tokens, nats; NaN where it was not measured.
    """

    texts: list[str]
    ids: list[torch.Tensor]
    ratio: float
    kl: list[float]


class SharedPrompts:
    """Prompts of studies, run once up to the end of the model and kept.

    Args:
        maira: the model.
        hook_name: `blocks.{i}.hook_resid_post`, where interventions will act.
        studies: their prompts for the findings report are kept.
        batch_size: studies a pass.

    Raises:
        InterventionError: another kind of hook point.
    """

    def __init__(self, maira: Maira2, hook_name: str, studies: Sequence[Any], batch_size: int = 32) -> None:
        point = PointTable(maira.model.config).resolve(hook_name)
        if not point.name.endswith("hook_resid_post") or point.index is None:
            raise InterventionError(
                f"{hook_name!r} leaves other parts of its own block untouched, so the blocks below it are not all that "
                "is shared; use blocks.{i}.hook_resid_post, or `steering` without shared prompts."
            )
        self.maira, self.hook_name = maira, hook_name
        tokenizer = maira.processor.tokenizer
        self._pad, self._eos = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
        self._upper = UpperModel(
            maira.model, point.index, point.module, cache_keyword(), self._pad, self._eos
        )
        self._prompts: list[Prompt] = []
        self._plain: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for start in range(0, len(studies), batch_size):
            self._prompts += read_prompts(maira, list(studies[start : start + batch_size]), self._upper)

    def __len__(self) -> int:
        return len(self._prompts)

    def frontal(self, number: int) -> torch.Tensor:
        """(patches, d_model) the stream at the frontal film's patches of one study, row by row."""
        prompt = self._prompts[number]
        return prompt.hidden[prompt.columns["view"] == KINDS["frontal"]]

    def write(
        self, which: Sequence[int], interventions: Sequence[Intervention] = (), **options: Any
    ) -> Written:
        """One job; see `write_all`."""
        return self.write_all([Job(which, interventions)], **options)[0]

    @torch.no_grad()
    def write_all(
        self,
        jobs: Sequence[Job],
        sae: SAE[Any] | None = None,
        p99: torch.Tensor | None = None,
        max_new_tokens: int = 120,
        batch_size: int = 128,
        measure_kl: bool = False,
    ) -> list[Written]:
        """Write a report for every study of every job, greedily; rows of several jobs share a batch.

        Args:
            jobs: studies and interventions.
            sae: whose latents.
            p99: (d_sae,) units.
            max_new_tokens: budget.
            batch_size: rows a batch.
            measure_kl: also compare next-token distributions along the unsteered reports.

        Returns:
            What each job wrote.

        Raises:
            InterventionError: an intervention that is impossible, or whose schedule never fires.
        """
        if any(job.interventions for job in jobs):
            check_point(self.maira.model, self.hook_name, sae)
        found: list[dict[int, tuple[str, torch.Tensor, float]]] = [{} for _ in jobs]
        moved: list[list[Effect]] = [[] for _ in jobs]
        for batch in self._batches(jobs, batch_size, sae, p99, max_new_tokens):
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
            # A schedule that reaches the report needs its hook at every step, and has its batch to itself.
            only = segments[0][2] if len(segments) == 1 else None
            run = self._go_on(rows, stacked(masks), stacked(hidden), only, max_new_tokens)
            kl = [float("nan")] * len(rows)
            if measure_kl:
                kl = run.kl(*self._unsteered(rows, max_new_tokens))
            texts = iter(zip(run.decode(max_new_tokens), kl, strict=True))
            for number, places, engine in segments:
                if engine is not None:
                    engine.require(False)
                    moved[number].append(engine.effect)
                for place in places:
                    ids, divergence = next(texts)
                    text = self.maira.processor.decode_report(ids).text
                    found[number][place] = (text, ids[ids != self._pad], divergence)
        return [_written(parts, effects) for parts, effects in zip(found, moved, strict=True)]

    def _batches(
        self,
        jobs: Sequence[Job],
        size: int,
        sae: SAE[Any] | None,
        p99: torch.Tensor | None,
        budget: int,
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Batches as (job, places in it); studies of like length stand together."""
        shared: list[tuple[int, int, int]] = []
        for number, job in enumerate(jobs):
            order = sorted((len(self._prompts[row].hidden), i) for i, row in enumerate(job.which))
            if job.interventions and order:
                first, _ = self._padded([job.which[order[-1][1]]])
                if self._engine(job, first, sae, p99, probe=True).reaches(first.input_ids.shape[1] + budget):
                    for start in range(0, len(order), size):
                        yield [(number, [i for _, i in order[start : start + size]])]
                    continue
            shared += [(length, number, i) for length, i in order]
        shared.sort()
        for start in range(0, len(shared), size):
            parts: dict[int, list[int]] = {}
            for _, number, i in shared[start : start + size]:
                parts.setdefault(number, []).append(i)
            yield list(parts.items())

    def _engine(
        self,
        job: Job,
        encoding: Maira2Encoding,
        sae: SAE[Any] | None,
        p99: torch.Tensor | None,
        probe: bool = False,
    ) -> Engine:
        items = list(job.interventions)
        if probe:  # strengths a row are of the batch that will run, not of this one study
            items = [replace(item, strength=1.0) for item in items]
        return Engine(sae, items, encoding, p99, self.maira.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def perplexity(
        self, which: Sequence[int], reports: Sequence[str] | Sequence[torch.Tensor], batch_size: int = 64
    ) -> list[float]:
        """Exp of the mean negative log-probability of each report's tokens, without steering.

        A text is closed; written ids are taken as they are, since a report that was cut has no closing token.
        """
        found: dict[int, float] = {}
        order = sorted(range(len(which)), key=lambda i: len(self._prompts[which[i]].hidden))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = [which[i] for i in places]
            ids = self._tokens([reports[i] for i in places])
            encoding, _ = self._padded(rows)
            run = self._go_on(rows, encoding.attention_mask, None, None, ids.shape[1])
            logp = run.score(ids).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            kept = ids != self._pad
            found |= dict(zip(places, perplexity(logp, kept).tolist(), strict=True))
        return [found[i] for i in range(len(which))]

    @torch.no_grad()
    def unsteered(self, which: Sequence[int], max_new_tokens: int = 120) -> list[str]:
        """The reports without steering; each is written once, and kept."""
        return [
            self.maira.processor.decode_report(ids).text for ids in self._unsteered(which, max_new_tokens)[0]
        ]

    def unsteered_perplexity(self, which: Sequence[int], max_new_tokens: int = 120) -> list[float]:
        """Perplexity of the unsteered reports."""
        ids, logp = self._unsteered(which, max_new_tokens)
        kept = ids != self._pad
        return perplexity(logp.gather(-1, ids[..., None])[..., 0], kept).tolist()

    def _tokens(self, reports: Sequence[str | torch.Tensor]) -> torch.Tensor:
        """(B, T) ids, padded on the right; texts get their closing token."""
        tokenizer = self.maira.processor.tokenizer
        rows = [
            torch.tensor([*tokenizer(report, add_special_tokens=False).input_ids, self._eos])
            if isinstance(report, str)
            else report
            for report in reports
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)

    def _unsteered(self, rows: Sequence[int], budget: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T) of the unsteered reports and the log-probabilities (B, T, d_vocab) along them, kept by study."""
        missing = [row for row in rows if row not in self._plain]
        if missing:
            encoding, hidden = self._padded(missing)
            mask = encoding.attention_mask
            ids = self._go_on(missing, mask, hidden, None, budget).decode(budget)
            run = self._go_on(missing, mask, None, None, ids.shape[1])
            logp = run.score(ids).log_softmax(-1)
            for row, written, scores in zip(missing, ids, logp, strict=True):
                n = int((written != self._pad).sum())
                self._plain[row] = (written[:n], scores[:n])
        kept = [self._plain[row] for row in rows]
        ids = nn.utils.rnn.pad_sequence([k[0] for k in kept], batch_first=True, padding_value=self._pad)
        logp = nn.utils.rnn.pad_sequence([k[1] for k in kept], batch_first=True)
        return ids, logp

    def _padded(self, rows: Sequence[int]) -> tuple[Maira2Encoding, torch.Tensor]:
        return padded([self._prompts[row] for row in rows], self._pad, self._eos)

    def _go_on(
        self,
        rows: Sequence[int],
        mask: torch.Tensor,
        hidden: torch.Tensor | None,
        engine: Engine | None,
        room: int,
    ) -> Continuation:
        return Continuation(self._upper, [self._prompts[row] for row in rows], mask, hidden, engine, room)


def _written(parts: dict[int, tuple[str, torch.Tensor, float]], effects: Sequence[Effect]) -> Written:
    rows = [parts[i] for i in range(len(parts))]
    changed = sum(effect.changed for effect in effects)
    ratio = sum(effect.changed * effect.ratio for effect in effects) / max(1, changed)
    return Written([r[0] for r in rows], [r[1] for r in rows], ratio, [r[2] for r in rows])
