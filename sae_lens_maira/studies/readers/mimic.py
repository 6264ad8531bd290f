"""MIMIC-CXR: images of MIMIC-CXR-JPG 2.x and reports of MIMIC-CXR, in the layout that PhysioNet gives them.

    mimic-cxr-2.0.0-metadata.csv[.gz], -split.csv[.gz]         beside the images' `files` folder
    files/p10/p10000032/s50414267/<dicom_id>.jpg               under the images' root
    files/p10/p10000032/s50414267.txt                          under the same root or another one

A study's frontal image is its first PA, else its first AP image, its lateral one the first LATERAL, else LL. Its prior
is the last study of the patient that was taken strictly before it, whether that study is itself in the table or not.
Studies without findings are left out and counted. It knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.readers.imported import Imported, Skipped, SkipReason
from sae_lens_maira.studies.sections import parse_sections
from sae_lens_maira.studies.study import Licence
from sae_lens_maira.studies.table import TEXT, StudyTable

FRONTAL_VIEWS = ("PA", "AP")
LATERAL_VIEWS = ("LATERAL", "LL")
METADATA = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
SPLIT = ("study_id", "split")
CHUNK = 512
"""Studies that one thread reads at a time."""


def import_mimic(
    images: Path | str,
    reports: Path | str | None = None,
    *,
    need_images: bool = True,
    workers: int = 16,
    progress: bool = True,
) -> Imported:
    """Table of the MIMIC-CXR studies that have a frontal image and findings.

    Args:
        images: root of MIMIC-CXR-JPG: the folder that holds `files` and the metadata and split tables.
        reports: root of MIMIC-CXR's reports, the folder that holds their `files`; that of the images if not given.
        need_images: leave out studies whose frontal image is no file, and drop laterals and priors that are none;
            False makes a table on a machine without the images.
        workers: threads that read reports.
        progress: show a bar.

    Returns:
        The table (root = `images`, rows ordered by patient and time, credentialed) and the studies left out.

    Raises:
        StudyError: a table or folder is missing, or lacks a column.
    """
    images = Path(images)
    reports = images if reports is None else Path(reports)
    for root in {images, reports} if need_images else {reports}:
        if not (root / "files").is_dir():
            raise StudyError(
                f"{root} holds no folder `files`; expected the layout of PhysioNet, {root}/files/p10/p10000032/... "
                f"Give the folder above `files`."
            )
    studies = _studies(_read(images, "metadata", METADATA), _read(images, "split", SPLIT))
    texts = _read_reports(studies, images if need_images else None, reports, workers, progress)
    return _assemble(studies, texts, images)


def _read(root: Path, kind: str, columns: Sequence[str]) -> pd.DataFrame:
    found = sorted(root.glob(f"mimic-cxr-2*-{kind}.csv")) + sorted(root.glob(f"mimic-cxr-2*-{kind}.csv.gz"))
    if not found:
        raise StudyError(
            f"{root} holds no mimic-cxr-2.0.0-{kind}.csv or .csv.gz; expected the tables of MIMIC-CXR-JPG there. "
            f"Download it beside `files`."
        )
    try:
        frame = pd.read_csv(found[0], usecols=list(columns), dtype=str, keep_default_na=False)
    except (OSError, ValueError, EOFError) as error:
        raise StudyError(
            f"{found[0]} could not be read ({error}); expected a CSV with the columns {', '.join(columns)}. "
            f"Download it again."
        ) from error
    return frame.assign(**{name: frame[name].str.strip() for name in columns})


def taken_at(date: pd.Series, time: pd.Series) -> pd.Series:
    """Date and time of studies as datetimes, NaT where either is missing or impossible.

    Args:
        date: yyyymmdd.
        time: hhmmss.sss as text of a number, which has lost its leading zeros: "80556.875" is 08:05:56.875.
    """
    parts = time.str.extract(r"^(\d{1,6})(\.\d*)?$")
    clock = date.str.replace(r"\.0$", "", regex=True) + parts[0].str.zfill(6)
    whole = pd.to_datetime(clock, format="%Y%m%d%H%M%S", errors="coerce")
    fraction = cast(pd.Series, pd.to_numeric(parts[1].where(parts[1] != "."), errors="coerce"))
    return whole + pd.to_timedelta((fraction.fillna(0.0) * 1000).round(), unit="ms")


def _studies(meta: pd.DataFrame, split: pd.DataFrame) -> pd.DataFrame:
    """One row a study, ordered by patient and time: ids, image paths, view, split, time, row of the prior or -1."""
    meta = meta.assign(taken=taken_at(meta["StudyDate"], meta["StudyTime"]))
    patient, study = meta["subject_id"], meta["study_id"]
    meta["path"] = (
        "files/p" + patient.str[:2] + "/p" + patient + "/s" + study + "/" + meta["dicom_id"] + ".jpg"
    )
    by_study = meta.groupby(["subject_id", "study_id"], sort=False, as_index=False)
    studies = cast(pd.DataFrame, by_study["taken"].min())
    for name, views in (("frontal", FRONTAL_VIEWS), ("lateral", LATERAL_VIEWS)):
        chosen = meta.loc[meta["ViewPosition"].isin(views)]
        rank = chosen["ViewPosition"].map({view: number for number, view in enumerate(views)})
        chosen = chosen.assign(rank=rank).sort_values("rank", kind="stable").drop_duplicates("study_id")
        chosen = chosen.rename(columns={"path": name, "ViewPosition": f"{name}_view"})
        columns = ["subject_id", "study_id", name, f"{name}_view"]
        studies = studies.merge(chosen[columns], how="left", on=["subject_id", "study_id"])
    split = split.loc[split["split"] != ""].drop_duplicates()
    studies["split"] = studies["study_id"].map(
        split.drop_duplicates("study_id").set_index("study_id")["split"]
    )
    studies["two_splits"] = studies["study_id"].isin(split.loc[split.duplicated("study_id"), "study_id"])
    studies = studies.sort_values(["subject_id", "taken", "study_id"], kind="stable").reset_index(drop=True)
    studies["prior"] = _priors(studies)
    return studies


def _priors(studies: pd.DataFrame) -> np.ndarray:
    """Row of each study's prior in the same ordered frame, -1 without one; equal times are no order."""
    row = np.arange(len(studies))
    new_patient = (studies["subject_id"] != studies["subject_id"].shift()).to_numpy()
    new_time = new_patient | (studies["taken"] != studies["taken"].shift()).to_numpy()
    first = np.maximum.accumulate(np.where(new_time, row, 0))  # first row of the same patient and time
    prior = np.where(new_patient[first], -1, first - 1)
    return np.where(studies["taken"].isna(), -1, prior)  # those without a time are sorted last


