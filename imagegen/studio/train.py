"""The Fine-tune tab: pictures and captions in, what is wrong with them, loss and samples on the way, a LoRA out."""

import html
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imagegen.families import adapters
from imagegen.finetune.data import find_faults, read_dataset
from imagegen.finetune.recipe import make_recipe
from imagegen.request import DataError
from imagegen.studio import training
from imagegen.studio.draw import curve_svg, progress_html
from imagegen.studio.parts import PRIVATE, Studio, choose, errors_shown

EVERY_S = 0.5
MAX_TRAINING_STEPS = 20_000


def lay_out_train(studio: Studio) -> SimpleNamespace:
    """Put the data and settings beside the loss and the samples; return the parts by name."""
    import gradio as gr

    tab = SimpleNamespace()
    with gr.Row(equal_height=False):
        with gr.Column(scale=5):
            tab.files = gr.File(
                label="Pictures, NAME.txt captions, metadata.jsonl", file_count="multiple", height=150,
                file_types=["image", ".txt", ".jsonl"],
            )  # fmt: skip
            tab.captions = gr.Dataframe(
                headers=["picture", "caption"], datatype="str", column_count=2, static_columns=[0], interactive=True,
                label="Captions, to be edited", max_height=220, wrap=True, row_count=1, type="array",
            )  # fmt: skip
            tab.check = gr.Button("Check the data", size="sm")
            tab.faults = gr.HTML("<p class='hint'>What is wrong with the data is listed here before anything is trained.</p>")
            with gr.Row():
                tab.name = gr.Textbox(label="Name", placeholder="my style", max_lines=1)
                tab.steps = gr.Number(300, label="Steps", precision=0, minimum=1, maximum=MAX_TRAINING_STEPS)
                tab.rank = gr.Number(8, label="Rank", precision=0, minimum=1, maximum=128)
            tab.sample = gr.Textbox(
                label="Sample prompt", placeholder="a house", max_lines=1, visible=studio.engine.safety is None
            )
            tab.right = gr.Checkbox(False, label="Where a licence forbids training on these pictures, I have the right")
            with gr.Row():
                tab.run = gr.Button("Start", variant="primary", scale=3)
                tab.stop = gr.Button("Stop", scale=1, min_width=80)
            with gr.Row():
                tab.earlier = gr.Dropdown([], label="A training that was stopped", scale=3)
                tab.resume = gr.Button("Resume", scale=1, min_width=80)
        with gr.Column(scale=6):
            tab.progress = gr.HTML(progress_html("Nothing is trained", 0))
            tab.curve = gr.HTML("<div class='chart blank'>The loss is drawn here.</div>")
            tab.samples = gr.Gallery(
                label="Samples, the last first", format="png", columns=4, height=260, object_fit="contain", interactive=False,
                elem_classes="strip",
            )  # fmt: skip
            with gr.Row():
                tab.use = gr.Button("Use it in Generate", interactive=False)
                tab.weights = gr.DownloadButton("Download the LoRA", interactive=False)
    return tab


def faults_html(faults: Sequence[str], count: int, notes: Sequence[str] = ()) -> str:
    """Return what is wrong with the data, or that nothing is."""
    if not faults:
        notes_html = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        return f"<p class='verdict' role='status'>{count} pictures with captions: nothing is wrong.</p><ul>{notes_html}</ul>"
    lines = "".join(f"<li>{html.escape(fault)}</li>" for fault in faults[:20])
    more = f"<li>and {len(faults) - 20} more</li>" if len(faults) > 20 else ""
    count_of = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return f"<p class='verdict' role='alert'>{count_of}:</p><ul class='faults'>{lines}{more}</ul>"


def check_data(place: Path, rows: Sequence[Sequence[Any]]) -> str:
    """Write the captions as they were edited, and say what is wrong; a row of no picture there is left out."""
    there = {path.name for path in place.iterdir()}
    training.write_captions(place, {str(row[0]): str(row[1] or "") for row in rows if row and str(row[0]) in there})
    faults = training.check_sizes(place) or find_faults(place)
    if faults:
        return faults_html(faults, 0)
    dataset = read_dataset(place)
    return faults_html([], len(dataset.items), dataset.notes)


