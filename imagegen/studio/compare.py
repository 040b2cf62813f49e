"""The Compare tab for one picture: its reference, what is held against it, and the difference, looked at and measured."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imagegen.receipt import read_receipt, write_new
from imagegen.reference import stock_request
from imagegen.reference_set import open_reference
from imagegen.report import in_words
from imagegen.request import ReceiptError, RequestError, build_request
from imagegen.studio.contest import (
    SETTINGS,
    Contest,
    Entry,
    default_floor,
    hold_models,
    hold_picture,
    hold_plans,
    in_figures,
    make_stock,
    rows_of,
    settings_of,
    speed_up,
)
from imagegen.studio.draw import figures_html, progress_html, stages_html, table_html
from imagegen.studio.parts import (
    COMPARED,
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
    look_at,
    narrate,
    open_upload,
    upload_path,
)
from imagegen.studio.views import SLIDER, connect_views, lay_out_views, show_pair

STOCK, RECORDED, UPLOAD = "Stock diffusers, run now in float32", "A picture of a reference set", "A picture of your own"
HEAD = ("", "a picture", "faster by", "PSNR", "SSIM", "FLIP", "largest difference")
BLAME_HEAD = ("lever", "faster by", "share of the drift", "PSNR after it")
THIS = "this picture"
EMPTY = {
    "PSNR": ("–", "noise floor 50 dB"),
    "Largest difference": ("–", "noise floor 2 of 255"),
    "SSIM": ("–", "1 is equal"),
    "FLIP": ("–", "0 is equal"),
}


def lay_out_compare(studio: Studio) -> SimpleNamespace:
    """Put the choice of what is compared beside the result; return the parts by name."""
    import gradio as gr

    tab = SimpleNamespace()
    with gr.Row(equal_height=False):
        with gr.Column(scale=4):
            tab.picture = gr.Image(label="This picture", height=200, **GIVEN)
            with gr.Row():
                tab.prompt = gr.Textbox(label="Or a prompt", placeholder="a red apple", max_lines=3, scale=3)
                tab.seed = gr.Textbox(label="Its seed", placeholder="7", max_lines=1, scale=1, min_width=80)
            tab.kind = gr.Radio([STOCK, RECORDED, UPLOAD], value=STOCK, label="Reference output")
            with gr.Row(visible=False) as tab.recorded:
                tab.set = gr.Dropdown([], label="Reference set")
                tab.entry = gr.Dropdown([], label="Its picture")
            tab.upload = gr.Image(label="Its reference", height=200, visible=False, **GIVEN)
            tab.plans = gr.CheckboxGroup(studio.tiers(), label="Made again by these plans")
            tab.models = gr.CheckboxGroup(list(studio.models), label="Made again by other models", visible=bool(studio.models))
            tab.blame = gr.Checkbox(False, label="Find out which lever costs what")
            with gr.Row():
                tab.run = gr.Button("Compare", variant="primary", scale=3)
                tab.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80)
            tab.progress = gr.HTML(progress_html("Nothing compared yet", 0))
        with gr.Column(scale=6):
            tab.figures = gr.HTML(figures_html(EMPTY, "Every figure is over all pixels and channels."))
            tab.which = gr.Radio([THIS], value=THIS, label="Looked at", elem_classes="tight")
            tab.views = lay_out_views()
            tab.table = gr.HTML("")
    return tab


def entry_html(contest: Contest, entry: Entry) -> str:
    """Return one entry's figures, each over what it is held against, and its verdict."""
    psnr, ssim, flip, largest = in_figures(entry.measured)
    floor = contest.floor
    figures = {
        "PSNR": (psnr, f"noise floor {in_words(floor['psnr_db'])}"),
        "Largest difference": (largest, f"noise floor {floor['max_difference']:g}"),
        "SSIM": (ssim, "1 is equal"),
        "FLIP": (flip, "0 is equal"),
    }
    if entry.seconds is not None:
        figures["A picture"] = (f"{entry.seconds:.3f} s", f"{speed_up(contest, entry)} as fast as exact")
    return figures_html(figures, f"{entry.name}, against {contest.against}: {entry.verdict}.")


