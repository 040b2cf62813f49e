"""The Compare tab for a whole reference set: every picture again under each plan, the worst first."""

import html
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imagegen.comparison import ComparisonReport, compare
from imagegen.receipt import slug
from imagegen.reference_set import ReferenceSet, import_reference, open_reference, record_reference
from imagegen.report import in_words
from imagegen.request import DataError, RequestError
from imagegen.speed import EXACT
from imagegen.studio.draw import pareto_svg, progress_html, table_html
from imagegen.studio.figures import NUM_PICTURES
from imagegen.studio.parts import (
    COMPARED,
    PRIVATE,
    REFERENCES,
    Blind,
    Desk,
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
)
from imagegen.studio.views import SLIDER, connect_views, lay_out_views, show_pair

HEAD = ("plan", "a picture", "faster by", "worst PSNR", "mean", "worst SSIM", "worst FLIP")
BLAME_HEAD = ("plan", "lever", "faster by", "share of the drift", "worst after it")
MAX_SET = 64
IMPORTED, RECORDED = "Add these pictures as a set", "Record a set of these prompts"


def lay_out_sets(studio: Studio) -> SimpleNamespace:
    """Put the choice of a set and plans over what they give; return the parts by name."""
    import gradio as gr

    tab = SimpleNamespace()
    with gr.Row(equal_height=False):
        with gr.Column(scale=4):
            tab.set = gr.Dropdown(list(studio.references), label="Reference set", value=next(iter(studio.references), None))
            tab.plans = gr.CheckboxGroup(studio.tiers(), value=studio.tiers()[:2], label="Plans")
            tab.count = gr.Slider(1, MAX_SET, 6, step=1, label="Pictures of it, from the first")
            with gr.Row():
                tab.run = gr.Button("Compare the set", variant="primary", scale=3)
                tab.stop = gr.Button("Stop", interactive=False, scale=1, min_width=80)
            tab.progress = gr.HTML(progress_html("Nothing compared yet", 0))
            with gr.Accordion("Another reference", open=False):
                tab.name = gr.Textbox(label="Its name", placeholder="my reference", max_lines=1)
                tab.files = gr.File(
                    label="PNGs that say how they were made, of this or another tool", file_count="multiple", file_types=[".png"],
                    height=120,
                )  # fmt: skip
                tab.add = gr.Button(IMPORTED, size="sm")
                tab.prompts = gr.Textbox(label="Or prompts, one a line", lines=3, max_lines=6)
                with gr.Row():
                    tab.record = gr.Button(RECORDED, size="sm", scale=3)
                    tab.stop_record = gr.Button("Stop recording", size="sm", interactive=False, scale=1, min_width=80)
        with gr.Column(scale=6):
            tab.verdicts = gr.HTML("<p class='hint'>A verdict for each plan, and a chart of time against the worst picture.</p>")
            tab.worst = gr.Gallery(
                label="Every picture, the worst first", format="png", columns=6, height=210, object_fit="contain",
                allow_preview=False, interactive=False, elem_classes="strip",
            )  # fmt: skip
            tab.views = lay_out_views()
            tab.report = gr.DownloadButton("Download the report", size="sm", interactive=False)
    return tab


def keep_pairs(found: ComparisonReport, references: Sequence[Path], place: Path) -> list[tuple[Path, Path, str]]:
    """Write every picture of a comparison into a folder; return reference, picture and what it is, the worst first."""
    kept = []
    for trial in found.trials:
        for number, (image, measured) in enumerate(zip(trial.images, trial.measured, strict=True)):
            path = place / f"{slug(trial.plan)}-{number:03d}.png"
            image.save(path, "PNG")
            psnr = measured["psnr_db"] if measured["psnr_db"] is not None else float("inf")
            said = f"{trial.plan}, {found.prompts[number]}: {in_words(psnr)}"
            kept.append((psnr, references[number], path, said))
    return [(reference, path, said) for _, reference, path, said in sorted(kept, key=lambda one: one[0])]


