"""The image path: equal to the library's own processor, faithful to ranges, and clear about bad files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor

from sae_lens_maira.errors import ImageError
from sae_lens_maira.maira2 import ImageRecipe, Maira2Processor, box_to_crop, box_to_image
from sae_lens_maira.maira2.images import stretch_contrast

pytestmark = pytest.mark.compat


@pytest.fixture
def recipe() -> ImageRecipe:
    return ImageRecipe(size=56, crop=56)


@pytest.mark.parametrize(("height", "width"), [(70, 90), (90, 70), (56, 56), (57, 201), (30, 41), (113, 56)])
def test_pixels_equal_the_librarys_image_processor(make_picture: Any, height: int, width: int) -> None:
    """After min-max stretching, our direct path and BitImageProcessor give the same pixels."""
    image = make_picture(3, height, width)
    image = image // 2 + 20
    stretched = Image.fromarray(stretch_contrast(image)).convert("RGB")
    library = BitImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_mean=[0.5307] * 3,
        image_std=[0.2583] * 3,
        resample=3,
    )
    wanted = torch.as_tensor(np.asarray(library(stretched)["pixel_values"][0]))
    torch.testing.assert_close(ImageRecipe(size=56, crop=56).to_pixels(image), wanted, atol=1e-5, rtol=0)


def test_channels_may_differ_in_mean_and_std(make_picture: Any) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    coloured = ImageRecipe(size=56, crop=56, mean=mean, std=std).to_pixels(make_picture())
    plain_recipe = ImageRecipe(size=56, crop=56, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    plain = plain_recipe.to_pixels(make_picture())
    wanted = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(coloured, wanted)


def test_an_image_at_518_px_has_1369_patches_per_image(
    make_processor: Any, tokenizers: Any, make_study: Any, make_picture: Any
) -> None:
    processor = make_processor(tokenizers["llama_first"], 518)
    study = make_study(frontal=make_picture(0, 600, 530), prior_frontal=make_picture(1, 520, 700))
    encoding = processor.encode(study)
    assert encoding.pixel_values.shape == (2, 3, 518, 518)
    assert int((encoding.roles == 3).sum()) == 2 * 1369
    assert (int(encoding.patch_row.max()), int(encoding.patch_col.max())) == (36, 36)


def test_every_source_of_the_same_radiograph_gives_the_same_pixels(
    recipe: ImageRecipe, make_picture: Any, tmp_path: Path
) -> None:
    radiograph = make_picture(1)
    Image.fromarray(radiograph).save(tmp_path / "radiograph.png")
    Image.fromarray(radiograph.astype(np.uint16) * 257).save(tmp_path / "radiograph16.png")
    wanted = recipe.to_pixels(radiograph)
    sources = {
        "pil": Image.fromarray(radiograph),
        "path": tmp_path / "radiograph.png",
        "string": str(tmp_path / "radiograph.png"),
        "rgb": Image.fromarray(radiograph).convert("RGB"),
        "rgb array": np.repeat(radiograph[..., None], 3, axis=2),
        "one channel": radiograph[..., None],
        "sixteen bit file": tmp_path / "radiograph16.png",
        "uint16": radiograph.astype(np.uint16) * 257,
        "signed": radiograph.astype(np.int16) - 300,
        "float": radiograph.astype(np.float32) / 255,
    }
    for name, source in sources.items():
        # a float copy may fall on the other side of a truncation: at most one grey level before resizing
        tolerance = 2.1 / 255 / 0.2583 if name in ("float",) else 1e-6
        assert (recipe.to_pixels(source) - wanted).abs().max() <= tolerance, name


def test_sixteen_bits_are_not_clipped_to_eight(recipe: ImageRecipe, tmp_path: Path) -> None:
    """PIL's conversion of a sixteen-bit picture to "L" clips at 255 and would leave a white square."""
    ramp = np.tile(np.linspace(1000, 60000, 80, dtype=np.uint16), (80, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels = recipe.to_pixels(tmp_path / "ramp.png")
    assert len(pixels.unique()) > 50


def test_stretching_reaches_both_ends_and_truncates() -> None:
    assert stretch_contrast(np.array([[10, 11], [12, 13]], dtype=np.uint8)).tolist() == [[0, 85], [170, 255]]
    assert stretch_contrast(np.array([[0.0, 0.999], [1.0, 0.5]])).tolist() == [[0, 254], [255, 127]]


def test_tables_and_arithmetic_agree_on_every_value() -> None:
    grey = np.arange(300, 4396, dtype=np.uint16).reshape(64, 64)
    assert np.array_equal(stretch_contrast(grey), stretch_contrast(grey.astype(np.float64)))


@pytest.mark.parametrize(
    "image",
    [
        np.full((60, 60), 7, dtype=np.uint8),
        np.full((60, 60), 0.5),
        Image.new("L", (60, 60), 200),
        np.zeros((0, 5)),
        np.array([[np.nan, 1.0], [0.0, 2.0]]),
        np.array([[np.inf, 1.0], [0.0, 2.0]]),
    ],
    ids=["constant", "constant float", "constant pil", "empty", "nan", "inf"],
)
def test_images_without_usable_contrast_are_refused(recipe: ImageRecipe, image: Any) -> None:
    with pytest.raises(ImageError, match=r"constant|no pixel|not finite"):
        recipe.to_pixels(image)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((2, 3, 4, 5)),
        np.zeros((60, 60, 2)),
        np.zeros((5, 5), dtype=complex),
        np.array([["a"]]),
        3,
        None,
        b"x",
    ],
    ids=str,
)
def test_things_that_are_no_image_are_refused(recipe: ImageRecipe, image: Any) -> None:
    with pytest.raises(ImageError, match="expected"):
        recipe.to_pixels(image)


