"""The studio: a page that makes pictures while you watch and puts each beside its reference output.

A reader of a model's stream of steps (`follow`), and the page over it and over `reference`. The page
is served to this machine and fetches nothing from another. Gradio is an extra, imported where it is
used.
"""

import atexit
import base64
import contextlib
import html
import importlib
import io
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from imagegen import fidelity
from imagegen.engine import Engine
from imagegen.families.diffusion import stock_runner
from imagegen.model import Model
from imagegen.receipt import open_picture, read_receipt
from imagegen.reference import FLOOR_MAX_DIFFERENCE, FLOOR_PSNR_DB, stock_request
from imagegen.request import Error, RequestError

if TYPE_CHECKING:
    import gradio as gr
    from PIL.Image import Image

MAX_PICTURES = 4
MAX_STEPS = 100
PREVIEW_SHARE = 0.2  # of the time may go into previews
STOCK, UPLOAD = "Stock diffusers, run now in float32", "A picture of your own"
EXAMPLES = ("a red apple", "a smiling sun", "a blue heart", "a cat in a box")
EXPLANATION = "Say what to draw and watch it appear. Every picture carries a receipt; Compare proves it against stock diffusers."
PRIVATE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
Runs = dict[str | None, threading.Event]  # session -> what stops its latest run


@dataclass(frozen=True)
class Frame:
    """What there is to show after a step.

    Attributes:
        message: the step and the time left, or how it ended.
        fraction: of the work that is done, 0 to 1.
        previews: every picture as far as it is known; empty before the first step.
        paths: the files of the finished pictures; empty until then, and after a stop.
    """

    message: str
    fraction: float
    previews: Sequence["Image"] = ()
    paths: Sequence[Path] = ()


def follow(
    model: Model, prompt: str, settings: dict[str, Any], folder: Path, stop: threading.Event, warn: Callable[[str], Any]
) -> Iterator[Frame]:
    """Make pictures, save them with their receipts, and say after every step what there is to show.

    Args:
        model: what makes them.
        prompt: what to draw.
        settings: what `Model.stream` takes.
        folder: where the PNGs go.
        stop: once set, from any thread, the work ends within one step.
        warn: is told what the user should know, such as a prompt that is too long.

    Raises:
        Error: a setting is wrong, or the folder cannot be written.
    """
    steps = model.stream(prompt, **settings)
    notice = model.notice_about(prompt)  # not caught as a warning: other threads change what is done with those
    if notice:
        warn(notice)
    previews: list[Image] = []
    due_s = 0.0
    with contextlib.closing(steps):
        for step in steps:
            done, of = step.index + 1, step.num_steps
            if step.result is not None:
                seeds = [picture.receipt.request["seed"] for picture in step.result.pictures]
                message = f"{of} steps in {step.elapsed_s:.1f} s · seed {seeds[0]}" + (f" to {seeds[-1]}" if seeds[1:] else "")
                yield Frame(message, 1.0, step.result.images, step.result.save(folder))
                return
            if stop.is_set():
                break
            now_s = time.perf_counter()
            if now_s >= due_s:
                previews = [step.preview(index) for index in range(len(step.latents))]
                due_s = now_s + (time.perf_counter() - now_s) / PREVIEW_SHARE
            left_s = step.elapsed_s / done * (of - done)
            yield Frame(f"Step {done} of {of} · about {left_s:.0f} s left", done / of, previews)
    yield Frame(f"Stopped after step {done} of {of}", done / of, previews)  # the work has ended by now


