"""The Generate tab: pictures while you watch, and everything that goes on from one of them."""

import html
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imagegen.receipt import read_receipt, remembered_prompt
from imagegen.request import RequestError
from imagegen.studio.draw import Frame, progress_html, stage_html
from imagegen.studio.enhance import enhance, find_writer
from imagegen.studio.figures import NUM_PICTURES, measure_tiers
from imagegen.studio.flags import FLAGS, flags_of, read_flags, size_of_shape, without_flags
from imagegen.studio.making import follow, larger, layers_of, painted, stream_alone
from imagegen.studio.parts import (
    GIVEN,
    PRIVATE,
    Stopped,
    Studio,
    Tell,
    check_upload,
    choose,
    connect_run,
    errors_shown,
    follow_work,
    narrate,
    open_upload,
    upload_path,
)
from imagegen.variations import VARIATIONS

MAX_PICTURES = 4
MAX_STEPS = 100
EXAMPLES = ("a red apple", "a smiling sun", "a blue heart", "a cat in a box")
SHAPES = ("1:1", "4:3", "3:2", "16:9", "3:4", "2:3", "9:16")
WORDS, CHANGE, REPAINT, GROW = "Words alone", "Change it", "Repaint what I paint", "Grow it"
NEEDS = {CHANGE: ("image-to-image", "editing"), REPAINT: ("inpainting",), GROW: ("outpainting",)}
TO_THE_STAGE = "() => { if (innerWidth < 640) document.querySelector('.theatre').scrollIntoView({block: 'center'}); }"
TAKEN = ("prompt", "negative_prompt", "seed", "num_steps", "guidance", "width", "height")


