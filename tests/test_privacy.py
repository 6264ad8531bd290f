"""Privacy: every command that writes or sends, times every licence class that is not known to be shareable."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sae_lens_maira import privacy
from sae_lens_maira.cli import main
from sae_lens_maira.errors import PrivacyError
from sae_lens_maira.io import sha256_of
from sae_lens_maira.latents import records as r
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.latents.writing import write_records

SECRET = "Zzyzxomegaly"
"""A word of the reports that no other file contains."""

Classes = {
    "credentialed": lambda rows: [row | {"licence": "credentialed"} for row in rows],
    "one of many": lambda rows: [rows[0] | {"licence": "credentialed"}, *rows[1:]],
    "unknown": lambda rows: [row | {"licence": "unknown"} for row in rows],
    "misspelt": lambda rows: [row | {"licence": "Public"} for row in rows],
    "padded": lambda rows: [row | {"licence": "public "} for row in rows],
    "blank": lambda rows: [row | {"licence": ""} for row in rows],
    "null": lambda rows: [row | {"licence": None} for row in rows],
    "a list": lambda rows: [row | {"licence": ["public"]} for row in rows],
    "no field": lambda rows: [{k: v for k, v in row.items() if k != "licence"} for row in rows],
    "no study": lambda rows: [],
    "no file": None,
}
NEURONPEDIA = ["dashboards", "neuronpedia", "--records", "RECORDS", "--out", "OUT", "--set-name", "a"]
COMMANDS = {
    "html": ["dashboards", "html", "--records", "RECORDS", "--out", "OUT", "--images", "true"],
    "export": NEURONPEDIA,
    "batches": [*NEURONPEDIA, "--kind", "saedashboard"],
    "payloads": [*NEURONPEDIA, "--kind", "api"],
    "upload": ["dashboards", "upload", "--records", "RECORDS", "--set-name", "a", "--confirm", "true"],
    "interpret": ["interpret", "run", "--records", "RECORDS", "--judge", "m", "--base-url", "REMOTE"],
}  # fmt: skip


class Site(ThreadingHTTPServer):
    """A server that counts what reaches it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[bytes] = []


class Handler(BaseHTTPRequestHandler):
    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]: narrower on purpose

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record set of twelve studies with text and images."""
    folder = tmp_path / "records"
    folder.mkdir()
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(folder / "f.png")
    tokens = ("▁There", "▁is", f"▁{SECRET}", ".")
    texts = {
        f"s{i}": r.StudyText(
            f"s{i}", tokens, (0, 1, 2, 3), ("report",) * 4, (True,) * 4, (0, 4), (("frontal", 2, 2),)
        )
        for i in range(12)
    }

    def context(study: int, value: float) -> r.Context:
        on = ((2,), (value,)) if value else ((), ())
        patches = ((1,), (value / 2,)) if value else ((), ())
        return r.Context(f"s{study}", 0, 4, "text", *on, (patches,), texts)

    top = tuple(context(i, 9.0 - i) for i in range(6))
    record = r.LatentRecord(
        latent=0, level=0, status="alive", density=0.1, max=9.0, p99=8.0, histogram=r.Histogram((0.0, 9.0), (6,)),
        firing=tuple(r.Firing(kind, 100, 6, 12, 6, 1.0, 9.0, 8.0) for kind in ("text", "image")),
        top_tokens=(r.TokenWeight("▁a", 1, 1.0),), bottom_tokens=(r.TokenWeight("▁b", 2, -1.0),), agreement=(),
        neighbours=(), maps=(), top=top, intervals=(r.Interval(1.0, 9.0, 0.1, top),),
        zero=tuple(context(i, 0.0) for i in range(6, 12)),
    )  # fmt: skip
    meta = r.RecordsMeta(
        "microsoft/maira-2",
        "blocks.15.hook_resid_post",
        15,
        "sae",
        "trained",
        64,
        1,
        (1,),
        100,
        100,
        12,
        (),
        0,
        {},
    )
    study = r.StudyInfo("s0", "p0", "public", f"There is {SECRET}.", images=(("frontal", "f.png"),))
    studies = [replace(study, study=f"s{i}", patient=f"p{i}") for i in range(12)]
    write_records(folder, meta, studies, texts.values(), [record])
    return folder


def relicense(folder: Path, name: str) -> None:
    """Change the licences, and the file's hash, so that the gate has to refuse rather than the check of the file."""
    path, change = folder / "studies.jsonl", Classes[name]
    if change is None:
        path.unlink()
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][path.name] = sha256_of(path)
    del meta["checksum"]
    (folder / "meta.json").write_text(json.dumps(meta))


