"""The workbench's web application: Starlette, on this machine only.

    GET  /                         the page                 POST /api/run       write a report, streamed
    GET  /static/NAME              its script and style     POST /api/explain   attribute a sentence
    GET  /api/overview, /api/study, /api/image, /api/latents, /api/latent
    POST /api/upload               an image, kept in memory  POST /api/export    files that reproduce a run

Every request needs the token, a known Host, and if it names an Origin, its own. Streams are lines of JSON. Nothing is
cached by the browser, and the page may load from nowhere else.
"""

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_lens_maira.errors import MairaError
from sae_lens_maira.workbench.jobs import JobQueue, Work
from sae_lens_maira.workbench.session import Session
from sae_lens_maira.workbench.spec import RunSpec

_FOLDER = files("sae_lens_maira.workbench") / "page"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MAX_JSON = 2 << 20
MAX_UPLOAD = 128 << 20
TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors {frames}"
)


def make_app(
    session: Session, token: str, allowed_hosts: tuple[str, ...] = (), frames: tuple[str, ...] = ()
) -> ASGIApp:
    """Make the application.

    Args:
        session: Model, SAE and studies.
        token: What every request must carry, in the header `X-Token` or as the query parameter `token`.
        allowed_hosts: Host names in addition to this machine's own, for a proxy that forwards to the workbench.
        frames: Origins that may show the page inside theirs, such as "http://localhost:8888"; none if empty.
    """
    jobs = JobQueue()
    decoding = asyncio.Semaphore(1)  # An upload is held several times while it is decoded.

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        jobs.close()

    async def page(request: Request) -> Response:
        html = (_FOLDER / "index.html").read_text(encoding="utf-8")
        return Response(html.replace("__TOKEN__", token), media_type=TYPES["html"])

    async def static(request: Request) -> Response:
        return _asset(request.path_params["name"])

    async def query(work: Callable[[], Any]) -> Response:
        """Answer with the result of something short that does not run the model."""
        return JSONResponse(await run_in_threadpool(work))

    async def overview(request: Request) -> Response:
        return await query(session.overview)

    async def study(request: Request) -> Response:
        name = request.query_params.get("id", "")
        return await query(lambda: session.shelf.about(name) | {"grids": session.shelf.grids(name)})

    async def image(request: Request) -> Response:
        wanted = request.query_params
        png = await run_in_threadpool(
            session.shelf.image, wanted.get("id", ""), wanted.get("view", "frontal")
        )
        return Response(png, media_type="image/png")

    async def latents(request: Request) -> Response:
        return await query(lambda: session.catalogue.search(request.query_params.get("q", "")[:200]))

    async def latent(request: Request) -> Response:
        number, view = _integer(request.query_params.get("id")), request.query_params.get("view", "frontal")
        return await query(lambda: session.catalogue.latent(number, view))

    async def upload(request: Request) -> Response:
        indication = request.query_params.get("indication", "")[:2000]
        async with decoding:
            name = await run_in_threadpool(session.shelf.add, await _body(request, MAX_UPLOAD), indication)
        return JSONResponse({"id": name})

    async def run(request: Request) -> Response:
        plain = await _json(request)
        spec = RunSpec.of(plain.get("spec"))
        return _stream(lambda emit, stopped: session.write(spec, emit, stopped))

    async def explain(request: Request) -> Response:
        plain = await _json(request)
        spec, text, number = RunSpec.of(plain.get("spec")), plain.get("text"), plain.get("sentence")
        if not isinstance(text, str) or not isinstance(number, int):
            raise HTTPException(
                400, "A request to explain needs the report's text and the number of a sentence."
            )
        return _stream(lambda emit, stopped: session.explain(spec, text, number, stopped))

    async def export(request: Request) -> Response:
        plain = await _json(request)
        spec, history = RunSpec.of(plain.get("spec")), plain.get("history", [])
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            raise HTTPException(400, "The history must be a list of runs.")
        return await query(lambda: session.export(spec, history))

    def _stream(work: Work) -> Response:
        async def lines() -> AsyncIterator[bytes]:
            async with aclosing(jobs.lines(work)) as found:
                async for line in found:
                    yield line

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code)
        if isinstance(error, MairaError):
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)

    get = {
        "/": page,
        "/static/{name}": static,
        "/api/overview": overview,
        "/api/study": study,
        "/api/image": image,
        "/api/latents": latents,
        "/api/latent": latent,
    }
    post = {"/api/upload": upload, "/api/run": run, "/api/explain": explain, "/api/export": export}
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
        ],
        exception_handlers={HTTPException: failed, MairaError: failed, Exception: failed},
        lifespan=lifespan,
    )
    return Guard(app, token, (*LOOPBACK, *allowed_hosts), frames)


