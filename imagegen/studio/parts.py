"""What every tab shares: the studio's facts, errors on the page, work that can be stopped, uploads that were checked.

Gradio is an extra, imported where it is used.
"""

import atexit
import contextlib
import html
import importlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from imagegen.comparison import Trial
from imagegen.families import adapters
from imagegen.reference_set import FILE as REFERENCE_FILE
from imagegen.request import Error, RequestError
from imagegen.speed import EXACT, TIERS, TURBO
from imagegen.studio.draw import progress_html
from imagegen.studio.figures import figures_of, keep_figures, say, say_profile
from imagegen.studio.visitors import Visitors

if TYPE_CHECKING:
    import gradio as gr

    from imagegen.engine import Engine
    from imagegen.model import Model

T = TypeVar("T")
Tell = Callable[[str, int, int], None]
MAX_UPLOAD_PIXELS = 4096 * 4096  # of a picture that a visitor gives
TRAININGS, PROFILES, REFERENCES, COMPARED = "trainings", "profiles", "references", "compared"
PRIVATE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
LOSSLESS: dict[str, Any] = {"format": "png", "image_mode": None, "elem_classes": "fill", "interactive": False}
GIVEN: dict[str, Any] = LOSSLESS | {"type": "filepath", "sources": ["upload", "clipboard"], "interactive": True}


class Stopped(Exception):
    """The visitor stopped the work."""


@dataclass
class Blind:
    """A blind test so far.

    Attributes:
        pair: reference, picture, what it is; None between two questions.
        reference_first: whether the reference is A.
        right: answers that were.
        of: answers.
    """

    pair: tuple[Path, Path, str] | None = None
    reference_first: bool = False
    right: int = 0
    of: int = 0


@dataclass
class Desk:
    """What lies before a visitor, kept here and not in the browser, which only sees it.

    Attributes:
        shown: the finished pictures in the stage.
        chosen: the one of them, or of the history, that actions are about.
        asked: what was typed before the prompt was enhanced, by the enhanced prompt.
        contest: the last comparison of one picture.
        pair: what the last comparison's views show: reference, picture, what it is.
        pairs: of the last comparison of a set, likewise, the worst first.
        set_pair: the one of them that is looked at.
        data: the pictures to train on.
        training: the folder of the training that is watched.
        blind: the blind test so far.
    """

    shown: list[Path] = field(default_factory=list)
    chosen: Path | None = None
    asked: dict[str, str] = field(default_factory=dict)
    contest: Any = None
    pair: tuple[Path, Path, str] | None = None
    pairs: list[tuple[Path, Path, str]] = field(default_factory=list)
    set_pair: tuple[Path, Path, str] | None = None
    data: Path | None = None
    training: Path | None = None
    blind: Blind = field(default_factory=Blind)


