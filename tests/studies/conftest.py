"""A small MIMIC-CXR tree in the official layout, with the quirks of the real one; radiographs are the phantom's."""

import gzip
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.studies.readers.imported import SkipReason

BANNER = " " * 33 + "FINAL REPORT\n"
FULL = (
    BANNER
    + """ EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation, pleural effusion or pneumothorax.  Bilateral
 nodular opacities that most likely represent nipple shadows.  LUNGS: Clear
 otherwise.  Clips from ___ project over the left breast.

 IMPRESSION:

 No acute cardiopulmonary process.
"""
)
ADDENDUM = (
    " " * 33
    + "ADDENDUM\n After further review the FINDINGS: were discussed with Dr. ___.\n "
    + "_" * 78
    + "\n"
    + FULL
)
TITLE_ONLY = (
    BANNER + " CHEST RADIOGRAPH PERFORMED ON ___\n\n The heart is normal.  The lungs are clear of effusion.\n"
)
TITLE_PROSE = (
    BANNER
    + " HISTORY:  Cough.\n\n PORTABLE CHEST, AP VIEW:  The heart is enlarged and there is edema in\n both lungs.\n"
)
NO_FINDINGS = (
    BANNER + " REASON FOR EXAM:  Line placement.\n\n COMPARISON:  ___.\n\n IMPRESSION:  Line in the SVC.\n"
)
EMPTY_FINDINGS = BANNER + " INDICATION:  Cough.\n\n FINDINGS:  ___\n\n IMPRESSION:  Clear.\n"


@dataclass(frozen=True)
class Case:
    """One study of the tree, and why the import should leave it out."""

    patient: str
    study: str
    date: str
    time: str
    report: str | bytes | None = FULL
    views: Sequence[str] = ("PA", "LATERAL")
    split: str | None = "train"
    skipped: SkipReason | None = None
    without_file: bool = False


QUIRKS = (
    # Study ids are not in time order; the first was taken at 8:05:56, the second on the same day at noon.
    Case("10000032", "50414267", "21800506", "120000"),
    Case("10000032", "53189527", "21800506", "80556.875", views=("AP", "PA", "LL"), report=ADDENDUM),
    Case("10000032", "53911762", "21800626", "165500.312", TITLE_ONLY, skipped=SkipReason.NO_FINDINGS),
    Case("10000032", "56699142", "21800805", "234424.765", TITLE_PROSE, views=("AP",)),
    Case("10000764", "57375967", "21321015", "93.25", NO_FINDINGS, skipped=SkipReason.NO_FINDINGS),
    Case("10000898", "50771383", "21880323", "0", EMPTY_FINDINGS, skipped=SkipReason.EMPTY_FINDINGS),
    # Equal times are no order: neither is the other's prior, and the third study's prior is the later id.
    Case("10000935", "51178377", "21870823", "71730.593", split="validate"),
    Case("10000935", "50578979", "21870823", "71730.593", split="validate"),
    Case("10000935", "55697293", "21870824", "71730.593", split="validate"),
    Case("10000980", "50985099", "21891120", "1000", split=None, skipped=SkipReason.NO_SPLIT),
    Case("10000980", "51967283", "21891121", "1000", views=("LL", ""), skipped=SkipReason.NO_FRONTAL),
    Case("10000980", "54935705", "21891122", "1000", report=None, skipped=SkipReason.NO_REPORT),
    Case(
        "10000980",
        "57861150",
        "21891123",
        "1000",
        report=b" FINDINGS: d\xe9j\xe0.",
        skipped=SkipReason.NOT_TEXT,
    ),
    Case("10000980", "58206436", "21891124", "1000", report=" \n ___ \n", skipped=SkipReason.EMPTY_REPORT),
    Case("10000980", "59988438", "21891125", "1000", without_file=True, skipped=SkipReason.NO_IMAGE_FILE),
    Case("10000980", "59999999", "21891126", "1000"),
    Case("10001038", "57966011", "", "", split="test"),
)

Build = Callable[..., Path]


def build_mimic_tree(
    root: Path, cases: Sequence[Case] = QUIRKS, reports: Path | None = None, packed: bool = True
) -> Path:
    """Write the cases in the official layout; reports under another root if one is given."""
    radiographs = [study.frontal for study in generate_studies(3, seed=5, size=64)]
    metadata, split = ["dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime,Rows"], [SPLIT_HEADER]
    number = 0
    for case in cases:
        folder = Path("files") / f"p{case.patient[:2]}" / f"p{case.patient}"
        (root / folder / f"s{case.study}").mkdir(parents=True)
        for view in case.views:
            number += 1
            dicom = "-".join(f"{part:08x}" for part in (number, 2, 3, 4, 5))
            metadata.append(f"{dicom},{case.patient},{case.study},{view},{case.date},{case.time},3056")
            if case.split:
                split.append(f"{dicom},{case.study},{case.patient},{case.split}")
            if not case.without_file:
                picture = io.BytesIO()
                radiograph = Image.fromarray(radiographs[number % 3])  # pyright: ignore[reportArgumentType]: arrays
                radiograph.putpixel(
                    (number % 64, number // 64), 255 if number % 2 else 0
                )  # no two files alike
                radiograph.save(picture, "JPEG", quality=95)
                (root / folder / f"s{case.study}" / f"{dicom}.jpg").write_bytes(picture.getvalue())
        if case.report is not None:
            text = case.report if isinstance(case.report, bytes) else case.report.encode()
            file = (reports or root) / folder / f"s{case.study}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text)
    for kind, lines in (("metadata", metadata), ("split", split)):
        data = ("\n".join(lines) + "\n").encode()
        name = f"mimic-cxr-2.0.0-{kind}.csv"
        (root / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return root


SPLIT_HEADER = "dicom_id,study_id,subject_id,split"


@pytest.fixture
def mimic_tree() -> Build:
    return build_mimic_tree


@pytest.fixture
def mimic_case() -> type[Case]:
    return Case


@pytest.fixture
def mimic_quirks() -> tuple[Case, ...]:
    return QUIRKS
