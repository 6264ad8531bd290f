"""Fault injection: every file that the product writes is flipped, cut and removed, and the commands that read it run.

Each case is detected (exit code 2 and one message) or harmless (exit code 0 and the output of undamaged files). The
quick variant damages every file and runs one command per artefact; the slow one runs all commands and more flips.
"""

import hashlib
import io
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from sae_lens_maira.cli import main
from sae_lens_maira.dashboards.server import Journal as UploadJournal
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.interp.transport import Journal
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.steering import Add, load_interventions, save_interventions
from sae_lens_maira.studies import StudyTable, table_of_studies

HOOK = "blocks.1.hook_resid_post"
STEPS = {"total_training_samples": 512, "train_batch_size_samples": 64, "lr": 0.001, "n_checkpoints": 2}
SAE = "{d_sae: 32, k: 4, matryoshka_widths: [8, 32]}"


class Outcome(NamedTuple):
    """Exit code, what was printed to stderr, and a digest of stdout and of the files that were written."""

    code: int
    error: str
    digest: str


class Artefact(NamedTuple):
    """Files that the product writes, and the commands that read them.

    Attributes:
        files: Function that lists the files in the folder of all artefacts.
        commands: Arguments of each command; `{root}` is the folder of all artefacts and `{out}` a new folder.
    """

    files: Callable[[Path], list[Path]]
    commands: tuple[tuple[str, ...], ...]


def inside(folder: str, *patterns: str, most: int = 2) -> Callable[[Path], list[Path]]:
    """Files below a folder, at most so many per pattern."""
    return lambda root: [
        p for one in patterns or ("**/*",) for p in sorted((root / folder).glob(one))[:most] if p.is_file()
    ]


def read(command: str) -> tuple[str, ...]:
    return tuple(command.split())


NAMES = "--set-name res-1k"
RECORDS = read("dashboards html --records {root}/records --out {out}")
TRAIN = (
    *read(f"train --hooks {HOOK} --studies 4 --device cpu --store {{root}}/store --out {{out}} --sae"),
    SAE,
)
ARTEFACTS = {
    "store": Artefact(
        inside("store", "*.json", "shard-000000.*"),
        (
            read("store validate --store {root}/store"),
            read("store show --store {root}/store --json"),
            read("store export --store {root}/store --out {out} --context-size 16"),
            (*TRAIN, "--trainer", json.dumps(STEPS | {"n_checkpoints": 0})),
            read("latents --sae {root}/sae --store {root}/store --studies 4 --study-seed 0 --out {out} --top 2"),
        ),
    ),
    "SAE": Artefact(
        inside("sae", "*", most=3),
        (
            read(f"dashboards neuronpedia --sae {{root}}/sae --records {{root}}/records --out {{out}} {NAMES}"),
            read("steer --sae {root}/sae --finding cardiomegaly --estimate true --out {out}"),
            read("evaluate --sae {root}/sae --studies 2"),
            read("locate --sae {root}/sae --studies 2 --device cpu"),
        ),
    ),
    "records": Artefact(
        inside("records", "*.json*", "*.parquet", "*.npz", "images/*", most=6),
        (
            RECORDS,
            read("interpret report --records {root}/records"),
            read(f"dashboards neuronpedia --records {{root}}/records --out {{out}} {NAMES}"),
            read(f"dashboards upload --records {{root}}/records {NAMES} --json"),
        ),
    ),
    "interpretations": Artefact(
        inside("records", "interpretations.jsonl"),
        (read("interpret report --records {root}/records --json"), RECORDS),
    ),
    "upload journal": Artefact(
        inside("", "upload.jsonl"),
        (read(f"dashboards upload --records {{root}}/records {NAMES} --json --journal {{root}}/upload.jsonl"),),
    ),
    "export": Artefact(inside("export"), (read("dashboards validate --folder {root}/export"),)),
    "batches": Artefact(inside("batches"), (read("dashboards validate --folder {root}/batches"),)),
    "payloads": Artefact(inside("payloads"), (read("dashboards validate --folder {root}/payloads"),)),
    "cached activations": Artefact(
        inside("cached", "*", most=8), (read("store import --cached {root}/cached --store {out}"),)
    ),
    "study table": Artefact(
        inside("table", "*.parquet", "**/*.png", most=1),
        (
            read("studies validate --table {root}/table/studies.parquet"),
            read("studies show --table {root}/table/studies.parquet"),
        ),
    ),
}  # fmt: skip