@dataclass
class Studio:
    """What the tabs know of the server.

    Attributes:
        engine: the queue in front of the model.
        visitors: their folders.
        loras: the LoRA files that whoever started the server offers, by name.
        references: the reference sets offered, by name.
        models: other models to compare with, by name: what `load` takes.
        runs: for each session, what stops its latest run.
        desks: for each session, what lies before the visitor.
        trainings: the runs of this server, by their folder.
        figures: what was measured of each tier on this machine (`figures.figures_of`).
    """

    engine: "Engine"
    visitors: Visitors
    loras: dict[str, Path] = field(default_factory=dict)
    references: dict[str, Path] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    runs: dict[str | None, threading.Event] = field(default_factory=dict)
    desks: dict[str | None, Desk] = field(default_factory=dict)
    trainings: dict[Path, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def model(self) -> "Model":
        """The model, to read facts of; to change it, take `engine.alone()`."""
        return self.engine.model

    def folder(self, request: "gr.Request") -> Path:
        """Return the visitor's folder."""
        return self.visitors.folder(request.session_hash)

    def desk(self, request: "gr.Request") -> "Desk":
        """Return what lies before the visitor; a session that nobody has the page open for keeps nothing."""
        return self.desks.get(request.session_hash) or Desk()

    def leave(self, session: str | None) -> None:
        """Forget a session whose page was closed, and end its work."""
        self.desks.pop(session, None)
        run = self.runs.pop(session, None)
        if run is not None:
            run.set()

    def stop_of(self, request: "gr.Request") -> threading.Event:
        """Return what stops the visitor's run."""
        return self.runs.get(request.session_hash) or threading.Event()

    def tiers(self) -> list[str]:
        """Return the tiers that this model has, the exact one first."""
        tiers = [EXACT.name, *TIERS.get(self.model.family.name, {})]
        return tiers + ([TURBO.name] if (self.model.folder / "turbo.safetensors").is_file() else [])

    def plans_for(self, folder: Path) -> dict[str, str | Path]:
        """Return what a visitor may choose as a plan, by the name that is shown: the model's own, tiers, own profiles."""
        own = self.model.plan.name
        plans: dict[str, str | Path] = {} if own in self.tiers() else {own: own}
        plans |= {tier: tier for tier in self.tiers()}
        return plans | {f"profile {path.stem}": path for path in sorted((folder / PROFILES).glob("*.json"))}

    def labels_for(self, folder: Path) -> list[tuple[str, str]]:
        """Return the names of `plans_for`, each after a label that says what was measured of it on this machine."""
        plans = self.plans_for(folder).items()
        told = {name: say_profile(plan) if isinstance(plan, Path) else say(self.figures.get(name)) for name, plan in plans}
        return [(f"{name}: {words}", name) for name, words in told.items()]

    def take_figures(self, trials: Sequence[Trial]) -> None:
        """Keep what trials, the exact plan's first, say of the tiers, also for the next start."""
        self.figures |= {name: figures for name, figures in figures_of(trials).items() if name in self.tiers()}
        keep_figures(self.visitors.root, self.model, self.figures)

    def loras_for(self, folder: Path) -> dict[str, Path]:
        """Return the LoRAs that a visitor may choose: those offered, and those trained here."""
        trained = sorted((folder / TRAININGS).glob(f"*/{adapters.FILE}"))
        return self.loras | {f"mine: {path.parent.name}": path for path in trained}

    def references_for(self, folder: Path) -> dict[str, Path]:
        """Return the reference sets that a visitor may choose: those offered, and those made here."""
        own = sorted((folder / REFERENCES).glob(f"*/{REFERENCE_FILE}"))
        return self.references | {f"mine: {path.parent.name}": path.parent for path in own}


def look_at(studio: Studio, prompt: str, picture: Any) -> None:
    """Let the server's safety check see a picture that was not made through the queue.

    Raises:
        RequestError: it may not be shown.
    """
    check = studio.engine.safety
    reason = check(prompt, picture) if check is not None else None
    if reason is not None:
        raise RequestError(f"the picture was refused: {reason}")


def choose(kind: str, name: object, known: dict[str, T]) -> T:
    """Return what a visitor chose from a list; a name is looked up and never made a path.

    Raises:
        RequestError: it is not on the list.
    """
    if not isinstance(name, str) or name not in known:
        raise RequestError(f"there is no {kind} {name!r}: choose one of {', '.join(known) or 'none, there are none yet'}")
    return known[name]


def import_gradio() -> Any:
    """Import Gradio with its telemetry off and a cache folder that no other program shares.

    Raises:
        Error: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="imagegen-studio-")
        atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise Error(f"the studio needs Gradio ({error}): pip install 'imagegen-diffusion[demo]'") from error


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """Show an error as one message on the page, no traceback; its text may be the user's, so it is no HTML."""
    import gradio as gr

    try:
        yield
    except Error as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def upload_path(given: Any) -> str | None:
    """Return the path of an upload, from an event without preprocessing: Gradio has checked that it lies in its cache."""
    return given.get("path") if isinstance(given, dict) else None


def check_upload(path: str | Path) -> None:
    """Refuse a picture that would fill the memory, by its header alone; one that is no picture is told by who opens it.

    Raises:
        RequestError: it has more than `MAX_UPLOAD_PIXELS`.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise RequestError(f"the file cannot be read as a picture ({type(error).__name__}): give a PNG") from None
    if width * height > MAX_UPLOAD_PIXELS:
        raise RequestError(f"the picture has {width}x{height} pixels, more than {MAX_UPLOAD_PIXELS:,}: make it smaller")


def open_upload(path: str | Path) -> Any:
    """Open an uploaded picture as RGB, transparency on white.

    Raises:
        RequestError: it cannot be read, or is too large.
    """
    from imagegen.canvas import to_rgb
    from imagegen.request import open_picture

    check_upload(path)
    picture = open_picture("picture", path)
    assert picture is not None
    try:
        return to_rgb(picture)
    except ValueError as error:
        raise RequestError(f"the file cannot be read as a picture ({type(error).__name__}): give a PNG") from None


def follow_work(
    work: Callable[[Tell], T], stop: threading.Event, every_s: float = 1.0
) -> Generator[tuple[str, int, int], None, T]:
    """Run work in a thread and yield the latest of what it tells, at least every second; return what it returns.

    Args:
        work: gets `tell(what, done, total)`, which raises `Stopped` in it once the event is set.
        stop: ends it; leaving this generator sets it too, and waits for the end.
        every_s: seconds after which the last is yielded again.
    """
    said: SimpleQueue[Any] = SimpleQueue()

    def tell(what: str, done: int, total: int) -> None:
        if stop.is_set():
            raise Stopped
        said.put((what, done, total))

    def run() -> None:
        try:
            made = work(tell)
        except BaseException as error:
            said.put(error)
        else:
            said.put([made])

    thread = threading.Thread(target=run, name="imagegen-studio", daemon=True)
    thread.start()
    last = ("starting", 0, 0)
    try:
        while True:
            with contextlib.suppress(Empty):
                item = said.get(timeout=every_s)
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, list):
                    return item[0]
                last = item
                if not said.empty():
                    continue
            yield last
    finally:
        stop.set()
        thread.join()


def narrate(
    work: Generator[tuple[str, int, int], None, T], part: Any, more: Callable[[], dict[Any, Any]] = dict
) -> Generator[dict[Any, Any], None, T]:
    """Yield the updates of a progress line that tell how work goes on, and `more` of them; return what the work returns."""
    with contextlib.closing(work):
        while True:
            try:
                what, done, total = next(work)
            except StopIteration as end:
                return end.value
            amount = f": {done} of {total}" if total > 1 else ""
            yield {part: progress_html(f"{what[:1].upper()}{what[1:]}{amount}", done / total if total else 0)} | more()


def connect_run(studio: Studio, tab: SimpleNamespace, triggers: list[Any], work: Callable[..., Any], **event: Any) -> Any:
    """Run `work` on the triggers, one run of a visitor at a time, and let Stop end it; return the event after it.

    Gradio's own way to cancel leaves the work running; here an event per visitor is set, which the
    work looks at after every step.
    """
    import gradio as gr

    runs = studio.runs

    def begin(request: gr.Request) -> tuple[Any, Any]:
        with errors_shown():
            if request.session_hash in runs:
                raise RequestError("the last run is still going: wait for it, or press Stop")
        runs[request.session_hash] = threading.Event()
        return gr.update(value="Working …", interactive=False), gr.update(interactive=True)

    def stop(request: gr.Request) -> Any:
        if request.session_hash in runs:
            runs[request.session_hash].set()
        return gr.update(interactive=False)

    def end(request: gr.Request) -> tuple[Any, Any]:
        runs.pop(request.session_hash, None)
        return gr.update(value=label, interactive=True), gr.update(interactive=False)

    label, buttons = tab.run.value, [tab.run, tab.stop]
    begun = gr.on(triggers, begin, None, buttons, **PRIVATE)
    worked = begun.success(work, **{"concurrency_limit": 1, "concurrency_id": event.get("api_name")} | event)
    for after in (worked.then, worked.failure):  # `then` alone is skipped after an error
        after(end, None, buttons, **PRIVATE)
    tab.stop.click(stop, None, tab.stop, **PRIVATE)
    return worked
