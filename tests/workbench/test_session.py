"""What the workbench does with a run: the same reports as other calls, streamed, stopped and exported."""

import ast
import contextlib
import dataclasses
import io
import json
import runpy
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lens_maira.errors import ImageError, StudyError, WorkbenchError
from sae_lens_maira.steering import Add, load_interventions
from sae_lens_maira.steering.positions import patches
from sae_lens_maira.studies import Licence
from sae_lens_maira.workbench.export import Opening, quoted
from sae_lens_maira.workbench.run import new_session
from sae_lens_maira.workbench.session import Cancelled
from sae_lens_maira.workbench.spec import RunSpec


def active_latent(session, study) -> int:
    """A latent that is active on the frontal image of a study."""
    frame = session.hooked.top_latents(study, session.catalogue.sae, k=1, roles="image_only")
    return int(frame.latent.mode()[0])


def write(session, spec, emit=lambda event: None, stopped=lambda: False):
    return session.write(spec, emit, stopped)


def printed_by(files, folder):
    """What run.py prints, run as it is in its own folder."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(str(folder / "run.py"))
    return output.getvalue().removesuffix("\n")


def test_a_run_writes_what_steer_writes(session, first):
    """Before and after are the reports of `steer` with the same painted patches; the stream ends with them."""
    study, latent = session.shelf[first], active_latent(session, session.shelf[first])
    rows, cols = session.shelf.grids(first)["frontal"]
    grid = np.zeros((rows, cols))
    grid[: rows // 2] = 1
    spec = RunSpec(first, sliders=((latent, 4.0),), place="painted", grid=tuple(map(tuple, grid.tolist())))
    events = []
    result = write(session, spec, events.append)
    where = patches("frontal", torch.tensor(grid, dtype=torch.float32))
    wanted = session.hooked.steer(
        study, session.catalogue.sae, [Add(latents=(latent,), strength=4.0, where=where)]
    )
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
    latent = active_latent(session, session.shelf[first])
    spec = RunSpec(first, sliders=((latent, 4.0),), place="image")
    steered = write(session, spec)["after"]["effect"]
    control = write(session, dataclasses.replace(spec, control_seed=1))["after"]["effect"]
    assert control["changed"] == steered["changed"]
    assert control["ratio"] == pytest.approx(steered["ratio"], rel=1e-4)


@pytest.mark.parametrize(
    ("place", "control"),
    [("everywhere", None), ("report", None), ("image", 3), ("map", None), ("painted", None)],
)
def test_the_exported_files_write_the_same_report(session, first, place, control, tmp_path):
    """run.py with intervention.json, executed as they are, print the report of the run, for every place."""
    rows, cols = session.shelf.grids(first)["frontal"]
    grid = (
        tuple(tuple(float(r < 3 and c < 4) for c in range(cols)) for r in range(rows))
        if place == "painted"
        else ()
    )
    latent = active_latent(session, session.shelf[first])
    spec = RunSpec(first, (), ((latent, 2.5),), place, "frontal", grid, control, 40)
    wanted = write(session, spec)["after"]["text"]
    files = session.export(spec)["files"]
    assert printed_by(files, tmp_path) == wanted
    assert (
        load_interventions(tmp_path / "intervention.json", session.catalogue.sae).interventions[0].strength
        == 2.5
    )


def test_parts_are_left_out_openly(session, tmp_path):
    """A prior image alone is not dropped: its report would go silently; both together are."""
    name = next(n for n in session.shelf if session.shelf[n].prior_report is not None)
    with pytest.raises(StudyError, match="prior report"):
        write(session, RunSpec(name, without=("prior_image",), max_new_tokens=2))
    spec = RunSpec(name, without=("prior_image", "prior_report"), max_new_tokens=40)
    full = write(session, RunSpec(name, max_new_tokens=40))["before"]["text"]
    without = write(session, spec)["before"]["text"]
    assert without != full
    assert printed_by(session.export(spec)["files"], tmp_path) == without


def test_a_run_is_cancelled_between_tokens(session, first):
    """`stopped` ends the run within one token, and nothing of it is kept."""
    seen = []
    with pytest.raises(Cancelled):
        write(session, RunSpec(first), seen.append, lambda: len(seen) >= 3)
    assert len(seen) <= 5
    assert len(write(session, RunSpec(first))["before"]["text"]) > len(seen[-1]["text"])


def test_a_sentence_is_explained(session, first):
    """Map, latents with names, and the check that ablation makes."""
    spec = RunSpec(first, max_new_tokens=60)
    text = write(session, spec)["before"]["text"]
    found = session.explain(spec, text, 0, lambda: False)
    assert text.startswith(found["text"])
    assert found["map"]["frontal"]
    assert {"drop", "random", "problems"} <= set(found["check"])


@pytest.mark.parametrize(
    ("query", "wanted"), [("0", 0), ("1", 1), ("5", 5), ("cardiomegaly", None), ("zzz", "none")]
)
def test_latents_are_found_by_number_name_and_finding(session, query, wanted):
    found = session.catalogue.search(query)
    if wanted == "none":
        assert found == []
    elif wanted is None:
        assert found
        assert all(
            "cardiomegaly" in f"{one['name']} {one['finding']} {one['tokens']}".lower() for one in found
        )
    else:
        assert found[0]["latent"] == wanted


def test_latents_are_found_by_the_tokens_that_they_raise(session):
    """A raised token that is in no name or finding finds its latent."""
    number, token = next(
        (one.latent, one.top_tokens[0].token.strip().lower())
        for one in session.catalogue.records.stream()
        if len(one.top_tokens[0].token.strip()) > 4
        and one.top_tokens[0].token.strip().lower() not in session.catalogue.names.get(one.latent, "").lower()
    )
    assert number in [one["latent"] for one in session.catalogue.search(f"{token} {number}")]


def test_a_picture_or_dicom_that_unpacks_to_gigabytes_is_refused(session):
    """40,000 x 40,000 pixels in a small file: refused by the header, before it is decoded."""
    small = io.BytesIO()
    Image.new("1", (40_000, 40_000)).save(small, "PNG")
    assert len(small.getvalue()) < 1 << 20
    with pytest.raises(ImageError):
        session.shelf.add(small.getvalue())
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
        session.shelf.add(bomb.getvalue())


@pytest.mark.parametrize("licence", ["credentialed", "unknown", None, "public", "synthetic"])
def test_exports_leave_out_texts_that_may_not_be_shared(session, first, licence):
    """Only public and synthetic texts are in the session file, unless the workbench allows others."""
    object.__setattr__(session.shelf[first], "licence", licence)
    try:
        history = [{"spec": RunSpec(first).plain(), "before": "SECRET TEXT", "after": None}]
        closed = session.export(RunSpec(first), history)
        session.allow_credentialed = True
        opened = session.export(RunSpec(first), history)
    finally:
        object.__setattr__(session.shelf[first], "licence", Licence.SYNTHETIC)
    shareable = licence in ("public", "synthetic")
    assert ("SECRET TEXT" in json.dumps(closed)) == shareable
    assert closed["texts_left_out"] == (not shareable)
    assert "SECRET TEXT" in json.dumps(opened)


def test_a_dropped_image_stays_in_memory(session, tmp_path, monkeypatch):
    """A PNG and a DICOM file are read without a file; they are credentialed and only the newest few are kept."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    buffer = io.BytesIO()
    Image.fromarray((np.arange(112 * 112).reshape(112, 112) % 251).astype(np.uint8)).save(buffer, "PNG")
    name = session.shelf.add(buffer.getvalue(), "Cough.")
    assert session.shelf.about(name)["licence"] == "credentialed"
    assert write(session, RunSpec(name, max_new_tokens=3))["before"]["text"]
    assert session.shelf.image(name, "frontal").startswith(b"\x89PNG")
    names = [session.shelf.add(buffer.getvalue()) for _ in range(9)]
    assert name not in list(session.shelf)
    assert names[-1] in list(session.shelf)
    for broken in (b"", b"not an image", b"\x89PNG\r\n\x1a\nxx"):
        with pytest.raises(ImageError, match="dropped file"):
            session.shelf.add(broken)
    assert names[-1] in list(session.shelf)  # what cannot be read removes nothing


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
            if "lateral" in session.shelf.grids(first):
                continue
        with pytest.raises(WorkbenchError):
            write(session, spec)