def run(arguments: tuple[str, ...], root: Path, out: Path) -> Outcome:
    """Run a command in this process; what it wrote is removed."""
    words = [word.replace("{root}", str(root)).replace("{out}", str(out)) for word in arguments]
    shutil.rmtree(out, ignore_errors=True)
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = main(words)
    digest = hashlib.sha256(stdout.getvalue().encode())
    for path in sorted(out.rglob("*")) if out.exists() else ():
        if path.is_file():
            digest.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    shutil.rmtree(out, ignore_errors=True)
    return Outcome(code, stderr.getvalue(), digest.hexdigest())


@pytest.fixture(scope="module")
def root(tmp_path_factory, phantom) -> Path:
    """Every artefact once, of four phantom studies."""
    root = tmp_path_factory.mktemp("faults")
    made = table_of_studies(generate_studies(2, seed=9), root / "table")
    StudyTable.from_frame(made.frame, root / "table").save(root / "table" / "studies.parquet")
    steps = json.dumps(STEPS | {"checkpoint_path": str(root / "checkpoints")})
    commands = (
        read(f"harvest --hooks {HOOK} --studies 4 --shard-studies 2 --store {{root}}/store --device cpu"),
        (*(word.replace("{out}", "{root}/sae") for word in TRAIN), "--trainer", steps),
        read(
            "latents --sae {root}/sae --studies 4 --study-seed 0 --out {root}/records --latents 0-7 --top 2"
        ),
        read("interpret run --records {root}/records"),
        read(f"dashboards neuronpedia --records {{root}}/records --out {{root}}/export {NAMES}"),
        read(
            f"dashboards neuronpedia --kind saedashboard --records {{root}}/records --out {{root}}/batches {NAMES}"
        ),
        read(f"dashboards neuronpedia --kind api --records {{root}}/records --out {{root}}/payloads {NAMES}"),
        read("store export --store {root}/store --out {root}/cached --context-size 16"),
    )
    for words in commands:
        done = run(words, root, root / "nothing")
        assert done.code == 0, done.error
    journal = UploadJournal(root / "upload.jsonl", _destination(root))
    journal.start()
    journal.step("source-set", "done")
    journal.sent([{"index": 900}])
    return root


def _destination(root: Path) -> dict[str, str]:
    plan = io.StringIO()
    with redirect_stdout(plan):
        assert main([*read(f"dashboards upload --records {root}/records {NAMES} --json")]) == 0
    found = json.loads(plan.getvalue())
    return {"url": found["url"], "model": found["model_id"], "source": found["source"]}


def flip(content: bytes, share: float, bit: int) -> bytes:
    """The content with one bit changed."""
    changed = bytearray(content)
    changed[min(len(content) - 1, int(share * len(content)))] ^= 1 << bit
    return bytes(changed)


QUICK = {
    "flip in the middle": lambda content: flip(content, 0.5, 0),
    "cut": lambda content: content[: len(content) // 2],
    "removed": None,
}
# A file that is absent because nothing was made or sent yet, and a journal whose end a kill cut off: no reader can tell
# these from a loss. What is missing is then shown as missing, or sent again.
UNKNOWABLE = {
    ("interpretations.jsonl", "removed"),
    ("interpretations.jsonl", "empty"),
    ("upload.jsonl", "removed"),
    ("upload.jsonl", "cut"),
    ("upload.jsonl", "cut by one byte"),
    ("upload.jsonl", "empty"),
    ("upload.jsonl", "flip of bit 2 at 100%"),  # the line end of the last entry
}
MORE = {f"flip of bit {b} at {s:.0%}": lambda c, s=s, b=b: flip(c, s, b) for s, b in
        ((0, 1), (0.1, 2), (0.25, 4), (0.4, 6), (0.6, 0), (0.75, 3), (0.9, 5), (0.999, 2))}  # fmt: skip
MORE |= {"cut by one byte": lambda content: content[:-1], "empty": lambda _: b""}


@contextmanager
def damaged(path: Path, change: Callable[[bytes], bytes] | None) -> Iterator[None]:
    """The file damaged within the block."""
    content = path.read_bytes()
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(content))
    try:
        yield
    finally:
        path.write_bytes(content)


