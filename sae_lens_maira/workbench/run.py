"""Start a workbench: until interrupted (command line), or in a thread of a notebook.

sm.workbench(m, sae, study)      the page inside the cell
"""

import os
import socket
import sys
import threading
from collections.abc import Sequence
from html import escape
from typing import Any

import uvicorn

from sae_lens_maira.errors import WorkbenchError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.latents import RecordSet
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.studies import Study
from sae_lens_maira.workbench.catalogue import Catalogue, open_records
from sae_lens_maira.workbench.export import Opening
from sae_lens_maira.workbench.server import make_app, new_token
from sae_lens_maira.workbench.session import Session
from sae_lens_maira.workbench.shelf import Shelf

NOTEBOOK_FRAMES = ("http://localhost:*", "http://127.0.0.1:*", "vscode-webview:")
START_SECONDS = 20


class RunningWorkbench:
    """A workbench that a thread of this process serves.

    Attributes:
        url: Its address, with the token.
        session: Model, SAE and studies.
    """

    def __init__(
        self, session: Session, port: int = 0, allowed_hosts: Sequence[str] = (), height: int = 900
    ) -> None:
        self.session, self._height = session, height
        token = new_token()
        self._socket = _bound(port)
        self.port = self._socket.getsockname()[1]
        frames = (*NOTEBOOK_FRAMES, *(f"https://{host}" for host in allowed_hosts))
        app = make_app(session, token, tuple(allowed_hosts), frames)
        self._server = _server(app)
        self._query = f"?token={token}"
        self.url = f"http://127.0.0.1:{self.port}/{self._query}"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        waiting = threading.Event()
        for _ in range(START_SECONDS * 20):
            if self._server.started:
                return
            waiting.wait(0.05)
        raise WorkbenchError(f"The workbench did not start on port {self.port} within {START_SECONDS} s.")

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(timeout=START_SECONDS)

    def __str__(self) -> str:
        return f"Workbench at {self.url}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
        source = f"{prefix.rstrip('/')}/proxy/{self.port}/{self._query}" if prefix else self.url
        return (
            f"<iframe src='{escape(source)}' title='Workbench' width='100%' height='{self._height}' "
            f"style='border:1px solid #8884'></iframe><p><a href='{escape(source)}' target='_blank' rel='noopener'>"
            "Open in its own tab</a></p>"
        )

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        colab = sys.modules.get("google.colab.output")
        if (
            colab is not None
        ):  # Colab's browser cannot reach the kernel's machine except through its own proxy
            colab.serve_kernel_port_as_iframe(self.port, path="/" + self._query, height=str(self._height))
        else:
            display(HTML(self._repr_html_()))


def workbench(
    m: HookedMaira2,
    sae: MatryoshkaSAE,
    studies: Study | Sequence[Study],
    *,
    port: int = 0,
    allowed_hosts: Sequence[str] = (),
    allow_credentialed: bool = False,
    height: int = 900,
) -> RunningWorkbench:
    """Steer and question reports by hand, in a page that this process serves to this machine.

    Args:
        m: The model, from `sae_lens_maira.load`.
        sae: The SAE, from `sae_lens_maira.load_sae`.
        studies: One study, or several to choose from.
        port: Port on 127.0.0.1; 0 takes a free one.
        allowed_hosts: Host names of a proxy that forwards to this machine, such as that of a JupyterHub.
        allow_credentialed: Let exported sessions hold texts of studies that are not public or synthetic.
        height: Height of the panel in a notebook, pixels.

    Returns:
        The running workbench; a notebook shows it. `close()` stops it.

    Raises:
        WorkbenchError: The port is taken, or two studies have one id.
    """
    chosen = [studies] if isinstance(studies, Study) else list(studies)
    session = new_session(m, sae, chosen, Opening.of(m, sae), open_records(sae, None), allow_credentialed)
    return RunningWorkbench(session, port, allowed_hosts, height)


def new_session(
    m: HookedMaira2,
    sae: MatryoshkaSAE,
    studies: Sequence[Study],
    opening: Opening,
    records: RecordSet | None,
    allow_credentialed: bool,
) -> Session:
    """Put the parts of a workbench together.

    Raises:
        WorkbenchError: There is no study, or two have one id.
    """
    processor: Any = m.processor
    side = processor.recipe.crop // processor.patch_size
    shelf = Shelf(by_id(studies), (side, side))
    return Session(m, shelf, Catalogue(sae, records), opening, allow_credentialed)


def serve(session: Session, port: int, started: Any) -> None:
    """Serve a session until the process is interrupted.

    Args:
        session: Model, SAE and studies.
        port: Port on 127.0.0.1; 0 takes a free one.
        started: Called with the address before requests are taken.

    Raises:
        WorkbenchError: The port is taken.
    """
    token = new_token()
    bound = _bound(port)
    bound.listen(128)  # The browser may ask before the server runs.
    started(f"http://127.0.0.1:{bound.getsockname()[1]}/?token={token}")
    _server(make_app(session, token)).run([bound])


def by_id(studies: Sequence[Study]) -> dict[str, Study]:
    """Study id -> study.

    Raises:
        WorkbenchError: There is no study, or two have one id.
    """
    found = {study.study_id: study for study in studies}
    if not found:
        raise WorkbenchError("There are no studies to work on. Give at least one.")
    if len(found) < len(studies):
        raise WorkbenchError(
            f"{len(studies)} studies have only {len(found)} different ids. Make the ids unique."
        )
    return found


def _bound(port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = error.strerror if isinstance(error, OSError) else "ports are 0 to 65535"
        raise WorkbenchError(f"Port {port} cannot be used ({reason}). Choose another one, or 0.") from error
    return found


def _server(app: Any) -> uvicorn.Server:
    # No access log: it would hold the token.
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    )


__all__ = ["RunningWorkbench", "by_id", "new_session", "serve", "workbench"]
