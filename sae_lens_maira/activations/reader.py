"""Read activation rows of studies: the one path from studies to rows.

    read_rows(maira, studies, hook_name)     rows in memory, in study order
    RowReader(...).batches(numbers)          rows of one forward after another, at several hook points in one pass

Harvesting to disk, training straight from the model, latents, evaluation and SAELens' store all use it. Which rows a
study gives depends on its id and the settings, never on the other studies of its batch; padding changes values by
rounding only. The forward stops after the last wanted layer, and studies are encoded in threads ahead of the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_lens_maira.activations.prefetch import prefetch
from sae_lens_maira.activations.rows import COLUMNS, SOURCES, ActivationRows, study_order
from sae_lens_maira.activations.sampling import RowSettings, kept_positions, rate_table, within_norms
from sae_lens_maira.errors import StoreError
from sae_lens_maira.hooks._names import PointTable
from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole
from sae_lens_maira.maira2.encoding import last_image_positions
from sae_lens_maira.studies import Study


@dataclass(frozen=True)
class ActivationBatch:
    """Rows of one forward.

    Attributes:
        values: Hook name -> (n, d_in) float32 on the CPU.
        index: n rows of `COLUMNS`.
        studies: Number of studies that were read.
    """

    values: dict[str, torch.Tensor]
    index: pd.DataFrame
    studies: int


class RowReader:
    """Reads rows of studies at hook points.

    Attributes:
        settings: Which rows are kept.
        hooks: Hook name -> d_in.
        stop: Number of decoder layers that a forward runs; None for the whole model.
    """

    def __init__(
        self,
        maira: Maira2 | HookedMaira2,
        studies: Sequence[Study],
        hook_names: Sequence[str],
        settings: RowSettings,
        workers: int = 1,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Check the hook points; the model runs when rows are needed.

        Args:
            maira: Model and processor.
            studies: Any sequence; items are read when needed.
            hook_names: Hook points of the language model's token sequence.
            settings: Which rows are kept.
            workers: Threads that encode ahead of the model; 0 encodes in the caller's thread.
            model_kwargs: Further arguments of the model's forward.

        Raises:
            StoreError: There are no hook points or studies, or a hook point gives no row per token.
            HookError: A hook point is unknown.
        """
        if not hook_names or not len(studies):
            raise StoreError(
                f"{len(hook_names)} hook points and {len(studies)} studies were given; give at least one of each."
            )
        self._hooked = (
            maira if isinstance(maira, HookedMaira2) else HookedMaira2(maira.model, maira.processor)
        )
        self._model, self._processor = maira.model, maira.processor
        self._studies, self._names = studies, list(hook_names)
        self.settings, self._workers = settings, workers
        self._model_kwargs = model_kwargs or {}
        self._table = rate_table(settings.kept)
        points = self._hooked.points
        self.hooks = {name: points.width(name) or 0 for name in self._names}
        wrong = [n for n in self._names if points.resolve(n).prefill_only or not self.hooks[n]]
        if wrong:
            raise StoreError(
                f"{', '.join(wrong)} gives no row of numbers per token, which is what is kept here. Choose a hook "
                "point of the language model's token sequence."
            )
        stops = [points.resolve(name).stop for name in self._names]
        known = [stop for stop in stops if stop is not None]
        self.stop = max(known) if len(known) == len(stops) else None

    def batches(self, numbers: Sequence[int]) -> Iterator[ActivationBatch]:
        """Rows of one forward after another.

        Studies of similar length go through the model together; the batches depend on the set of numbers, not on
        their order.

        Args:
            numbers: Numbers of the studies to read.

        Raises:
            StoreError: A study has no report.
        """
        for chosen, source, encoding in prefetch(self._encodings(numbers), self._workers):
            complete = self._generated(encoding) if SOURCES[source] == "generated" else encoding
            yield self.read(complete, chosen, [self._study_id(i) for i in chosen], source)

    def rows_per_study(self, most: int = 8) -> float:
        """Expected number of kept rows of a study: the largest of a few that are spread over the sequence.

        Args:
            most: Number of studies to encode; the model does not run. A generated report counts with its token limit.
        """
        numbers = sorted({i * len(self._studies) // most for i in range(most)})
        largest = 0.0
        for job in self._encodings(numbers):
            _, source, encoding = job()
            roles = encoding.roles.numpy()
            kept = self._table[roles].sum(axis=1).max()
            if SOURCES[source] == "generated":
                kept += self._table[TokenRole.REPORT] * self.settings.max_new_tokens
            largest = max(largest, float(kept) + 3 * self.settings.last_image)
        return largest * len(self.settings.sources)

    def _study_id(self, number: int) -> str:
        """A study's id; its number if it has none, as plain objects with the fields of a study may not."""
        return getattr(self._studies[number], "study_id", f"study {number}")

    def read(
        self, encoding: Maira2Encoding, numbers: Sequence[int], names: Sequence[str], source: int = 0
    ) -> ActivationBatch:
        """Run one encoded batch through the model and keep its rows.

        Args:
            encoding: B studies, padded on the right or not at all.
            numbers: Their numbers, for the index.
            names: Their ids, which decide the sample.
            source: Number of the source in `SOURCES`.
        """
        with torch.no_grad():
            _, cache = self._hooked.run_with_cache(
                encoding.forward_inputs(),
                names_filter=self._names,
                stop_at_layer=self.stop,
                **self._model_kwargs,
            )
        values = {name: cache[name].flatten(2) for name in self._names}
        cpu = encoding.to("cpu")
        mask = torch.from_numpy(self._mask(cpu, values, names, source))
        row, position = (index.numpy() for index in mask.nonzero(as_tuple=True))
        columns: dict[str, Any] = {
            "study": np.asarray(numbers, dtype=np.int64)[row],
            "position": position.astype(np.int32),
            "role": cpu.roles[mask].numpy(),
            "token": cpu.input_ids[mask].numpy().astype(np.int32),
            "view": cpu.view[mask].numpy(),
            "patch_row": cpu.patch_row[mask].numpy(),
            "patch_col": cpu.patch_col[mask].numpy(),
            "source": np.full(len(row), source, dtype=np.int8),
        }
        kept = {name: value[mask.to(value.device)].float().cpu() for name, value in values.items()}
        return ActivationBatch(kept, pd.DataFrame(columns), len(numbers))

    def ordered(self, parts: Sequence[ActivationBatch]) -> ActivationBatch:
        """Batches as one, sorted by study, source and position."""
        index = pd.concat([part.index for part in parts], ignore_index=True).loc[:, list(COLUMNS)]
        order = study_order(index)
        turned = torch.from_numpy(order)
        values = {name: torch.cat([part.values[name] for part in parts])[turned] for name in self._names}
        return ActivationBatch(values, index.iloc[order], sum(part.studies for part in parts))

    def _encodings(self, numbers: Sequence[int]) -> Iterator[partial[tuple[list[int], int, Maira2Encoding]]]:
        """One encoding job per batch and source."""
        lengths = {i: study_length(self._studies[i]) for i in numbers}
        if 0 in self.settings.sources:
            lacking = [i for i in numbers if not self._studies[i].report]
            if lacking:
                raise StoreError(
                    f"{len(lacking)} studies have no report, the first is {self._study_id(lacking[0])}. "
                    "Leave them out, or use reports='generated'."
                )
        order = sorted(numbers, key=lambda i: (lengths[i], i))
        for start in range(0, len(order), self.settings.batch_size):
            chosen = order[start : start + self.settings.batch_size]
            for source in self.settings.sources:
                yield partial(self._encode, chosen, source)

    def _encode(self, chosen: list[int], source: int) -> tuple[list[int], int, Maira2Encoding]:
        batch = [self._studies[i] for i in chosen]
        report: Any = "teacher" if SOURCES[source] == "teacher" else None
        side: Any = (
            "left" if SOURCES[source] == "generated" else "right"
        )  # the model writes after the last column
        processor: Any = self._processor
        encoding = processor.encode(batch, task=self.settings.task, report=report, padding_side=side)
        self._refuse_long(encoding, chosen)
        return chosen, source, encoding

    def _refuse_long(self, encoding: Maira2Encoding, chosen: Sequence[int]) -> None:
        """StoreError if a study's text alone is longer than the model's context; three images alone may be."""
        config: Any = self._model.config
        most = int(config.get_text_config().max_position_embeddings)
        lengths = (encoding.attention_mask.bool() & (encoding.roles != TokenRole.IMAGE)).sum(1).tolist()
        for number, length in zip(chosen, lengths, strict=True):
            if length > most:
                raise StoreError(
                    f"The text of study {self._study_id(number)} has {length:,} tokens, and the model's context is "
                    f"{most:,}. Shorten its report or its sections, or leave the study out."
                )

    @torch.no_grad()
    def _generated(self, prompts: Maira2Encoding) -> Maira2Encoding:
        """Left-padded prompts with the reports that the model writes greedily, padded on the right.

        The ids are the generated ones, never text that was tokenized again.
        """
        model: Any = self._model
        prompt = prompts.to(model.device, model.dtype)
        output = model.generate(
            **prompt.model_inputs(),
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,
            pad_token_id=prompt.pad_token_id,
            eos_token_id=prompt.eos_token_id,
        )
        return _padded_right(prompt.extend(output[:, prompt.input_ids.shape[1] :]))

    def _mask(
        self, cpu: Maira2Encoding, values: dict[str, torch.Tensor], names: Sequence[str], source: int
    ) -> np.ndarray:
        """(B, L) True at kept positions.

        Args:
            cpu: The encoding on the CPU.
            values: Hook name -> (B, L, d_in).
            names: Study ids.
            source: Number of the source.
        """
        settings = self.settings
        roles = cpu.roles.numpy()
        limited = settings.max_norm is not None or settings.max_norm_ratio is not None
        norms = [
            torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32).cpu() for v in values.values() if limited
        ]
        last = last_image_positions(cpu.image_index).numpy() & settings.last_image
        keep = np.zeros(roles.shape, dtype=bool)
        for row, (length, name) in enumerate(zip(cpu.attention_mask.sum(1).tolist(), names, strict=True)):
            mine = roles[row, :length]
            sampled = kept_positions(mine, self._table, settings.seed, name, source) | last[row, :length]
            candidates = (self._table[mine] > 0) | last[row, :length]
            for norm in norms:
                sampled &= within_norms(norm[row, :length], candidates, mine == TokenRole.IMAGE, settings)
            keep[row, :length] = sampled
        return keep


def _padded_right(encoding: Maira2Encoding) -> Maira2Encoding:
    """Move the padding of every row from the left to the right, so that a row's column is its position."""
    padding = (encoding.attention_mask.cumsum(1) == 0).sum(1).tolist()
    moved: dict[str, Any] = {}
    for column in fields(encoding):
        value = getattr(encoding, column.name)
        if isinstance(value, torch.Tensor) and column.name != "pixel_values":
            moved[column.name] = torch.stack(
                [row.roll(-shift) for row, shift in zip(value, padding, strict=True)]
            )
    return replace(encoding, **moved)


def study_length(study: Study) -> tuple[int, int]:
    """Number of images and of characters of text, by which studies are sorted into batches."""
    images = sum(image is not None for image in (study.frontal, study.lateral, study.prior_frontal))
    texts = (study.indication, study.technique, study.comparison, study.prior_report, study.report)
    return images, sum(len(text or "") for text in texts)


def read_rows(
    maira: Maira2 | HookedMaira2,
    studies: Sequence[Study],
    hook_name: str,
    settings: RowSettings | None = None,
    *,
    progress: bool = True,
    workers: int = 1,
) -> ActivationRows:
    """Run studies through the model and keep activations in memory. For more than fits there, use `harvest`.

    Args:
        maira: Model and processor.
        studies: The studies to read.
        hook_name: Hook point, for example `blocks.15.hook_resid_post`.
        settings: Which rows are kept; `RowSettings()` if not given.
        progress: Show a progress bar.
        workers: Threads that encode ahead of the model.

    Returns:
        The rows, by study and position.

    Raises:
        StoreError: Nothing was kept, a study has no report, or both kinds of report were requested.
    """
    settings = settings or RowSettings()
    if len(settings.sources) > 1:
        raise StoreError(
            "reports='both' gives two sets of rows per study, which rows in memory do not tell apart. Read 'teacher' "
            "and 'generated' one after the other, or harvest to a store."
        )
    reader = RowReader(maira, studies, [hook_name], settings, workers)
    parts = []
    with tqdm(
        total=len(studies), desc=f"activations at {hook_name}", unit="study", disable=not progress
    ) as bar:
        for part in reader.batches(range(len(studies))):
            parts.append(part)
            bar.update(part.studies)
    whole = reader.ordered(parts)
    if not len(whole.index):
        raise StoreError(
            f"Nothing was kept: no position of {len(studies)} studies passes roles={settings.roles!r} and the limits "
            "on norms. Choose other roles, or give studies with reports."
        )
    columns = {name: whole.index[name].to_numpy(copy=True) for name in COLUMNS if name != "source"}
    return ActivationRows(values=whole.values[hook_name], hook_name=hook_name, **columns)


def layer_of(config: Any, hook_name: str) -> int:
    """Decoder layer of a hook point of a model with this configuration; -1 for points after the last layer."""
    stop = PointTable(config).resolve(hook_name).stop
    return -1 if stop is None else int(stop) - 1


__all__ = ["ActivationBatch", "RowReader", "layer_of", "read_rows", "study_length"]
