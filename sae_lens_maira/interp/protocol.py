"""Chat-completion protocol: adapt requests to a server, and parse its responses.

OpenAI-compatible servers refuse different parameters. The first request uses all of them; a parameter that the server
names in its error message is renamed or dropped, one change at a time:

    max_tokens     -> max_completion_tokens -> dropped
    temperature    -> dropped
    json_schema    -> json_object (schema in the prompt) -> plain text (schema in the prompt)

Responses differ too: errors come with an error status or with status 200, as JSON, as text or as a web page; reasoning
models write their reasoning before the answer; there may be text around the JSON. An answer is used only if exactly one
JSON object in it matches the schema. Nothing is repaired or guessed.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sae_lens_maira.interp.prompts import Messages, with_text

Form = TypeVar("Form", bound=BaseModel)

SHOWN = 300  # Largest number of letters of a server's message that are shown.
LONGEST = 100_000  # Largest number of letters of an answer that are searched for JSON.
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)
_THOUGHT = re.compile(r"<(think|thinking|reasoning|thought)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(r"</(think|thinking|reasoning|thought)>", re.IGNORECASE)
_THOUGHT_OPEN = re.compile(r"<(think|thinking|reasoning|thought)>", re.IGNORECASE)
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_SPECIAL = re.compile(r"<\|[a-z_]+\|>")
FORMATS = ("json_schema", "json_object", "plain")
_REFUSES = re.compile(
    r"unsupported|not supported|n.t support|unrecognized|unknown|unexpected|not allowed|not permitted|"
    r"extra (inputs|fields)|invalid (parameter|argument|field)|deprecated|instead|only the default|no longer",
    re.IGNORECASE,
)
_FORMAT = re.compile(
    r"response_format|json_schema|json_object|schema|grammar|structured|guided", re.IGNORECASE
)


@dataclass(frozen=True)
class Problem:
    """Reason why a question has no usable answer.

    Attributes:
        kind: "connection", "timeout", "too large", "server error", "rate limit", "stopped" (no question will be
            answered), "refused" (this form of the question), "no completion", "cut off", "invalid", "not JSON",
            "declined".
        words: Message of the server, or description of the problem.
        parameter: Parameter of the request that the server names; "" if none.
        retry: Whether the same question can succeed later.
    """

    kind: str
    words: str = ""
    parameter: str = ""
    retry: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.words}" if self.words else self.kind


@dataclass(frozen=True)
class Completion:
    """Completion that a server generated.

    Attributes:
        text: Content of the message; "" if the server sent none.
        reasoning: Reasoning that the server sent separately from the content.
        finish: Finish reason; "stop" if the server gives none.
        served_model: Name of the model that answered.
        tokens: (prompt, completion) tokens as counted by the server; 0 if it does not count them.
    """

    text: str
    reasoning: str = ""
    finish: str = "stop"
    served_model: str = ""
    tokens: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Dialect:
    """Form of requests that one server accepts.

    Attributes:
        format: How the schema is given: "json_schema", "json_object" or "plain".
        limit: Name of the parameter that limits the answer's tokens; "" for none.
        temperature: Whether `temperature` is sent.
    """

    format: str = "json_schema"
    limit: str = "max_tokens"
    temperature: bool = True

    @classmethod
    def of(cls, noted: Any) -> Dialect:
        """Read the dialect from a journal's note; without a note, use all parameters."""
        names = {f.name for f in fields(cls)}
        known = isinstance(noted, dict) and set(noted) == names and noted["format"] in FORMATS
        return cls(**noted) if known else cls()

    @property
    def changes(self) -> tuple[str, ...]:
        """Differences from the full request, in words."""
        found = []
        if self.format != "json_schema":
            found.append(
                f"response_format: {self.format}" if self.format != "plain" else "response_format dropped"
            )
        if self.limit != "max_tokens":
            found.append(f"max_tokens renamed {self.limit}" if self.limit else "max_tokens dropped")
        if not self.temperature:
            found.append("temperature dropped")
        return tuple(found)

    def request(
        self, model: str, messages: Messages, form: type[BaseModel], max_tokens: int
    ) -> dict[str, Any]:
        """Make the body of a chat-completion request.

        Args:
            model: Name of the model.
            messages: Chat messages.
            form: Schema of the answer.
            max_tokens: Largest number of tokens of the answer.
        """
        schema = form.model_json_schema()
        request: dict[str, Any] = {"model": model, "messages": messages}
        if self.format == "json_schema":
            inside = {"name": form.__name__, "schema": schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": inside}
        else:
            order = f"Answer with one JSON object of this schema and nothing else: {json.dumps(schema)}"
            request["messages"] = with_text(messages, order)
            if self.format == "json_object":
                request["response_format"] = {"type": "json_object"}
        if self.temperature:
            request["temperature"] = 0
        if self.limit:
            request[self.limit] = max_tokens
        return request


def adapted(dialect: Dialect, problem: Problem, proven: bool) -> Dialect | None:
    """Choose the dialect to try after a problem; None if no change of the request can help.

    Args:
        dialect: Dialect of the failed request.
        problem: Problem of the failed request.
        proven: Whether this server has already answered such a question in this dialect; then only a named parameter is
            changed.
    """
    lower = problem.words.lower()
    if problem.kind in ("refused", "no completion", "server error"):
        refuses = problem.parameter or _REFUSES.search(lower)
        if dialect.limit and refuses and _names(dialect.limit, problem):
            return replace(dialect, limit="max_completion_tokens" if dialect.limit == "max_tokens" else "")
        if dialect.temperature and refuses and _names("temperature", problem):
            return replace(dialect, temperature=False)
        if _FORMAT.search(lower) or _FORMAT.search(problem.parameter):
            return _next_format(dialect)
    # A refusal that names no parameter, or text instead of JSON from a server that ignores schemas.
    if not proven and problem.kind in ("refused", "not JSON"):
        return _next_format(dialect)
    return None


def _names(parameter: str, problem: Problem) -> bool:
    return problem.parameter == parameter or (
        not problem.parameter and re.search(rf"\b{parameter}\b", problem.words) is not None
    )


def _next_format(dialect: Dialect) -> Dialect | None:
    after = FORMATS.index(dialect.format) + 1
    return replace(dialect, format=FORMATS[after]) if after < len(FORMATS) else None


def read_response(status: int, headers: Mapping[str, str], body: bytes) -> Completion | Problem:
    """Parse an HTTP response to a completion, or return the problem.

    Args:
        status: HTTP status code.
        headers: Response headers, names in lower case.
        body: Decoded body.
    """
    if 300 <= status < 400:
        target = headers.get("location", "another address")
        return Problem("stopped", plain_words(f"HTTP {status}: the server redirects to {target}"))
    content = _json(body)
    if isinstance(content, dict) and not content.get("error") and status == 200 and content.get("choices"):
        return _completion(content)
    words, code, parameter = error_words(content, body)
    if status == 200 and not (isinstance(content, dict) and content.get("error")):
        return Problem("no completion", f"HTTP 200 without an answer: {words}")
    inside = int(code) if status == 200 and code.isdigit() and len(code) == 3 else status
    message = f"HTTP {inside}: {words}"
    if inside in (401, 402, 404, 405, 410) or code in _QUOTA:
        return Problem("stopped", message)
    if inside == 403:
        return Problem("forbidden", message)
    if inside == 429:
        return Problem("rate limit", message, retry=True)
    if inside in RETRIED or inside >= 500:
        return Problem("server error", message, retry=True)
    return Problem("refused", message, parameter)


def _completion(content: dict[str, Any]) -> Completion | Problem:
    choices = content["choices"]
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        inside = choice.get("error") if isinstance(choice, dict) else None
        return Problem(
            "no completion", f"HTTP 200 without a message: {plain_words(json.dumps(inside or choices))}"
        )
    if choice.get("error"):
        return Problem("server error", error_words(choice, b"")[0], retry=True)
    if message.get("refusal"):
        return Problem("declined", plain_words(str(message["refusal"])))
    finish = choice.get("finish_reason")
    usage = content.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    return Completion(
        text=_content(message.get("content")),
        reasoning=reasoning if isinstance(reasoning, str) else "",
        finish=finish if isinstance(finish, str) else "stop",
        served_model=plain_words(str(content.get("model") or "")),
        tokens=(_count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))),
    )