@dataclass(frozen=True)
class _Texts:
    """Columns read from the files of a run of studies, in their order."""

    sections: pd.DataFrame
    reason: np.ndarray
    """Index into SkipReason, -1 for a study whose report has findings."""
    frontal: np.ndarray
    """Whether the image is there, (n,) bool; all True where images are not asked for."""
    lateral: np.ndarray


REPORT_COLUMNS = ("report", "indication", "technique", "comparison", "as_prior")
_REASONS = list(SkipReason)


def _read_reports(
    studies: pd.DataFrame, images: Path | None, reports: Path, workers: int, progress: bool
) -> _Texts:
    patient, study = studies["subject_id"], studies["study_id"]
    paths = ("files/p" + patient.str[:2] + "/p" + patient + "/s" + study + ".txt").tolist()
    frontal, lateral = studies["frontal"].tolist(), studies["lateral"].tolist()

    def read(start: int) -> _Texts:
        stop = min(start + CHUNK, len(paths))
        told = [_read_report(reports / path) for path in paths[start:stop]]
        return _Texts(
            pd.DataFrame([texts for _, texts in told], columns=list(REPORT_COLUMNS)).astype(TEXT),
            np.array([-1 if reason is None else _REASONS.index(reason) for reason, _ in told]),
            _present(images, frontal[start:stop]),
            _present(images, lateral[start:stop]),
        )

    parts: list[_Texts] = []
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(paths), unit="report", desc="reports", disable=not progress) as bar,
    ):
        for part in pool.map(read, range(0, len(paths), CHUNK)):
            parts.append(part)
            bar.update(len(part.reason))
    if not parts:
        raise StudyError("The metadata table names no study; expected one row an image. Download it again.")
    return _Texts(
        pd.concat([part.sections for part in parts], ignore_index=True),
        np.concatenate([part.reason for part in parts]),
        np.concatenate([part.frontal for part in parts]),
        np.concatenate([part.lateral for part in parts]),
    )