def open_any(path: str | Path) -> "Image":
    """Open an uploaded picture as RGB.

    Raises:
        RequestError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise RequestError(f"the file cannot be read as a picture ({type(error).__name__}): give a PNG") from None


def stage_html(frame: Frame) -> str:
    """Return the pictures so far, inline, over the progress; before the first one an empty stage."""
    inner = [f"<div class='blank'><p>{html.escape(frame.message)}</p></div>"]
    if frame.previews:
        inner = []
        for number, picture in enumerate(frame.previews, 1):
            file = io.BytesIO()
            picture.save(file, format="PNG", compress_level=1)
            source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            inner.append(f"<img src='{source}' alt='Preview of picture {number}'>")
        bar = f"<div class='bar'><div style='width: {frame.fraction:.1%}'></div></div>"
        inner.append(f"{bar}<p role='status'>{html.escape(frame.message)}</p>")
    return f"<div class='stage{' one' if len(frame.previews) < 2 else ''}'>{''.join(inner)}</div>"


def figures_html(psnr: str, largest: str, note: str) -> str:
    """Return the two measurements over a line that says what was compared with what."""
    boxes = f"<div><span>PSNR</span><b>{psnr}</b></div><div><span>Largest difference</span><b>{largest}</b></div>"
    return f"<div class='figures'>{boxes}<p>{html.escape(note)}</p></div>"


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


def lay_out_generate(model: Model) -> SimpleNamespace:
    """Put the controls, with the family's defaults and ranges, beside the stage; return the parts by name."""
    import gradio as gr

    family, tab = model.family, SimpleNamespace(files=gr.State([]))
    side = {"minimum": family.min_px, "maximum": family.max_px, "step": family.multiple_px, "value": family.size_px}
    with gr.Row():
        with gr.Column(scale=5):
            # No autofocus: Gradio takes the focus from the other fields again whenever a long prompt scrolls.
            tab.prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0], max_lines=6)
            gr.Examples([[text] for text in EXAMPLES], tab.prompt, label="Try one of these")
            with gr.Row():
                tab.run = gr.Button("Generate", variant="primary", scale=3)
                tab.stop = gr.Button("Stop", interactive=False, scale=1)
            with gr.Row():
                tab.steps = gr.Slider(1, MAX_STEPS, family.num_steps, step=1, label="Steps")
                tab.guidance = gr.Slider(1, 20, family.guidance, step=0.1, label="Guidance")
            with gr.Row():
                tab.width = gr.Slider(label="Width", **side)
                tab.height = gr.Slider(label="Height", **side)
            with gr.Row():
                tab.count = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Pictures")
                tab.seed = gr.Textbox(label="Seed", placeholder="empty: a new one", max_lines=1)
            with gr.Accordion("Negative prompt", open=False):
                tab.negative = gr.Textbox(show_label=False, container=False, placeholder="what to steer away from")
        with gr.Column(scale=6):
            tab.live = gr.HTML(stage_html(Frame("Your picture appears here", 0.0)))
            tab.gallery = gr.Gallery(format="png", visible=False, show_label=False, interactive=False, elem_classes="result")
            tab.status = gr.HTML("", elem_classes="status")
            with gr.Row(visible=False) as tab.actions:
                tab.download = gr.DownloadButton("Download PNG", size="sm")
                tab.keep = gr.Button("Keep this seed", size="sm")
                tab.compare = gr.Button("Compare", size="sm")
            with gr.Accordion("Receipt", open=False, visible=False) as tab.about:
                tab.receipt = gr.Code(language="json", show_label=False, interactive=False, max_lines=24)
    return tab


