"""The commands `studies import` and `studies validate`: make one Parquet table of a data set, and check it.

`studies.readers`, `studies.validate` and the phantom do the work. This module lists the options of each source and
prints what was read, what was left out and why.
"""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sae_lens_maira.studies import StudyTable
    from sae_lens_maira.studies.readers import Imported

NEEDED = {
    "mimic": ("images",),
    "iuxray": ("reports",),
    "folder": ("images",),
    "csv": ("table",),
    "phantom": (),
}
ALLOWED = {
    "mimic": ("images", "reports", "need_images", "workers"),
    "iuxray": ("images", "reports", "projections", "assume_frontal", "need_images"),
    "folder": ("images", "licence", "patients", "need_reports", "assume_frontal"),
    "csv": ("table", "images", "columns", "licence", "relicense_from", "to", "cut_reports"),
    "phantom": ("studies", "study_seed", "size", "split"),
}


def import_studies(
    source: Literal["mimic", "iuxray", "folder", "csv", "phantom"],
    out: Path,
    images: Path | None = None,
    reports: Path | None = None,
    projections: list[Path] | Path | None = None,
    assume_frontal: bool | None = None,
    table: Path | None = None,
    columns: dict[str, str] | None = None,
    licence: Literal["public", "credentialed", "synthetic"] | None = None,
    relicense_from: str | None = None,
    to: Literal["public", "credentialed", "synthetic"] | None = None,
    cut_reports: bool | None = None,
    patients: Literal["study", "folder"] | None = None,
    need_images: bool | None = None,
    need_reports: bool | None = None,
    studies: int | None = None,
    study_seed: int | None = None,
    size: int | None = None,
    split: str | None = None,
    workers: int | None = None,
    as_json: bool = False,
) -> None:
    """Make one table of studies (Parquet) from a data set; studies that are left out are counted by reason.

    Example: sae-lens-maira studies import --source mimic --images mimic-cxr-jpg --reports mimic-cxr --out mimic.parquet

    Args:
        source: Data set: mimic (MIMIC-CXR-JPG and MIMIC-CXR's reports), iuxray (Open-I), folder (images or DICOM), csv,
            or phantom.
        out: Parquet file of the table; studies left out and files not used are listed next to it as .skipped.csv.
        images: Folder of the images; for mimic the folder above `files`, for csv the one its paths are relative to.
        reports: For mimic: folder above the reports' `files`, if another, or mimic_cxr_sectioned.csv; for iuxray:
            folder or .tgz of XML reports.
        projections: For iuxray: projection table (indiana_projections.csv or nlmcxr_tsne_pa.csv.gz), or
            several in brackets.
        assume_frontal: For iuxray and folder: true takes images of unknown view as frontal.
        table: For csv: the file.
        columns: For csv: column of the table and its name in the file, for example "{frontal: image_path}".
        licence: For folder and csv: licence of studies that state none, credentialed if not given. A stated licence is
            only made stricter.
        relicense_from: For csv: licence word in the file to replace by --to; the only way to loosen a licence.
        to: For csv: the licence that replaces it.
        cut_reports: For csv: true cuts whole reports in the column report into sections.
        patients: For folder: study (each study is a separate patient, if not given) or folder (each folder is one
            patient).
        need_images: For mimic and iuxray: false keeps studies whose image files are not on this machine.
        need_reports: For folder: false keeps images without a report.
        studies: For phantom: number of studies (200 if not given).
        study_seed: For phantom: random seed of the studies (0 if not given, the seed of its training studies).
        size: For phantom: side of the images in pixels (112 if not given).
        split: For phantom: split name given to all studies.
        workers: For mimic: threads that read reports (16 if not given).
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.errors import ConfigError

    options = {name: value for name, value in locals().items() if name in set().union(*ALLOWED.values())}
    given = {name: value for name, value in options.items() if value is not None}
    foreign = [name for name in given if name not in ALLOWED[source]]
    lacking = [name for name in NEEDED[source] if name not in given]
    if ("relicense_from" in given) != ("to" in given) and source == "csv":
        lacking.append("to" if "relicense_from" in given else "relicense_from")
    if foreign or lacking:
        wrong = [f"does not read {', '.join(foreign)}"] if foreign else []
        wrong += [f"needs {', '.join(lacking)}"] if lacking else []
        raise ConfigError(
            f"--source {source} {' and '.join(wrong)}; it takes {', '.join(ALLOWED[source])}. Add or remove options."
        )
    if out.suffix.lower() not in (".parquet", ".pq"):
        raise ConfigError(
            f"--out was {out}; a table of studies is Parquet, so give a name ending in .parquet."
        )
    imported = _read(source, out, given)
    if not len(imported.table):
        counts = {
            reason.value: count for reason, count in imported.counts().items()
        } | imported.unused_counts()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "nothing was found"
        raise ConfigError(
            f"No study was imported ({reasons}), so {out} was not written.{_hint(source, imported)}"
        )
    imported.table.save(out)
    listed = imported.save_skipped(out.with_suffix(".skipped.csv"))
    _print_import(imported, out, listed, source, as_json)


def _hint(source: str, imported: "Imported") -> str:
    """Advice about the most likely reason for studies that were left out."""
    from sae_lens_maira.studies.readers import SkipReason

    counts = imported.counts()
    if counts.get(SkipReason.UNKNOWN_VIEW):
        table = " Give --projections with a table of views, or" if source == "iuxray" else " Use"
        return f"{table} --assume-frontal true to take images of unknown view as frontal."
    example = next((path for reason, path in imported.examples.items() if reason in counts), None)
    return f" Looked for {example}, for example. Check the folders." if example else " Check the folders."


def _read(source: str, out: Path, given: dict[str, Any]) -> "Imported":
    from sae_lens_maira.studies.readers import import_csv, import_folder, import_iuxray, import_mimic

    if source == "mimic":
        return import_mimic(**given)
    if source == "iuxray":
        return import_iuxray(**given)
    if source == "folder":
        return import_folder(given.pop("images"), **given)
    if source == "csv":
        old, new = given.pop("relicense_from", None), given.pop("to", None)
        relicense = {old: new} if old is not None and new is not None else {}
        return import_csv(given.pop("table"), given.pop("images", None), relicense=relicense, **given)
    return _phantom(out, **given)


def _phantom(
    out: Path, studies: int = 200, study_seed: int = 0, size: int = 112, split: str | None = None
) -> "Imported":
    """Make a table of phantom studies with their truth; images are written to the folder `images` next to it."""
    from tqdm.auto import tqdm

    from sae_lens_maira.phantom import generate_study
    from sae_lens_maira.studies import table_of_studies
    from sae_lens_maira.studies.readers import Imported

    drawn = (generate_study(study_seed, index, size, split) for index in range(studies))
    return Imported(table_of_studies(tqdm(drawn, total=studies, unit="study"), out.parent), [])


def _print_import(imported: "Imported", out: Path, listed: Path, source: str, as_json: bool) -> None:
    counts = {reason.value: count for reason, count in imported.counts().items()}
    unused = imported.unused_counts()
    root = imported.table.root
    numbers = imported.table.counts()
    if as_json:
        answer = numbers | {"skipped": counts, "unused_files": unused, "notes": dict(imported.notes)}
        sys.stdout.write(json.dumps(answer | {"table": str(out), "root": str(root)}) + "\n")
        return
    sys.stdout.write(f"{out}: {numbers['studies']:,} studies of {numbers['patients']:,} patients\n")
    for note, count in imported.notes.items():
        sys.stdout.write(f"  {count:,} {printable(note)}\n")
    sys.stdout.write(f"left out: {sum(counts.values()):,} studies, listed in {listed}\n")
    examples = {reason.value: path for reason, path in imported.examples.items()}
    for reason, count in counts.items():
        looked = f" (for example {printable(examples[reason])})" if reason in examples else ""
        sys.stdout.write(f"  {count:,} {reason}{looked}\n")
    if unused:
        sys.stdout.write(f"files not used: {sum(unused.values()):,}, listed there too\n")
        sys.stdout.writelines(f"  {count:,} {printable(reason)}\n" for reason, count in unused.items())
    if "view unknown" in counts:
        sys.stdout.write(f"{_hint(source, imported).strip()}\n")
    if numbers["frontal"] and root.resolve() != out.parent.resolve():
        sys.stdout.write(f"image paths are relative to {root}: give --root {root} with this table\n")


def printable(text: str) -> str:
    """Replace control and escape characters by visible escapes, for a terminal."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda c: repr(c[0])[1:-1], text
    )