def lay_out_generate(studio: Studio) -> SimpleNamespace:
    """Put the controls, with the family's defaults and ranges, beside the stage; return the parts by name."""
    import gradio as gr

    family, tab = studio.model.family, SimpleNamespace()
    side = {"minimum": family.min_px, "maximum": family.max_px, "step": family.multiple_px, "value": family.size_px}
    shapes = list(SHAPES) if family.min_px < family.max_px else ["1:1"]
    starts = [WORDS, *(start for start, modes in NEEDS.items() if set(modes) & set(family.modes))]
    plans = studio.labels_for(studio.visitors.root / "nobody")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5):
            # No autofocus: Gradio takes the focus from the other fields again whenever a long prompt scrolls.
            tab.prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLES[0], max_lines=6)
            gr.Examples([[text] for text in EXAMPLES], tab.prompt, label="Try one of these")
            with gr.Row():
                tab.run = gr.Button("Generate", variant="primary", scale=3)
                tab.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80)
                tab.enhance = gr.Button("Enhance", scale=1, min_width=80, visible=find_writer() is not None)
            tab.shape = gr.Radio(shapes, value="1:1", label="Shape", elem_classes="tight")
            with gr.Row():
                tab.count = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Pictures")
                tab.seed = gr.Textbox(label="Seed", placeholder="empty: a new one", max_lines=1)
            tab.plan = gr.Radio(plans, value=studio.model.plan.name, label="Speed, and what it costs", elem_classes="tight lines")
            with gr.Row():
                tab.measure = gr.Button("Measure the tiers on this machine", size="sm", scale=3)
                tab.stop_measure = gr.Button("Stop measuring", size="sm", interactive=False, scale=1, min_width=80)
            tab.measured = gr.HTML("", elem_classes="quiet")
            with gr.Accordion("Steps, guidance, size, negative prompt", open=False):
                with gr.Row():
                    tab.steps = gr.Slider(1, MAX_STEPS, family.num_steps, step=1, label="Steps")
                    tab.guidance = gr.Slider(1, 20, family.guidance, step=0.1, label="Guidance")
                with gr.Row():
                    tab.width = gr.Slider(label="Width", **side)
                    tab.height = gr.Slider(label="Height", **side)
                tab.negative = gr.Textbox(label="Negative prompt", placeholder="what to steer away from")
                flags = ", ".join(f"<code>--{name}</code>" for name in FLAGS)
                gr.HTML(f"<p class='hint'>Or in the prompt: {flags}, as in <code>a fox --ar 3:2 --seed 7 --no text</code></p>")
            with gr.Accordion("Start from a picture", open=False) as tab.from_picture:
                tab.start = gr.Radio(starts, value=WORDS, label="What becomes of it", elem_classes="tight")
                tab.picture = gr.Image(label="The picture", height=220, **GIVEN)
                tab.strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="How much is drawn anew")
                tab.editor = gr.ImageEditor(
                    label="Paint over what is to be drawn anew", type="pil", format="png", sources=(), transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=24, colors=["#ffffff"], color_mode="fixed"), height=320, visible=False,
                )  # fmt: skip
                tab.editor.preprocess = layers_of
                step = family.multiple_px
                with gr.Row(visible=False) as tab.margins:
                    tab.sides = [gr.Number(0, label=f"{name} (px)", step=step, precision=0, minimum=0, min_width=80)
                                 for name in ("Left", "Right", "Top", "Bottom")]  # fmt: skip
            with gr.Accordion("LoRAs", open=False):
                tab.loras = gr.Dropdown(list(studio.loras), value=[], multiselect=True, label="LoRAs, which add up")
                tab.weight = gr.Slider(0, 2, 1, step=0.05, label="Their weight")
        with gr.Column(scale=6):
            with gr.Column(elem_classes="theatre"):
                tab.live = gr.HTML(stage_html(Frame("Your picture appears here", 0.0)))
                tab.gallery = gr.Gallery(
                    format="png", visible=False, show_label=False, interactive=False, elem_classes="result", columns=1,
                    object_fit="contain", buttons=["download", "fullscreen"],
                )  # fmt: skip
            tab.status = gr.HTML("<p class='status'>&nbsp;</p>")
            with gr.Row(elem_classes="actions"):
                tab.download = gr.DownloadButton("Download PNG", size="sm", interactive=False)
                tab.keep = gr.Button("Keep this seed", size="sm", interactive=False)
                tab.compare = gr.Button("Compare", size="sm", interactive=False)
            with gr.Row(elem_classes="actions"):
                there = "image-to-image" in family.modes
                tab.subtle = gr.Button("Vary subtly", size="sm", interactive=False, visible=there)
                tab.strong = gr.Button("Vary strongly", size="sm", interactive=False, visible=there)
                tab.upscale = gr.Button("Upscale 2 ×", size="sm", interactive=False, visible=there)
                tab.begin = gr.Button("Start from it", size="sm", interactive=False, visible=len(starts) > 1)
            with gr.Accordion("Receipt", open=False):
                tab.receipt = gr.Code(language="json", show_label=False, interactive=False, max_lines=24)
            tab.history = gr.Gallery(
                label="Your pictures, kept for this browser", format="png", columns=6, height=220, object_fit="contain",
                allow_preview=False, interactive=False, elem_classes="strip",
            )  # fmt: skip
            tab.restore = gr.File(label="Drop a PNG made here to restore its settings", file_types=[".png"], height=130)
    tab.about = [tab.download, tab.keep, tab.compare, tab.subtle, tab.strong, tab.upscale, tab.begin]
    return tab