def compare_set(studio: Studio, folder: Path, opened: ReferenceSet, plans: Sequence[Any], count: int, tell: Tell) -> Any:
    """Compare a set's first pictures; return the report, its pairs the worst first, and the page's path.

    Raises:
        DataError: the set is damaged or empty.
        PlanError: a plan cannot engage.
    """
    place = folder / COMPARED / secrets.token_hex(4)
    place.mkdir(parents=True)
    references = []
    for number, entry in enumerate(opened.pictures[:count]):
        references.append(place / f"reference-{number:03d}.png")
        shutil.copyfile(opened.folder / entry["file"], references[-1])
    tell("waiting for the model", 0, 1)
    with studio.engine.alone() as model:
        found = compare(replace(opened, pictures=opened.pictures[:count]), model, plans, progress=tell)
        if len(opened.pictures[:count]) >= NUM_PICTURES and not model.loras:
            studio.take_figures(found.trials)
    for trial in found.trials:
        for prompt, image in zip(found.prompts, trial.images, strict=True):
            look_at(studio, prompt, image)
    found.reference["folder"] = opened.folder.name  # the page is downloaded: where the set lies is the server's business
    return found, keep_pairs(found, references, place), found.save(place)


def set_html(found: ComparisonReport) -> str:
    """Return verdicts, the table, the chart and the blame; the first plan is the exact one."""
    rows, blamed, words = [], [], []
    exact_s = found.trials[0].median_s
    for trial in found.trials:
        summary = trial.summary()
        fidelity = summary["fidelity"]
        ssim, flip = (f"{fidelity[name]['worst']:.4f}" if name in fidelity else "–" for name in ("ssim", "flip"))
        faster = f"{exact_s / trial.median_s:.2f} ×"
        worst, mean = in_words(trial.worst()), in_words(trial.mean())
        rows.append((trial.plan, f"{trial.median_s:.3f} s", faster, worst, mean, ssim, flip))
        words.append(f"{trial.plan}: {trial.verdict}.")
        blamed += [
            (trial.plan, part["lever"], f"{part['factor']:.2f} ×", f"{part['share_of_drift']:.0%}",
             in_words(part["worst_psnr_db_after"])) for part in trial.blame
        ]  # fmt: skip
    floor = (found.reference.get("noise_floor") or {}).get("psnr_db")
    rows.append(("noise floor of equal runs", "", "", in_words(floor) if floor else "not recorded", "", "", ""))
    parts = [f"<p class='verdict' role='status'>{html.escape(line)}</p>" for line in words]
    parts += [f"<p class='hint'>{html.escape(note)}</p>" for note in found.notes]
    parts.append(table_html(HEAD, rows, f"{found.reference['pictures']} pictures, medians"))
    parts.append(pareto_svg([trial.summary() for trial in found.trials]))
    if blamed:
        parts.append(table_html(BLAME_HEAD, blamed, "Each lever added in turn"))
    return "".join(parts)


def add_set(folder: Path, name: str, files: Sequence[str]) -> str:
    """Make a visitor's pictures a reference set; return the name that it has in lists.

    Raises:
        DataError: there are no pictures or too many, or one does not say its prompt and seed.
        RequestError: one has too many pixels.
    """
    if not files or len(files) > MAX_SET:
        raise DataError(f"give from 1 to {MAX_SET} pictures, got {len(files or ())}")
    place = _new_set(folder, name)
    place.mkdir(parents=True)
    try:
        for number, file in enumerate(files):
            check_upload(file)
            shutil.copyfile(file, place / f"{number:03d}-{slug(Path(file).stem)}.png")
        import_reference(place)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, DataError):
            raise DataError(str(error).replace(f"{place}/", "")) from None
        raise
    return f"mine: {place.name}"