def run(command: str, folder: Path, site: Site, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """Run a command; its server is reached under a name that is not this machine's."""
    import sae_lens_maira.dashboards.upload as upload

    here = f"http://localhost:{site.server_address[1]}/api"
    monkeypatch.setattr(upload, "SITE", here)
    monkeypatch.setattr(privacy, "is_loopback", lambda url: False)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "sk-np-test")
    places = {"RECORDS": str(folder), "OUT": str(folder.parent / "out"), "REMOTE": here}
    return main([places.get(word, word) for word in COMMANDS[command]] + list(more))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("licence", Classes)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_of_text_or_images_leaves(command, licence, folder, site, monkeypatch, capsys):
    """Exit code 2, no file outside the record set, no request with a word of a report, no word on the terminal."""
    relicense(folder, licence)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(command, folder, site, monkeypatch) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["records"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert site.bodies == []
    output = capsys.readouterr()
    assert SECRET not in output.out + output.err
    assert "Traceback" not in output.err


@pytest.mark.parametrize("command", ["html", "export", "batches", "payloads"])
def test_the_same_commands_write_public_studies(command, folder, site, monkeypatch):
    """The control of the test above: with public studies the text is there, readable by its owner only, unmarked."""
    assert run(command, folder, site, monkeypatch) == 0
    out = folder.parent / "out"
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not (out / privacy.MARKER).exists()
    assert any(SECRET.encode() in content(path) for path in files)
    if os.name == "posix":
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_an_upload_sends_public_studies(folder, site, monkeypatch):
    run("upload", folder, site, monkeypatch)
    assert site.bodies


@pytest.mark.parametrize("licence", [name for name in Classes if name not in ("no field", "no file")])
@pytest.mark.parametrize("command", ["html", "export", "batches", "payloads"])
def test_asked_for_data_are_marked(command, licence, folder, site, monkeypatch):
    """With the option the folder carries the mark and every file with a word of a report says so itself."""
    relicense(folder, licence)
    if licence == "no study":
        return  # contexts of unlisted studies are refused in any case
    assert run(command, folder, site, monkeypatch, "--allow-credentialed", "true") == 0
    out = folder.parent / "out"
    assert json.loads((out / privacy.MARKER).read_text())["licence"] == "credentialed"
    assert privacy.is_marked(out / "deeper")
    carriers = [path for path in out.rglob("*") if path.is_file() and SECRET.encode() in content(path)]
    assert carriers
    for path in carriers:
        assert b"credentialed" in (path.read_bytes() + path.name.encode()).lower(), path
    assert all('"PUBLIC"' not in path.read_text() for path in out.glob("*.jsonl"))


def test_a_marked_folder_is_not_uploaded(folder, site, monkeypatch, capsys):
    privacy.mark_folder(folder.parent, "credentialed", "test")
    assert run("upload", folder, site, monkeypatch) == 2
    assert site.bodies == []
    assert privacy.MARKER in capsys.readouterr().err


def content(path: Path) -> bytes:
    import gzip

    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["public"], "public"),
        (["synthetic"], "synthetic"),
        (["public", "synthetic"], "public"),
        (["public", "credentialed"], "credentialed"),
        ([], "credentialed"),
        ([None], "credentialed"),
        (["PUBLIC"], "credentialed"),
        ([b"public"], "credentialed"),
    ],
)
def test_the_strictest_class_applies(licences, expected):
    assert privacy.strictest(licences) == expected


