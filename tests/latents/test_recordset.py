"""Record sets: what is written is read back, damage is named, and nothing half-written can be opened."""

import json
import shutil
from dataclasses import replace

import pytest

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.records import Interpretation, load, save
from sae_lens_maira.latents import records as r
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.latents.writing import write_records
from sae_lens_maira.privacy import strictest

META = r.RecordsMeta(
    model="phantom",
    hook_name="blocks.3.hook_resid_post",
    layer=3,
    sae="sae",
    control="trained",
    d_in=4,
    d_sae=600,
    level_widths=(100, 600),
    rows_text=10,
    rows_image=20,
    studies=2,
    findings=("cardiomegaly",),
    seed=0,
    versions={"sae_lens": "6"},
)
STUDIES = [
    r.StudyInfo("s1", "p1", "synthetic", report="Groß.", boxes=(("cardiomegaly", 0.1, 0.2, 0.3, 0.4),)),
    r.StudyInfo("s2", "p2", "synthetic", images=(("frontal", "images/s2.png"),)),
]


TEXT = r.StudyText(
    "s1",
    tokens=("</s>", "heart", "größer"),
    positions=(6, 7, 8),
    roles=("report",) * 3,
    read=(False, False, True),
    span=(1, 3),
    views=(("frontal", 8, 8),),
)


def make_record(latent: int, value: float = 1.5) -> r.LatentRecord:
    context = r.Context(
        study="s1",
        start=1,
        end=3,
        modality="image",
        token_indices=(2,),
        token_values=(0.5,),
        patches=(((10,), (value,)),),
        texts={"s1": TEXT},
    )
    return r.LatentRecord(
        latent=latent,
        level=int(latent >= 100),
        status="alive",
        density=0.1,
        max=value,
        p99=value,
        histogram=r.Histogram((0.0, 1.0, 2.0), (3, 4)),
        firing=(
            r.Firing("text", 10, 1, 2, 1, 1.0, 1.0, 1.0),
            r.Firing("image", 20, 2, 2, 1, 1.5, value, 1.5),
        ),
        top_tokens=(r.TokenWeight("heart", 5, 0.5),),
        bottom_tokens=(),
        agreement=(r.FindingAgreement("cardiomegaly", "image", 0.5, 0.2, 0.7, 0.5, 0.5, 1, 2),),
        neighbours=(r.Neighbour(3, "co-fires", 0.4),),
        maps=(r.MeanMap("frontal", 1, 2, (0.0, 1.0), 2),),
        top=(context,),
        intervals=(r.Interval(0.0, 2.0, 0.1, (context,)),),
        zero=(),
    )


def test_what_is_written_is_read_back(tmp_path):
    """Records across file borders, by number and as a stream; numbers may have gaps."""
    written = [make_record(latent, 1.0 + latent) for latent in range(0, 600, 2)]
    write_records(tmp_path / "set", META, iter(STUDIES), iter([TEXT]), iter(written))
    records = RecordSet.open(tmp_path / "set")
    assert len(records) == 300
    assert len(list((tmp_path / "set").glob("records-*.jsonl"))) == 2
    assert list(records.stream()) == written
    assert records[598] == written[-1]
    assert records[0] == written[0]
    assert records.meta == META
    assert list(records.studies.values()) == STUDIES
    row = records.table.set_index("latent").loc[4]
    assert row["level"] == 0
    assert row["finding_image"] == "cardiomegaly"
    assert row["max_image"] == 5.0
    assert row["fired_text"] == 1
    assert 598 in records
    assert 599 not in records
    with pytest.raises(RecordError, match="Latent 599"):
        records[599]


def test_an_interrupted_rewrite_leaves_the_old_set(tmp_path):
    """A source that fails half-way changes nothing and leaves no scratch."""
    write_records(tmp_path, META, STUDIES, [TEXT], [make_record(0)])
    (tmp_path / "interpretations.jsonl").write_text("of the old set")

    def failing():
        yield make_record(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path, META, STUDIES, [TEXT], failing())
    assert list(RecordSet.open(tmp_path).stream()) == [make_record(0)]
    assert (tmp_path / "interpretations.jsonl").read_text() == "of the old set"
    assert not list(tmp_path.glob(".writing-*"))
    assert not list(tmp_path.glob("replaced-*"))


def test_another_set_is_set_aside_with_what_was_made_from_it(tmp_path):
    """Old sentences and images do not describe new latents; they stay with the old set, and a warning says where."""
    old = write_records(tmp_path, META, STUDIES, [TEXT], [make_record(0)])
    (tmp_path / "images").mkdir()
    for name in ("interpretations.jsonl", "journal.jsonl", "images/a.png"):
        (tmp_path / name).write_text("of the old set")
    again = write_records(tmp_path, META, STUDIES, [TEXT], [make_record(0)])
    assert again.fingerprint == old.fingerprint
    assert (tmp_path / "interpretations.jsonl").read_text() == "of the old set"
    (tmp_path / "images").mkdir()
    with pytest.warns(UserWarning, match="contained another record set"):
        write_records(tmp_path, META, STUDIES, [TEXT], [make_record(1)])
    assert [record.latent for record in RecordSet.open(tmp_path)] == [1]
    other = tmp_path / f"replaced-{old.fingerprint[:12]}"
    assert RecordSet.open(other).fingerprint == old.fingerprint
    assert (other / "journal.jsonl").read_text() == "of the old set"
    for name in ("interpretations.jsonl", "journal.jsonl", "images"):
        assert not (tmp_path / name).exists(), name


