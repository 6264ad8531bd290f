"""Contract of the upload with a server written from what Neuronpedia's own code does, not from our client.

Routes, status codes, the generic text of an internal error, the limit of a transaction and the fall-through of unknown
routes to a page are those observed when its web application was run.
"""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sae_lens_maira.dashboards.upload import upload
from sae_lens_maira.errors import ConfigError, PrivacyError, RecordError, ServerError
from sae_lens_maira.interp.records import Interpretation

KEY = "sk-np-test"
EXPLANATION_TYPES = {
    "oai_token-act-pair",
    "np_max-act-logits",
    "np_max-act",
    "np_acts-logits-general",
    "eleuther_acts_top20",
}
"""Rows of the server's table of explanation types; `methodName` is a foreign key into it."""
PAGE = b"<!DOCTYPE html><html><head><title>Neuronpedia</title></head><body></body></html>"


class Site(ThreadingHTTPServer):
    """Keeps models, source sets and features; features are never replaced.

    Attributes:
        transaction: most features that fit into one transaction on this machine.
        answers: what feature uploads answer instead of storing anything.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.models: dict[str, dict] = {"maira-2": {"id": "maira-2", "layers": 32}}
        self.sets: dict[str, dict] = {}
        self.features: dict[int, dict] = {}
        self.max_bytes = 10_000_000
        self.limit = 10**9
        self.transaction = 128
        self.answers: bytes | None = None
        self.cut_at: int | None = None
        self.answer_first = False

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/api"


class Handler(BaseHTTPRequestHandler):
    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]: narrower on purpose

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: object, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        site = self.server
        site.requests.append(f"{self.command} {self.path}")
        if self.headers.get("X-Api-Key") != KEY:
            self.answer(401, {"error": f"bad key {self.headers.get('X-Api-Key')}"})
        elif len(site.requests) > site.limit:
            self.answer(429, {"error": "slow down"}, Retry_After="30")
        else:
            return True
        return False

    def do_GET(self) -> None:
        if not self.allowed():
            return
        route, _, name = self.path.removeprefix("/api/").partition("/")
        if route == "source-set":
            self.answer(*((200, self.server.sets[name]) if name in self.server.sets else (404, {})))
        else:
            self.answer(200, PAGE)  # an unknown route falls through to a page

    def do_POST(self) -> None:
        site = self.server
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        if len(data) > site.max_bytes:
            self.answer(413, {"error": "too large"})
            return
        cut = site.cut_at == len(site.requests)
        status, answer = (0, None) if cut and not site.answer_first else self.act(json.loads(data))
        if cut:
            self.connection.close()
            return
        self.answer(status, answer)

    def act(self, body: dict) -> tuple[int, object]:
        """The routes; what throws there is a generic text with status 500."""
        site, broken = self.server, (500, {"message": "Internal Server Error"})
        match self.path.removeprefix("/api/"):
            case "model/get":
                return 200, site.models.get(body["id"])
            case "model/new":
                if body["id"] in site.models:
                    return 400, {"message": "Model already exists"}
                site.models[body["id"]] = body
                return 200, {"message": "Model created", "model": body}
            case "source-set/new":
                if body["modelId"] not in site.models:
                    return broken
                site.sets[f"{body['modelId']}/{body['name']}"] = body
                return 200, {"message": "Source set created", "sourceSet": body}
            case "feature/upload-batch":
                if site.answers is not None:
                    return 200, site.answers
                if not self.valid(body):
                    return 400, {"message": "Invalid request"}
                name = f"{body['modelId']}/{body['source'].partition('-')[2]}"
                types = {e.get("methodName") for f in body["features"] for e in f["explanations"]} - {None}
                if (
                    name not in site.sets
                    or len(body["features"]) > site.transaction
                    or types - EXPLANATION_TYPES
                ):
                    return broken
                for feature in body["features"]:
                    site.features.setdefault(feature["index"], feature)
                return 200, {"message": "Features uploaded", "count": len(body["features"])}
        return 200, PAGE

    @staticmethod
    def valid(body: dict) -> bool:
        """The limits of the server's own schema."""
        return 1 <= len(body["features"]) <= 128 and all(
            set(f) == {"index", "density", "activations", "explanations", "topLogits", "bottomLogits"}
            and len(f["activations"]) >= 1
            and max(len(f["topLogits"]), len(f["bottomLogits"])) <= 20
            and all(len(e["text"]) <= 512 and set(e) <= {"text", "methodName"} for e in f["explanations"])
            and all(
                1 <= len(a["tokens"]) == len(a["values"]) <= 1024
                and all(a["tokens"])
                and None not in a["values"]
                and (a["quantileFraction"] is None or 0 <= a["quantileFraction"] <= 1)
                for a in f["activations"]
            )
            for f in body["features"]
        )


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
def send(site, make_set, target, tmp_path):
    records = make_set()

    def run(records=records, **options):
        options = {"confirm": True, "key": KEY, "base_url": site.api, "max_features": 2} | options
        return upload(records, target, tmp_path / "journal.jsonl", **options)

    return run