def test_uploads_at_the_same_time_are_different_studies(session, monkeypatch):
    """Both are decoded before either gets its id: two ids, two images."""
    both = threading.Barrier(2, timeout=300)

    def decoded(content):
        both.wait()
        return np.full((120, 120), content[0], dtype=np.uint8)

    monkeypatch.setattr("sae_lens_maira.workbench.shelf._decoded_in_memory", decoded)
    names = {}
    threads = [
        threading.Thread(target=lambda n=n: names.update({n: session.shelf.add(bytes([n]))})) for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names.values())) == 2
    for n, name in names.items():
        assert session.shelf[name].frontal[0, 0] == n


def test_a_study_that_is_removed_during_its_run_has_its_result(session, monkeypatch):
    """Eight newer uploads remove it from the list, not from the run; its report is not kept for the next one."""
    image = np.arange(120 * 120, dtype=np.float64).reshape(120, 120)
    monkeypatch.setattr("sae_lens_maira.workbench.shelf._decoded_in_memory", lambda content: image)
    name = session.shelf.add(b"")
    result = write(
        session, RunSpec(name, max_new_tokens=3), lambda event: [session.shelf.add(b"") for _ in range(9)]
    )
    assert result["before"]["text"]
    assert name not in list(session.shelf)
    write(session, RunSpec(next(iter(session.shelf)), max_new_tokens=3))
    assert not any(key[0] == name for key in session._unsteered)


