"""What the workbench does with a run: the same reports as other calls, streamed, stopped and exported."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lens_maira.errors import ImageError, StudyError, WorkbenchError
from sae_lens_maira.steering import Add, load_interventions
from sae_lens_maira.steering.positions import patches
from sae_lens_maira.studies import Licence
from sae_lens_maira.workbench.session import Cancelled
from sae_lens_maira.workbench.spec import RunSpec


def active_latent(session, study) -> int:
    """A latent that is active on the frontal image of a study."""
    frame = session.hooked.top_latents(study, session.sae, k=1, roles="image_only")
    return int(frame.latent.mode()[0])


@pytest.fixture
def first(session):
    return next(iter(session.studies))


def test_a_run_writes_what_steer_writes(session, first):
    """Before and after are the reports of `steer` with the same painted patches; the stream ends with them."""
    study, latent = session.studies[first], active_latent(session, session.studies[first])
    rows, cols = session.grids(first)["frontal"]
    grid = np.zeros((rows, cols))
    grid[: rows // 2] = 1
    spec = RunSpec(first, sliders=((latent, 4.0),), place="painted", grid=tuple(map(tuple, grid.tolist())))
    events = []
    result = session.write(spec, events.append)
    where = patches("frontal", torch.tensor(grid, dtype=torch.float32))
    wanted = session.hooked.steer(study, session.sae, [Add(latents=(latent,), strength=4.0, where=where)])
    assert (result["before"]["text"], result["after"]["text"]) == (wanted.before, wanted.after)
    for side in ("before", "after"):
        texts = [event["text"] for event in events if event["side"] == side]
        assert len(texts) > 5
        assert texts[-1] == result[side]["text"]
        assert "".join(text for text, _ in result["pieces"][side == "after"]) == texts[-1]
    assert result["after"]["effect"]["changed"] > 0
    assert result["before"]["perplexity"] >= 1


def test_the_control_moves_as_far_in_another_direction(session, first):
    """Same positions and norm, another report or the same, never the latent's direction."""
    latent = active_latent(session, session.studies[first])
    spec = RunSpec(first, sliders=((latent, 4.0),), place="image")
    steered = session.write(spec)["after"]["effect"]
    control = session.write(dataclasses.replace(spec, control_seed=1))["after"]["effect"]
    assert control["changed"] == steered["changed"]
    assert control["ratio"] == pytest.approx(steered["ratio"], rel=1e-4)