def connect_train(studio: Studio, tab: SimpleNamespace, lora: Any, tabs: Any) -> None:
    """Make the tab work; `lora` is the Generate tab's picker, to which a result goes, and `tabs` the page's."""
    import gradio as gr

    def gather(files: list[str] | None, request: gr.Request) -> dict[Any, Any]:
        desk = studio.desk(request)
        if desk.data is not None:
            shutil.rmtree(desk.data, ignore_errors=True)
        desk.data = None
        if not files:
            return {tab.captions: [["", ""]], tab.faults: ""}
        with errors_shown():
            place = studio.folder(request) / "data" / secrets.token_hex(4)
            captions = training.gather(files, place)
            desk.data = place
            rows = [[name, text] for name, text in captions.items()]
            return {tab.captions: rows, tab.faults: check_data(place, rows)}

    def check(rows: list[list[Any]], request: gr.Request) -> str:
        with errors_shown():
            return check_data(data_of(request), rows)

    def data_of(request: gr.Request) -> Path:
        place = studio.desk(request).data
        if place is None:
            raise DataError("there are no pictures yet: drop some, with captions")
        return place

    def start(
        rows: list[list[Any]], name: str, num_steps: int, rank: int, sample: str, right: bool, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        with errors_shown():
            place = data_of(request)
            check_data(place, rows)
            faults = training.check_sizes(place) or find_faults(place)
            if faults:
                raise DataError(f"{faults[0]}: mend the data first")
            if not 1 <= num_steps <= MAX_TRAINING_STEPS:
                raise DataError(f"give from 1 to {MAX_TRAINING_STEPS} steps, got {num_steps}")
            every = max(1, min(50, int(num_steps) // 8))
            settings: dict[str, Any] = {"num_steps": int(num_steps), "rank": int(rank), "save_every": every}
            settings["validate_every"] = max(1, int(num_steps) // 4)
            unchecked = studio.engine.safety is not None  # a check looks at finished pictures, and samples go to files at once
            settings["validation_prompts"] = [sample.strip()] if sample.strip() and not unchecked else []
            make_recipe(settings | {"validation_prompts": tuple(settings["validation_prompts"])})
            made = training.new_training(studio.folder(request), name, place, settings | {"i_have_the_right": bool(right)})
            training.start(studio, made)
            studio.desk(request).training = made
        yield from watch(request)

    def resume(name: Any, request: gr.Request) -> Iterator[dict[Any, Any]]:
        with errors_shown():
            place = choose("training", name, training.unfinished(studio.folder(request)))
            run = studio.trainings.get(place)
            if run is None or run.ended.is_set():
                training.start(studio, place)
            studio.desk(request).training = place
        yield from watch(request)

    def watch(request: gr.Request) -> Iterator[dict[Any, Any]]:
        run = _run_of(studio, request)
        seen = -1
        update: dict[Any, Any]
        while run is not None:
            ended = run.ended.is_set()
            fraction = run.done / run.total if run.total else 0
            amount = f": {run.done} of {run.total}" if run.total > 1 and not ended else ""
            update = {tab.progress: progress_html(f"{run.message[:1].upper()}{run.message[1:]}{amount}", fraction)}
            if len(run.losses) != seen or ended:
                seen = len(run.losses)
                last = max(run.total if run.message.startswith("step") else 0, *(step for step, _ in run.losses), 1)
                update[tab.curve] = curve_svg(run.losses, last) or gr.skip()
                update[tab.samples] = [str(path) for path in training.samples(run.folder)]
            if ended:
                file = run.folder / adapters.FILE
                update[tab.earlier] = gr.update(choices=list(training.unfinished(studio.folder(request))))
                if file.is_file():
                    update |= {tab.use: gr.update(interactive=True), tab.weights: gr.update(value=str(file), interactive=True)}
                yield update
                return
            yield update
            time.sleep(EVERY_S)

    def stop(request: gr.Request) -> None:
        run = _run_of(studio, request)
        if run is not None:
            run.stop.set()

    def use(request: gr.Request) -> tuple[Any, Any]:
        place = studio.desk(request).training
        names = list(studio.loras_for(studio.folder(request)))
        return gr.update(choices=names, value=[f"mine: {place.name}"] if place else []), gr.Tabs(selected="generate")

    shown = [tab.progress, tab.curve, tab.samples, tab.earlier, tab.use, tab.weights]
    tab.files.change(gather, tab.files, [tab.captions, tab.faults], **PRIVATE)
    tab.captions.input(check, tab.captions, tab.faults, **PRIVATE)
    tab.check.click(check, tab.captions, tab.faults, **PRIVATE)
    tab.stop.click(stop, None, None, **PRIVATE)
    tab.use.click(use, None, [lora, tabs], **PRIVATE)
    event: dict[str, Any] = {"outputs": shown, "show_progress": "hidden", "concurrency_limit": 16, "concurrency_id": "train"}
    given = [tab.captions, tab.name, tab.steps, tab.rank, tab.sample, tab.right]
    tab.run.click(start, given, api_visibility="private", **event)
    tab.resume.click(resume, tab.earlier, api_visibility="private", **event)


def _run_of(studio: Studio, request: Any) -> Any:
    """Return the run that a visitor watches, or None."""
    place = studio.desk(request).training
    return studio.trainings.get(place) if place is not None else None


def refresh_train(studio: Studio, tab: SimpleNamespace, request: Any) -> dict[Any, Any]:
    """Return the updates of the choices that a visitor's own work changes."""
    import gradio as gr

    return {tab.earlier: gr.update(choices=list(training.unfinished(studio.folder(request))))}
