"""Import MIMIC-CXR: images of MIMIC-CXR-JPG 2.x and reports of MIMIC-CXR, in PhysioNet's layout.

    mimic-cxr-2.0.0-metadata.csv[.gz], -split.csv[.gz]         next to the images' `files` folder
    files/p10/p10000032/s50414267/<dicom_id>.jpg               below the images' root; .png, .jpeg and .dcm copies too
    files/p10/p10000032/s50414267.txt                          below the same root or another one
    mimic_cxr_sectioned.csv[.gz]                               instead of the .txt files

A study's frontal image is its first PA image whose file exists, else its first AP image; its lateral image is the first
LATERAL, else LL. Its prior is the patient's last study strictly before it, whether that study is in the table or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.delimited import TEXT, csv_frame
from sae_lens_maira.studies.readers.imported import Imported, Skipped, SkipReason
from sae_lens_maira.studies.readers.report_files import read_report_file
from sae_lens_maira.studies.sections import refers_to_impression
from sae_lens_maira.studies.study import Licence
from sae_lens_maira.studies.table import StudyTable

FRONTAL_VIEWS = ("PA", "AP")
LATERAL_VIEWS = ("LATERAL", "LL")
SUFFIXES = (".jpg", ".png", ".jpeg", ".dcm")
METADATA = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
SPLIT = ("study_id", "split")
SECTIONED = "mimic_cxr_sectioned.csv"
REPORT_COLUMNS = ("report", "indication", "technique", "comparison", "as_prior")
CHUNK = 512
"""Studies that one thread reads at a time."""

ReadReport = Callable[[str, str], "tuple[SkipReason | None, tuple[str | None, ...], bool]"]
"""(patient, study) -> reason why there are no findings or None, texts of REPORT_COLUMNS, whether they are the
impression.
"""


def import_mimic(
    images: Path | str,
    reports: Path | str | None = None,
    *,
    need_images: bool = True,
    workers: int = 16,
    progress: bool = True,
) -> Imported:
    """Make a table of the MIMIC-CXR studies that have a frontal image and findings.

    Args:
        images: Root of MIMIC-CXR-JPG: the folder that holds `files` and the metadata and split tables.
        reports: Root of MIMIC-CXR's reports (the folder that holds their `files`), or mimic_cxr_sectioned.csv or the
            folder with it; the images' root if not given.
        need_images: Leave out studies without a frontal image file, and drop laterals and priors without a file.
            False makes a table on a machine without the images.
        workers: Threads that read reports.
        progress: Show a progress bar.

    Returns:
        The table (root = `images`, rows ordered by patient and time, credentialed) and the studies left out.

    Raises:
        StudyError: A table or folder is missing, or lacks a column.
    """
    images = Path(images)
    reports = images if reports is None else Path(reports)
    sectioned = _sectioned_file(reports)
    for root in {images, reports} if need_images else {reports}:
        if not (root / "files").is_dir() and not (root == reports and sectioned):
            raise StudyError(
                f"{root} holds no folder `files`; expected the layout of PhysioNet, {root}/files/p10/p10000032/... "
                "Give the folder above `files`, or mimic_cxr_sectioned.csv for the reports."
            )
    read = _report_reader(reports) if sectioned is None else _sectioned_reader(sectioned)
    studies = _studies(_read(images, "metadata", METADATA), _read(images, "split", SPLIT))
    files = _read_files(studies, images if need_images else None, read, workers, progress)
    imported = _assemble(studies, files, images)
    return Imported(
        imported.table, imported.skipped, imported.notes, (), _examples(studies, imported, images, reports)
    )


def _read(root: Path, kind: str, columns: Sequence[str]) -> pd.DataFrame:
    found = sorted(root.glob(f"mimic-cxr-2*-{kind}.csv")) + sorted(root.glob(f"mimic-cxr-2*-{kind}.csv.gz"))
    if not found:
        raise StudyError(
            f"{root} holds no mimic-cxr-2.0.0-{kind}.csv or .csv.gz; expected the tables of MIMIC-CXR-JPG there. "
            "Download it next to `files`."
        )
    frame = csv_frame(found[0], columns=columns)
    frame = frame.assign(**{name: frame[name].str.strip() for name in columns})
    for name in ("subject_id", "study_id"):  # a table that was converted to floats contains 10000032.0
        if name in frame:
            frame[name] = frame[name].str.replace(r"\.0+$", "", regex=True)
    return frame


def taken_at(date: pd.Series, time: pd.Series) -> pd.Series:
    """Convert dates and times of studies to datetimes, NaT where either is missing or impossible.

    Args:
        date: Dates as yyyymmdd.
        time: Times as hhmmss.sss, written as numbers without leading zeros: "80556.875" is 08:05:56.875.
    """
    parts = time.astype(object).str.extract(r"^(\d{1,6})(\.\d*)?$")
    clock = date.astype(object).str.replace(r"\.0$", "", regex=True) + parts[0].str.zfill(6)
    whole = pd.to_datetime(clock, format="%Y%m%d%H%M%S", errors="coerce")
    fraction = cast(pd.Series, pd.to_numeric(parts[1].where(parts[1] != "."), errors="coerce"))
    return whole + pd.to_timedelta((fraction.fillna(0.0) * 1000).round(), unit="ms")


def _studies(meta: pd.DataFrame, split: pd.DataFrame) -> pd.DataFrame:
    """One row per study, ordered by patient and time: ids, image candidates, split, time, row of the prior or -1."""
    meta = meta.astype(object)
    meta = meta.assign(taken=taken_at(meta["StudyDate"], meta["StudyTime"]))
    patient, study = meta["subject_id"], meta["study_id"]
    meta["path"] = "files/p" + patient.str[:2] + "/p" + patient + "/s" + study + "/" + meta["dicom_id"]
    by_study = meta.groupby(["subject_id", "study_id"], sort=False, as_index=False)
    studies = cast(pd.DataFrame, by_study["taken"].min())
    for name, views in (("frontal", FRONTAL_VIEWS), ("lateral", LATERAL_VIEWS)):
        chosen = meta.loc[meta["ViewPosition"].isin(views)]
        rank = chosen["ViewPosition"].map({view: number for number, view in enumerate(views)})
        chosen = chosen.assign(rank=rank).sort_values("rank", kind="stable")
        chosen = chosen.assign(**{name: list(zip(chosen["path"], chosen["ViewPosition"], strict=True))})
        candidates = chosen.groupby(["subject_id", "study_id"], sort=False)[name].agg(list).reset_index()
        studies = studies.merge(candidates, how="left", on=["subject_id", "study_id"])
    split = split.loc[split["split"] != ""].drop_duplicates()
    studies["split"] = studies["study_id"].map(
        split.drop_duplicates("study_id").set_index("study_id")["split"]
    )
    studies["two_splits"] = studies["study_id"].isin(split.loc[split.duplicated("study_id"), "study_id"])
    studies = studies.sort_values(["subject_id", "taken", "study_id"], kind="stable").reset_index(drop=True)
    studies["prior"] = _priors(studies)
    return studies


def _priors(studies: pd.DataFrame) -> np.ndarray:
    """Row of each study's prior in the same ordered frame, -1 without one. A study of the same time is not a prior."""
    row = np.arange(len(studies))
    new_patient = (studies["subject_id"] != studies["subject_id"].shift()).to_numpy()
    new_time = new_patient | (studies["taken"] != studies["taken"].shift()).to_numpy()
    first = np.maximum.accumulate(np.where(new_time, row, 0))  # first row of the same patient and time
    prior = np.where(new_patient[first], -1, first - 1)
    return np.where(studies["taken"].isna(), -1, prior)  # those without a time are sorted last