def test_what_a_killed_process_left_is_removed_and_what_it_set_aside_returns(tmp_path):
    """Every state of a rewrite that was killed: the same set again, with its interpretations, and nothing else."""
    old = write_records(tmp_path, META, STUDIES, [TEXT], [make_record(0)])
    (tmp_path / "interpretations.jsonl").write_text("of the old set")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("an image")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    order = [
        "interpretations.jsonl",
        *sorted(files.keys() - {"interpretations.jsonl", "meta.json"}),
        "meta.json",
    ]
    other = tmp_path / f"replaced-{old.fingerprint[:12]}"
    for moved in range(len(order) + 1):
        for path in [*tmp_path.iterdir()]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (tmp_path / "images").mkdir()
        other.mkdir()
        for name in order[:moved]:
            (other / name).write_bytes(files[name])
        for name in order[moved:]:
            (tmp_path / name).write_bytes(files[name])
        if moved == len(order):  # killed while it wrote: a part of the new set, without meta.json
            (tmp_path / "texts.jsonl").write_bytes(b"half")
        write_records(tmp_path, META, STUDIES, [TEXT], [make_record(0)])
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert found == files, moved
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [], moved


def test_interpretations_belong_to_their_record_set(tmp_path):
    """Each names fingerprint and licence of its records; in the folder of another set they are refused."""
    one = Interpretation(1, "A heart.", "a", "", "", (), (), None, "ok", 1, 1, "1")
    ours = write_records(tmp_path / "a", META, STUDIES, [TEXT], [make_record(1)])
    write_records(tmp_path / "b", META, STUDIES, [TEXT], [make_record(2)])
    save(tmp_path / "a", [one])
    (stored,) = load(tmp_path / "a")
    licence = strictest(study.licence for study in ours.studies.values())
    assert stored == replace(one, records=ours.fingerprint, licence=licence)
    assert (tmp_path / "a" / "interpretations.jsonl").stat().st_mode & 0o077 == 0
    assert ours._file("texts.jsonl").stat().st_mode & 0o077 == 0
    (tmp_path / "b" / "interpretations.jsonl").write_bytes(
        (tmp_path / "a" / "interpretations.jsonl").read_bytes()
    )
    with pytest.raises(RecordError, match="belongs to the record set"):
        load(tmp_path / "b")


def test_an_older_folder_is_refused(tmp_path):
    """A folder without a format number, as version 1 wrote it, gives one message that says what to run."""
    write_records(tmp_path, META, STUDIES, [TEXT], [make_record(0)])
    plain = json.loads((tmp_path / "meta.json").read_text())
    for name in ("format", "files"):
        del plain[name]
    (tmp_path / "meta.json").write_text(json.dumps(plain))
    with pytest.raises(
        RecordError, match=r"format 1; this version reads format 2. Run `sae-lens-maira latents`"
    ):
        RecordSet.open(tmp_path)


def test_an_empty_set_opens(tmp_path):
    """A record set without latents can be written and opened."""
    assert len(write_records(tmp_path, META, [], [], [])) == 0


@pytest.mark.parametrize(
    "name",
    ["records-00000.jsonl", "maps-00000.npz", "texts.jsonl", "studies.jsonl", "latents.parquet", "meta.json"],
)
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_damage_is_named(tmp_path, name, damage):
    """Each file, cut off or missing, gives a RecordError that names it."""
    write_records(tmp_path, META, STUDIES, [TEXT], [make_record(0)])
    path = tmp_path / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 3])
    else:
        path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 4]) + whole[-19:])

    def read():
        records = RecordSet.open(tmp_path)
        return [c.tokens for record in records for c in record.top], records.studies

    with pytest.raises(
        RecordError, match=r"meta\.json|has changed since it was written" if name == "meta.json" else name
    ):
        read()


def test_wrong_order_doubles_and_infinity_are_refused(tmp_path):
    with pytest.raises(RecordError, match="ascending"):
        write_records(tmp_path, META, STUDIES, [TEXT], [make_record(1), make_record(1)])
    with pytest.raises(RecordError, match="twice"):
        write_records(tmp_path, META, [STUDIES[0]] * 2, [], [])
    with pytest.raises(RecordError, match="finite"):
        write_records(tmp_path, META, STUDIES, [TEXT], [replace(make_record(1), max=float("inf"))])
    with pytest.raises(RecordError, match=r"meta\.json"):
        RecordSet.open(tmp_path)


def test_files_of_two_sets_do_not_mix(tmp_path):
    write_records(tmp_path / "a", META, STUDIES, [TEXT], [make_record(1)])
    write_records(tmp_path / "b", META, STUDIES, [TEXT], [make_record(2)])
    name = "records-00000.jsonl"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(RecordError, match="has changed since it was written"):
        RecordSet.open(tmp_path / "a")[1]