def test_a_dry_run_makes_no_connection_and_no_file(send, site, tmp_path):
    plan = send(confirm=False, key=None)
    assert site.requests == []
    assert not (tmp_path / "journal.jsonl").exists()
    assert (plan.features, plan.payloads, plan.left_out, plan.sent) == (5, 3, 1, False)
    assert "Dry run" in str(plan)


def test_everything_arrives_once_and_a_second_call_sends_nothing(send, site, tmp_path):
    site.models.clear()
    plan = send(new_model=True)
    assert sorted(site.features) == [0, 1, 3, 4, 5]
    assert list(site.models) == ["maira-2"]
    assert list(site.sets) == ["maira-2/res-matryoshka-16k"]
    assert plan.sent
    before = len(site.requests)
    again = send(new_model=True)
    assert (again.features, again.already_sent) == (0, 5)
    assert site.requests[before:] == site.requests[:2]  # look-ups only
    assert KEY not in (tmp_path / "journal.jsonl").read_text()


@pytest.mark.parametrize("answer_first", [False, True])
@pytest.mark.parametrize("cut_at", [3, 4, 5])
def test_a_cut_connection_is_resumed(send, site, cut_at, answer_first):
    """Whether the server had taken the request or not; request 3 makes the source set, 4 and on send latents."""
    site.cut_at, site.answer_first = cut_at, answer_first
    with pytest.raises(ServerError, match=r"broke while sending (the source set|latents \d to \d)"):
        send()
    site.cut_at = None
    send(max_features=3)
    assert sorted(site.features) == [0, 1, 3, 4, 5]


def test_a_journal_cut_in_the_middle_of_a_line_still_resumes(send, site, tmp_path):
    send()
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert send().features == 1
    assert send().features == 0


@pytest.mark.parametrize("licences", ["credentialed", "unknown"])
def test_credentialed_studies_are_refused_before_any_byte(send, site, make_set, licences):
    with pytest.raises(PrivacyError, match=licences):
        send(records=make_set(licence=licences))
    assert site.requests == []


def test_a_study_that_the_table_does_not_list_is_refused_before_any_byte(send, site, make_set):
    def stranger(records):
        top = (dataclasses.replace(records[-1].top[0], study="stranger"), *records[-1].top[1:])
        return [*records[:-1], dataclasses.replace(records[-1], top=top)]

    with pytest.raises(PrivacyError, match="stranger"):
        send(records=make_set(change=stranger))
    assert site.requests == []


def test_a_wrong_key_is_named_without_being_shown(send):
    with pytest.raises(ServerError, match=r"model maira-2 .*with status 401") as caught:
        send(key="secret-key")
    assert "secret-key" not in str(caught.value)


def test_no_key_is_said_before_any_request(send, site, monkeypatch):
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="NEURONPEDIA_API_KEY"):
        send(key=None)
    assert site.requests == []


def test_a_rate_limit_names_the_latents_and_goes_on_later(send, site):
    site.limit = 4
    with pytest.raises(
        ServerError, match=r"latents 3 to 4, 2 in all \([\d,]+ bytes\) with status 429 \(retry after 30 s\)"
    ):
        send()
    site.limit = 10**9
    assert send().features == 3
    assert sorted(site.features) == [0, 1, 3, 4, 5]