def open_table(table: Path, root: Path | None, errors: str = "strict") -> "StudyTable":
    """Open the table of studies that a command names."""
    from sae_lens_maira.studies import read_table

    return read_table(table, root, errors)


def validate_studies(
    table: Path,
    root: Path | None = None,
    images: Literal["decode", "open", "exist", "none"] = "decode",
    most: int = 50,
    workers: int = 16,
    out: Path | None = None,
    without_errors: Path | None = None,
    as_json: bool = False,
) -> None:
    """Check a table: images, ids, splits, text, priors; every issue with its rows from 0.

    Example: sae-lens-maira studies validate --table mimic.parquet --root mimic-cxr-jpg

    Exit code 2 if there is an error; warnings alone leave it at 0, and so does --without-errors.

    Args:
        table: Parquet or CSV.
        root: Folder that image paths are relative to; the table's folder if not given.
        images: Depth of the check: decode reads each image as the model does, open reads headers, exist checks that
            files exist, none skips images.
        most: Largest number of issues to print; all are counted.
        workers: Number of threads that read images.
        out: CSV file for all issues.
        without_errors: Parquet file for the rows without errors; image paths stay relative to the same folder.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.errors import StudyError
    from sae_lens_maira.maira2.images import check_image, read_stretched
    from sae_lens_maira.privacy import private_files
    from sae_lens_maira.studies.validate import validate_table

    opened = open_table(table, root, "replace")
    report = validate_table(
        opened,
        images=images,
        read_image=read_stretched,
        open_image=check_image,
        workers=workers,
    )
    rows = [
        {
            "severity": "error" if issue.kind.is_error else "warning",
            "kind": issue.kind.value,
            "rows": list(issue.rows),
            "detail": issue.detail,
        }
        for issue in report.issues
    ]
    counts = {kind.value: count for kind, count in report.counts().items()}
    if out is not None:
        import pandas as pd

        from sae_lens_maira.io import atomic_write, csv_of

        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, csv_of(pd.DataFrame(rows, columns=["severity", "kind", "rows", "detail"])))
    if without_errors is not None:
        kept = opened.without(row for issue in report.errors for row in issue.rows)
        if not len(kept):
            raise StudyError(
                f"Every row of {table} has an error, so {without_errors} was not written. Fix them."
            )
        with private_files(without_errors.parent):
            kept.save(without_errors)
        sys.stderr.write(
            f"{without_errors}: {len(kept):,} of {report.studies:,} studies; {report.studies - len(kept):,} with "
            f"errors left out. Read it with --root {opened.root}.\n"
        )
    if as_json:
        answer = {"studies": report.studies, "images": report.images, "counts": counts, "issues": rows[:most]}
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        sys.stdout.writelines(f"{issue}\n" for issue in report.issues[:most])
        found = ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "no issue"
        sys.stdout.write(f"{table}: {report.studies:,} studies, {report.images:,} images: {found}\n")
    if report.exit_code and without_errors is None:
        raise StudyError(
            f"{table} has {len(report.errors)} error{'' if len(report.errors) == 1 else 's'}, with which later steps "
            "would fail or give wrong results. Fix or "
            f"leave out the rows named above{'' if out is None else f' and in {out}'}, then validate again; "
            "--without-errors writes a table without them."
        )
