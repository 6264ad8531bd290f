"""Images and boxes of a record set: kept as the model sees them, so that a page can lay one over the other."""

import numpy as np
import pytest
from PIL import Image

from sae_lens_maira.latents.collect import save_images, study_info
from sae_lens_maira.latents.contexts import Pseudonyms
from sae_lens_maira.maira2.images import centre_crop
from sae_lens_maira.studies import Finding, Licence, Study


@pytest.fixture
def wide() -> Study:
    """A image twice as wide as high, with a white square that its box surrounds."""
    image = np.zeros((100, 200), np.uint8)
    image[20:40, 60:90] = 255
    box = (60 / 200, 20 / 100, 90 / 200, 40 / 100)
    return Study(
        study_id="s",
        patient_id="p",
        frontal=image,
        licence=Licence.SYNTHETIC,
        truth=(Finding(name="nodule", box=box),),
    )


def test_a_kept_image_and_its_boxes_share_one_frame(wide: Study, tmp_path):
    """The box of the entry surrounds the white square of the saved crop, and cropping again moves neither."""
    kept = save_images(wide, "s", tmp_path, side=518)
    entry = study_info(wide, Pseudonyms(), ["nodule"], "truth", kept)
    with Image.open(tmp_path / kept[0][1]) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (100, 100)
    rows, cols = (np.flatnonzero((pixels > 128).any(axis)) for axis in (1, 0))
    name, *box = entry.boxes[0]
    assert name == "nodule"
    assert box == pytest.approx(
        [cols[0] / 100, rows[0] / 100, (cols[-1] + 1) / 100, (rows[-1] + 1) / 100], abs=1e-6
    )
    again, boxes = centre_crop(tmp_path / kept[0][1], entry.boxes, side=518)
    assert again.size == (100, 100)
    assert boxes[0][1:] == pytest.approx(tuple(box))


def test_boxes_stay_on_the_whole_image_where_none_is_kept(wide: Study):
    entry = study_info(wide, Pseudonyms(), ["nodule"], "truth", ())
    assert entry.boxes[0][1:] == pytest.approx((0.3, 0.2, 0.45, 0.4))