def failures(root: Path, name: str, commands: tuple[tuple[str, ...], ...], damages: dict) -> list[str]:
    """Cases that are neither detected nor harmless."""
    found, cases = [], 0
    artefact, out = ARTEFACTS[name], root / "written"
    for command in commands:
        expected = run(command, root, out)
        assert expected.code == 0, expected.error
        for path in artefact.files(root):
            for damage, change in damages.items():
                with damaged(path, change):
                    try:
                        done = run(command, root, out)
                    except Exception as error:
                        done = Outcome(1, repr(error), "")
                messages = [line for line in done.error.splitlines() if line.startswith("sae-lens-maira ")]
                detected = done.code == 2 and len(messages) == 1 and "Traceback" not in done.error
                cases += 1
                # A shard without its entry counts as not harvested yet, which `store show` reports as such.
                unharvested = command[:2] == ("store", "show") and path.name.startswith("shard-")
                if (path.name, damage) in UNKNOWABLE or (unharvested and damage == "removed"):
                    continue
                if not detected and done[::2] != expected[::2]:
                    message = done.error.strip()[-300:]
                    found.append(
                        f"{' '.join(command[:2])}: {path.relative_to(root)}, {damage}: {done.code} {message}"
                    )
    assert cases >= len(commands) * len(damages)
    return found


@pytest.mark.parametrize("name", ARTEFACTS)
def test_damage_is_detected_or_harmless(name, root):
    assert failures(root, name, ARTEFACTS[name].commands[:1], QUICK) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTEFACTS)
def test_more_damage_in_every_command(name, root):
    assert failures(root, name, ARTEFACTS[name].commands, QUICK | MORE) == []


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cut", "removed")]


