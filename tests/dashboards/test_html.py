"""The page's files: small, closed to remote sources, private by default; and what one latent keeps of its record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sae_lens_maira.dashboards.html import LATENT_BYTES, latent_file, write_page
from sae_lens_maira.dashboards.html_latent import ALPHABET, levels
from sae_lens_maira.errors import PrivacyError, RecordError
from sae_lens_maira.latents.records import (
    Context,
    Firing,
    Histogram,
    Interval,
    LatentRecord,
    RecordsMeta,
    StudyInfo,
    StudyText,
)
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.latents.space import spatial_of_records
from sae_lens_maira.latents.writing import write_records
from sae_lens_maira.phantom import phantom_path

SIDE = 37


def _context(study: str, value: float, dense: bool = True, length: int = 250) -> Context:
    rng = np.random.default_rng(int(value * 10))
    strong = rng.random((3, SIDE * SIDE)).tolist()
    values = rng.random(length).tolist()
    values[3] = value
    return Context(
        study=study,
        start=0,
        end=length,
        modality="text",
        token_indices=tuple(range(length)) if dense else (),
        token_values=tuple(values) if dense else (),
        patches=tuple((tuple(range(SIDE * SIDE)), tuple(one)) if dense else ((), ()) for one in strong),
        texts={study: TEXT},
    )


TEXT = StudyText(
    "s0",
    tokens=("▁opacity",) * 250,
    positions=tuple(range(250)),
    roles=("indication",) * 50 + ("report",) * 200,
    read=(True,) * 250,
    span=(0, 250),
    views=tuple((view, SIDE, SIDE) for view in ("frontal", "lateral", "prior")),
)


def _record(latent: int, contexts: int = 3) -> LatentRecord:
    return LatentRecord(
        latent=latent,
        level=0,
        status="alive",
        density=0.01,
        max=9.0,
        p99=8.0,
        histogram=Histogram((0.0, 1.0, 9.0), (10, 2)),
        firing=tuple(Firing(kind, 100, 3, 10, 2, 1.0, 9.0, 8.0) for kind in ("text", "image")),
        top_tokens=(),
        bottom_tokens=(),
        agreement=(),
        neighbours=(),
        maps=(),
        top=tuple(_context("s0", 9.0 - i / 10) for i in range(contexts)),
        intervals=(Interval(1.0, 9.0, 0.1, tuple(_context("s0", 4.0) for _ in range(contexts))),),
        zero=tuple(_context("s0", 0.0, dense=False) for _ in range(contexts)),
    )


META = RecordsMeta(
    "phantom", "blocks.3.hook_resid_post", 3, "sae", "trained", 64, 4, (2, 4), 100, 100, 1, (), 0, {}
)


def _write(folder: Path, licence: str = "synthetic", contexts: int = 3, **changes: object) -> RecordSet:
    Image.fromarray(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)).save(folder / "radiograph.png")
    entry = StudyInfo(
        "s0",
        "p0",
        licence,
        images=(("frontal", "radiograph.png"),),
        boxes=(("opacity", 0.5, 0.5, 0.75, 1.0),),
    )
    return write_records(
        folder, META, [replace(entry, **changes)], [TEXT], [_record(latent, contexts) for latent in (0, 300)]
    )


def _payload(path: Path) -> dict:
    text = path.read_text(encoding="ascii")
    return json.loads(text[text.index("(") + 1 : text.rindex(")")])


def test_a_latent_page_stays_below_its_limit_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    write_page(_write(tmp_path, contexts=30), [], tmp_path / "page", images=False)
    path = tmp_path / "page" / latent_file(300)
    page = _payload(path)
    kept = len(page["top"]) + len(page["zero"]) + sum(len(i["contexts"]) for i in page["intervals"])
    assert path.stat().st_size <= LATENT_BYTES
    assert page["left_out"] == 90 - kept > 0
    assert len(page["top"]) > 0


def test_images_are_the_centre_crop_and_boxes_move_into_it(tmp_path: Path) -> None:
    write_page(_write(tmp_path), [], tmp_path / "page")
    study = _payload(tmp_path / "page" / latent_file(0))["studies"]["s0"]
    with Image.open(tmp_path / "page" / study["images"]["frontal"]) as radiograph:
        assert radiograph.size == (48, 48)
    # 64 wide, cropped by 8 on either side: x -> (64 x - 8) / 48.
    assert study["boxes"] == [["opacity", pytest.approx(0.5), 0.5, pytest.approx(0.833), 1]]


def test_credentialed_images_stay_out_unless_asked_for(tmp_path: Path) -> None:
    records = _write(tmp_path, licence="credentialed")
    with pytest.raises(PrivacyError, match="credentialed"):
        write_page(records, [], tmp_path / "page", images=True)
    assert not (tmp_path / "page").exists()
    write_page(records, [], tmp_path / "page", allow_credentialed=True)
    assert not (tmp_path / "page" / "images").exists()
    assert _payload(tmp_path / "page" / latent_file(0))["studies"]["s0"]["images"] == {}
    write_page(records, [], tmp_path / "page", images=True, allow_credentialed=True)
    (image,) = (tmp_path / "page" / "images").iterdir()
    with Image.open(image) as copy:
        assert copy.info["Licence"] == "credentialed"


@pytest.mark.parametrize(
    "source",
    ["/etc/radiograph.png", "../radiograph.png", "a/../../radiograph.png", "link.png", "C:\\radiograph.png"],
)
def test_images_outside_the_folder_are_refused(tmp_path: Path, source: str) -> None:
    """A record set cannot make the page copy files from elsewhere, also not through a link."""
    outside = tmp_path / "radiograph.png"
    folder = tmp_path / "records"
    folder.mkdir()
    records = _write(folder, images=(("frontal", source),))
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(outside)
    (folder / "link.png").symlink_to(outside)
    with pytest.raises(PrivacyError, match="outside"):
        write_page(records, [], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"gone\.png"):
        write_page(_write(tmp_path, images=(("frontal", "gone.png"),)), [], tmp_path / "page")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="which is not part of a page"):
        write_page(_write(tmp_path), [], tmp_path)
    assert (tmp_path / "radiograph.png").is_file()


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = _write(tmp_path)
    bytes_of = []
    for name in ("one", "two"):
        write_page(records, [], tmp_path / name)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        bytes_of.append([(p.relative_to(tmp_path / name), p.read_bytes()) for p in files])
    assert bytes_of[0] == bytes_of[1]


def test_the_page_names_no_remote_source_and_never_parses_markup(tmp_path: Path) -> None:
    page = write_page(_write(tmp_path), [], tmp_path / "page").parent
    html = (page / "index.html").read_text()
    assert "default-src 'none'" in html
    code = "".join((page / name).read_text() for name in ("index.html", "app.js", "latent.js", "style.css"))
    assert "https:" not in code
    assert not any(
        word in code for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write")
    )


def test_levels_keep_order_and_never_turn_firing_into_silence() -> None:
    values = np.linspace(0, 5, 200)
    numbers = [ALPHABET.index(letter) for letter in levels(values.tolist(), 5.0)]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[1], numbers[-1]) == (0, 1, len(ALPHABET) - 1)
    assert np.abs(np.array(numbers) / (len(ALPHABET) - 1) * 5 - values).max() < 5 / len(ALPHABET)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    """Pieces made side by side, images shared between them."""
    records = _write(tmp_path)
    found = []
    for workers in (1, 3):
        page = write_page(records, [], tmp_path / f"page{workers}", workers=workers).parent
        found.append({str(p.relative_to(page)): p.read_bytes() for p in page.rglob("*") if p.is_file()})
    assert found[0] == found[1]
    assert any(name.startswith("images/") for name in found[0])


def test_image_latents_show_where_they_fire_against_the_boxes(tmp_path: Path) -> None:
    """The best image latent of each boxed finding has its spatial scores and the control's on its page; others none."""
    records = RecordSet.open(phantom_path().parent / "saes" / "image" / "records")
    scores = spatial_of_records(records).set_index("finding")
    assert len(scores) > 5
    write_page(records, [], tmp_path / "page", images=False)
    shown: dict[str, tuple[int, dict[str, Any]]] = {}
    for file in (tmp_path / "page" / "data" / "latents").rglob("*.js"):
        text = file.read_text(encoding="utf-8")
        latent = json.loads(text[text.index("{") : text.rindex("}") + 1])
        shown |= {row["finding"]: (latent["latent"], row) for row in latent["space"]}
    assert set(shown) == set(scores.index)
    for finding, (latent, row) in shown.items():
        assert latent == scores.loc[finding, "latent"]
        for name in ("pointing", "iou_low", "elsewhere_energy"):
            assert row[name] == pytest.approx(scores.loc[finding, name], rel=5e-3, abs=1e-3)
