"""A server that misbehaves in every way we know of: retried, or counted as unusable with its reason; the gate."""

import asyncio
import json

import pytest

pytest.importorskip("httpx")
from pydantic import BaseModel
from werkzeug import Request, Response

from sae_lens_maira.errors import PrivacyError, RecordError, ServerError
from sae_lens_maira.interp.judge import Judge, Server
from sae_lens_maira.interp.transport import Journal, key_of
from sae_lens_maira.privacy import check_destination, is_loopback


class Colour(BaseModel):
    colour: str


def completion(text: str, finish: str = "stop") -> Response:
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "served",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}},
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
    return Response(json.dumps(body), content_type="application/json")


GOOD = '{"colour": "red"}'


def ask(httpserver, journal, questions=("?",), licences=("credentialed",), **options):
    """Replies and usage of a judge that puts these questions, one after another."""

    async def go():
        server = Server(model="m", base_url=httpserver.url_for("/v1"), **options)
        async with Judge(server, journal) as judge:
            replies = [await judge.ask([{"role": "user", "content": q}], Colour, licences) for q in questions]
        return replies, judge.usage

    return asyncio.run(go())


def script(httpserver, answers):
    """Answer the requests with these in turn, the last for ever; returns the list of bodies seen."""
    bodies, left = [], list(answers)

    def handle(request: Request) -> Response:
        bodies.append(request.get_json())
        return left.pop(0) if len(left) > 1 else left[0]

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(handle)
    return bodies


def test_429_waits_as_told_and_500_is_retried(httpserver, tmp_path):
    bodies = script(
        httpserver, [Response("slow", 429, {"Retry-After": "1"}), Response("oops", 500), completion(GOOD)]
    )
    with Journal(tmp_path / "j") as journal:
        (reply,), usage = ask(httpserver, journal)
    assert reply.answer == Colour(colour="red")
    assert len(bodies) == 3
    assert usage.retries == 2
    assert (usage.tokens_in, usage.tokens_out) == (10, 5)
    assert json.loads((tmp_path / "j").read_text())["seconds"] >= 1.0
    assert usage.price((2.0, 4.0)) == pytest.approx(40e-6)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (completion(GOOD, "length"), "cut off"),
        (completion('{"colour": '), "invalid"),
        (completion('{"hue": 3}'), "invalid"),
        (completion(""), "invalid"),
        (Response("oops", 500), "server error: HTTP 500: oops"),
    ],
)
def test_what_cannot_be_used_is_counted_and_not_guessed(httpserver, tmp_path, answer, problem):
    script(httpserver, [answer])
    with Journal(tmp_path / "j") as journal:
        (reply,), usage = ask(httpserver, journal, max_retries=0)
    assert reply.answer is None
    assert reply.problem.startswith(problem)
    assert usage.unusable == 1


def test_a_timeout_is_counted(httpserver, tmp_path):
    import time

    def slow(request: Request) -> Response:
        time.sleep(0.6)
        return completion(GOOD)

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(slow)
    with Journal(tmp_path / "j") as journal:
        (reply,), usage = ask(httpserver, journal, max_retries=1, timeout=0.2)
    assert reply.problem == "timeout: no whole answer within 0.2 s"
    assert usage.unusable == 1


def test_a_server_without_schemas_is_remembered(httpserver, tmp_path):
    """The schema is offered once; further questions, also of a second run, ask for a JSON object at once."""
    bodies = script(httpserver, [Response("no schemas", 400), completion(GOOD)])
    for questions in (("a", "b"), ("c",)):
        with Journal(tmp_path / "j") as journal:
            replies, _ = ask(httpserver, journal, questions)
        assert all(reply.answer for reply in replies)
    modes = [body["response_format"]["type"] for body in bodies]
    assert modes == ["json_schema", "json_object", "json_object", "json_object"]
    assert "JSON object of this schema" in bodies[1]["messages"][0]["content"]


def test_a_question_refused_in_every_format_is_unusable_and_the_format_stays(httpserver, tmp_path):
    script(httpserver, [Response("too long", 400)])
    with Journal(tmp_path / "j") as journal:
        (reply,), _ = ask(httpserver, journal)
        assert reply.problem == "refused: HTTP 400: too long"
    assert "note" not in (tmp_path / "j").read_text()