@dataclass(frozen=True)
class _Files:
    """Columns read from the files of a sequence of studies, in their order."""

    sections: pd.DataFrame
    reason: np.ndarray
    """Index into SkipReason, -1 for a study whose report has findings."""
    from_impression: np.ndarray
    """Whether the findings are the impression, because the findings section only refers to it."""
    frontal: list[tuple[str, str] | None]
    """(path, view) of the image that is used."""
    lateral: list[tuple[str, str] | None]


_REASONS = list(SkipReason)


def _read_files(
    studies: pd.DataFrame, images: Path | None, read_report: ReadReport, workers: int, progress: bool
) -> _Files:
    patients, ids = studies["subject_id"].tolist(), studies["study_id"].tolist()
    frontal, lateral = studies["frontal"].tolist(), studies["lateral"].tolist()

    def read(start: int) -> _Files:
        part = slice(start, start + CHUNK)
        found = [
            read_report(patient, study) for patient, study in zip(patients[part], ids[part], strict=True)
        ]
        return _Files(
            pd.DataFrame([texts for _, texts, _ in found], columns=list(REPORT_COLUMNS)).astype(TEXT),
            np.array([-1 if reason is None else _REASONS.index(reason) for reason, _, _ in found]),
            np.array([refers for _, _, refers in found], dtype=bool),
            [_first_file(images, candidates) for candidates in frontal[part]],
            [_first_file(images, candidates) for candidates in lateral[part]],
        )

    parts: list[_Files] = []
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(ids), unit="report", desc="reports", disable=not progress) as bar,
    ):
        for part in pool.map(read, range(0, len(ids), CHUNK)):
            parts.append(part)
            bar.update(len(part.reason))
    if not parts:
        raise StudyError("The metadata table names no study; expected one row per image. Download it again.")
    return _Files(
        pd.concat([part.sections for part in parts], ignore_index=True),
        np.concatenate([part.reason for part in parts]),
        np.concatenate([part.from_impression for part in parts]),
        list(itertools.chain.from_iterable(part.frontal for part in parts)),
        list(itertools.chain.from_iterable(part.lateral for part in parts)),
    )