def read_answer(completion: Completion, form: type[Form]) -> Form | Problem:
    """Parse the answer in a completion, or return the problem.

    Args:
        completion: Completion that the server generated.
        form: Schema of the answer.
    """
    if completion.finish == "length":
        thinking = _THOUGHT_OPEN.search(completion.text) or (completion.reasoning and not completion.text)
        return Problem("cut off", "the model was still reasoning" if thinking else "")
    if completion.finish == "content_filter":
        return Problem("declined", "the server's content filter stopped the answer")
    if max(len(completion.text), len(completion.reasoning)) > LONGEST:
        return Problem("invalid", f"the answer has more than {LONGEST:,} letters")
    texts = [final_text(completion.text), completion.reasoning]
    some = False
    for text in texts:
        found = {one.model_dump_json(): one for one in _objects(text, form)}
        some = some or "{" in text
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            return Problem("invalid", f"{len(found)} different answers in one: {plain_words(text)}")
    shown = plain_words(texts[0] or completion.reasoning)
    if not shown:
        return Problem("invalid", "the answer is empty")
    return Problem("invalid" if some else "not JSON", f"the answer is {shown!r}")


def final_text(text: str) -> str:
    """Remove reasoning and channel marks from a model's text."""
    finals = list(_FINAL.finditer(text))
    if finals:
        text = text[finals[-1].end() :]
    text = _THOUGHT.sub(" ", text)
    ends = list(_THOUGHT_END.finditer(text))
    if ends:  # With some chat templates the reasoning starts in the prompt.
        text = text[ends[-1].end() :]
    opened = _THOUGHT_OPEN.search(text)
    return _SPECIAL.sub(" ", text[: opened.start()] if opened else text).strip()


