"""A fake server with 57 behaviours, asked by the command: understood, or exit 2 with the server's own words."""

import asyncio
import gzip
import json
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("httpx")
from werkzeug import Request, Response

from sae_lens_maira.cli import main
from sae_lens_maira.interp.records import FILE, load
from sae_lens_maira.interp.run import JOURNAL, interpret_offline
from sae_lens_maira.interp.transport import Journal

KEY = "sk-secret-4711"


def answer(body: dict) -> dict:
    """A model that explains by the marked word and answers detection by looking for it."""
    system, user = (message["content"] for message in body["messages"])
    if "Say in one sentence" in system:
        return {"explanation": user.split("<<")[1].split(">>")[0]}
    description, *texts = [line for line in user.splitlines() if line and not line.startswith("Answer with")]
    word = description.removeprefix("Description: ")
    return {"verdicts": [word in text for text in texts]}


def chat(content, finish="stop", **message) -> dict:
    answer = {"role": "assistant", "content": content} | message
    return {
        "model": "odd",
        "choices": [{"index": 0, "finish_reason": finish, "message": answer}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


def sent(value, status=200, **headers) -> Response:
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    kind = headers.pop("content_type", "application/json")
    return Response(text, status, {k.replace("_", "-"): v for k, v in headers.items()}, content_type=kind)


def error(message, status=400, **more) -> Response:
    return sent({"error": {"message": message} | more}, status)


def refuses(*parameters: str) -> Callable[[dict], Response | None]:
    """Refuse parameters as OpenAI does, naming the first one that is sent."""

    def check(body: dict) -> Response | None:
        for name in parameters:
            if name in body:
                use = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                text = f"Unsupported parameter: '{name}' is not supported with this model.{use}"
                return error(text, param=name, code="unsupported_parameter")
        return None

    return check


def wrapped(make: Callable[[str], object]) -> Callable[[dict, int], Response]:
    """Good answers in an odd form."""
    return lambda body, n: sent(make(json.dumps(answer(body))))


def after(check: Callable[[dict], Response | None]) -> Callable[[dict, int], Response]:
    return lambda body, n: check(body) or sent(chat(json.dumps(answer(body))))


def no_formats(body: dict) -> Response | None:
    return error("response_format is not supported by this server") if "response_format" in body else None


def no_schema(body: dict) -> Response | None:
    return sent("bad request", 400) if body.get("response_format", {}).get("type") == "json_schema" else None


def ignores_formats(body: dict) -> Response | None:
    last = body["messages"][-1]["content"]
    return None if "JSON object of this schema" in last else sent(chat("It is active in effusions, I think."))


def sometimes(bad: Response) -> Callable[[dict, int], Response]:
    return lambda body, n: bad if n == 1 else sent(chat(json.dumps(answer(body))))


def packed(body: dict, n: int) -> Response:
    return sent(gzip.compress(json.dumps(chat(json.dumps(answer(body)))).encode()), Content_Encoding="gzip")


FENCE = "```"
USABLE: dict[str, Callable[[dict, int], Response]] = {
    "a good server": wrapped(chat),
    "max_tokens refused": after(refuses("max_tokens")),
    "temperature refused": after(refuses("temperature")),
    "both refused": after(refuses("max_tokens", "temperature")),
    "every limit refused": after(refuses("max_tokens", "max_completion_tokens")),
    "no response_format": after(no_formats),
    "no schemas": after(no_schema),
    "formats ignored": after(ignores_formats),
    "thoughts": wrapped(lambda text: chat(f'<think>Perhaps {{"verdicts": [1]}}?</think>\n{text}')),
    "end of thoughts only": wrapped(lambda text: chat(f"Let me see.\n</think>\n\n{text}")),
    "channels": wrapped(
        lambda text: chat(
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
            f"<|constrain|>json<|message|>{text}<|return|>"
        )
    ),
    "a fence": wrapped(lambda text: chat(f"{FENCE}json\n{text}\n{FENCE}")),
    "a prefix": wrapped(lambda text: chat(f"Sure! Here is the JSON you asked for:\n{text}\nAnything else?")),
    "content null": wrapped(lambda text: chat(None, reasoning_content=text)),
    "content in parts": wrapped(lambda text: chat([{"type": "text", "text": text}])),
    "more keys": wrapped(lambda text: chat(json.dumps(json.loads(text) | {"because": {"of": []}}))),
    "an answer inside an object": wrapped(lambda text: chat(json.dumps({"answer": json.loads(text)}))),
    "usage NaN": wrapped(lambda text: json.dumps(chat(text) | {"usage": {"prompt_tokens": float("nan")}})),
    "no finish, no usage": wrapped(lambda text: {"choices": [{"message": {"content": text}}]}),
    "a busy start": sometimes(sent("busy", 429, Retry_After="0")),
    "a fault at the start": sometimes(sent("oops", 500)),
    "an odd answer at the start": sometimes(sent(chat('{"explanation": "\\ud800 lone"}'))),
    "compressed": packed,
}


@pytest.fixture
def records(hand_made):
    """Two text latents, explained offline before."""
    made = hand_made(("pacemaker", "nodule"), licence="credentialed")
    interpret_offline(made)
    return made


def run(httpserver, records, behaviour, *more: str) -> int:
    """Exit code of the command against a server that behaves so; `httpserver.bodies` has what it was sent."""
    httpserver.clear()
    httpserver.bodies = []

    def handle(request: Request) -> Response:
        httpserver.bodies.append(request.get_json())
        return behaviour(httpserver.bodies[-1], len(httpserver.bodies))

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(handle)
    words = ["interpret", "run", "--records", str(records.folder), "--judge", "odd", "--methods", "detection"]
    words += ["--n-train", "10", "--n-test", "10", "--base-url", httpserver.url_for("/v1"), *more]
    return main(words)


@pytest.mark.parametrize("name", USABLE)
def test_an_odd_server_is_understood(httpserver, records, capsys, name):
    assert run(httpserver, records, USABLE[name]) == 0
    printed = capsys.readouterr().out
    done = [one for one in load(records.folder) if one.explainer == "odd"]
    assert [one.explanation for one in done][1] == "nodule"
    assert done[1].scores[0].answered == done[1].scores[0].asked > 0
    if "odd answer" not in name:
        assert "Statuses: 2 ok" in printed
        assert done[0].scores[0].balanced_accuracy == 1.0
    if "refused" in name or "format" in name or "schemas" in name:
        # What the server refuses is offered once per run, and not at all in the next one.
        assert "Adapted to this server: " in printed
        first = len(httpserver.bodies)
        assert run(httpserver, records, USABLE[name], "--seed", "1") == 0
        assert len(httpserver.bodies) < first


def test_a_server_is_asked_from_within_a_running_event_loop(httpserver, records):
    """As in a notebook: the command and `interpret` give what they give outside."""
    plain = next(iter(USABLE))
    assert run(httpserver, records, USABLE[plain]) == 0
    outside = [one.scores[0].balanced_accuracy for one in load(records.folder) if one.explainer == "odd"]

    async def host() -> int:
        return run(httpserver, records, USABLE[plain], "--seed", "1")

    assert asyncio.run(host()) == 0
    assert len(httpserver.bodies) > 0
    inside = [one.scores[0].balanced_accuracy for one in load(records.folder) if one.explainer == "odd"]
    assert inside == outside


def slowly() -> Iterator[bytes]:
    for _ in range(40):
        time.sleep(0.1)
        yield b" "


def for_ever() -> Iterator[bytes]:
    for _ in range(10_000):
        yield b" " * 65536


def page(title: str) -> str:
    return f"<!DOCTYPE html><html><head><title>{title}</title></head><body><p>Sign in.</p></body></html>"


FAILS: dict[str, tuple[Callable[[dict, int], Response], str, int]] = {
    "a wrong key": (lambda b, n: error(f"Incorrect API key provided: {KEY}", 401), "Incorrect API key", 1),
    "no money": (lambda b, n: error("Insufficient credits", 402), "HTTP 402: Insufficient credits", 1),
    "forbidden": (lambda b, n: error("Country not supported", 403), "Country not supported", 1),
    "no such model": (lambda b, n: error("The model `odd` does not exist", 404), "does not exist", 1),
    "a wrong path": (lambda b, n: sent({"detail": "Not Found"}, 404), "HTTP 404: Not Found", 1),
    "no quota": (
        lambda b, n: error("You exceeded your current quota", 429, code="insufficient_quota"),
        "exceeded your current quota",
        1,
    ),
    "a redirect": (
        lambda b, n: sent("", 302, Location="http://login.example/"),
        "redirects to http://login.example/",
        1,
    ),
    "an error inside a 200": (
        lambda b, n: sent({"error": {"message": "Model is paused"}}),
        "Model is paused",
        15,
    ),
    "a payment error inside a 200": (
        lambda b, n: sent({"error": {"message": "No credit left", "code": 402}}),
        "HTTP 402: No credit left",
        1,
    ),
    "an error as text inside a 200": (
        lambda b, n: sent({"error": "Unexpected endpoint"}),
        "Unexpected endpoint",
        15,
    ),
    "a web page": (
        lambda b, n: sent(page("Log in"), content_type="text/html"),
        "a web page instead of JSON (Log in)",
        5,
    ),
    "a web page with 502": (lambda b, n: sent(page("Bad Gateway"), 502), "HTTP 502: a web page", 3),
    "still thinking": (lambda b, n: sent(chat("<think>Well,", "length")), "--judge-max-tokens 400", 5),
    "prose for ever": (lambda b, n: sent(chat("It is a pacemaker.")), "It is a pacemaker.", 15),
    "other JSON": (lambda b, n: sent(chat('{"colour": 3}')), '{"colour": 3}', 5),
    "two answers": (
        lambda b, n: sent(chat('{"explanation": "nodule"} or {"explanation": "device"}')),
        "2 different answers",
        5,
    ),
    "no choices": (lambda b, n: sent({"choices": []}), "HTTP 200 without an answer", 5),
    "no message": (lambda b, n: sent({"choices": [None]}), "HTTP 200 without a message", 5),
    "an empty body": (lambda b, n: sent(""), "an empty body", 5),
    "bytes that are not UTF-8": (
        lambda b, n: sent(b'{"choices": "\xff\xfe"}'),
        "HTTP 200 without an answer",
        5,
    ),
    "a deep body": (lambda b, n: sent("[" * 100_000), "HTTP 200 without an answer", 5),
    "a deep answer": (lambda b, n: sent(chat('{"a":' * 5_000)), "the answer is", 5),
    "a lone surrogate": (lambda b, n: sent(chat('{"explanation": "\\ud800 x"}')), "the answer is", 5),
    "an empty answer": (lambda b, n: sent(chat("")), "the answer is empty", 5),
    "a refusal": (lambda b, n: sent(chat(None, refusal="I cannot help.")), "declined: I cannot help", 5),
    "a content filter": (lambda b, n: sent(chat("", "content_filter")), "content filter", 5),
    "a long wait": (lambda b, n: sent("later", 429, Retry_After="3600"), "asks to wait 3600 s", 1),
    "overload": (lambda b, n: sent({"message": "Overloaded"}, 529), "HTTP 529: Overloaded", 3),
    "a question too long": (
        lambda b, n: error("maximum context length is 512"),
        "maximum context length",
        15,
    ),
    "a drip": (lambda b, n: Response(slowly(), 200), "no whole answer within 0.4 s", 2),
    "an endless body": (lambda b, n: Response(for_ever(), 200), "larger than 4 MiB", 5),
    "a compressed bomb": (
        lambda b, n: sent(gzip.compress(b" " * (64 << 20), 1), Content_Encoding="gzip"),
        "larger than 4 MiB",
        5,
    ),
    "a damaged compression": (lambda b, n: sent(b"\x1f\x8bxx", Content_Encoding="gzip"), "damaged", 5),
    "a foreign compression": (lambda b, n: sent(b"xx", Content_Encoding="br"), "compressed as 'br'", 5),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_server_of_no_use_stops_the_run_with_its_own_words(httpserver, records, capsys, monkeypatch, name):
    """Exit 2 after a handful of questions; stored interpretations stay; a good server is then asked again."""
    behaviour, words, most = FAILS[name]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    before = (records.folder / FILE).read_bytes()
    limits = ["--retries", "0", "--timeout", "0.4" if "drip" in name else "20"]
    assert run(httpserver, records, behaviour, *limits) == 2
    printed = capsys.readouterr().err
    assert words in printed.splitlines()[0]
    assert printed.count("\n") == 1
    assert KEY not in printed
    assert 1 <= len(httpserver.bodies) <= most
    assert (records.folder / FILE).read_bytes() == before
    with Journal(records.folder / JOURNAL) as journal:
        assert len(journal) == 0
    assert KEY not in (records.folder / JOURNAL).read_text()


def test_a_server_that_does_not_run_costs_seconds(records, capsys):
    began = time.monotonic()
    words = ["interpret", "run", "--records", str(records.folder), "--judge", "odd"]
    assert main([*words, "--base-url", "127.0.0.1:9/v1"]) == 2
    assert "connection: " in capsys.readouterr().err
    assert time.monotonic() - began < 8


def test_an_address_without_a_scheme_is_understood_here_and_refused_elsewhere(httpserver, records, capsys):
    plain = httpserver.url_for("/v1").removeprefix("http://")
    assert run(httpserver, records, USABLE["a good server"], "--base-url", plain) == 0
    for wrong, why in (
        ("api.example.org/v1", "no scheme"),
        ("ftp://a/v1", "not an HTTP address"),
        ("http://", "not an"),
    ):
        assert run(httpserver, records, USABLE["a good server"], "--base-url", wrong) == 2
        assert why in capsys.readouterr().err


def test_a_server_mended_is_asked_again_and_good_answers_are_not_paid_twice(httpserver, records, capsys):
    """Explanations work, detection does not: the run stops; then only detection is asked."""

    def half(body: dict, n: int) -> Response:
        good = answer(body)
        return sent(chat(json.dumps(good) if "explanation" in good else "no idea"))

    assert run(httpserver, records, half) == 2
    printed = capsys.readouterr().err
    assert "All of the first 5 questions about detection failed" in printed
    assert "'no idea'" in printed
    assert run(httpserver, records, USABLE["a good server"]) == 0
    assert "2 answers from the journal" in capsys.readouterr().out
    assert all("explanation" not in answer(body) for body in httpserver.bodies)
    asked = len(httpserver.bodies)
    assert run(httpserver, records, USABLE["a good server"]) == 0
    assert not httpserver.bodies
    assert f"{asked + 2} answers from the journal" in capsys.readouterr().out


def test_a_server_that_dies_later_stops_the_run(httpserver, records, capsys):
    def dies(body: dict, n: int) -> Response:
        return USABLE["a good server"](body, n) if n <= 3 else sent("gone", 503)

    more = ["--retries", "0", "--concurrency", "1", "--batch-size", "1"]
    assert run(httpserver, records, dies, *more) == 2
    assert "HTTP 503: gone. The server stopped answering" in capsys.readouterr().err
    assert len(httpserver.bodies) == 3 + 5


def test_a_better_interpretation_is_kept(httpserver, records, capsys):
    """Same judge, later cut off in half of its answers: the explained latent keeps what it had."""
    assert run(httpserver, records, USABLE["a good server"]) == 0
    before = {one.latent: one for one in load(records.folder) if one.explainer == "odd"}

    def half(body: dict, n: int) -> Response:
        good = answer(body)
        bad = good.get("explanation") == "nodule"
        return sent(chat("" if bad else json.dumps(good)))

    assert run(httpserver, records, half, "--seed", "5", "--concurrency", "1") == 0
    now = {one.latent: one for one in load(records.folder) if one.explainer == "odd"}
    assert now[0] != before[0]
    assert now[1] == before[1]


@pytest.mark.parametrize("option", ["--n-test", "--n-train"])
def test_samples_too_small_for_any_score_are_refused(records, capsys, option):
    before = (records.folder / FILE).read_bytes()
    assert main(["interpret", "run", "--records", str(records.folder), option, "4"]) == 2
    assert f"{option} 4" in capsys.readouterr().err
    assert (records.folder / FILE).read_bytes() == before


def test_answers_of_the_journal_prove_nothing_about_a_server_that_died(httpserver, records, capsys):
    """A run is repeated with other samples: some answers are in the journal, and the server is gone."""
    more = ["--retries", "0", "--concurrency", "1", "--batch-size", "1"]
    assert run(httpserver, records, USABLE["a good server"], *more) == 0
    capsys.readouterr()
    assert run(httpserver, records, lambda body, n: sent("gone", 503), *more, "--seed", "5") == 2
    printed = capsys.readouterr().err
    assert "HTTP 503: gone." in printed
    assert len(httpserver.bodies) <= 3


def test_a_model_cut_off_at_first_goes_on(httpserver, records, capsys):
    """Small models lose themselves now and then: eleven cut answers before the first usable one end no run."""

    def late(body: dict, n: int) -> Response:
        text = json.dumps(answer(body))
        bad = 2 < n <= 13
        return sent(chat(text[:5] if bad else text, finish="length" if bad else "stop"))

    assert run(httpserver, records, late, "--batch-size", "1") == 0
    assert "11 unusable" in capsys.readouterr().out
