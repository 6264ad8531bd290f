"""OpenAI-compatible client: returns a validated answer, or the reason why there is none.

    question -> journal? -> budget -> request (adapted to the server) -> retries -> answer that fits its schema

Until the first usable answer of each topic, questions of that topic are sent one at a time. If they all fail, the run
stops with the server's message, so that a wrong address or model costs seconds only. Parameters that a server refuses
(`max_tokens`, `temperature`, schemas) are renamed or dropped once per run, and recorded in the journal and in `Usage`.
Time and size of a whole answer are bounded.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel

from sae_lens_maira.errors import ConfigError, ServerError
from sae_lens_maira.interp.prompts import Messages, tokens_of
from sae_lens_maira.interp.protocol import Completion, Dialect, Problem, adapted, read_answer
from sae_lens_maira.interp.transport import Journal, Transport, key_of
from sae_lens_maira.privacy import check_destination, is_loopback, mask

Answer = TypeVar("Answer", bound=BaseModel)
DEFAULT_URL = "https://api.openai.com/v1"

# Number of failed questions of one topic after which a run stops, if none was answered. A model that fails at random
# half of the time ("cut off", "invalid") fails the first 12 questions in one of 4,000 runs.
PATIENCE = {"stopped": 1, "forbidden": 1, "connection": 1, "timeout": 2, "server error": 3, "rate limit": 3}
PATIENCE |= {"cut off": 12, "invalid": 12}
PATIENCE_ELSE = 5
# Number of consecutive failures after which a run stops later on.
LOST = {"connection", "timeout", "server error", "rate limit", "forbidden", "no completion", "too large"}
_NO_JSON = "The model does not answer in the requested JSON format; choose another model."
HINTS = {
    "connection": "Start the server, or check --base-url (OPENAI_BASE_URL).",
    "timeout": "Pass a larger --timeout for a slow model.",
    "cut off": "Answers were cut off at --judge-max-tokens {max_tokens}; a reasoning model needs 4000 or more.",
    "invalid": _NO_JSON,
    "not JSON": _NO_JSON,
    "declined": "The model declines these questions; choose another model.",
    "no completion": "Check that --base-url is the address of an OpenAI-compatible API; it usually ends in /v1.",
    "rate limit": "Run the same command again later, or with a smaller --concurrency.",
    "stopped": "Check --base-url (OPENAI_BASE_URL), OPENAI_API_KEY, the model's name and your quota.",
    "forbidden": "Check OPENAI_API_KEY and the model's name.",
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """Settings: the model to ask, and the limits of a run.

    Attributes:
        model: Name of the model at the server.
        base_url: Address of the server, `OPENAI_BASE_URL` if not given; the scheme may be left out for this machine
            only.
        api_key: API key, `OPENAI_API_KEY` if not given; local servers need none.
        concurrency: Number of questions sent at the same time.
        max_retries: Largest number of retries of a question after 429, 5xx, timeouts and lost connections;
            `Retry-After` is respected.
        timeout: Seconds for one whole answer, and the longest `Retry-After` that is respected.
        max_tokens: Largest number of tokens of one answer, including reasoning.
        max_tokens_total: Budget of tokens for prompts and answers together; None for no limit.
        max_requests: Budget of requests; None for no limit.
        usd_per_mtok: Price of a million prompt tokens and of a million answer tokens; None if unknown.
        allow_remote: Allow text of credentialed studies to leave this machine.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    max_retries: int = 5
    timeout: float = 120.0
    max_tokens: int = 400
    max_tokens_total: int | None = None
    max_requests: int | None = None
    usd_per_mtok: tuple[float, float] | None = None
    allow_remote: bool = False

    def __post_init__(self) -> None:
        """Refuse an address or a limit for which no question can be asked."""
        least = {"concurrency": 1, "max_retries": 0, "max_tokens": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {smallest} or more.")
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"timeout is {self.timeout}; expected a number of seconds above 0.")
        _ = self.url

    @property
    def url(self) -> str:
        """Address that questions are sent to, with its scheme.

        Raises:
            ConfigError: The address has no scheme and is not this machine, or is not an HTTP address.
        """
        given = (self.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).strip()
        address = given.rstrip("/")
        if "://" not in given:
            address = f"http://{address}"
            if not is_loopback(address):
                raise ConfigError(
                    f"The server address {given!r} has no scheme. Write http://{given} or https://{given}."
                )
        try:
            parts = urlsplit(address)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(
                f"The server address {given!r} is not an HTTP address; expected one such as http://127.0.0.1:8000/v1."
            )
        return address

    @property
    def name(self) -> str:
        """Address without user, password and query."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        return urlunsplit((parts.scheme, f"{host}:{parts.port}" if parts.port else host, parts.path, "", ""))


@dataclass(frozen=True)
class Reply(Generic[Answer]):
    """A validated answer, or None and the problem, such as "cut off", "invalid: ..." or "over budget"."""

    answer: Answer | None
    key: str
    problem: str = ""


@dataclass
class Usage:
    """Counts of a run: requests, tokens and outcomes.

    Attributes:
        requests: Number of requests, without retries.
        cached: Number of answers from the journal.
        retries: Number of retries of all requests.
        tokens_in, tokens_out: Prompt and answer tokens as counted by the server.
        usable, unusable, over_budget: Numbers of questions by outcome; `usable` includes cached answers.
        problems: Number of unusable answers per reason.
        adapted: Parameters that were renamed or dropped for this server.
    """

    requests: int = 0
    cached: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usable: int = 0
    unusable: int = 0
    over_budget: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    adapted: tuple[str, ...] = ()

    def price(self, usd_per_mtok: tuple[float, float] | None) -> float | None:
        """US dollars at the user's prices."""
        if usd_per_mtok is None:
            return None
        return (self.tokens_in * usd_per_mtok[0] + self.tokens_out * usd_per_mtok[1]) / 1e6


