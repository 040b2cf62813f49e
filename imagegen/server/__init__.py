"""The server: the page and the programs' interface over one engine, behind one guard.

FastAPI and uvicorn come with Gradio, an extra, and are imported where they are used.
"""

import contextlib
import importlib
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from imagegen import studio
from imagegen.catalog import EMBEDDED
from imagegen.engine import Engine, Safety
from imagegen.loader import load
from imagegen.model import Model
from imagegen.request import Error, RequestError
from imagegen.server.guard import LOOPBACK, MIB, Guard, Rules, error_body

if TYPE_CHECKING:
    import gradio as gr

MAX_FILE_MIB = 20  # of the page's uploads
MIN_TOKEN = 16  # letters
EVERYWHERE = ("0.0.0.0", "::", "")
PROGRAMS = "programs"  # the folder in the output folder of what programs made; the page serves nothing of it


def build_app(engine: Engine, folder: Path, page: "gr.Blocks | None", rules: Rules | None = None) -> Guard:
    """Return the ASGI application.

    Args:
        engine: the queue in front of the model.
        folder: where the pictures go; the only one of yours that the page serves, without what programs made.
        page: the Gradio page at `/`, or None for none.
        rules: who may ask, and how much.

    Raises:
        Error: Gradio is missing.
    """
    gr = studio.import_gradio()
    from fastapi import FastAPI, Request, Response

    from imagegen.server.programs import build_router

    rules = rules or Rules()
    app = FastAPI(title="imagegen", docs_url=None, redoc_url=None)  # those would fetch from another server
    app.include_router(build_router(engine, folder / PROGRAMS))

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> Response:
        return Response(
            error_body(f"the server failed ({type(error).__name__})", "server_error"), 500, media_type="application/json"
        )

    if page is not None:
        page.queue(max_size=engine.max_waiting)
        page.has_launched = True  # else Gradio takes any file of this machine for one that was uploaded
        options = {"allowed_paths": [str(folder)], "blocked_paths": [str(folder / PROGRAMS)], "ssr_mode": False, "pwa": False}
        options |= {"mcp_server": False, "enable_monitoring": False, "footer_links": [], "run_history": False}
        gr.mount_gradio_app(app, page, "/", max_file_size=MAX_FILE_MIB * MIB, **options, **studio.look())
    return Guard(app, rules)


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: its address.
        port: the port that it listens on.
        page: the Gradio page.
        server: uvicorn's.
        engine: the queue in front of the model.
    """

    url: str
    port: int
    page: "gr.Blocks"
    server: Any
    engine: Engine
    _thread: threading.Thread

    def wait(self) -> None:
        """Wait until it ends."""
        while self._thread.is_alive():
            self._thread.join(1)

    def close(self) -> None:
        """End the work within one step, and the server."""
        self.engine.close()
        self.server.should_exit = True
        self._thread.join()
        self.page.close(verbose=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def launch(
    model: Model | str | Path | None = None,
    host: str | None = None,
    port: int = 7860,
    output_dir: str | Path = "out",
    *,
    loras: str | Path | None = None,
    references: str | Path | None = None,
    models: Iterable[str | Path] = (),
    public: bool = False,
    allow_hosts: Iterable[str] = (),
    token: str | None = None,
    safety: Safety | None = None,
    max_waiting: int = 32,
    max_batch: int = 8,
    background: bool = False,
    page: Callable[[Engine, Path], "gr.Blocks"] | None = None,
) -> Served:
    """Serve the studio and the programs' interface until it is interrupted.

    Args:
        model: a loaded model, or what `load` takes; by default the embedded one.
        host: address to listen on; by default this machine's own, which nobody else reaches, with `public` all of them.
        port: port to listen on; 0 takes any free one.
        output_dir: where the pictures go.
        loras: a folder of LoRA files that the page offers.
        references: a folder of reference sets that the page offers.
        models: other models that the page compares this one with; what `load` takes, each.
        public: others may come, who know the token.
        allow_hosts: names by which others may ask, as in `pictures.example.org`; numeric addresses are known with `public`.
        token: what everybody must know: the API key of programs, and what the page asks for.
        safety: looks at every finished picture (see `Engine`).
        max_waiting: how many requests may wait.
        max_batch: how many pictures are made at once.
        background: return at once and serve in the background; `close()` what is returned.
        page: builds another page.

    Raises:
        Error: Gradio is missing, the model cannot be loaded, the folder or the port cannot be used, or others could
            come who know no token.
    """
    studio.import_gradio()
    rules = check_rules(host, public, allow_hosts, token)
    listening = _listen(host or ("0.0.0.0" if public else "127.0.0.1"), port)
    with contextlib.ExitStack() as stack:
        stack.callback(listening.close)
        folder = Path(output_dir).resolve()
        engine = Engine(
            model if isinstance(model, Model) else load(model or EMBEDDED),
            max_waiting=max_waiting, max_batch=max_batch, safety=safety,
        )  # fmt: skip
        stack.callback(engine.close)
        offers: dict[str, Any] = {"loras": loras, "references": references, "models": models}
        blocks = page(engine, folder) if page else studio.build(engine, folder, **offers)
        served = _start(build_app(engine, folder, blocks, rules), listening, blocks, engine)
        if background:
            stack.pop_all()
            return served
        stack.callback(served.close)
        # Gradio may hand out what lies in the working directory: make that an empty one.
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        print(f"imagegen studio: {served.url} (Ctrl-C ends it)", flush=True)
        served.wait()
    return served


def find_safety(name: str) -> Safety:
    """Return the function that `MODULE:FUNCTION` names; modules are looked for here as well.

    Raises:
        RequestError: there is none.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"--safety {name!r} names no function ({error}): give MODULE:FUNCTION") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise RequestError(f"--safety {name!r} is no function: give one of (prompt, picture) that returns a reason or None")
    return found


def check_rules(host: str | None, public: bool, allow_hosts: Iterable[str], token: str | None) -> Rules:
    """Return who may ask; arguments as of `launch`.

    Raises:
        RequestError: others could come who know no token.
    """
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise RequestError(f"the token must be {MIN_TOKEN} plain letters or more, none of them a blank: {_suggestion()}")
    if public and token is None:
        raise RequestError(f"a public server needs a token, which is its API key and its page's password: {_suggestion()}")
    names = {*allow_hosts, *([host] if host is not None and host not in EVERYWHERE else [])}
    if not public and (names - LOOPBACK or host in EVERYWHERE):
        raise RequestError(f"others could come by {host or ', '.join(sorted(names))!r}: pass --public too, with a token")
    return Rules(LOOPBACK | {name.lower() for name in names}, public, token)


def _suggestion() -> str:
    return f"pass --token or set IMAGEGEN_TOKEN, for example to {secrets.token_urlsafe(24)}"


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything is loaded.

    Raises:
        RequestError: it cannot be taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        taken = socket.socket(family, socket.SOCK_STREAM)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen(128)
        return taken
    except (OSError, OverflowError):
        raise RequestError(f"cannot listen on {host}:{port}: it is taken, or not this machine's; choose another") from None


def _start(app: Guard, listening: socket.socket, page: "gr.Blocks", engine: Engine) -> Served:
    """Let uvicorn serve in a thread of its own, and wait until it does."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, proxy_headers=False, ws="none",
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), name="imagegen-server", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise Error("the server did not start")
        time.sleep(0.02)
    host, port = listening.getsockname()[:2]
    name = "127.0.0.1" if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    return Served(f"http://{name}:{port}", port, page, server, engine, thread)