def test_the_enum_of_studies_is_understood():
    from sae_lens_maira.studies import Licence

    assert [
        privacy.is_shareable(one) for one in (Licence.PUBLIC, Licence.SYNTHETIC, Licence.CREDENTIALED)
    ] == [
        True,
        True,
        False,
    ]
    with pytest.raises(PrivacyError, match="1 'credentialed'; 2 studies"):
        privacy.check_shareable([Licence.PUBLIC, Licence.CREDENTIALED], "a test")


def test_keys_are_masked_however_they_are_written():
    key = 'sk/np+"x'
    text = f"bad key {key}, sk%2Fnp%2B%22x, {json.dumps(key)}"
    assert privacy.mask(text, key, None, "") == 'bad key ***, ***, "***"'
    assert privacy.mask("a b", "a") == "a b"


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize(
    ("mode", "expected"), [(0o755, 0o600), (0o770, 0o640), (0o2750, 0o640), (0o1777, 0o600)]
)
def test_files_are_private_unless_their_folder_is_shared(tmp_path, mode, expected):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    before = os.umask(0o022)
    try:
        with privacy.private_files(shared / "new"):
            (shared / "file").write_text("text")
        (shared / "later").write_text("text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((shared / "file").stat().st_mode) == expected
    assert stat.S_IMODE((shared / "later").stat().st_mode) == 0o644


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_records_are_readable_by_their_owner_only_and_drafts_of_killed_processes_go(folder):
    """A record set contains text of reports; what a killed `latents` left of it is replaced by the next write."""
    left = folder / ".written"
    left.mkdir()
    (left / "texts.jsonl").write_text(SECRET)
    kept = RecordSet.open(folder)
    texts = [kept.texts[name] for name in kept.studies]
    write_records(folder, kept.meta, kept.studies.values(), texts, list(kept.stream()))
    assert not left.exists()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}
    assert {
        name for name, mode in modes.items() if mode & 0o077 and name.endswith(("jsonl", "parquet"))
    } == set()
    assert not [path.name for path in folder.iterdir() if "partial" in path.name]


# Commands without a row in COMMANDS, and where nothing of a study's text or images can leave by them.
OTHERS = {
    "attribute": "gate: tests/test_privacy_of_tables.py",
    "dashboards saedashboard": "gate: tests/test_privacy_of_tables.py",
    "steer": "the page: tests/steering/test_page.py; tables and page are readable by their owner only",
    "workbench": "this machine only, exports: tests/workbench/test_session.py",
    "latents": "a record set readable by its owner only, without images of closed classes; numbers on the terminal",
    "harvest": "activations: tests/test_privacy_of_tables.py",
    "train": "weights: tests/test_privacy_of_tables.py",
    "evaluate": "numbers: tests/test_privacy_of_tables.py",
    "match": "numbers: tests/test_privacy_of_tables.py",
    "locate": "numbers: tests/test_privacy_of_tables.py",
    "store show": "numbers of an activation store",
    "store validate": "numbers of an activation store",
    "store export": "activations of an activation store",
    "store import": "activations of an activation store",
    "studies import": "the table that the other commands read, in the place that the user names",
    "studies show": "shows the user's own studies on the terminal; sends and writes nothing",
    "studies validate": "names rows and files of the user's own table; sends nothing",
    "interpret report": "reads what interpret run wrote; sends nothing",
    "interpret findings": "reads what interpret run wrote; sends nothing",
    "interpret published": "reads published explanations; sends nothing",
    "dashboards validate": "reads files that the gate let through",
    "quickstart": "synthetic studies only",
    "measure-phantom": "synthetic studies only",
}


def test_every_command_is_in_one_of_the_two_tables():
    """A new command needs a row here that says why nothing leaves by it."""
    from sae_lens_maira.cli import COMMANDS as ALL

    gated = {next(name for name in ALL if " ".join(words).startswith(name)) for words in COMMANDS.values()}
    assert gated | set(OTHERS) == set(ALL)
    assert not gated & set(OTHERS)