def connect_generate(studio: Studio, tab: SimpleNamespace, picture: Any) -> None:
    """Make the tab work; `picture` is the Compare tab's, which follows the choice made here."""
    import gradio as gr

    engine, family = studio.engine, studio.model.family

    def generate(
        prompt: str, negative_prompt: str, seed: str, num_steps: int, guidance: float, width: int, height: int, num_images: int,
        plan: str, loras: list[str], weight: float, start: str, picture: str | None, strength: float, editor: list[str],
        left: int, right: int, top: int, bottom: int, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        def ask() -> tuple[str, dict[str, Any]]:
            words, flags = read_flags(prompt, family)
            number = int(seed) if seed.strip().isdecimal() else seed.strip() or None  # what is no number, the request refuses
            settings = {"negative_prompt": negative_prompt, "seed": number, "num_steps": num_steps, "guidance": guidance}
            settings |= {"width": width, "height": height, "num_images": num_images}
            if start != WORDS:
                settings = {key: value for key, value in settings.items() if key not in ("width", "height")}
                settings |= begun(start, picture, strength, editor, (left, right, top, bottom))
            return words, settings | flags

        yield from run(ask, (plan, loras, weight), num_images, request)

    def begun(start: str, path: str | None, strength: float, layers: list[str], margins: tuple[int, ...]) -> dict[str, Any]:
        if start not in NEEDS:
            raise RequestError(f"there is no way {start!r} to start: choose one of those listed")
        if not path:
            raise RequestError("there is no picture to start from: give one, or start from words alone")
        image = open_upload(path)
        if start == GROW:
            return {"image": image, "margins": tuple(int(side or 0) for side in margins)}
        if start == CHANGE:
            return {"image": image} | ({"strength": strength} if "image-to-image" in family.modes else {})
        return {"image": image, "mask": painted(layers, image.size), "strength": strength}

    def run(
        ask: Callable[[], tuple[str, dict[str, Any]]], way: tuple[str, list[str], float], count: int, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        stop, folder, desk = studio.stop_of(request), studio.folder(request), studio.desk(request)
        yield unfinished(Frame("Reading the prompt", 0.0, count=count))
        try:
            with errors_shown():
                words, settings = ask()
                plan = choose("plan", way[0], studio.plans_for(folder))
                loras = [choose("LoRA", name, studio.loras_for(folder)) for name in way[1] or ()]
                other = plan != studio.model.plan.name or loras
                made_by = (lambda: stream_alone(studio, words, settings, plan, loras, way[2])) if other else None
                asked = desk.asked.get(words, "")
                warn = lambda text: gr.Warning(html.escape(text))  # noqa: E731
                for frame in follow(engine, words, settings, folder, stop, warn, made_by, asked):
                    yield finished(frame, request) if frame.paths else unfinished(frame)
        except gr.Error:
            yield unfinished(Frame("Nothing was made", 0.0, count=count))
            raise

    def unfinished(frame: Frame) -> dict[Any, Any]:
        hidden = {part: gr.update(interactive=False) for part in tab.about}
        hidden[tab.gallery] = gr.update(visible=False)
        return hidden | {tab.live: gr.update(value=stage_html(frame), visible=True), tab.status: "<p class='status'>&nbsp;</p>"}

    def finished(frame: Frame, request: gr.Request) -> dict[Any, Any]:
        files = [str(path) for path in frame.paths]
        desk = studio.desk(request)
        desk.shown = list(frame.paths)
        status = status_html(f"{frame.message} · saved in {frame.paths[0].parent.name}")
        shown: dict[Any, Any] = {tab.live: gr.update(visible=False), tab.status: status, tab.history: history(request)}
        shown[tab.gallery] = gr.update(value=files, columns=min(2, len(files)), selected_index=None, visible=True)
        return shown | chosen(frame.paths[0], request)

    def history(request: gr.Request) -> list[str]:
        return [str(path) for path in studio.visitors.pictures(request.session_hash)]

    def chosen(path: Path, request: gr.Request) -> dict[Any, Any]:
        studio.desk(request).chosen = path
        receipt = json.dumps(asdict(read_receipt(path)), indent=2, ensure_ascii=False)
        on = {part: gr.update(interactive=True) for part in tab.about if part is not tab.download}
        return on | {tab.receipt: receipt, tab.download: gr.update(value=str(path), interactive=True), picture: str(path)}

    def choose_shown(event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        shown = studio.desk(request).shown
        with errors_shown():
            return chosen(shown[event.index], request) if event.index < len(shown) else {tab.receipt: gr.skip()}

    def choose_old(event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        old = studio.visitors.pictures(request.session_hash)
        if event.index >= len(old):
            return {tab.receipt: gr.skip()}
        with errors_shown():
            studio.desk(request).shown = [old[event.index]]
            shown = gr.update(value=[str(old[event.index])], columns=1, selected_index=None, visible=True)
            made = read_receipt(old[event.index]).request
            stage = {tab.gallery: shown, tab.live: gr.update(visible=False)}
            stage[tab.status] = status_html(f"{made['prompt']} · seed {made['seed']} · made earlier")
            return chosen(old[event.index], request) | stage

    def go_on(kind: str) -> Callable[..., Iterator[dict[Any, Any]]]:
        def work(plan: str, loras: list[str], weight: float, count: int, request: gr.Request) -> Iterator[dict[Any, Any]]:
            def ask() -> tuple[str, dict[str, Any]]:
                path = studio.desk(request).chosen
                if path is None:
                    raise RequestError("no picture is chosen: make one, or choose one of yours")
                words, image = remembered(path), open_upload(path)
                if kind == "upscale":
                    return words, larger(image, family)
                return words, {"image": image, "strength": VARIATIONS[kind], "num_images": count}

            yield from run(ask, (plan, loras, weight), 1 if kind == "upscale" else count, request)

        return work

    def restore(file: str | None) -> dict[Any, Any]:
        if not file:
            return {tab.prompt: gr.skip()}
        with errors_shown():
            check_upload(file)
            recorded = named(lambda: read_receipt(file), file).request
            values = {name: recorded.get(name) for name in TAKEN}
            parts = dict(
                zip(TAKEN, (tab.prompt, tab.negative, tab.seed, tab.steps, tab.guidance, tab.width, tab.height), strict=True)
            )
            values["seed"] = str(values["seed"])
            gr.Info("Settings restored from the receipt.")
            return {parts[name]: value for name, value in values.items() if value is not None}

    def write_out(prompt: str, request: gr.Request) -> str:
        writer = find_writer()
        with errors_shown():
            if writer is None:
                raise RequestError("this server has no enhancing service: who runs it sets IMAGEGEN_ENHANCE_URL")
            words = read_flags(prompt, family)[0]
            written = without_flags(enhance(words, writer))
            studio.desk(request).asked[written] = words
            return f"{written} {flags_of(prompt)}".strip()

    def measure(request: gr.Request) -> Iterator[dict[Any, Any]]:
        with errors_shown():
            try:
                work = follow_work(lambda tell: _measure(studio, tell), studio.stop_of(request))
                yield from narrate(work, tab.measured)
            except Stopped:
                yield {tab.measured: progress_html("Stopped, nothing was kept", 0)}
                return
            said = f"Measured {NUM_PICTURES} pictures of each"
            yield {tab.measured: progress_html(said, 1), tab.plan: gr.update(choices=studio.labels_for(studio.folder(request)))}

    def set_shape(shape: str) -> tuple[int, int]:
        with errors_shown():
            return size_of_shape(shape, family)

    def begin_from(request: gr.Request) -> dict[Any, Any]:
        path, start = studio.desk(request).chosen, CHANGE
        return {tab.picture: str(path), tab.start: start, tab.from_picture: gr.update(open=True)}

    def show_start(start: str, path: dict | None) -> dict[Any, Any]:
        shown = {tab.editor: gr.update(visible=start == REPAINT), tab.margins: gr.update(visible=start == GROW)}
        shown[tab.strength] = gr.update(visible=start != GROW)
        file = upload_path(path)
        with errors_shown():
            if start == REPAINT and file:
                check_upload(file)
                shown[tab.editor] = gr.update(value=open_upload(file), visible=True)
        return shown

    stage = [tab.live, tab.gallery, tab.status, tab.receipt, tab.history, picture, *tab.about]
    event: dict[str, Any] = {"outputs": stage, "show_progress": "hidden", "concurrency_limit": 32}
    way = [tab.plan, tab.loras, tab.weight]
    for trigger in (tab.run.click, tab.prompt.submit):
        trigger(None, js=TO_THE_STAGE, **PRIVATE)
    connect_run(
        studio, tab, [tab.run.click, tab.prompt.submit], generate, api_name="generate", **event,
        inputs=[tab.prompt, tab.negative, tab.seed, tab.steps, tab.guidance, tab.width, tab.height, tab.count, *way,
                tab.start, tab.picture, tab.strength, tab.editor, *tab.sides],
    )  # fmt: skip
    for button, kind in ((tab.subtle, "subtle"), (tab.strong, "strong"), (tab.upscale, "upscale")):
        connect_run(
            studio, tab, [button.click], go_on(kind), api_visibility="private", **event, inputs=[*way, tab.count],
            concurrency_id=kind,
        )  # fmt: skip
    measured = SimpleNamespace(run=tab.measure, stop=tab.stop_measure)
    connect_run(
        studio, measured, [tab.measure.click], measure, api_visibility="private", show_progress="hidden", inputs=None,
        outputs=[tab.measured, tab.plan], concurrency_id="measure",
    )  # fmt: skip
    tab.gallery.select(choose_shown, None, [tab.receipt, tab.download, picture, *tab.about[1:]], **PRIVATE)
    old = [tab.receipt, tab.gallery, tab.live, tab.status, picture, *tab.about]
    tab.history.select(choose_old, None, old, **PRIVATE)
    tab.keep.click(lambda receipt: str(json.loads(receipt)["request"]["seed"]), tab.receipt, tab.seed, **PRIVATE)
    tab.restore.upload(
        restore, tab.restore, [tab.prompt, tab.negative, tab.seed, tab.steps, tab.guidance, tab.width, tab.height], **PRIVATE
    )
    tab.shape.input(set_shape, tab.shape, [tab.width, tab.height], **PRIVATE)
    tab.enhance.click(write_out, tab.prompt, tab.prompt, api_visibility="private", concurrency_limit=4, concurrency_id="enhance")
    tab.begin.click(begin_from, None, [tab.picture, tab.start, tab.from_picture], **PRIVATE)
    for part in (tab.start, tab.picture):
        part.change(show_start, [tab.start, tab.picture], [tab.editor, tab.margins, tab.strength], **PRIVATE, preprocess=False)


def _measure(studio: Studio, tell: Tell) -> None:
    """Measure the tiers with the model to oneself, and keep what was found."""
    tell("waiting for the model", 0, 1)
    with studio.engine.alone() as model:
        studio.take_figures(measure_tiers(model, studio.tiers(), next(iter(studio.references.values()), None), tell))


def status_html(text: str) -> str:
    """Return the line under the stage that says what is on it."""
    return f"<p class='status' role='status'>{html.escape(text)}</p>"


def remembered(path: Path) -> str:
    """Return the prompt of a picture that was made here."""
    from PIL import Image

    with Image.open(path) as opened:
        opened.load()
        return remembered_prompt(opened)


def named(work: Callable[[], Any], file: str) -> Any:
    """Do something with an upload; an error calls it by its name, not by where the server keeps it."""
    try:
        return work()
    except RequestError:
        raise
    except ValueError as error:
        raise type(error)(str(error).replace(file, Path(file).name)) from None


def refresh_generate(studio: Studio, tab: SimpleNamespace, request: Any) -> dict[Any, Any]:
    """Return the updates of what a visitor's own work changes: plans, LoRAs, and the pictures made so far."""
    import gradio as gr

    folder = studio.folder(request)
    pictures = [str(path) for path in studio.visitors.pictures(request.session_hash)]
    return {
        tab.plan: gr.update(choices=studio.labels_for(folder)),
        tab.loras: gr.update(choices=list(studio.loras_for(folder))),
        tab.history: pictures,
    }
