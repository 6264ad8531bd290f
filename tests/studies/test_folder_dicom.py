"""Folders of DICOM files: studies, patients, views, body parts and priors come from the headers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from sae_lens_maira.studies.readers import SkipReason, import_folder

pytestmark = pytest.mark.compat


def dicom(path: Path, **tags: Any) -> Path:
    """A small radiograph; tags override the defaults, None removes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "Rows": 8,
        "Columns": 8,
        "Modality": "CR",
        "BodyPartExamined": "CHEST",
        "PatientID": "P1",
        "StudyInstanceUID": "1.2.3",
        "StudyDate": "20200103",
        "StudyTime": "101500",
    }
    for name, value in (values | tags).items():
        if value is not None:
            setattr(data, name, value)
    data.SamplesPerPixel, data.PixelRepresentation, data.HighBit = 1, 0, 15
    data.BitsAllocated = data.BitsStored = 16
    data.PhotometricInterpretation = "MONOCHROME2"
    data.PixelData = np.arange(64, dtype=np.uint16).tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def views(folder: Path, **words: Any) -> list[tuple[str | None, ...]]:
    rows = import_folder(folder, need_reports=False, **words).table.rows()
    return [(row["study_id"], row["patient_id"], row["frontal"], row["lateral"], row["view"]) for row in rows]


def test_a_pa_its_lateral_and_a_hand_are_one_study_of_one_patient(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", ViewPosition="PA")
    dicom(tmp_path / "b.dcm", ViewPosition="LL")
    dicom(
        tmp_path / "c.dcm",
        ViewPosition="PA",
        BodyPartExamined="HAND",
        Laterality="L",
        StudyInstanceUID="1.2.4",
    )
    (tmp_path / "a.txt").write_text("FINDINGS: Clear.\n")
    imported = import_folder(tmp_path)
    (row,) = imported.table.rows()
    assert (row["study_id"], row["patient_id"], row["report"]) == ("1.2.3", "P1", "Clear.")
    assert (row["frontal"], row["lateral"], row["view"]) == ("a.dcm", "b.dcm", "PA")
    assert row["licence"] == "credentialed"
    assert imported.unused_counts() == {"body part HAND, not the chest": 1}


@pytest.mark.parametrize(
    ("tags", "view"),
    [
        ({"ViewPosition": "PA"}, "PA"),
        ({"ViewPosition": "AP"}, "AP"),
        ({"ViewPosition": "ap"}, "AP"),
        ({"ViewPosition": "AP_SUPINE"}, "AP"),
        ({"SeriesDescription": "Chest PA"}, "PA"),
        ({"SeriesDescription": "THORAX A.P."}, "AP"),
        ({"ProtocolName": "W033 Chest p.a."}, "PA"),
        ({"PatientOrientation": ["L", "F"]}, "FRONTAL"),
    ],
)
def test_frontal_views_by_what_the_header_says(tmp_path: Path, tags: dict[str, Any], view: str) -> None:
    dicom(tmp_path / "x.dcm", **tags)
    assert views(tmp_path) == [("1.2.3", "P1", "x.dcm", None, view)]


@pytest.mark.parametrize(
    "tags",
    [
        {"ViewPosition": "LATERAL"},
        {"ViewPosition": "LL"},
        {"ViewPosition": "RL"},
        {"SeriesDescription": "chest lat"},
        {"SeriesDescription": "Lateral"},
        {"PatientOrientation": ["A", "F"]},
        {"PatientOrientation": ["P", "F"]},
    ],
)
def test_laterals_are_never_frontal(tmp_path: Path, tags: dict[str, Any]) -> None:
    dicom(tmp_path / "x.dcm", **tags)
    imported = import_folder(tmp_path, need_reports=False, assume_frontal=True)
    assert imported.counts() == {SkipReason.NO_FRONTAL: 1}


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"SeriesDescription": "Chest PA and LAT"},
        {"ViewPosition": "LAO"},
        {"PatientOrientation": ["R", "F"]},
    ],
)
def test_an_unknown_view_is_left_out_unless_assumed(tmp_path: Path, tags: dict[str, Any]) -> None:
    dicom(tmp_path / "x.dcm", **tags)
    assert import_folder(tmp_path, need_reports=False).counts() == {SkipReason.UNKNOWN_VIEW: 1}
    imported = import_folder(tmp_path, need_reports=False, assume_frontal=True)
    assert imported.notes["frontal view assumed, not known"] == 1
    assert len(imported.table) == 1


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Modality": "CT"}, "modality CT, not a radiograph"),
        ({"BodyPartExamined": "ABDOMEN"}, "body part ABDOMEN, not the chest"),
        ({"BodyPartExamined": None, "SeriesDescription": "Left hand PA"}, "body part HAND, not the chest"),
        ({"BodyPartExamined": None, "Laterality": "R"}, "body part paired (R), not the chest"),
        ({"NumberOfFrames": 3}, "DICOM of several frames"),
        ({"Rows": None}, "DICOM without an image, or not DICOM"),
    ],
)
def test_other_images_are_counted_with_a_true_reason(
    tmp_path: Path, tags: dict[str, Any], reason: str
) -> None:
    dicom(tmp_path / "good.dcm", ViewPosition="PA", PatientID="P2", StudyInstanceUID="9.9")
    dicom(tmp_path / "x.dcm", ViewPosition="PA", **tags)
    imported = import_folder(tmp_path, need_reports=False)
    assert len(imported.table) == 1
    assert [(entry.file, entry.reason) for entry in imported.unused] == [("x.dcm", reason)]


def test_priors_follow_the_dates_of_a_patient(tmp_path: Path) -> None:
    days = {
        "c": ("20200110", "080000"),
        "a": ("20200103", "101500"),
        "b": ("20200103", "101500"),
        "d": ("", ""),
    }
    for name, (day, time) in days.items():
        path = dicom(
            tmp_path / name / "IM1",
            ViewPosition="PA",
            StudyInstanceUID=f"1.{name}",
            StudyDate=day,
            StudyTime=time,
        )
        (path.parent / "report.txt").write_text(f"FINDINGS: Report {name}.\n")
    dicom(
        tmp_path / "e" / "IM1",
        ViewPosition="AP",
        StudyInstanceUID="1.e",
        PatientID="P2",
        StudyDate="20210101",
    )
    (tmp_path / "e.txt").write_text("Other patient.")
    (tmp_path / "junk.dcm").write_bytes(b"not dicom")
    rows = {row["study_id"]: row for row in import_folder(tmp_path).table.rows()}
    priors = {
        name: (row["prior_study_id"], row["prior_frontal"], row["prior_report"]) for name, row in rows.items()
    }
    assert priors == {
        "1.a": (None, None, None),
        "1.b": (None, None, None),  # equal times are not an order
        "1.c": ("1.b", "b/IM1", "FINDINGS: Report b."),
        "1.d": (None, None, None),
        "1.e": (None, None, None),
    }
    assert rows["1.c"]["taken"] == "2020-01-10T08:00:00"
    assert rows["1.e"]["report"] == "Other patient."


def test_a_radiograph_for_processing_gives_way_to_the_one_for_presentation(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", ViewPosition="PA", PresentationIntentType="FOR PROCESSING")
    dicom(tmp_path / "b.dcm", ViewPosition="PA", PresentationIntentType="FOR PRESENTATION")
    imported = import_folder(tmp_path, need_reports=False)
    assert [row["frontal"] for row in imported.table.rows()] == ["b.dcm"]
    assert imported.unused_counts() == {"another image of a study": 1}
