"""The guarded upload against a real HTTP server that enforces the API's limits."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sae_lens_maira.dashboards.schema import Line
from sae_lens_maira.dashboards.upload import upload
from sae_lens_maira.dashboards.validate import payload_issues
from sae_lens_maira.errors import ConfigError, PrivacyError, RecordError, ServerError

KEY = "sk-np-test"


class Site(ThreadingHTTPServer):
    """Keeps models, source sets and features; features are never replaced, as on the real site."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.models: set[str] = set()
        self.sets: set[str] = set()
        self.features: dict[int, dict] = {}
        self.max_bytes = 10_000_000
        self.limit = 10**9
        self.cut_at: int | None = None
        self.answer_first = False

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/api"


class Handler(BaseHTTPRequestHandler):
    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]: narrower on purpose

    def log_message(self, format: str, *args: object) -> None:
        pass

    def say(self, status: int, body: object, **headers: str) -> None:
        data = json.dumps(body).encode()
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
            self.say(401, {"error": f"bad key {self.headers.get('X-Api-Key')}"})
        elif len(site.requests) > site.limit:
            self.say(429, {"error": "slow down"}, Retry_After="30")
        else:
            return True
        return False

    def do_GET(self) -> None:
        if self.allowed():
            kept = self.server.sets | self.server.models
            self.say(*((200, {"name": "kept"}) if self.path.split("/api/")[1] in kept else (404, {})))

    def do_POST(self) -> None:
        site = self.server
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        if len(data) > site.max_bytes:
            self.say(413, {"error": "too large"})
            return
        body = json.loads(data)
        cut = site.cut_at == len(site.requests)
        if not cut or site.answer_first:
            self.keep(body)
        if cut:
            self.connection.close()
            return
        self.say(200, {})

    def keep(self, body: dict) -> None:
        site = self.server
        if self.path == "/api/model/new":
            site.models.add(f"model/{body['id']}")
        elif self.path == "/api/source-set/new":
            site.sets.add(f"source-set/{body['modelId']}/{body['name']}")
        else:
            assert not list(payload_issues(body, Line("request", 1, body)))
            for feature in body["features"]:
                site.features.setdefault(feature["index"], feature)


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
    plan = send(new_model=True)
    assert sorted(site.features) == [0, 1, 3, 4, 5]
    assert site.models == {"model/maira-2"}
    assert site.sets == {"source-set/maira-2/res-matryoshka-16k"}
    assert plan.sent
    before = len(site.requests)
    again = send(new_model=True)
    assert (again.features, again.already_sent) == (0, 5)
    assert len(site.requests) == before
    assert KEY not in (tmp_path / "journal.jsonl").read_text()


@pytest.mark.parametrize("answer_first", [False, True])
@pytest.mark.parametrize("cut_at", [2, 3, 4])
def test_a_cut_connection_is_resumed(send, site, cut_at, answer_first):
    """Whether the server had taken the request or not; request 2 makes the source set, 3 and on send latents."""
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
    with pytest.raises(ServerError, match=r"source set res-matryoshka-16k with status 401") as caught:
        send(key="secret-key")
    assert "secret-key" not in str(caught.value)


def test_no_key_is_said_before_any_request(send, site, monkeypatch):
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="NEURONPEDIA_API_KEY"):
        send(key=None)
    assert site.requests == []


def test_a_rate_limit_names_the_latents_and_goes_on_later(send, site):
    site.limit = 3
    with pytest.raises(ServerError, match=r"latents 3 to 4 with status 429 \(retry after 30 s\)"):
        send()
    site.limit = 10**9
    assert send().features == 3
    assert sorted(site.features) == [0, 1, 3, 4, 5]


def test_a_payload_too_large_names_the_latents_and_fits_when_cut(send, site):
    site.max_bytes = 60_000
    with pytest.raises(ServerError, match=r"latents 0 to 4 with status 413.*--max-bytes"):
        send(max_features=4)
    send(max_bytes=59_000)
    assert sorted(site.features) == [0, 1, 3, 4, 5]


def test_a_source_set_of_somebody_else_is_refused(send, site):
    site.sets.add("source-set/maira-2/res-matryoshka-16k")
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
