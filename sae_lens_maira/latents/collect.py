"""Latent records from studies and an SAE, in two passes over the same blocks of rows.

    pass 1   statistics of all latents; they name the studies that each latent's contexts come from
    pass 2   contexts of those studies, spooled to disk; then one record per latent, written as it is made

Memory holds the statistics and one block. `blocks` may read a store or run the model anew; it must give the same
rows both times. It knows nothing about interpretation.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_lens_maira.activations import ActivationRows, harvest_rows, layer_of
from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.assembly import RecordBuilder, level_of_latents
from sae_lens_maira.latents.contexts import ContextSpool, build_context, study_text
from sae_lens_maira.latents.entries import Pseudonyms, save_images, study_entry
from sae_lens_maira.latents.records import POSITION_KINDS, RecordsMeta
from sae_lens_maira.latents.recordset import RecordSet, write_records
from sae_lens_maira.latents.relations import Relations, token_weights
from sae_lens_maira.latents.streaming import LatentStatistics
from sae_lens_maira.maira2 import Maira2, TokenRole
from sae_lens_maira.sae import level_widths_of
from sae_lens_maira.studies import Licence, Study

Blocks = Callable[[], Iterable[ActivationRows]]
KEPT = tuple(
    role
    for role in TokenRole
    if role not in (TokenRole.PAD, TokenRole.BOS, TokenRole.TEMPLATE, TokenRole.SEPARATOR)
)


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to keep.

    Attributes:
        model, sae, control: names for the record set's meta; control is "trained", "untrained" or "raw".
        latents: write records of these only; all if None. Statistics and neighbours always see all.
        top: contexts of largest activation.
        intervals: octaves of activation, highest first, that get contexts.
        per_interval: contexts of each.
        zero: contexts of studies in which the latent never fires.
        min_studies: fewer active studies make a latent "rare".
        tokens: output tokens at either end.
        findings: findings of highest F1 per kind of position.
        neighbours: of each relation.
        sample_rows: rows per kind on which co-firing is measured.
        keep_images: copy images also of credentialed studies; None copies those of the others only.
        image_side: largest side of a copied image in pixels.
        chunk: rows encoded at once.
        salt: of pseudonyms; drawn anew and not kept if None.
        seed: of every draw.
    """

    model: str = "phantom"
    sae: str = ""
    control: str = "trained"
    latents: tuple[int, ...] | None = None
    top: int = 20
    intervals: int = 5
    per_interval: int = 5
    zero: int = 20
    min_studies: int = 10
    tokens: int = 10
    findings: int = 5
    neighbours: int = 5
    sample_rows: int = 4096
    keep_images: bool | None = None
    image_side: int = 256
    chunk: int = 2048
    salt: str | None = None
    seed: int = 0


def harvested_blocks(
    maira: Maira2, studies: Sequence[Study], hook_name: str, roles: Any = KEPT, studies_per_block: int = 32
) -> Blocks:
    """Blocks that run the model anew in each pass: time twice, no disk."""

    def blocks() -> Iterator[ActivationRows]:
        for start in range(0, len(studies), studies_per_block):
            part = studies[start : start + studies_per_block]
            rows = harvest_rows(maira, part, hook_name, roles=roles, progress=False)
            rows.study[:] += start
            yield rows

    return blocks


def collect_records(
    blocks: Blocks,
    studies: Sequence[Study],
    sae: SAE[Any],
    maira: Maira2,
    out: Path | str,
    config: CollectConfig | None = None,
    labels: Callable[[Study], Iterable[str] | None] | None = None,
    findings: Sequence[str] | None = None,
) -> RecordSet:
    """Collect the records of an SAE's latents and write them.

    Args:
        blocks: gives the rows, whole studies in ascending order, numbered as in `studies`; called twice.
        studies: the studies with their reports.
        sae: any SAELens SAE with a decoder `W_dec` (d_sae, d_in).
        maira: the model, for its tokenizer, final norm and `lm_head`.
        out: folder of the record set.
        config: what to keep.
        labels: finding keys of a study by rules, None where unknown; the studies' own truth if not given.
        findings: keys to measure agreement for; all that occur if not given.

    Returns:
        The record set, opened.

    Raises:
        RecordError: rows do not fit the studies or the SAE, or the two passes differ.
    """
    config, out = config or CollectConfig(), Path(out)
    known = [_labels(study, labels) for study in studies]
    keys = (
        tuple(findings)
        if findings is not None
        else tuple(sorted({key for own in known if own is not None for key in own}))
    )
    truth = np.array([[key in (own or ()) for key in keys] for own in known], dtype=bool)
    d_sae, side = int(sae.cfg.d_sae), maira.processor.patches_per_side
    statistics = LatentStatistics(
        d_sae,
        (side, side),
        truth.reshape(len(studies), len(keys)),
        np.array([own is not None for own in known], dtype=bool),
        top=config.top,
        per_octave=config.per_interval,
        zero=config.zero,
        sample_rows=config.sample_rows,
        seed=config.seed,
    )
    hook_name = ""
    for rows in blocks():
        if len(rows) and rows.study.max() >= len(studies):
            raise RecordError(
                f"Rows name study {rows.study.max()}, and {len(studies)} studies were given; blocks number studies "
                "as in that sequence. Give the same studies to both."
            )
        hook_name = rows.hook_name
        statistics.update(rows, encode_sparse(sae, rows.values, config.chunk))
    if not statistics.n_studies:
        raise RecordError(
            "The blocks held no rows, so there is nothing to record; give studies with reports."
        )

    latents = list(range(d_sae)) if config.latents is None else sorted(set(config.latents))
    if latents and not 0 <= latents[0] <= latents[-1] < d_sae:
        raise RecordError(
            f"Latents {latents[0]} to {latents[-1]} were asked of {d_sae}; choose from 0 to {d_sae - 1}."
        )
    decoder = sae.W_dec.detach().cpu().float()
    widths = level_widths_of(sae)
    levels = level_of_latents(widths, d_sae)
    builder = RecordBuilder(statistics, keys, levels, config)
    wanted = builder.wanted(latents)
    names = Pseudonyms(config.salt)
    by = "truth" if labels is None else "rule_labels"
    with tempfile.TemporaryDirectory(prefix="contexts-") as scratch:
        spool = ContextSpool(Path(scratch))
        _spool_contexts(blocks(), studies, sae, maira, wanted, builder, names, spool, config.chunk)
        gain, unembed = _readout(maira)
        relations = Relations(statistics.samples, decoder, levels).of(latents, config.neighbours)
        tokens = _tokens(maira, decoder[latents], gain, unembed, config.tokens)
        records = (
            builder.build(latent, contexts, near, words)
            for (latent, contexts), near, words in zip(spool.shards(latents), relations, tokens, strict=True)
        )
        entries = (
            study_entry(
                studies[i],
                names,
                sorted(known[i] or ()),
                by if known[i] is not None else "",
                save_images(studies[i], names.study(studies[i]), out, config.image_side)
                if _keeps(studies[i], config)
                else (),
            )
            for i in sorted(wanted)
        )
        meta = RecordsMeta(
            model=config.model,
            hook_name=hook_name,
            layer=layer_of(maira, hook_name),
            sae=config.sae,
            control=config.control,
            d_in=int(sae.cfg.d_in),
            d_sae=d_sae,
            level_widths=tuple(widths),
            rows_text=int(statistics.rows[0]),
            rows_image=int(statistics.rows[1]),
            studies=statistics.n_studies,
            findings=keys,
            seed=config.seed,
            versions=_versions(),
        )
        return write_records(out, meta, entries, records)