class Judge:
    """Client that asks a server; use as `async with Judge(server, journal) as judge`."""

    def __init__(self, server: Server, journal: Journal) -> None:
        self.server, self.journal, self.usage = server, journal, Usage()
        self._key = server.api_key or os.environ.get("OPENAI_API_KEY") or ""
        self._transport = Transport(f"{server.url}/chat/completions", self._key, server.timeout)
        self._slots = asyncio.Semaphore(server.concurrency)
        self._reserved = 0
        self._first: dict[str, asyncio.Lock] = {}
        self._answered: set[str] = set()  # Topics with a usable answer in this run.
        self._proven: set[str] = set()  # Topics with a usable answer in this run or in the journal.
        self._failed: Counter[str] = Counter()
        self._in_a_row = 0
        self._stopped: ServerError | None = None
        self._note = f"requests to {server.model} at {server.name}"
        self._dialect = Dialect.of(journal.note(self._note))
        self.usage.adapted = self._dialect.changes

    async def __aenter__(self) -> Judge:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.close()

    async def ask(
        self, messages: Messages, form: type[Answer], licences: Iterable[str], topic: str = ""
    ) -> Reply[Answer]:
        """Ask one question.

        Args:
            messages: Chat messages.
            form: Schema of the answer.
            licences: Licence classes of the studies whose text or images are in the messages.
            topic: Kind of question; a run stops when the first questions of a topic all fail.

        Raises:
            PrivacyError: Credentialed text would leave the machine; nothing was sent.
            ServerError: The first questions all failed, or the server stopped answering.
        """
        check_destination(licences, self.server.url, self.server.allow_remote)
        async with self._slots:
            if self._stopped is not None:  # Another question has ended the run.
                raise self._stopped
            if topic not in self._answered:
                async with self._first.setdefault(topic, asyncio.Lock()):
                    if self._stopped is not None:
                        raise self._stopped
                    if topic not in self._answered:
                        return await self._ask(messages, form, topic)
            return await self._ask(messages, form, topic)

    async def _ask(self, messages: Messages, form: type[Answer], topic: str) -> Reply[Answer]:
        """Ask, adapting the request to the server; changes that help are kept for later questions."""
        dialect = self._dialect
        tried = {dialect}
        while True:
            answer, key, cached = await self._once(messages, form, dialect)
            if answer is None:
                self.usage.over_budget += 1
                return Reply(None, key, "over budget")
            if not isinstance(answer, Problem):
                self._keep(dialect)
                self.usage.usable += 1
                self._proven.add(topic)
                if cached:  # A cached answer does not show that the server works now.
                    self.usage.cached += 1
                else:
                    self._answered.add(topic)
                    self._in_a_row = 0
                return Reply(answer, key)
            change = adapted(dialect, answer, proven=topic in self._proven)
            if change is None or change in tried:
                break
            dialect = change
            tried.add(dialect)
        self._failed_once(answer, topic)
        return Reply(None, key, self._masked(str(answer)))

    def _keep(self, dialect: Dialect) -> None:
        if dialect != self._dialect:
            self._dialect = dialect
            self.journal.set_note(self._note, asdict(dialect))
            self.usage.adapted = dialect.changes

    def _failed_once(self, problem: Problem, topic: str) -> None:
        """Count an unusable answer. Raises ServerError if further questions would fail too."""
        self.usage.unusable += 1
        reason = self._masked(str(problem))
        self.usage.problems[reason] = self.usage.problems.get(reason, 0) + 1
        self._failed[topic] += 1
        self._in_a_row = self._in_a_row + 1 if problem.kind in LOST else 0
        patience = PATIENCE.get(problem.kind, PATIENCE_ELSE)
        if topic not in self._answered and self._failed[topic] >= patience:
            number = self._failed[topic]
            which = "The first question" if number == 1 else f"All of the first {number} questions"
            about = f" about {topic}" if topic and self._answered else ""
            self._stopped = self._error(problem, f"{which}{about} failed")
        elif problem.kind == "stopped" or self._in_a_row >= 2 * self.server.concurrency + 3:
            self._stopped = self._error(
                problem, "The server stopped answering; usable answers are in the journal"
            )
        if self._stopped is not None:
            raise self._stopped

    def _error(self, problem: Problem, what: str) -> ServerError:
        reason = problem.words if problem.words.startswith("HTTP") else str(problem)
        hint = HINTS.get(problem.kind, "Check the server and the model.").format(
            max_tokens=self.server.max_tokens
        )
        return ServerError(
            f"{self._masked(reason).rstrip('.')}. {what} (model {self.server.model!r} at {self.server.name}). {hint}"
        )

    def nothing_usable(self) -> ServerError | None:
        """Error of a run without any usable answer; None if there is one."""
        if self.usage.usable or not self.usage.unusable:
            return None
        reason, _ = max(self.usage.problems.items(), key=lambda item: item[1])
        kind, _, words = reason.partition(": ")
        return self._error(
            Problem(kind, words), f"None of {self.usage.unusable} questions has a usable answer"
        )

    def _masked(self, text: str) -> str:
        return mask(text, self._key)

    async def _once(
        self, messages: Messages, form: type[Answer], dialect: Dialect
    ) -> tuple[Answer | Problem | None, str, bool]:
        """Ask once; return the answer, problem or None (budget spent), the request's key, and whether it was cached."""
        request = dialect.request(self.server.model, messages, form, self.server.max_tokens)
        key = key_of(request)
        row = self.journal.get(key)
        if row is not None:
            answer = read_answer(Completion(row.get("text") or "", row.get("reasoning") or ""), form)
            if not isinstance(answer, Problem):
                return answer, key, True
        expected = tokens_of(messages) + self.server.max_tokens
        if not self._reserve(expected):
            return None, key, False
        try:
            return await self._send(request, key, form), key, False
        finally:
            self._reserved -= expected

    def _reserve(self, tokens: int) -> bool:
        server, usage = self.server, self.usage
        if server.max_requests is not None and usage.requests >= server.max_requests:
            return False
        spent = usage.tokens_in + usage.tokens_out + self._reserved
        if server.max_tokens_total is not None and spent + tokens > server.max_tokens_total:
            return False
        usage.requests += 1
        self._reserved += tokens
        return True

    async def _send(self, request: dict[str, Any], key: str, form: type[Answer]) -> Answer | Problem:
        """Send one request with its retries; write the outcome to the journal."""
        began, retries = time.monotonic(), 0
        while True:
            result, wait = await self._transport.post(request)
            if not isinstance(result, Problem) or not result.retry:
                break
            if wait is not None and wait > self.server.timeout:
                words = f"{result.words}; the server asks to wait {wait:.0f} s, --timeout is {self.server.timeout:g} s"
                result = Problem("stopped", words)
                break
            if retries >= self._retries(result):
                break
            await asyncio.sleep(
                wait if wait is not None else min(8.0, 0.5 * 2**retries) * random.uniform(0.8, 1.0)
            )
            retries += 1
        self.usage.retries += retries
        row: dict[str, Any] = {"key": key, "usable": False, "request": request}
        if isinstance(result, Problem):
            answer: Answer | Problem = result
        else:
            self.usage.tokens_in += result.tokens[0]
            self.usage.tokens_out += result.tokens[1]
            answer = read_answer(result, form)
            row |= {"text": result.text, "reasoning": result.reasoning, "finish_reason": result.finish}
            row |= {
                "served_model": result.served_model,
                "usage": dict(zip(("in", "out"), result.tokens, strict=True)),
            }
        row |= {"usable": not isinstance(answer, Problem), "retries": retries}
        if isinstance(answer, Problem):
            row |= {"error": self._masked(str(answer))}
        self.journal.append(row | {"seconds": round(time.monotonic() - began, 3)})
        return answer

    def _retries(self, problem: Problem) -> int:
        """Number of retries of a question: few for an address that has never answered."""
        if self._answered or problem.kind not in ("connection", "timeout"):
            return self.server.max_retries
        return min(self.server.max_retries, 2 if problem.kind == "connection" else 0)