def error_words(content: Any, body: bytes) -> tuple[str, str, str]:
    """Parse (words, code, parameter) from an error body: JSON of the usual layouts, a web page, or text."""
    code = parameter = ""
    if isinstance(content, dict):
        error = content.get("error") or content.get("detail") or content.get("message") or content
        if isinstance(error, list) and error:  # FastAPI lists its validation errors.
            error = error[0]
        if isinstance(error, dict):
            code = str(error.get("code") or error.get("status") or "")
            parameter = str(error.get("param") or "")
            where = error.get("loc")
            if isinstance(where, list) and where:
                parameter = parameter or str(where[-1])
            metadata = error.get("metadata")
            raw = metadata.get("raw") if isinstance(metadata, dict) else None
            words = error.get("message") or error.get("msg") or error.get("type") or json.dumps(error)
            return plain_words(f"{words} ({raw})" if raw else str(words)), code, parameter
        return plain_words(str(error)), code, parameter
    text = body.decode("utf-8", errors="replace")
    if "<html" in text[:2000].lower() or "<!doctype" in text[:200].lower():
        title = _TITLE.search(text)
        message = plain_words(title.group(1) if title else text)
        return f"a web page instead of JSON ({message or 'without a title'})", code, parameter
    return plain_words(text) or "an empty body", code, parameter


def plain_words(text: str) -> str:
    """Convert text of unknown origin to one short printable line."""
    text = html.unescape(_TAG.sub(" ", text))
    text = "".join(c if c.isprintable() else " " for c in text[: 4 * SHOWN])
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 4] + " ..."


def _objects(text: str, form: type[Form]) -> list[Form]:
    """Find all JSON objects in a text that match the schema."""
    decoder, found, at = json.JSONDecoder(), [], text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            one = form.model_validate(value)
            one.model_dump_json()  # Refuses lone surrogates, which cannot be written to a file.
        except (ValueError, ValidationError, RecursionError):
            at = text.find("{", at + 1)  # Not an answer: continue after this brace.
        else:
            found.append(one)
            at = text.find("{", end)
    return found


def _json(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _content(content: Any) -> str:
    """Convert the content of a message (a string, a list of parts, or None) to text."""
    if isinstance(content, list):
        parts = [
            p.get("text") for p in content if isinstance(p, dict) and p.get("type") in ("text", "output_text")
        ]
        return "".join(p for p in parts if isinstance(p, str))
    return content if isinstance(content, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else 0