class Guard:
    """Refuses requests without the token or from elsewhere, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, token: str, hosts: tuple[str, ...], frames: tuple[str, ...]) -> None:
        self.app, self._token, self._hosts = app, token, {host.lower() for host in hosts}
        policy = POLICY.format(frames=" ".join(frames) or "'none'")
        self._headers = [
            (b"cache-control", b"no-store"),
            (b"content-security-policy", policy.encode()),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"referrer-policy", b"no-referrer"),
            (b"x-content-type-options", b"nosniff"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self._headers]}
            await send(message)

        problem = self._problem(Request(scope))
        if problem is None:
            await self.app(scope, receive, guarded)
        else:
            await PlainTextResponse(problem, 403)(scope, receive, guarded)

    def _problem(self, request: Request) -> str | None:
        host = request.headers.get("host", "").lower()
        if _hostname(host) not in self._hosts:
            return (
                f"The host {host[:100]!r} is not this workbench. Open the address that was printed; behind a proxy, "
                "start it with allowed_hosts."
            )
        origins = [origin.lower() for origin in request.headers.getlist("origin")]
        if any(origin not in self._own(host) for origin in origins):
            return "The request comes from another page. Open the address that was printed."
        given = request.headers.get("x-token") or request.query_params.get("token", "")
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            return "The token is missing or wrong. Open the address that was printed, with its token."
        return None

    def _own(self, host: str) -> set[str]:
        """Origins of the page itself; a proxy's browser sees the proxy's name."""
        names = {host, *(name for name in self._hosts if name not in LOOPBACK)}
        return {f"{scheme}://{name}" for scheme in ("http", "https") for name in names}


def new_token() -> str:
    """A token that cannot be guessed."""
    return secrets.token_urlsafe(24)


def _hostname(host: str) -> str:
    return (host.rsplit(":", 1)[0] if not host.endswith("]") and ":" in host else host).lower()


def _asset(name: str) -> Response:
    if name not in ("workbench.js", "workbench.css"):
        raise HTTPException(404, f"There is no file {name!r}.")
    return Response((_FOLDER / name).read_bytes(), media_type=TYPES[name.rsplit(".", 1)[1]])


async def _body(request: Request, limit: int) -> bytes:
    """The body, refused before it is larger than the limit."""
    length = request.headers.get("content-length", "0")
    content = bytearray()
    if not length.isdigit() or int(length) > limit:
        raise HTTPException(413, f"The upload has {length} bytes; at most {limit:,} are taken.")
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise HTTPException(413, f"The upload has more than {limit:,} bytes.")
    return bytes(content)


async def _json(request: Request) -> Mapping[str, Any]:
    try:
        found = json.loads(await _body(request, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The request is not JSON ({type(error).__name__}).") from error
    if not isinstance(found, dict):
        raise HTTPException(400, "The request must be a JSON object.")
    return found


def _integer(text: str | None) -> int:
    if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise HTTPException(400, f"The number {text!r} is not a whole number.")
    return int(text)


__all__ = ["Guard", "make_app", "new_token"]
