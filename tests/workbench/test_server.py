"""The workbench's server over real HTTP: who is refused, what streams, what ends when a page goes."""

import http.client
import json
import sys
import threading
import time
import types
from urllib.parse import urlsplit

import pytest

import sae_lens_maira as sm
from sae_lens_maira.workbench import server
from sae_lens_maira.workbench.jobs import MAX_WAITING
from sae_lens_maira.workbench.run import RunningWorkbench
from sae_lens_maira.workbench.session import Cancelled
from sae_lens_maira.workbench.spec import RunSpec


@pytest.fixture
def running(session):
    found = RunningWorkbench(session)
    yield found
    found.close()


class Client:
    """Requests to a running workbench, with its token by default."""

    def __init__(self, running: RunningWorkbench) -> None:
        self.port = running.port
        self.token = urlsplit(running.url).query.removeprefix("token=")

    def open(self, path, method="GET", body=None, token=True, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, ({"X-Token": self.token} if token else {}) | named)
        return connection, connection.getresponse()

    def get(self, path, **keywords):
        connection, answer = self.open(path, **keywords)
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def events(self, path, plain):
        connection, answer = self.open(path, "POST", json.dumps(plain))
        assert answer.status == 200
        found = [json.loads(line) for line in answer]
        connection.close()
        return found


@pytest.fixture
def client(running):
    return Client(running)


PATHS = (
    "/",
    "/static/workbench.js",
    "/api/overview",
    "/api/image?id=x",
    "/api/run",
    "/api/upload",
    "/nowhere",
)


