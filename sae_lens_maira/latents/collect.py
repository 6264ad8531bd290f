"""Collect latent records from studies and an SAE, in two passes over the same rows.

    pass 1   statistics of all latents; they determine the studies that each latent's contexts come from
    pass 2   activations of those latents in those studies, spooled to disk; then one record per latent

Memory contains the statistics and one block of rows, for any number of studies. Several processes can share the passes,
and a killed process continues from the work folder; the records are the same. Images of credentialed studies are copied
only on request.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_lens_maira.activations import layer_of
from sae_lens_maira.distributed import Ranks
from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import locked
from sae_lens_maira.latents.assembly import (
    CollectConfig,
    RecordBuilder,
    Relations,
    level_of_latents,
    token_weights,
)
from sae_lens_maira.latents.contexts import TEXTS, Pseudonyms, StudyTexts, make_context
from sae_lens_maira.latents.passes import (
    ContextReader,
    Wanted,
    count,
    fingerprint_of_ids,
    read_activations,
    spool,
)
from sae_lens_maira.latents.records import LatentRecord, RecordsMeta, StudyInfo
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.latents.source import ActivationSource
from sae_lens_maira.latents.statistics import LatentStatistics
from sae_lens_maira.latents.workdir import Workdir
from sae_lens_maira.latents.writing import write_records
from sae_lens_maira.maira2 import Maira2, OutputHead
from sae_lens_maira.maira2.images import centre_crop
from sae_lens_maira.privacy import is_shareable, private_files
from sae_lens_maira.sae import fingerprint, level_widths_of
from sae_lens_maira.studies import Study
from sae_lens_maira.token_roles import VIEWS

Labels = Callable[[Study], Iterable[str] | None]


def collect_records(
    source: ActivationSource,
    studies: Sequence[Study],
    sae: SAE[Any],
    maira: Maira2 | OutputHead,
    out: Path | str,
    config: CollectConfig | None = None,
    labels: Labels | None = None,
    findings: Sequence[str] | None = None,
    ranks: Ranks | None = None,
) -> RecordSet:
    """Collect the records of an SAE's latents and write them, or continue after a kill.

    Args:
        source: Shards of rows, whole studies in ascending order, numbered as in `studies`; read twice.
        studies: Studies with reports.
        sae: Any SAELens SAE with a decoder `W_dec` (d_sae, d_in).
        maira: Model, or only its tokenizer, final norm and `lm_head`.
        out: Folder of the record set.
        config: Settings of the collection.
        labels: Function from a study to its finding keys, None where they are unknown; the truth of the studies if not
            given.
        findings: Finding keys for which agreement is measured; all keys that occur if not given.
        ranks: Processes that share the passes, all with the same arguments; rank 0 writes the records. One process if
            not given.

    Returns:
        The record set, opened.

    Raises:
        RecordError: Rows do not match the studies or the SAE, the two passes differ, or the folder contains an
            unfinished collection with other settings.
        RankError: Another rank failed or died.
        LockError: Another process writes to the folder.
    """
    ranks = ranks or Ranks()
    # All ranks together own the folder; rank 0 locks it.
    with nullcontext() if ranks.rank else locked(out):
        return _collect(
            source, studies, sae, maira, Path(out), config or CollectConfig(), labels, findings, ranks
        )


def _collect(
    source: ActivationSource,
    studies: Sequence[Study],
    sae: SAE[Any],
    maira: Maira2 | OutputHead,
    out: Path,
    config: CollectConfig,
    labels: Labels | None,
    findings: Sequence[str] | None,
    ranks: Ranks,
) -> RecordSet:
    """Implement `collect_records` while the folder is locked."""
    head = maira if isinstance(maira, OutputHead) else OutputHead.of(maira)
    d_sae, side = int(sae.cfg.d_sae), head.processor.patches_per_side
    latents = list(range(d_sae)) if config.latents is None else sorted(set(config.latents))
    if latents and not 0 <= latents[0] <= latents[-1] < d_sae:
        raise RecordError(
            f"Latents {latents[0]} to {latents[-1]} were requested, but the SAE has {d_sae}; choose from 0 to "
            f"{d_sae - 1}."
        )
    keys, truth, labelled = _truth(studies, labels, findings)
    place = Workdir(out, _plan(source, studies, sae, config, keys, truth), ranks, config.salt)

    def make() -> LatentStatistics:
        return LatentStatistics(
            d_sae,
            (side, side),
            truth,
            labelled,
            top=config.top,
            per_octave=config.per_interval,
            zero=config.zero,
            sample_rows=config.sample_rows,
            seed=config.seed,
            map_bytes=config.map_bytes,
        )

    bars = config.progress and ranks.rank == 0
    statistics, hook_name = count(
        source, len(studies), sae, make, place, config.chunk, config.save_seconds, bars
    )
    widths = level_widths_of(sae)
    builder = RecordBuilder(statistics, keys, level_of_latents(widths, d_sae), config)
    wanted = Wanted([(latent, builder.wanted(latent)) for latent in latents], d_sae)
    names = Pseudonyms(place.salt)
    reader = ContextReader(studies, sae, head.processor, wanted, names, builder.grid, config.chunk)
    spool(source, reader, place, config.save_seconds, bars)
    if ranks.rank == 0:
        meta = RecordsMeta(
            model=config.model,
            hook_name=hook_name,
            layer=layer_of(head.config, hook_name),
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
            sae_fingerprint=fingerprint(sae),
        )
        entries = _entries(studies, wanted, names, labels, out, config)
        texts = StudyTexts(*(place.contexts(other) / TEXTS for other in range(ranks.size)))
        records = _records(studies, latents, builder, place, texts, names, sae, head, config)
        ordered = (texts[names.study(studies[number])] for number in wanted.studies.tolist())
        write_records(out, meta, entries, ordered, records, statistics.maps)
    place.close()
    return RecordSet.open(out)


def _truth(
    studies: Sequence[Study], labels: Labels | None, findings: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Finding keys, truth (n, F) and whether a study is labelled (n,)."""
    known = [_labels(study, labels) for study in studies]
    labelled = np.array([own is not None for own in known], dtype=bool)
    occurring = sorted({key for own in known if own is not None for key in own})
    keys = tuple(findings) if findings is not None else tuple(occurring)
    truth = np.array([[key in (own or ()) for key in keys] for own in known], dtype=bool)
    return keys, truth.reshape(len(studies), len(keys)), labelled