def test_a_payload_too_large_names_the_latents_and_fits_when_cut(send, site):
    site.max_bytes = 60_000
    with pytest.raises(
        ServerError, match=r"latents 0 to 4, 4 in all \([\d,]+ bytes\) with status 413.*--max-bytes"
    ):
        send(max_features=4)
    send(max_bytes=59_000)
    assert sorted(site.features) == [0, 1, 3, 4, 5]


def test_a_source_set_of_somebody_else_is_refused(send, site):
    site.sets["maira-2/res-matryoshka-16k"] = {"name": "res-matryoshka-16k"}
    with pytest.raises(ServerError, match="already exists"):
        send()
    assert site.features == {}


def test_a_latent_that_changed_since_it_was_sent_is_refused(send, site, make_set):
    send()
    changed = make_set(
        change=lambda rs: [dataclasses.replace(r, density=0.5) if r.latent == 1 else r for r in rs]
    )
    with pytest.raises(RecordError, match="Latent 1 was sent before"):
        send(records=changed)


def test_the_journal_of_another_upload_is_refused(send, site):
    send()
    with pytest.raises(RecordError, match="Give another journal"):
        send(base_url=site.api + "/other")


@pytest.mark.parametrize(
    "url", ["http://example.org/api", "https://user:pass@example.org", "ftp://localhost"]
)
def test_unsafe_addresses_are_refused(send, url):
    with pytest.raises(ConfigError, match="address"):
        send(base_url=url)


def test_a_missing_model_is_reported_before_anything_is_made(send, site):
    site.models.clear()
    with pytest.raises(ServerError, match="--new-model true"):
        send()
    assert (site.models, site.sets, site.features) == ({}, {}, {})


def test_an_existing_model_is_not_made_again(send, site):
    with pytest.raises(ServerError, match="needs no --new-model"):
        send(new_model=True)
    assert (site.sets, site.features) == ({}, {})


def test_a_generic_500_names_what_was_sent_and_a_smaller_request_goes_on(send, site, make_set):
    """128 latents exceed the transaction; the advice in the message works."""
    site.transaction = 12
    records = make_set(latents=30)
    with pytest.raises(ServerError, match=r"latents 0 to 29, 29 in all .* status 500.*--max-features 12"):
        send(records=records, max_features=128)
    assert site.features == {}
    send(records=records, max_features=12)
    assert len(site.features) == 29


@pytest.mark.parametrize(
    "answer", [PAGE, b"", b"null", b"[]", b'"ok"', b'{"error": "not signed in"}', b"{", b"[" * 5000]
)
def test_a_200_that_stored_nothing_is_not_journalled(send, site, answer):
    site.answers = answer
    with pytest.raises(ServerError, match="counts as not sent"):
        send()
    site.answers = None
    assert send().features == 5
    assert sorted(site.features) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("where", ["headers", "body"])
def test_an_answer_that_drips_ends_in_time(send, site, monkeypatch, status, where):
    """A byte every 50 ms, each in time for the socket: the bound is on the whole answer."""

    def drip(self: Handler) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        start = f"HTTP/1.1 {status} x\r\n" + ("Content-Length: 1000\r\n\r\n" if where == "body" else "X: ")
        self.wfile.write(start.encode())
        with contextlib.suppress(OSError):
            for _ in range(60):
                time.sleep(0.05)
                self.wfile.write(b"x")

    monkeypatch.setattr(Handler, "do_POST", drip)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"no whole answer within 0.4 s\); what was accepted before"):
        send(timeout=0.4)
    assert time.monotonic() - began < 2.5


def test_explanations_of_any_method_arrive(send, site, make_set):
    """Our method names are mapped to one that the server's table knows."""
    printed = Interpretation(
        0, "fires at effusion", "m", "acts_top40", "pathology", (), (), None, "ok", 40, 20, "1"
    )
    send(interpretations={0: [printed]})
    assert site.features[0]["explanations"] == [
        {"text": "fires at effusion", "methodName": "eleuther_acts_top20"}
    ]