def test_calls_of_the_notebook_wait_for_a_run(session, first):
    """While the workbench steers, the same model in another thread writes its plain report, afterwards."""
    study = session.shelf[first]
    (plain,) = session.hooked.generate(study, return_type="reports")
    latent = active_latent(session, study)
    spec = RunSpec(first, sliders=((latent, 6.0),), place="image")
    steered = write(session, spec)["after"]["text"]
    assert steered != plain.text
    found, started = [], threading.Event()

    def emit(event):
        if event["side"] == "after" and not started.is_set():
            started.set()
            other.start()

    other = threading.Thread(
        target=lambda: found.extend(session.hooked.generate(study, return_type="reports"))
    )
    assert write(session, spec, emit)["after"]["text"] == steered
    other.join(timeout=60)
    assert [one.text for one in found] == [plain.text]


def test_an_attribution_is_cancelled(session, first):
    """It stops at the next forward pass and leaves no hook behind."""
    text = write(session, RunSpec(first))["before"]["text"]
    asked = []

    def stopped():
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Cancelled):
        session.explain(RunSpec(first), text, 0, stopped)
    assert len(asked) == 3
    assert session.explain(RunSpec(first), text, 0, lambda: False)["latents"]


def test_perplexity_is_of_the_tokens_as_they_were_written(session, first):
    """A report that its budget cut has no end token to be surprised by: both are about as likely per token."""
    full = write(session, RunSpec(first))["before"]["perplexity"]
    cut = write(session, RunSpec(first, max_new_tokens=10))["before"]["perplexity"]
    assert 1 <= cut < 2
    assert 1 <= full < 2


def test_a_control_of_nothing_and_runs_that_cannot_be_are_refused_by_both(session, first):
    """`write` and `export` refuse the same: no latent, an unknown one, a mask of another shape, a view not there."""
    wrong = [
        RunSpec(first, sliders=((10**6, 1.0),)),
        RunSpec(first, sliders=((-1, 1.0),)),
        RunSpec(first, sliders=((0, 1.0),), place="painted", grid=((1.0, 0.0),)),
        RunSpec("nobody"),
    ]
    for spec in wrong:
        with pytest.raises(WorkbenchError):
            write(session, spec)
        with pytest.raises(WorkbenchError):
            session.export(spec)
    with pytest.raises(WorkbenchError, match="Add a latent"):
        write(session, RunSpec(first, control_seed=1))


@pytest.mark.parametrize(
    "text", ["a", 'quo"te', "it's", "back\\slash", "a😀b", "line\nbreak", "\u2028", "');import os;('"]
)
def test_names_in_exported_code_are_those_names(text):
    assert ast.literal_eval(quoted(text)) == text


def test_exported_code_of_unknown_studies_says_what_to_fill_in(parts):
    """Studies of a notebook and dropped images have no source; the model and the SAE do."""
    model, sae, studies = parts
    session = new_session(model, sae, studies, Opening.of(model, sae), None, False)
    code = session.export(RunSpec(studies[0].study_id))["files"]["run.py"]
    assert code.startswith("# Fill in: STUDIES")
    assert "sm.load('phantom', device='cpu')" in code
    image = io.BytesIO()
    Image.fromarray(np.arange(120 * 120, dtype=np.uint8).reshape(120, 120)).save(image, "PNG")
    name = session.shelf.add(image.getvalue(), "SECRET reason")
    code = session.export(RunSpec(name))["files"]["run.py"]
    assert "FILE" in code.splitlines()[0]
    assert "SECRET" not in code