def contest_html(contest: Contest) -> str:
    """Return the table of a contest, the time of each stage, and the blame."""
    parts = [table_html(HEAD, rows_of(contest), f"Against {contest.against}")]
    stages = {entry.name: entry.stages for entry in contest.entries if entry.stages}
    if stages:
        parts.append(f"<h3>Where the time goes</h3>{stages_html(stages)}")
    for entry in contest.entries:
        if entry.blame:
            rows = [
                (part["lever"], f"{part['factor']:.2f} ×", f"{part['share_of_drift']:.0%}", in_words(part["worst_psnr_db_after"]))
                for part in entry.blame
            ]
            parts.append(table_html(BLAME_HEAD, rows, f"{entry.name}: each lever added in turn"))
    return "".join(parts)


@dataclass(frozen=True)
class Question:
    """What is asked of the tab, checked.

    Attributes:
        kind: what the reference is.
        request: by the names of `generate`; None where two given pictures are compared.
        picture: the file of a finished picture, or None.
        reference: the file of the reference, or None where stock diffusers makes it.
        against: what the reference is, in words.
        floor: of runs that should be equal.
    """

    kind: str
    request: dict[str, Any] | None
    picture: Path | None
    reference: Path | None
    against: str
    floor: dict[str, float]


def read_question(
    studio: Studio,
    folder: Path,
    picture: str | None,
    typed: tuple[str, Any],
    kind: str,
    recorded: tuple[Any, Any],
    upload: str | None,
) -> Question:
    """Check what a visitor chose.

    Args:
        studio: knows the sets that may be chosen.
        folder: the visitor's.
        picture: path of an upload, or None.
        typed: prompt and seed.
        kind: one of the three.
        recorded: the set's name and the number of its picture, from 1.
        upload: path of the visitor's own reference, or None.

    Raises:
        RequestError: something is missing or unknown; a ReceiptError where stock diffusers cannot make the reference.
    """
    given = Path(picture) if picture else None
    if kind not in (STOCK, RECORDED, UPLOAD):
        raise RequestError(f"there is no reference {kind!r}: choose one of those listed")
    if given is None and kind != RECORDED and not str(typed[0] or "").strip():
        raise RequestError("there is no picture yet: give one, or write a prompt")
    if kind == UPLOAD and not upload:
        raise RequestError("there is no reference yet: give one first")
    if kind == RECORDED:
        opened = open_reference(choose("reference set", recorded[0], studio.references_for(folder)))
        numbers = {str(number): one for number, one in enumerate(opened.pictures, 1)}
        one = choose("picture of that set", str(recorded[1]), numbers)
        against = f"the recorded picture of {one['request']['prompt']!r}"
        return Question(kind, one["request"], given, opened.folder / one["file"], against, default_floor(opened.noise_floor))
    request = None
    if given is not None:
        with contextlib.suppress(*((ReceiptError,) if kind == UPLOAD else ())):  # any two pictures can be compared
            check_upload(given)
            request = stock_request(studio.model, read_receipt(given)).settings()
    else:
        request = settings_of(str(typed[0]), typed[1], studio.model)
    against = "the picture you gave"
    if kind == STOCK and request is not None:
        against = f"stock diffusers in float32 with seed {request['seed']}"
    return Question(kind, request, given, Path(upload) if kind == UPLOAD and upload else None, against, default_floor())


def answer(
    studio: Studio,
    folder: Path,
    asked: Question,
    plans: dict[str, Any],
    models: dict[str, str],
    with_blame: bool,
    tell: Tell,
) -> Contest:
    """Make what is missing, and hold everything against the reference; the files go to the visitor's folder.

    Raises:
        RequestError: two pictures differ in size, or one cannot be read.
        PlanError: a plan cannot engage.
    """
    place = folder / COMPARED
    tell("waiting for the model", 0, 1)
    with studio.engine.alone() as model:
        seconds = None
        if asked.reference is None:
            assert asked.request is not None  # stock diffusers makes it from the receipt, or from what was typed
            wanted = build_request(asked.request["prompt"], model.family, {name: asked.request[name] for name in SETTINGS})
            image, seconds = make_stock(model, wanted, tell)
            look_at(studio, wanted.prompt, image)
        else:
            image = open_upload(asked.reference)
        contest = Contest(_keep(image, place, "reference"), asked.against, asked.floor, reference_s=seconds)
        if asked.picture is not None:
            hold_picture(open_upload(asked.picture), THIS, _keep_file(asked.picture, place), contest, image)
        if plans or models:
            if asked.request is None:
                raise RequestError("these pictures carry no receipt to make them again from: choose no plans and no models")
            prompt = asked.request["prompt"]
            look = lambda image: look_at(studio, prompt, image)  # noqa: E731
            hold_plans(model, plans, asked.request, contest, place, with_blame, tell, look)
            hold_models(models, model, asked.request, contest, place, tell, look)
    return contest