def _present(root: Path | None, paths: Sequence[str | float]) -> np.ndarray:
    if root is None:
        return np.ones(len(paths), dtype=bool)
    return np.array([isinstance(path, str) and (root / path).is_file() for path in paths], dtype=bool)


def _read_report(path: Path) -> tuple[SkipReason | None, tuple[str | None, ...]]:
    """Why a report has no findings, or None; and the texts of REPORT_COLUMNS."""
    nothing = (None,) * len(REPORT_COLUMNS)
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return SkipReason.NO_REPORT, nothing
    except OSError as error:
        raise StudyError(
            f"The report {path} is there but could not be read ({error}); expected a readable file. Mend its "
            f"permissions or the disk."
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return SkipReason.NOT_TEXT, nothing
    if "\x00" in text or "\ufffd" in text:
        return SkipReason.NOT_TEXT, nothing
    found = parse_sections(text)
    texts = (found.findings, found.indication, found.technique, found.comparison, found.as_prior)
    if found.findings:
        return None, texts
    if found.has_findings_header:
        return SkipReason.EMPTY_FINDINGS, texts
    return (SkipReason.NO_FINDINGS if found.body else SkipReason.EMPTY_REPORT), texts


def _assemble(studies: pd.DataFrame, texts: _Texts, root: Path) -> Imported:
    reasons = {
        SkipReason.NO_SPLIT: studies["split"].isna().to_numpy(),
        SkipReason.TWO_SPLITS: studies["two_splits"].to_numpy(dtype=bool),
        SkipReason.NO_FRONTAL: studies["frontal"].isna().to_numpy(),
        SkipReason.NO_IMAGE_FILE: ~texts.frontal,
    }
    reason = texts.reason.copy()
    for name in reversed(reasons):  # the first one is told
        reason[reasons[name]] = _REASONS.index(name)
    lost = {
        "lateral left out: its file is missing": studies["lateral"].notna().to_numpy() & ~texts.lateral,
        "without prior: date or time is missing": studies["taken"].isna().to_numpy(),
    }
    frontal = studies["frontal"].where(texts.frontal)
    kept = np.flatnonzero(reason < 0)
    prior = studies["prior"].to_numpy()[kept]
    taken = _iso(studies["taken"])
    frame = pd.DataFrame(
        {
            "study_id": _take(studies["study_id"], kept),
            "patient_id": _take(studies["subject_id"], kept),
            "frontal": _take(frontal, kept),
            "lateral": _take(studies["lateral"].where(texts.lateral), kept),
            "prior_frontal": _take(frontal, prior),
            "prior_report": _take(texts.sections["as_prior"], prior),
            **{name: _take(texts.sections[name], kept) for name in REPORT_COLUMNS[:-1]},
            "view": _take(studies["frontal_view"], kept),
            "taken": _take(taken, kept),
            "prior_study_id": _take(studies["study_id"], prior),
            "prior_taken": _take(taken, prior),
            "split": _take(studies["split"], kept),
            "licence": Licence.CREDENTIALED.value,
        }
    )
    gone = np.flatnonzero(reason >= 0)
    skipped = [
        Skipped(str(study), _REASONS[why])
        for study, why in zip(studies["study_id"].to_numpy()[gone], reason[gone], strict=True)
    ]
    notes = {note: int(where[kept].sum()) for note, where in lost.items()}
    notes["prior without a frontal image"] = int(
        (frame["prior_study_id"].notna() & frame["prior_frontal"].isna()).sum()
    )
    return Imported(StudyTable.from_frame(frame, root), skipped, {n: c for n, c in notes.items() if c})


def _take(values: pd.Series, rows: np.ndarray) -> pd.Series:
    """The values at rows, empty at -1."""
    return pd.Series(values.astype(TEXT).array.take(rows, allow_fill=True), copy=False)


def _iso(taken: pd.Series) -> pd.Series:
    text = np.datetime_as_string(taken.to_numpy().astype("datetime64[ms]"))
    return pd.Series(text).where(taken.notna().to_numpy())