@torch.no_grad()
def encode_sparse(sae: SAE[Any], values: torch.Tensor, chunk: int) -> torch.Tensor:
    """Activations (n, d_sae) of rows (n, d_in), sparse, encoded `chunk` rows at a time on the SAE's device."""
    dtype = sae.W_dec.dtype
    parts = [sae.encode(part.to(sae.device, dtype)).cpu().to_sparse() for part in values.split(chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, int(sae.cfg.d_sae)).to_sparse()


@torch.no_grad()
def _spool_contexts(
    blocks: Iterable[ActivationRows],
    studies: Sequence[Study],
    sae: SAE[Any],
    maira: Maira2,
    wanted: dict[int, list[int]],
    builder: RecordBuilder,
    names: Pseudonyms,
    spool: ContextSpool,
    chunk: int,
) -> None:
    found: set[int] = set()
    for block in blocks:
        for study in np.unique(block.study).tolist():
            if study not in wanted:
                continue
            found.add(study)
            rows = block.where(block.study == study)
            latents = wanted[study]
            parts = [
                sae.encode(part.to(sae.device, sae.W_dec.dtype))[:, latents].float().cpu()
                for part in rows.values.split(chunk)
            ]
            acts = torch.cat(parts).numpy()
            text, name = study_text(maira.processor, studies[study]), names.study(studies[study])
            spool.add(
                study,
                {
                    latent: build_context(name, text, rows, acts[:, i], builder.grid, builder.kind_of(latent))
                    for i, latent in enumerate(latents)
                },
            )
    if found != set(wanted):
        raise RecordError(
            f"The second pass over the blocks lacked {len(set(wanted) - found)} studies that the first one had; "
            "`blocks` must give the same rows whenever it is called."
        )


def _labels(study: Study, labels: Callable[[Study], Iterable[str] | None] | None) -> frozenset[str] | None:
    if labels is None:
        return None if study.truth is None else study.present_keys
    own = labels(study)
    return None if own is None else frozenset(own)


def _keeps(study: Study, config: CollectConfig) -> bool:
    return study.licence != Licence.CREDENTIALED if config.keep_images is None else config.keep_images


def _readout(maira: Maira2) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain of the final norm (d_in,) and weight of `lm_head` (vocabulary, d_in), on the CPU."""
    norm = maira.model.get_submodule("model.language_model.norm").get_parameter("weight")
    return norm.detach().cpu(), maira.model.lm_head.weight.detach().cpu()


def _tokens(
    maira: Maira2, decoder: torch.Tensor, gain: torch.Tensor, unembed: torch.Tensor, n: int
) -> Iterator[tuple[list[tuple[str, int, float]], list[tuple[str, int, float]]]]:
    weights, ids = token_weights(decoder, gain, unembed, n)
    spelled = maira.processor.tokenizer.convert_ids_to_tokens
    for weight, token in zip(weights.tolist(), ids.tolist(), strict=True):
        up, down = (
            [(spelled(i) or f"<{i}>", i, w) for i, w in zip(t, v, strict=True)]
            for t, v in zip(token, weight, strict=True)
        )
        yield up, down


def _versions() -> dict[str, str]:
    found = {}
    for name in ("sae-lens-maira", "sae-lens", "transformers", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


__all__ = [
    "KEPT",
    "POSITION_KINDS",
    "Blocks",
    "CollectConfig",
    "collect_records",
    "encode_sparse",
    "harvested_blocks",
]