def _first_file(root: Path | None, candidates: Any) -> tuple[str, str] | None:
    """The first candidate (path without suffix, view) whose file exists; the first one without a root."""
    if not isinstance(candidates, list):
        return None
    for stem, view in candidates:
        for suffix in SUFFIXES:
            if root is None or (root / f"{stem}{suffix}").is_file():
                return f"{stem}{suffix}", view
    return None


def _report_path(patient: str, study: str) -> str:
    return f"files/p{patient[:2]}/p{patient}/s{study}.txt"


def _report_reader(root: Path) -> ReadReport:
    def read(patient: str, study: str) -> tuple[SkipReason | None, tuple[str | None, ...], bool]:
        found = read_report_file(root / _report_path(patient, study))
        if isinstance(found, SkipReason):
            return found, (None,) * len(REPORT_COLUMNS), False
        texts = (found.findings, found.indication, found.technique, found.comparison, found.as_prior)
        if found.findings:
            return None, texts, found.findings_from_impression
        reason = SkipReason.EMPTY_FINDINGS if found.has_findings_header else SkipReason.NO_FINDINGS
        return reason, texts, False

    return read


def _sectioned_file(reports: Path) -> Path | None:
    if reports.is_file():
        return reports
    found = [reports / SECTIONED, reports / f"{SECTIONED}.gz"]
    return (
        next((file for file in found if file.is_file()), None) if not (reports / "files").is_dir() else None
    )


def _sectioned_reader(path: Path) -> ReadReport:
    """Reports from MIMIC-CXR's table of sections; it has no indication and no technique."""
    frame = csv_frame(path, columns=("study", "impression", "findings", "last_paragraph", "comparison"))
    cells = {name: frame[name].array for name in frame}
    place = {str(study).strip().lstrip("s"): row for row, study in enumerate(cells["study"])}

    def read(patient: str, study: str) -> tuple[SkipReason | None, tuple[str | None, ...], bool]:
        row = place.get(study)
        if row is None:
            return SkipReason.NO_REPORT, (None,) * len(REPORT_COLUMNS), False
        text = {name: " ".join(str(column[row]).split()) for name, column in cells.items()}
        parts = [("FINDINGS", text["findings"]), ("IMPRESSION", text["impression"])]
        prior = " ".join(f"{name}: {part}" for name, part in parts if part) or text["last_paragraph"]
        findings = text["findings"]
        refers = refers_to_impression(findings) and bool(text["impression"])
        findings = text["impression"] if refers else "" if refers_to_impression(findings) else findings
        texts = (findings or None, None, None, text["comparison"] or None, prior or None)
        if findings:
            return None, texts, refers
        return (SkipReason.NO_FINDINGS if prior else SkipReason.EMPTY_REPORT), texts, False

    return read