def lay_out_compare() -> SimpleNamespace:
    """Put the choice of two pictures beside their measurement; return the parts by name."""
    import gradio as gr

    tab = SimpleNamespace()
    lossless: dict[str, Any] = {"format": "png", "image_mode": None, "height": 240, "elem_classes": "fill", "interactive": False}
    lossless |= {"buttons": ["download", "fullscreen"]}
    given = lossless | {"type": "filepath", "sources": ["upload", "clipboard"], "interactive": True}
    with gr.Row():
        with gr.Column(scale=4):
            tab.picture = gr.Image(label="This picture", **given)
            tab.kind = gr.Radio([STOCK, UPLOAD], value=STOCK, label="Reference output")
            tab.upload = gr.Image(label="Its reference", visible=False, **given)
            with gr.Row():
                tab.run = gr.Button("Compare", variant="primary", scale=3)
                tab.stop = gr.Button("Stop", interactive=False, scale=1)
        with gr.Column(scale=6):
            tab.figures = gr.HTML(figures_html("–", "–", "Over every pixel and channel."))
            tab.slider = gr.ImageSlider(label="This picture | its reference", **(lossless | {"height": 480, "max_height": 480}))
            tab.map = gr.Image(label="Where they differ (black: equal)", **lossless)
    return tab


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """Show an error as one message on the page, no traceback; its text may be the user's, so it is no HTML."""
    import gradio as gr

    try:
        yield
    except Error as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def connect_run(tab: SimpleNamespace, runs: Runs, triggers: list[Any], work: Callable[..., Any], **event: Any) -> None:
    """Run `work` on the triggers, one at a time over all visitors, and let Stop end it.

    Gradio's own way to cancel leaves the work running; here an event per visitor is set, which the
    work looks at after every step.
    """
    import gradio as gr

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
    worked = begun.success(work, **event, concurrency_limit=1, concurrency_id="model")
    for after in (worked.then, worked.failure):  # `then` alone is skipped after an error
        after(end, None, buttons, **PRIVATE)
    tab.stop.click(stop, None, tab.stop, **PRIVATE)