def _new_set(folder: Path, name: str) -> Path:
    """Return the place of a new set: its name cut down to letters and digits, and a number where that is taken."""
    stem, number = slug(name), 1
    while (place := folder / REFERENCES / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return place


def record_set(studio: Studio, folder: Path, name: str, prompts: Sequence[str], tell: Tell) -> str:
    """Record a set of a visitor's prompts under the exact plan, with its noise floor; return its name in lists.

    Raises:
        DataError: there are no prompts or too many.
    """
    if not prompts or len(prompts) > MAX_SET:
        raise DataError(f"give from 1 to {MAX_SET} prompts, one a line, got {len(prompts)}")
    place = _new_set(folder, name)
    tell("waiting for the model", 0, 1)
    try:
        with studio.engine.alone() as model:
            record_reference(model, prompts, place, progress=tell)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return f"mine: {place.name}"


def connect_sets(studio: Studio, tab: SimpleNamespace) -> None:
    """Make the tab work."""
    import gradio as gr

    def run(name: Any, plans: list[str], count: int, request: gr.Request) -> Iterator[dict[Any, Any]]:
        stop, folder = studio.stop_of(request), studio.folder(request)
        with errors_shown():
            opened = open_reference(choose("reference set", name, studio.references_for(folder)))
            known = studio.plans_for(folder)
            chosen = [EXACT.name, *(choose("plan", plan, known) for plan in plans or () if plan != EXACT.name)]
            if not isinstance(count, (int, float)) or not 1 <= count <= MAX_SET:
                raise RequestError(f"take from 1 to {MAX_SET} pictures, got {count!r}")
            try:
                work = follow_work(lambda tell: compare_set(studio, folder, opened, chosen, int(count), tell), stop)
                found, pairs, page = yield from narrate(work, tab.progress)
            except Stopped:
                yield {tab.progress: progress_html("Stopped", 0)}
                return
            yield show(studio.desk(request), found, pairs, page)

    def show(desk: Desk, found: ComparisonReport, pairs: list[tuple[Path, Path, str]], page: Path) -> dict[Any, Any]:
        desk.pairs, desk.blind = pairs, Blind()
        desk.set_pair = pairs[0] if pairs else None
        parts = {
            tab.progress: progress_html("Done", 1),
            tab.verdicts: set_html(found),
            tab.worst: gr.update(value=[(str(path), said) for _, path, said in pairs], selected_index=0),
            tab.report: gr.update(value=str(page), interactive=True),
            tab.views.kind: SLIDER,
        }
        return parts | show_pair(tab.views, SLIDER, desk.set_pair)

    def look(kind: str, event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        desk = studio.desk(request)
        with errors_shown():
            if 0 <= event.index < len(desk.pairs):
                desk.set_pair = desk.pairs[event.index]
            return show_pair(tab.views, kind, desk.set_pair)

    def add(name: str, files: list[str] | None, request: gr.Request) -> Any:
        with errors_shown():
            made = add_set(studio.folder(request), name, files or [])
            return gr.update(choices=list(studio.references_for(studio.folder(request))), value=made)

    def record(name: str, text: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        stop, folder = studio.stop_of(request), studio.folder(request)
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        with errors_shown():
            try:
                made = yield from narrate(
                    follow_work(lambda tell: record_set(studio, folder, name, prompts, tell), stop), tab.progress
                )
            except Stopped:
                yield {tab.progress: progress_html("Stopped, nothing was kept", 0)}
                return
            yield {
                tab.progress: progress_html(f"Recorded {made}", 1),
                tab.set: gr.update(choices=list(studio.references_for(folder)), value=made),
            }

    connect_views(tab.views, lambda request: studio.desk(request).set_pair)
    tab.worst.select(look, tab.views.kind, tab.views.all, **PRIVATE)
    tab.add.click(add, [tab.name, tab.files], tab.set, **PRIVATE)
    connect_run(
        studio, tab, [tab.run.click], run, api_name="compare_set", show_progress="hidden",
        inputs=[tab.set, tab.plans, tab.count],
        outputs=[tab.progress, tab.verdicts, tab.worst, tab.report, tab.views.kind, *tab.views.all],
    )  # fmt: skip
    recorder = SimpleNamespace(run=tab.record, stop=tab.stop_record)
    connect_run(
        studio, recorder, [tab.record.click], record, api_visibility="private", show_progress="hidden",
        inputs=[tab.name, tab.prompts], outputs=[tab.progress, tab.set], concurrency_id="record",
    )  # fmt: skip


def refresh_sets(studio: Studio, tab: SimpleNamespace, request: Any) -> dict[Any, Any]:
    """Return the updates of the choices that a visitor's own work changes."""
    import gradio as gr

    folder = studio.folder(request)
    sets, plans = list(studio.references_for(folder)), list(studio.plans_for(folder))
    return {tab.set: gr.update(choices=sets), tab.plans: gr.update(choices=plans)}
