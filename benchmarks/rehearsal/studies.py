"""Write a small data set in the layout of MIMIC-CXR-JPG: synthetic images of a radiograph's size, and reports.

    train   four studies of three patients: one image, one image, one image, and frontal, lateral and prior
    test    sixteen studies of sixteen patients with one image each; every fourth report states a pleural effusion

The pictures are the phantom's, enlarged. Nothing of MIMIC-CXR is used.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from sae_lens_maira.phantom import generate_studies

BODY = (
    "The cardiomediastinal silhouette is unchanged. Lungs are well expanded without focal consolidation. There is no "
    "pneumothorax. Degenerative changes are seen in the thoracic spine. No displaced rib fracture is seen. "
)
EFFUSION = ("There is no pleural effusion.", "There is a small left pleural effusion.")
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old with cough, evaluate for pneumonia.

 TECHNIQUE:  Chest radiograph.

 COMPARISON:  None.

 FINDINGS:

 {findings}

 IMPRESSION:

 No acute process.
"""
TRAIN = (
    ("10000001", "50000001", ("PA",)),
    ("10000002", "50000002", ("AP",)),
    ("10000003", "50000003", ("PA",)),
    ("10000003", "50000004", ("PA", "LATERAL")),  # its prior is the study before it
)
TEST = tuple((f"{10000100 + n}", f"{50000100 + n}", ("PA",)) for n in range(16))


def write_mimic(root: Path, side: int, height: int, seed: int = 77) -> None:
    """Write images, reports and the tables of metadata and splits.

    Args:
        root: Folder of the data set; created if missing.
        side: Width and height of the images before they are enlarged, in pixels.
        height: Height of the images that are written, in pixels; their width is 0.82 of it, as of many radiographs.
        seed: Random seed of the images.
    """
    metadata = ["dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime"]
    split = ["dicom_id,study_id,subject_id,split"]
    images = [study.frontal for study in generate_studies(len(TRAIN) + len(TEST) + 1, seed=seed, size=side)]
    number = 0
    for place, (patient, study, views) in enumerate((*TRAIN, *TEST)):
        folder = root / "files" / f"p{patient[:2]}" / f"p{patient}"
        (folder / f"s{study}").mkdir(parents=True)
        for view in views:
            name = f"{number:08x}-00000000-00000000-00000000-00000000"
            pixels = np.asarray(images[number], dtype=np.uint8)
            picture = (
                Image.fromarray(pixels)
                .convert("L")
                .resize((int(0.82 * height), height), Image.Resampling.BICUBIC)
            )
            picture.save(folder / f"s{study}" / f"{name}.jpg", quality=95)
            metadata.append(f"{name},{patient},{study},{view},2180{place + 101:04d},1000")
            split.append(f"{name},{study},{patient},{'train' if place < len(TRAIN) else 'test'}")
            number += 1
        findings = BODY + EFFUSION[place % 4 == 0]
        (folder / f"s{study}.txt").write_text(REPORT.format(findings=findings))
    for kind, lines in (("metadata", metadata), ("split", split)):
        (root / f"mimic-cxr-2.0.0-{kind}.csv").write_text("\n".join(lines) + "\n")