def _plan(
    source: ActivationSource,
    studies: Sequence[Study],
    sae: SAE[Any],
    config: CollectConfig,
    keys: tuple[str, ...],
    truth: np.ndarray,
) -> dict[str, Any]:
    """Everything that determines the records. A control is fitted on rows, whose last bits may differ between
    processes.
    """
    chosen = dataclasses.asdict(config)
    for name in ("salt", "save_seconds", "progress", "chunk"):
        del chosen[name]
    shape = [int(sae.cfg.d_in), int(sae.cfg.d_sae)]
    return {
        "settings": chosen,
        "rows": getattr(source, "about", None),
        "shards": len(source),
        "studies": fingerprint_of_ids([study.study_id for study in studies]),
        "findings": [keys, int(truth.sum())],
        "weights of the SAE": fingerprint(sae) if config.control == "trained" else shape,
    }


def _records(
    studies: Sequence[Study],
    latents: list[int],
    builder: RecordBuilder,
    place: Workdir,
    texts: StudyTexts,
    names: Pseudonyms,
    sae: SAE[Any],
    head: OutputHead,
    config: CollectConfig,
) -> Iterator[LatentRecord]:
    """Yield records one by one, from the activations and texts that all processes wrote."""
    folders = [place.contexts(rank) for rank in range(place.world)]
    decoder = sae.W_dec.detach().float()
    relations = Relations(builder.samples, decoder.cpu(), builder.levels).of(latents, config.neighbours)
    tokens = _tokens(head, decoder[latents], config.tokens)
    none = (np.zeros(0, np.int32), np.zeros(0, np.float32))
    spooled = read_activations(folders, latents)
    for (latent, active), near, words in zip(spooled, relations, tokens, strict=True):
        modality = builder.modality_of(latent)
        contexts = {
            number: make_context(texts, names.study(studies[number]), *active.get(number, none), modality)
            for number in builder.wanted(latent)
        }
        yield builder.build(latent, contexts, near, words)


def _entries(
    studies: Sequence[Study],
    wanted: Wanted,
    names: Pseudonyms,
    labels: Labels | None,
    out: Path,
    config: CollectConfig,
) -> Iterator[StudyInfo]:
    by = "truth" if labels is None else "rule_labels"
    for number in wanted.studies.tolist():
        study = studies[number]
        known = _labels(study, labels)
        kept = _keeps(study, config)
        images = save_images(study, names.study(study), out, config.image_side) if kept else ()
        yield study_info(study, names, sorted(known or ()), by if known is not None else "", images)


def _labels(study: Study, labels: Labels | None) -> frozenset[str] | None:
    if labels is None:
        return None if study.truth is None else study.present_keys
    own = labels(study)
    return None if own is None else frozenset(own)


def _keeps(study: Study, config: CollectConfig) -> bool:
    return is_shareable(study.licence) if config.keep_images is None else config.keep_images


def _tokens(
    head: OutputHead, decoder: torch.Tensor, n: int
) -> Iterator[tuple[list[tuple[str, int, float]], list[tuple[str, int, float]]]]:
    weights, ids = token_weights(decoder.to(head.lm_head.device), head.norm, head.lm_head, n)
    spelled = head.processor.tokenizer.convert_ids_to_tokens
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


def study_info(
    study: Study,
    names: Pseudonyms,
    findings: Sequence[str],
    labelled_by: str,
    images: tuple[tuple[str, str], ...],
) -> StudyInfo:
    """Make the entry of one study; boxes come from its truth, relative to the crop if images are kept."""
    boxes = tuple(
        (finding.key, *finding.box)
        for finding in study.truth or ()
        if finding.present and finding.box is not None
    )
    if images and study.frontal is not None:
        boxes = centre_crop(study.frontal, boxes, side=1)[1]
    return StudyInfo(
        study=names.study(study),
        patient=names.patient(study),
        licence=study.licence.value,
        report=study.report,
        indication=study.indication,
        technique=study.technique,
        comparison=study.comparison,
        prior_report=study.prior_report,
        findings=tuple(findings),
        labelled_by=labelled_by,
        boxes=boxes,
        images=images,
        split=study.split,
    )


def save_images(study: Study, name: str, folder: Path, side: int) -> tuple[tuple[str, str], ...]:
    """Save a study's images as grey PNGs of at most `side` pixels, cropped as the model sees them.

    Args:
        study: Study with images.
        name: Pseudonym of the study.
        folder: Folder of the record set; the files are written to its subfolder `images`.
        side: Largest side in pixels.

    Returns:
        `(view, path relative to folder)` of every image.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    stem = hashlib.sha256(name.encode()).hexdigest()[:16]
    saved = []
    for view, image in zip(VIEWS, (study.frontal, study.lateral, study.prior_frontal), strict=True):
        if image is None:
            continue
        square, _ = centre_crop(image, (), side)
        path = f"images/{stem}-{view}.png"
        with private_files(folder):
            square.save(folder / path)
        saved.append((view, path))
    return tuple(saved)