@pytest.mark.parametrize("damage", ["flip in the middle", *SLOW])
def test_a_damaged_checkpoint_ends_in_the_same_sae(damage, root):
    """The one before it is used, and that is said; nothing of the damaged one is taken over."""
    again = (*TRAIN, "--trainer", json.dumps(STEPS | {"checkpoint_path": str(root / "checkpoints")}))
    newest = max((p for p in (root / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    expected = run(again, root, root / "written")
    for path in sorted(newest.iterdir()):
        with damaged(path, QUICK[damage]):
            done = run(again, root, root / "written")
        assert (done.code, done.digest) == (0, expected.digest), (path.name, done.error)
        assert "is damaged" in done.error or (path.name, damage) == ("checksums.json", "removed")


WRITERS: dict[str, tuple[str, ...]] = {
    "harvest": read(f"harvest --hooks {HOOK} --studies 4 --shard-studies 2 --store {{out}} --device cpu"),
    "train": (*TRAIN, "--trainer", json.dumps(STEPS | {"checkpoint_path": "{out}/checkpoints"})),
    "latents": read("latents --sae {root}/sae --studies 4 --study-seed 0 --out {out} --latents 0-7 --top 2"),
    "interpret run": read("interpret run --records {out}"),
    "dashboards html": RECORDS,
    "dashboards neuronpedia": ARTEFACTS["records"].commands[2],
    "store export": read("store export --store {root}/store --out {out} --context-size 16"),
    "store import": ARTEFACTS["cached activations"].commands[0],
    "studies validate": read(
        "studies validate --table {root}/table/studies.parquet --out {out}/a.csv --without-errors {out}/b.parquet"
    ),
    "steer": read(
        "steer --sae {root}/sae --finding cardiomegaly --studies 60 --steered 2 --max-new-tokens 24 --out {out}"
    ),
    "attribute": read(
        "attribute --sae {root}/sae --studies 1 --sentences [0] --candidates 16 --regenerate false --out {out}"
    ),
}
FEW = ("harvest", "train", "latents", "interpret run", "dashboards neuronpedia")


@contextmanager
def disk_of(limit: int) -> Iterator[None]:
    """The kernel refuses files over so many bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def written_by(
    name: str, root: Path, out: Path, limit: int | None = None
) -> tuple[int, str, dict[str, bytes]]:
    """Exit code, stderr and the files of a command, which may find files of an earlier run."""
    if name == "interpret run" and not out.exists():
        shutil.copytree(root / "records", out)
        (out / "interpretations.jsonl").unlink()
    words = [word.replace("{root}", str(root)).replace("{out}", str(out)) for word in WRITERS[name]]
    err = io.StringIO()
    disk = nullcontext() if limit is None else disk_of(limit)
    with redirect_stdout(io.StringIO()), redirect_stderr(err), disk:
        code = main(words)
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    return code, err.getvalue(), files


@pytest.mark.parametrize(
    ("name", "most"),
    [*((name, 1) for name in FEW), *(pytest.param(n, 8, marks=pytest.mark.slow) for n in WRITERS)],
)
def test_a_full_disk_is_one_message_and_the_next_run_ends_as_if_it_had_not_been(
    name, most, root, monkeypatch
):
    """At a limit below the size of each file in turn, the largest first: checkpoints and intermediate files too."""
    monkeypatch.setattr("secrets.token_hex", lambda nbytes=None: "0" * 32)  # pseudonyms
    folder = root / "disk"
    out = folder / "out"  # always the same, since checkpoints record their place
    shutil.rmtree(folder, ignore_errors=True)
    code, error, expected = written_by(name, root, out)
    assert code == 0, error
    # interpret writes into a record set that is there.
    written = [n for n in expected if name != "interpret run" or n == "interpretations.jsonl"]
    sizes = sorted({len(expected[name]) for name in written}, reverse=True)
    met = 0
    for size in sizes[:: max(1, len(sizes) // most)][:most]:
        shutil.rmtree(out)
        code, error, _ = written_by(name, root, out, size - 1)
        messages = [line for line in error.splitlines() if line.startswith("sae-lens-maira ")]
        assert code == 2, (size, error)
        assert len(messages) == 1, (size, error)
        assert "Traceback" not in error
        assert "No space to write" in messages[0] or "File too large" in messages[0], (size, messages)
        assert [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".lock"))] == []
        met += 1
        code, error, found = written_by(name, root, out)
        assert code == 0, (size, error)
        assert found == expected, (
            size,
            sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n)),
        )
    assert met


def test_damage_of_a_journal_is_asked_again(tmp_path):
    """A changed answer of the judge is not served; the others are."""
    keys = [hashlib.sha256(bytes([n])).hexdigest() for n in range(3)]
    with Journal(tmp_path / "journal.jsonl") as journal:
        for key in keys:
            journal.append({"key": key, "request": {}, "usable": True, "answer": "yes"})
    content = (tmp_path / "journal.jsonl").read_bytes()
    for place in range(0, len(content), 7):
        (tmp_path / "journal.jsonl").write_bytes(flip(content, place / len(content), place % 8))
        with Journal(tmp_path / "journal.jsonl") as journal:
            rows = [row for row in map(journal.get, keys) if row is not None]
            assert all(row["answer"] == "yes" for row in rows)
            assert len(rows) >= 1


def test_saved_interventions(tmp_path, root):
    """Every bit of the file counts: another value is refused, the same value in other letters is read."""
    from sae_lens_maira.sae import load_matryoshka

    sae, path = load_matryoshka(root / "sae"), tmp_path / "intervention.json"
    save_interventions(path, Add(latents=(1, 2), strength=2.0), sae, HOOK, sae.threshold.detach(), "a note")
    content, expected = path.read_bytes(), load_interventions(path, sae)
    detected = 0
    for place in range(0, 8 * len(content), 37):
        path.write_bytes(flip(content, place // 8 / len(content), place % 8))
        try:
            found = load_interventions(path, sae)
        except InterventionError:
            detected += 1
        else:
            assert found == expected
    assert detected > 20