def connect_generate(model: Model, folder: Path, runs: Runs, tab: SimpleNamespace, picture: Any) -> None:
    """Make the Generate tab work; `picture` is the Compare tab's, which follows the choice made here."""
    import gradio as gr

    def generate(
        prompt: str, negative_prompt: str, seed: str, num_steps: int, guidance: float,
        width: int, height: int, num_images: int, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        number = int(seed) if seed.strip().isdecimal() else seed.strip() or None  # what is no number, the request refuses
        settings = {"negative_prompt": negative_prompt, "seed": number, "num_steps": num_steps, "guidance": guidance}
        settings |= {"width": width, "height": height, "num_images": num_images}
        stop = runs.get(request.session_hash) or threading.Event()
        yield unfinished(Frame("Reading the prompt", 0.0))
        try:
            with errors_shown():
                for frame in follow(model, prompt, settings, folder, stop, lambda text: gr.Warning(html.escape(text))):
                    yield finished(frame) if frame.paths else unfinished(frame)
        except gr.Error:
            yield unfinished(Frame("Nothing was made", 0.0))
            raise

    def unfinished(frame: Frame) -> dict[Any, Any]:
        hidden = {part: gr.update(visible=False) for part in (tab.gallery, tab.actions, tab.about)}
        return hidden | {tab.live: gr.update(value=stage_html(frame), visible=True), tab.status: ""}

    def finished(frame: Frame) -> dict[Any, Any]:
        files = [str(path) for path in frame.paths]
        status = f"{frame.message} · saved in {html.escape(folder.name)}"
        shown = {part: gr.update(visible=True) for part in (tab.actions, tab.about)}
        shown[tab.gallery] = gr.update(value=files, columns=min(2, len(files)), selected_index=None, visible=True)
        return shown | {tab.live: gr.update(visible=False), tab.status: status, tab.files: files} | chosen(files[0])

    def chosen(file: str) -> dict[Any, Any]:
        receipt = json.dumps(asdict(read_receipt(file)), indent=2, ensure_ascii=False)
        return {tab.receipt: receipt, tab.download: file, picture: file}

    def choose(files: list[str], event: gr.SelectData) -> dict[Any, Any]:
        with errors_shown():
            return chosen(files[event.index])

    choice = [tab.receipt, tab.download, picture]
    connect_run(
        tab, runs, [tab.run.click, tab.prompt.submit], generate, api_name="generate", show_progress="hidden",
        inputs=[tab.prompt, tab.negative, tab.seed, tab.steps, tab.guidance, tab.width, tab.height, tab.count],
        outputs=[tab.live, tab.gallery, tab.status, tab.actions, tab.about, tab.files, *choice],
    )  # fmt: skip
    tab.gallery.select(choose, tab.files, choice, **PRIVATE)
    tab.keep.click(lambda receipt: str(json.loads(receipt)["request"]["seed"]), tab.receipt, tab.seed, **PRIVATE)


def connect_compare(model: Model, runs: Runs, tab: SimpleNamespace) -> None:
    """Make the Compare tab work."""
    import gradio as gr

    source, bar = model.origin, gr.Progress()

    def compare(given: dict | None, kind: str, other: dict | None, request: gr.Request, progress: Any = bar) -> tuple[Any, ...]:
        picture, upload = ((file or {}).get("path") for file in (given, other))  # in Gradio's cache: it has checked that
        stop = runs.get(request.session_hash) or threading.Event()

        def on_step(done: int, of: int) -> bool:
            progress((done, of), desc="Stock diffusers", unit="steps")
            return not stop.is_set()

        with errors_shown():
            if not picture or (kind == UPLOAD and not upload):
                raise RequestError(f"there is no {'reference' if picture else 'picture'} yet: give one first")
            if kind == UPLOAD:
                this, reference, against = open_any(picture), open_any(str(upload)), "the picture you gave"
            else:
                this, receipt = open_picture(picture)
                wanted = stock_request(model, receipt)
                reference = stock_runner(source, model.device, family=model.family)(wanted, on_step)[0]
                against = f"stock diffusers in float32 with seed {wanted.seed}"
            psnr_db, largest = fidelity.psnr_db(this, reference), fidelity.max_difference(this, reference)
            psnr = "identical" if largest == 0 else f"{psnr_db:.1f} dB"
            floor = "inside" if psnr_db >= FLOOR_PSNR_DB and largest <= FLOOR_MAX_DIFFERENCE else "outside"
            note = f"Over every pixel and channel, against {against}: {floor} the noise floor of equal runs."
            figures = figures_html(psnr, f"{largest} of 255", note)
            return figures, (this, reference), fidelity.difference_map(this, reference, gain=255 / max(largest, 1))

    tab.kind.change(lambda kind: gr.update(visible=kind == UPLOAD), tab.kind, tab.upload, **PRIVATE)
    connect_run(
        tab, runs, [tab.run.click], compare, api_name="compare", show_progress_on=tab.slider, preprocess=False,
        inputs=[tab.picture, tab.kind, tab.upload], outputs=[tab.figures, tab.slider, tab.map],
    )  # fmt: skip


def build(engine: Engine | Model, output_dir: str | Path) -> "gr.Blocks":
    """Lay out the page for a model and make it work; pictures go to `output_dir`. `server.launch` serves it.

    Raises:
        Error: Gradio is missing, or the folder cannot be made.
    """
    gr = import_gradio()
    model = engine.model if isinstance(engine, Engine) else engine
    folder = Path(output_dir).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot make the folder {str(output_dir)!r}: {error.strerror}; choose another") from None
    dtype = str(model.dtype).removeprefix("torch.")
    about = f"Model {html.escape(Path(model.source).name)}, {dtype} on {model.device.type}, plan {html.escape(model.plan.name)}"
    runs: Runs = {}
    model.hashes  # noqa: B018  read now, not during the first picture
    with gr.Blocks(title="imagegen studio", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(f"<h1>imagegen studio</h1><p>{EXPLANATION}</p><p>{about}</p>", elem_classes="head")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                made = lay_out_generate(model)
            with gr.Tab("Compare", id="compare"):
                compared = lay_out_compare()
        connect_generate(model, folder, runs, made, compared.picture)
        connect_compare(model, runs, compared)
        made.compare.click(lambda: gr.Tabs(selected="compare"), None, tabs, **PRIVATE)
    return page


def look() -> dict[str, Any]:
    """Return how the page looks, as what mounts it takes it."""
    gr = import_gradio()
    hues = {"primary_hue": "indigo", "secondary_hue": "indigo", "neutral_hue": "slate"}
    theme = gr.themes.Default(**hues, font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(body_text_color_subdued="*neutral_500")  # the default is too pale to read on white
    return {"theme": theme, "css_paths": Path(__file__).with_suffix(".css")}