def _assemble(studies: pd.DataFrame, files: _Files, root: Path) -> Imported:
    frontal = pd.Series([found[0] if found else None for found in files.frontal], dtype=object)
    lateral = pd.Series([found[0] if found else None for found in files.lateral], dtype=object)
    view = pd.Series([found[1] if found else None for found in files.frontal], dtype=object)
    reasons = {
        SkipReason.NO_SPLIT: studies["split"].isna().to_numpy(),
        SkipReason.TWO_SPLITS: studies["two_splits"].to_numpy(dtype=bool),
        SkipReason.NO_FRONTAL: studies["frontal"].isna().to_numpy(),
        SkipReason.NO_IMAGE_FILE: frontal.isna().to_numpy(),
    }
    reason = files.reason.copy()
    for name in reversed(reasons):  # the first reason is kept
        reason[reasons[name]] = _REASONS.index(name)
    first = [row[0][0] if isinstance(row, list) else None for row in studies["frontal"]]
    other = [
        bool(path) and not str(path).startswith(f"{stem}.") for path, stem in zip(frontal, first, strict=True)
    ]
    lost = {
        "first frontal file missing: another frontal image of the study taken": np.array(other, dtype=bool),
        "lateral left out: its file is missing": studies["lateral"].notna().to_numpy()
        & lateral.isna().to_numpy(),
        "findings taken from the impression": files.from_impression,
        "without prior: date or time is missing": studies["taken"].isna().to_numpy(),
    }
    kept = np.flatnonzero(reason < 0)
    prior = studies["prior"].to_numpy()[kept]
    taken = _iso(studies["taken"])
    frame = pd.DataFrame(
        {
            "study_id": _take(studies["study_id"], kept),
            "patient_id": _take(studies["subject_id"], kept),
            "frontal": _take(frontal, kept),
            "lateral": _take(lateral, kept),
            "prior_frontal": _take(frontal, prior),
            "prior_report": _take(files.sections["as_prior"], prior),
            **{name: _take(files.sections[name], kept) for name in REPORT_COLUMNS[:-1]},
            "view": _take(view, kept),
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


def _examples(
    studies: pd.DataFrame, imported: Imported, images: Path, reports: Path
) -> dict[SkipReason, str]:
    """Reason -> one path that was not found, for missing files."""
    rows = studies.drop_duplicates("study_id").set_index("study_id")
    found: dict[SkipReason, str] = {}
    for study, reason in imported.skipped:
        if reason in found or reason not in (SkipReason.NO_IMAGE_FILE, SkipReason.NO_REPORT):
            continue
        row = rows.loc[study]
        if reason is SkipReason.NO_IMAGE_FILE:
            found[reason] = f"{images / row['frontal'][0][0]}.jpg"
        else:
            found[reason] = (
                f"{reports}, row s{study}"
                if reports.is_file()
                else str(reports / _report_path(row["subject_id"], study))
            )
    return found


def _take(values: pd.Series, rows: np.ndarray) -> pd.Series:
    """The values at rows, empty at -1."""
    return pd.Series(values.astype(TEXT).array.take(rows, allow_fill=True), copy=False)


def _iso(taken: pd.Series) -> pd.Series:
    text = np.datetime_as_string(taken.to_numpy().astype("datetime64[ms]"))
    return pd.Series(text).where(taken.notna().to_numpy())


__all__ = ["import_mimic", "taken_at"]