@pytest.mark.parametrize(
    ("place", "control"),
    [("everywhere", None), ("report", None), ("image", 3), ("map", None), ("painted", None)],
)
def test_the_exported_files_write_the_same_report(session, first, place, control, tmp_path, monkeypatch):
    """run.py with intervention.json, executed as they are, print the report of the run, for every place."""
    rows, cols = session.grids(first)["frontal"]
    grid = (
        tuple(tuple(float(r < 3 and c < 4) for c in range(cols)) for r in range(rows))
        if place == "painted"
        else ()
    )
    latent = active_latent(session, session.studies[first])
    spec = RunSpec(first, (), ((latent, 2.5),), place, "frontal", grid, control, 40)
    wanted = session.write(spec)["after"]["text"]
    files = session.export(spec)["files"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    printed = []
    exec(compile(files["run.py"], "run.py", "exec"), {"print": printed.append})
    assert printed == [wanted]
    assert load_interventions(tmp_path / "intervention.json", session.sae).interventions[0].strength == 2.5


def test_parts_are_left_out_openly(session):
    """A prior image alone is not dropped: its report would go silently; both together are."""
    name = next(n for n, s in session.studies.items() if s.prior_report is not None)
    with pytest.raises(StudyError, match="prior report"):
        session.write(RunSpec(name, without=("prior_image",), max_new_tokens=2))
    spec = RunSpec(name, without=("prior_image", "prior_report"), max_new_tokens=40)
    full = session.write(RunSpec(name, max_new_tokens=40))["before"]["text"]
    without = session.write(spec)["before"]["text"]
    assert without != full
    printed = []
    exec(compile(session.export(spec)["files"]["run.py"], "run.py", "exec"), {"print": printed.append})
    assert printed == [without]


def test_a_run_is_cancelled_between_tokens(session, first):
    """`stopped` ends the run within one token, and nothing of it is kept."""
    seen = []
    with pytest.raises(Cancelled):
        session.write(RunSpec(first), seen.append, lambda: len(seen) >= 3)
    assert len(seen) <= 5
    assert len(session.write(RunSpec(first))["before"]["text"]) > len(seen[-1]["text"])


def test_a_sentence_is_explained(session, first):
    """Map, latents with names, and the check that ablation makes."""
    spec = RunSpec(first, max_new_tokens=60)
    text = session.write(spec)["before"]["text"]
    found = session.explain(spec, text, 0)
    assert text.startswith(found["text"])
    assert found["map"]["frontal"]
    assert {"drop", "random", "problems"} <= set(found["check"])


@pytest.mark.parametrize(("query", "wanted"), [("17", 17), ("cardiomegaly", None), ("zzz", "none")])
def test_latents_are_found_by_number_name_and_finding(session, query, wanted):
    found = session.search(query)
    if wanted == "none":
        assert found == []
    elif wanted is None:
        assert found
        assert all(
            "cardiomegaly" in f"{one['name']} {one['finding']} {one['tokens']}".lower() for one in found
        )
    else:
        assert wanted in [one["latent"] for one in found]


def test_latents_are_found_by_the_tokens_that_they_raise(session):
    """A raised token that is in no name or finding finds its latent."""
    number, token = next(
        (one.latent, one.top_tokens[0].token.strip().lower())
        for one in session.records.stream()
        if len(one.top_tokens[0].token.strip()) > 4
        and one.top_tokens[0].token.strip().lower()
        not in session.sae.latent_names.get(one.latent, "").lower()
    )
    assert number in [one["latent"] for one in session.search(f"{token} {number}")]


def test_a_picture_or_dicom_that_unpacks_to_gigabytes_is_refused(session):
    """40,000 x 40,000 pixels in a small file: refused by the header, before it is decoded."""
    small = io.BytesIO()
    Image.new("1", (40_000, 40_000)).save(small, "PNG")
    assert len(small.getvalue()) < 1 << 20
    with pytest.raises(ImageError):
        session.upload(small.getvalue())
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.Rows = data.Columns = 20_000
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 7, 0, 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.PixelData = bytes(20_000 * 20_000)
    bomb = io.BytesIO()
    pydicom.dcmwrite(bomb, data, enforce_file_format=False)
    assert len(bomb.getvalue()) < 4 << 20
    with pytest.raises(ImageError):
        session.upload(bomb.getvalue())


@pytest.mark.parametrize("licence", ["credentialed", "unknown", None, "public", "synthetic"])
def test_exports_leave_out_texts_that_may_not_be_shared(session, first, licence):
    """Only public and synthetic texts are in the session file, unless the workbench allows others."""
    object.__setattr__(session.studies[first], "licence", licence)
    try:
        history = [{"spec": RunSpec(first).plain(), "before": "SECRET TEXT", "after": None}]
        closed = session.export(RunSpec(first), history)
        session.allow_credentialed = True
        opened = session.export(RunSpec(first), history)
    finally:
        object.__setattr__(session.studies[first], "licence", Licence.SYNTHETIC)
    shareable = licence in ("public", "synthetic")
    assert ("SECRET TEXT" in json.dumps(closed)) == shareable
    assert closed["texts_left_out"] == (not shareable)
    assert "SECRET TEXT" in json.dumps(opened)


def test_a_dropped_film_stays_in_memory(session, tmp_path, monkeypatch):
    """A PNG and a DICOM file are read without a file; they are credentialed and only the newest few are kept."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    buffer = io.BytesIO()
    Image.fromarray((np.arange(112 * 112).reshape(112, 112) % 251).astype(np.uint8)).save(buffer, "PNG")
    name = session.upload(buffer.getvalue(), "Cough.")
    assert session.about(name)["licence"] == "credentialed"
    assert session.write(RunSpec(name, max_new_tokens=3))["before"]["text"]
    assert session.film(name, "frontal").startswith(b"\x89PNG")
    names = [session.upload(buffer.getvalue()) for _ in range(9)]
    assert name not in session.studies
    assert names[-1] in session.studies
    for broken in (b"", b"not an image", b"\x89PNG\r\n\x1a\nxx"):
        with pytest.raises(ImageError, match="dropped file"):
            session.upload(broken)


@pytest.mark.parametrize(
    "change",
    [
        {"study": 3},
        {"more": 1},
        {"without": ["report"]},
        {"sliders": [[1]]},
        {"sliders": [["1", 2]]},
        {"sliders": [[1, 1e400]]},
        {"sliders": [[1, True]]},
        {"sliders": [[1, 1]] * 40},
        {"place": "door"},
        {"view": "oblique"},
        {"place": "painted"},
        {"grid": [[1], [1, 2]]},
        {"grid": [[2.0]]},
        {"grid": [[0.5]] * 300},
        {"control_seed": -1},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**6},
        {"max_new_tokens": 1.5},
    ],
    ids=str,
)
def test_requests_that_make_no_sense_are_refused(change):
    RunSpec.of({"study": "a"})
    for plain in ({"study": "a"} | change, None, [], {}):
        with pytest.raises(WorkbenchError):
            RunSpec.of(plain)


def test_unknown_names_are_refused(session, first):
    for spec in (
        RunSpec("nobody"),
        RunSpec(first, sliders=((10**6, 1.0),)),
        RunSpec(first, view="lateral", place="map"),
    ):
        if spec.place == "map":
            spec = dataclasses.replace(spec, sliders=((0, 1.0),))
            if "lateral" in session.grids(first):
                continue
        with pytest.raises(WorkbenchError):
            session.write(spec)
