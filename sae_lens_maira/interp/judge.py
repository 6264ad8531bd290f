"""The door to a language model: one question in, one checked answer or the reason why there is none.

Any OpenAI-compatible server does (`OPENAI_BASE_URL`). Answers are constrained to a JSON schema; a server that refuses
schemas is asked for a JSON object instead, and that is remembered. A cut-off or malformed answer is unusable, never
repaired. One semaphore, one budget, one journal for the whole run. This is the only file that imports `openai`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

import openai
from pydantic import BaseModel, ValidationError

from sae_lens_maira.errors import ServerError
from sae_lens_maira.interp.journal import Journal, key_of
from sae_lens_maira.interp.privacy import check_destination, is_loopback
from sae_lens_maira.interp.prompts import tokens_of, with_text


def _import_event_loop() -> None:
    """Import the lazy part of `anyio`, which the client needs, with nnsight's hand off `object`.

    nnsight mounts a method `save` on every object; anyio then refuses its own classes ("Attribute 'save' is missing
    its type annotation") if it is imported later. The mount is taken away for the import and put back.
    """
    nnsight = sys.modules.get("nnsight")
    if nnsight is None or not hasattr(object, "save"):
        importlib.import_module("anyio._backends._asyncio")
        return
    mounts = importlib.import_module("nnsight._c")
    mounts.unmount("save")
    try:
        importlib.import_module("anyio._backends._asyncio")
    finally:
        mounts.mount(nnsight.save, "save")


_import_event_loop()

Answer = TypeVar("Answer", bound=BaseModel)
DEFAULT_URL = "https://api.openai.com/v1"
Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Server:
    """Which model to ask, and how hard.

    Attributes:
        model: name of the model at the server.
        base_url: address of the server; `OPENAI_BASE_URL` if not given.
        api_key: `OPENAI_API_KEY` if not given; local servers need none.
        concurrency: questions in flight at once.
        max_retries: of one question after 429, 5xx, timeouts and lost connections; `Retry-After` is obeyed.
        timeout: seconds for one answer.
        max_tokens: most tokens of one answer.
        max_tokens_total: budget of tokens, asked and answered together; None for no limit.
        max_requests: budget of requests; None for no limit.
        usd_per_mtok: price of a million tokens asked and answered; None where unknown.
        allow_remote: let credentialed studies leave this machine.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = None
    concurrency: int = 8
    max_retries: int = 5
    timeout: float = 120.0
    max_tokens: int = 400
    max_tokens_total: int | None = None
    max_requests: int | None = None
    usd_per_mtok: tuple[float, float] | None = None
    allow_remote: bool = False

    @property
    def url(self) -> str:
        """Where questions go."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL


@dataclass(frozen=True)
class Reply(Generic[Answer]):
    """A checked answer, or None and the reason: "cut off", "invalid", "error: ..." or "over budget"."""

    answer: Answer | None
    key: str
    problem: str = ""


@dataclass
class Usage:
    """What a run used, answers from the journal apart."""

    requests: int = 0
    cached: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    unusable: int = 0
    over_budget: int = 0
    problems: dict[str, int] = field(default_factory=dict)

    def price(self, usd_per_mtok: tuple[float, float] | None) -> float | None:
        """US dollars at the user's prices."""
        if usd_per_mtok is None:
            return None
        return (self.tokens_in * usd_per_mtok[0] + self.tokens_out * usd_per_mtok[1]) / 1e6


class Judge:
    """Asks a server; use as `async with Judge(server, journal) as judge`."""

    def __init__(self, server: Server, journal: Journal) -> None:
        self.server, self.journal, self.usage = server, journal, Usage()
        self._reserved = 0
        self._slots = asyncio.Semaphore(server.concurrency)
        local = is_loopback(server.url)
        # To this machine neither through a proxy of the environment nor on to wherever it redirects.
        http = openai.DefaultAsyncHttpxClient(trust_env=not local, follow_redirects=False)
        self._client = openai.AsyncOpenAI(
            base_url=server.url,
            api_key=server.api_key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=server.max_retries,
            timeout=server.timeout,
            http_client=http,
        )

    async def __aenter__(self) -> Judge:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    @property
    def _mode_note(self) -> str:
        return f"answers of {self.server.model} at {self.server.url}"

    async def ask(self, messages: Messages, form: type[Answer], licences: Iterable[str]) -> Reply[Answer]:
        """Ask one question.

        Args:
            messages: chat messages.
            form: what the answer must look like.
            licences: licence classes of the studies whose text is in the messages.

        Raises:
            PrivacyError: credentialed text would leave the machine; nothing was sent.
            ServerError: the server refuses the key or the model, so that no question can be answered.
        """
        check_destination(licences, self.server.url, self.server.allow_remote)
        async with self._slots:
            mode = self.journal.note(self._mode_note) or "json_schema"
            reply = await self._once(messages, form, mode)
            if reply.problem == "refused" and mode == "json_schema":
                fallback = await self._once(messages, form, "json_object")
                # Only an accepted answer proves that the schema was the obstacle and not the question.
                if fallback.problem != "refused" and self.journal.note(self._mode_note) is None:
                    self.journal.set_note(self._mode_note, "json_object")
                reply = fallback
        if reply.answer is None:
            self.usage.over_budget += reply.problem == "over budget"
            self.usage.unusable += reply.problem != "over budget"
            self.usage.problems[reply.problem] = self.usage.problems.get(reply.problem, 0) + 1
        return reply

    def _request(self, messages: Messages, form: type[BaseModel], mode: str) -> dict[str, Any]:
        schema = form.model_json_schema()
        if mode == "json_schema":
            shape = {"type": mode, "json_schema": {"name": form.__name__, "schema": schema, "strict": True}}
        else:
            shape = {"type": "json_object"}
            told = f"Answer with one JSON object of this schema and nothing else: {json.dumps(schema)}"
            messages = with_text(messages, told)
        return {
            "model": self.server.model,
            "messages": messages,
            "response_format": shape,
            "temperature": 0,
            "max_tokens": self.server.max_tokens,
        }

    async def _once(self, messages: Messages, form: type[Answer], mode: str) -> Reply[Answer]:
        request = self._request(messages, form, mode)
        key = key_of(request)
        row = self.journal.get(key)
        if row is None:
            expected = tokens_of(messages) + self.server.max_tokens
            if not self._reserve(expected):
                return Reply(None, key, "over budget")
            try:
                row = await self._send(request, key)
            finally:
                self._reserved -= expected
        else:
            self.usage.cached += 1
        if row.get("error"):
            return Reply(None, key, row["error"])
        if row["finish_reason"] == "length":
            return Reply(None, key, "cut off")
        try:
            return Reply(form.model_validate_json(row["text"] or ""), key)
        except ValidationError:
            return Reply(None, key, "invalid")

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

    async def _send(self, request: dict[str, Any], key: str) -> dict[str, Any]:
        """One request with the client's retries; the row it left in the journal."""
        began = time.monotonic()
        row: dict[str, Any] = {"key": key, "request": request}
        try:
            raw = await self._client.chat.completions.with_raw_response.create(**request)
            completion = raw.parse()
            choice = completion.choices[0]
            self.usage.retries += raw.retries_taken
            row |= {
                "text": choice.message.content,
                "finish_reason": choice.finish_reason,
                "served_model": completion.model,
                "retries": raw.retries_taken,
            }
            if completion.usage is not None:
                row["usage"] = {
                    "in": completion.usage.prompt_tokens,
                    "out": completion.usage.completion_tokens,
                }
                self.usage.tokens_in += completion.usage.prompt_tokens
                self.usage.tokens_out += completion.usage.completion_tokens
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ServerError(
                f"{self.server.url} refused the question for model {self.server.model!r} ({error.status_code}: "
                f"{error.message}); no other question would be answered either. Check OPENAI_BASE_URL, "
                "OPENAI_API_KEY and the model's name."
            ) from None
        except openai.BadRequestError as error:
            # "refused" is what the fallback is decided on; the server's words stay in the journal.
            row |= {"error": "refused", "message": str(error.message)}
        except openai.APIError as error:
            row |= {"error": f"error: {type(error).__name__}", "message": str(error.message)}
        except (json.JSONDecodeError, IndexError, AttributeError, TypeError) as error:
            row |= {"error": f"error: no completion ({type(error).__name__})"}
        row["seconds"] = round(time.monotonic() - began, 3)
        self.journal.append(row)
        return row