@pytest.mark.parametrize("path", PATHS)
def test_requests_without_token_or_from_elsewhere_are_refused(client, path):
    """No token, a wrong one, another host (DNS rebinding), another origin: 403 for every path and method."""
    attacks = [
        {"token": False},
        {"token": False, "X_Token": "x" * 32},
        {"Host": "evil.example"},
        {"Host": f"evil.example:{client.port}"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{client.port + 1}"},
        {"Origin": f"ftp://127.0.0.1:{client.port}"},
        {"Origin": "http://[evil"},
        {"Host": f"127.0.0.1.:{client.port}"},
    ]
    for attack in attacks:
        for method in ("GET", "POST", "PUT"):
            status, headers, content = client.get(path, method=method, **attack)
            assert status == 403, (attack, method, status)
            assert headers["cache-control"] == "no-store"
            assert client.token.encode() not in content


def test_every_answer_has_its_headers(client):
    """Nothing is cached, sniffed, framed or loaded from elsewhere; also refusals and errors."""
    for path, token in (("/", True), ("/api/overview", True), ("/nowhere", True), ("/", False)):
        _, headers, _ = client.get(path, token=token)
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"


def test_bodies_are_bounded_and_checked(client, monkeypatch):
    """Too large by header or by stream, no JSON, deep JSON, wrong shapes: 4xx with a reason, and the server goes on."""
    monkeypatch.setattr(server, "MAX_UPLOAD", 1000)
    chunked = (b"x" * 400 for _ in range(4))
    cases = [
        ("/api/upload", b"x" * 2000, 413),
        ("/api/upload", chunked, 413),
        ("/api/upload", b"no image", 400),
        ("/api/run", b"{", 400),
        ("/api/run", b"[" * 100_000, 400),
        ("/api/run", b"[]", 400),
        ("/api/run", b"{}", 400),
        ("/api/export", json.dumps({"spec": {"study": "a"}, "history": [1]}).encode(), 400),
        ("/api/explain", json.dumps({"spec": {"study": "a"}, "text": 1, "sentence": 0}).encode(), 400),
    ]
    for path, body, wanted in cases:
        status, _, content = client.get(path, method="POST", body=body)
        assert status == wanted, (path, content[:200])
        assert json.loads(content)["error"]
    assert client.get("/api/overview")[0] == 200


def test_a_run_streams_and_ends_with_the_result(client, session):
    """Text grows event by event; a model error is an event with its cause."""
    name = next(iter(session.shelf))
    found = client.events("/api/run", {"spec": RunSpec(name).plain()})
    texts = [event["text"] for event in found if event["event"] == "text"]
    assert found[-1]["event"] == "result"
    assert found[-1]["result"]["before"]["text"] == texts[-1]
    assert len(set(texts)) > 5
    (*_, last) = client.events("/api/run", {"spec": RunSpec("nobody").plain()})
    assert last["event"] == "error"
    assert "nobody" in last["message"]


def test_runs_queue_and_a_page_that_goes_frees_its_place(client, session, monkeypatch):
    """The second of two users waits and gets a message; when the first leaves, the second's run starts."""
    stopped = threading.Event()

    def slow(spec, emit, is_stopped):
        while not is_stopped():
            emit({"event": "text", "side": "before", "text": "a"})
            time.sleep(0.01)
        stopped.set()
        raise Cancelled

    write = session.write
    monkeypatch.setattr(session, "write", slow)
    name = next(iter(session.shelf))
    spec = json.dumps({"spec": RunSpec(name, max_new_tokens=5).plain()})
    first, answer = client.open("/api/run", "POST", spec)
    assert json.loads(answer.readline())["event"] == "started"
    assert json.loads(answer.readline())["event"] == "text"  # the slow one runs now
    monkeypatch.setattr(session, "write", write)
    second, waiting = client.open("/api/run", "POST", spec)
    assert json.loads(waiting.readline()) == {"event": "queued", "ahead": 1}
    assert client.get("/api/overview")[0] == 200  # a slow model blocks nothing else
    answer.close()
    first.close()
    assert stopped.wait(20)
    events = [json.loads(line) for line in waiting]
    second.close()
    assert events[-1]["event"] == "result"


def test_a_full_queue_is_said(client, session, monkeypatch):
    """One more than the queue takes gets a message instead of waiting."""
    release = threading.Event()
    monkeypatch.setattr(session, "write", lambda *_: release.wait(30))
    spec = json.dumps({"spec": RunSpec(next(iter(session.shelf))).plain()})
    held = [client.open("/api/run", "POST", spec) for _ in range(MAX_WAITING)]
    for _, answer in held:
        answer.readline()
    (last,) = client.events("/api/run", json.loads(spec))
    assert last["event"] == "error"
    release.set()
    for connection, answer in held:
        answer.close()
        connection.close()


def test_a_notebook_shows_the_page_in_a_frame(parts):
    """`sm.workbench(...)` serves in a thread; its HTML is a frame of the address, and close ends it."""
    model, sae, studies = parts
    found = sm.workbench(model, sae, studies[0])
    try:
        assert found.url.split("?")[0] in found._repr_html_()
        assert Client(found).get("/api/overview")[0] == 200
    finally:
        found.close()
    with pytest.raises(OSError, match=r"refused|reset"):
        Client(found).get("/api/overview")


def test_proxies_of_notebooks_get_an_address_of_their_own(parts, monkeypatch):
    """JupyterHub's proxy path, Colab's own frame, and the host of a proxy that was allowed."""
    model, sae, studies = parts
    found = sm.workbench(model, sae, studies[0], allowed_hosts=["hub.example"])
    try:
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/a/")
        assert f"'/user/a/proxy/{found.port}/?token=" in found._repr_html_()
        asked = []
        colab = types.SimpleNamespace(
            serve_kernel_port_as_iframe=lambda port, **kw: asked.append((port, kw["path"]))
        )
        monkeypatch.setitem(sys.modules, "google.colab.output", colab)
        found._ipython_display_()
        assert asked == [(found.port, "/?" + urlsplit(found.url).query)]
        client = Client(found)
        status, headers, _ = client.get("/api/overview", Host="hub.example", Origin="https://hub.example")
        assert status == 200
        assert "https://hub.example" in headers["content-security-policy"]
        assert client.get("/api/overview", Host="hub.example", Origin="https://other.example")[0] == 403
    finally:
        found.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("workbench")]


def test_numbers_that_json_lacks_and_errors_of_the_server_are_sent_as_such(client, session, monkeypatch):
    """An infinite perplexity is null, not a broken stream; an unforeseen error is a 500 with its cause."""
    spec = {"spec": RunSpec(next(iter(session.shelf))).plain()}
    monkeypatch.setattr(
        session, "write", lambda *_: {"perplexity": float("inf"), "maps": [float("nan"), 1.0]}
    )
    assert client.events("/api/run", spec)[-1]["result"] == {"perplexity": None, "maps": [None, 1.0]}
    monkeypatch.setattr(session, "overview", lambda: 1 / 0)
    status, headers, content = client.get("/api/overview")
    assert (status, headers["cache-control"]) == (500, "no-store")
    assert "ZeroDivisionError" in json.loads(content)["error"]