def test_a_wrong_model_stops_the_run(httpserver, tmp_path):
    script(httpserver, [Response("no such model", 404)])
    with Journal(tmp_path / "j") as journal, pytest.raises(ServerError, match="OPENAI_BASE_URL"):
        ask(httpserver, journal)


def test_budgets_stop_before_they_are_passed(httpserver, tmp_path):
    bodies = script(httpserver, [completion(GOOD)])
    with Journal(tmp_path / "j") as journal:
        replies, usage = ask(httpserver, journal, ("a", "b", "c"), max_requests=2)
        assert [r.problem for r in replies] == ["", "", "over budget"]
        replies, usage = ask(httpserver, journal, ("d", "a"), max_tokens_total=100, max_tokens=200)
        assert [r.problem for r in replies] == ["over budget", "over budget"]
        assert usage.over_budget == 2
        assert usage.unusable == 0
    assert len(bodies) == 2


def test_the_journal_answers_the_second_run_and_errors_are_asked_again(httpserver, tmp_path):
    bodies = script(httpserver, [Response("oops", 500), completion(GOOD)])
    for asked, cached in ((1, 0), (2, 0), (2, 1)):
        with Journal(tmp_path / "j") as journal:
            (reply,), usage = ask(httpserver, journal, max_retries=0)
        assert len(bodies) == asked
        assert bool(reply.answer) == (asked == 2)
        assert usage.cached == cached


def test_a_torn_last_line_costs_only_itself(tmp_path):
    with Journal(tmp_path / "j") as journal:
        for i in range(3):
            journal.append({"key": key_of({"i": i}), "usable": True, "text": "é"})
    whole = (tmp_path / "j").read_bytes()
    for cut in (1, 2, 20):
        (tmp_path / "j").write_bytes(whole[:-cut])
        with Journal(tmp_path / "j") as journal:
            assert journal.torn == (cut > 1)
            journal.append({"key": key_of({}), "usable": True, "text": ""})
        with Journal(tmp_path / "j") as journal:
            assert journal.get(key_of({}))
            assert journal.get(key_of({"i": 1}))
            assert (journal.get(key_of({"i": 2})) is None) == (cut > 1)
    (tmp_path / "other").write_text("a\nb\n")
    with pytest.raises(RecordError, match="not a journal"):
        Journal(tmp_path / "other")


def test_credentialed_text_stays_before_any_byte(httpserver, tmp_path):
    """The gate closes before a connection is made; public text passes, and so does the user's permission."""

    async def go(**options):
        async with Judge(Server(model="m", base_url="http://192.0.2.1/v1", **options), journal) as judge:
            await judge.ask([{"role": "user", "content": "secret"}], Colour, ["synthetic", "credentialed"])

    with Journal(tmp_path / "j") as journal, pytest.raises(PrivacyError, match="--allow-remote"):
        asyncio.run(go())
    assert not (tmp_path / "j").read_bytes()
    assert "none credentialed" in check_destination(["public"], "https://example.org/v1")
    assert "--allow-remote" in check_destination(
        ["credentialed"], "https://example.org/v1", allow_remote=True
    )
    with pytest.raises(PrivacyError):
        check_destination(["something new"], "https://example.org/v1")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:8/v1"])
def test_loopback(url):
    """These addresses are this machine."""
    assert is_loopback(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost.example.org",
        "http://127.0.0.1.nip.io",
        "http://127.0.0.1@example.org",
        "http://10.0.0.1",
    ],
)
def test_not_loopback(url):
    """These addresses are other machines, although they look local."""
    assert not is_loopback(url)


def test_a_local_server_cannot_pass_text_on(httpserver, tmp_path):
    """A redirect to another host is not followed."""
    script(httpserver, [Response("", 307, {"Location": "http://192.0.2.1/v1/chat/completions"})])
    with (
        Journal(tmp_path / "j") as journal,
        pytest.raises(ServerError, match=r"redirects to http://192\.0\.2\.1"),
    ):
        ask(httpserver, journal, max_retries=0)