def test_bad_files_are_refused_with_their_path(
    recipe: ImageRecipe, make_picture: Any, tmp_path: Path
) -> None:
    Image.fromarray(make_picture(0, 300, 300)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(make_picture(0, 300, 300)).save(tmp_path / "whole.jpg")
    jpeg = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "cut.jpg", "text.png", "empty.png"):
        with pytest.raises(ImageError, match=f"{name} could not be read"):
            recipe.to_pixels(tmp_path / name)
    with pytest.raises(ImageError, match="no image file at"):
        recipe.to_pixels(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="no image file at"):
        recipe.to_pixels(tmp_path)


def test_an_animation_is_refused(recipe: ImageRecipe, make_picture: Any, tmp_path: Path) -> None:
    frames = [Image.fromarray(make_picture(seed)) for seed in range(3)]
    frames[0].save(tmp_path / "radiograph.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="3 frames"):
        recipe.to_pixels(tmp_path / "radiograph.gif")


def test_a_bad_image_is_refused_by_encode(processor: Maira2Processor, make_study: Any) -> None:
    with pytest.raises(ImageError, match="constant"):
        processor.encode(make_study(frontal=np.zeros((60, 60), dtype=np.uint8)))


@pytest.mark.parametrize(("width", "height"), [(100, 100), (200, 100), (100, 300)])
def test_boxes_map_to_the_whole_image_and_back(width: int, height: int) -> None:
    box = (0.1, 0.2, 0.55, 0.9)
    whole = box_to_image(box, width, height)
    assert box_to_crop(whole, width, height) == pytest.approx(box)
    across, down = (whole[2] - whole[0]) * width, (whole[3] - whole[1]) * height
    assert (across, down) == pytest.approx((0.45 * min(width, height), 0.7 * min(width, height)))


def test_a_mapped_box_covers_the_same_pixels(recipe: ImageRecipe) -> None:
    """A white square painted on the whole image is found again where `box_to_crop` says."""
    radiograph = np.zeros((140, 280), dtype=np.uint8)
    radiograph[35:70, 140:175] = 255
    box = box_to_crop((140 / 280, 35 / 140, 175 / 280, 70 / 140), 280, 140)
    assert box is not None
    pixels = recipe.to_pixels(radiograph)[0] > 0
    rows, columns = torch.where(pixels)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert [int(edge) / 56 for edge in found] == pytest.approx(box, abs=1 / 56)


def test_a_box_outside_the_crop_maps_to_none_and_one_across_its_edge_is_clipped() -> None:
    assert box_to_crop((0.0, 0.1, 0.2, 0.3), 200, 100) is None
    assert box_to_crop((0.0, 0.1, 0.5, 0.3), 200, 100) == pytest.approx((0.0, 0.1, 0.5, 0.3))