def _keep(image: Any, place: Path, stem: str) -> Path:
    """Write a picture without a receipt: what made it is not ours."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return write_new(place, stem, file.getvalue())


def _keep_file(path: Path, place: Path) -> Path:
    """Keep a given picture as it came, if it is a PNG; Gradio's own copy goes after an hour."""
    content = path.read_bytes()
    return write_new(place, "picture", content) if content.startswith(b"\x89PNG") else _keep(open_upload(path), place, "picture")


def connect_compare(studio: Studio, tab: SimpleNamespace) -> None:
    """Make the tab work."""
    import gradio as gr

    def compare(
        picture: Any, prompt: str, seed: Any, kind: str, set_name: Any, entry: Any, upload: Any, plans: Any, models: Any,
        blame: bool, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        stop, folder = studio.stop_of(request), studio.folder(request)
        with errors_shown():
            paths = upload_path(picture), upload_path(upload)
            asked = read_question(studio, folder, paths[0], (prompt, seed), kind, (set_name, entry), paths[1])
            known = studio.plans_for(folder)
            chosen = {str(name): choose("plan", name, known) for name in plans or ()}
            others = {str(name): choose("model", name, studio.models) for name in models or ()}
            if asked.picture is None and not chosen and not others:
                raise RequestError("there is nothing to hold against it: choose a plan, or give a picture")
            try:
                work = follow_work(lambda tell: answer(studio, folder, asked, chosen, others, blame, tell), stop)
                contest = yield from narrate(work, tab.progress)
            except Stopped:
                yield {tab.progress: progress_html("Stopped", 0)}
                return
            yield show(contest, request)

    def show(contest: Contest, request: gr.Request) -> dict[Any, Any]:
        desk, first = studio.desk(request), contest.entries[0]
        desk.contest, desk.pair = contest, (contest.reference, first.path, first.name)
        names = [entry.name for entry in contest.entries]
        parts = {
            tab.progress: progress_html("Done", 1),
            tab.figures: entry_html(contest, first),
            tab.which: gr.update(choices=names, value=first.name),
            tab.table: contest_html(contest),
            tab.views.kind: SLIDER,
        }
        return parts | show_pair(tab.views, SLIDER, desk.pair)

    def look(name: str, kind: str, request: gr.Request) -> dict[Any, Any]:
        desk = studio.desk(request)
        if desk.contest is None:
            return {tab.figures: gr.skip()}
        with errors_shown():
            entry = choose("picture", name, {entry.name: entry for entry in desk.contest.entries})
            desk.pair = (desk.contest.reference, entry.path, entry.name)
            return {tab.figures: entry_html(desk.contest, entry)} | show_pair(tab.views, kind, desk.pair)

    def choose_kind(kind: str) -> dict[Any, Any]:
        return {tab.recorded: gr.update(visible=kind == RECORDED), tab.upload: gr.update(visible=kind == UPLOAD)}

    def list_entries(name: Any, request: gr.Request) -> Any:
        with errors_shown():
            known = studio.references_for(studio.folder(request))
            pictures = open_reference(known[name]).pictures if name in known else []
            choices = [(f"{number}: {one['request']['prompt']}", number) for number, one in enumerate(pictures, 1)]
            return gr.update(choices=choices, value=1 if choices else None)

    tab.kind.change(choose_kind, tab.kind, [tab.recorded, tab.upload], **PRIVATE)
    tab.set.change(list_entries, tab.set, tab.entry, **PRIVATE)
    tab.which.input(look, [tab.which, tab.views.kind], [tab.figures, *tab.views.all], **PRIVATE)
    connect_views(tab.views, lambda request: studio.desk(request).pair)
    connect_run(
        studio, tab, [tab.run.click], compare, api_name="compare", show_progress="hidden", preprocess=False,
        inputs=[tab.picture, tab.prompt, tab.seed, tab.kind, tab.set, tab.entry, tab.upload, tab.plans, tab.models, tab.blame],
        outputs=[tab.progress, tab.figures, tab.which, tab.table, tab.views.kind, *tab.views.all],
    )  # fmt: skip


def refresh_compare(studio: Studio, tab: SimpleNamespace, request: Any) -> dict[Any, Any]:
    """Return the updates of the choices that a visitor's own work changes: plans and reference sets."""
    import gradio as gr

    folder = studio.folder(request)
    sets = list(studio.references_for(folder))
    return {tab.plans: gr.update(choices=list(studio.plans_for(folder))), tab.set: gr.update(choices=sets)}
