"""The studio: a page to make pictures, compare them with their reference, tune and train.

`generate`, `compare`, `sets`, `blind`, `tune` and `train` lay out and connect a tab each, over `parts`, which they
share; `visitors` knows whose files are whose. The page is served by `server`, and fetches nothing from another
machine. Gradio is an extra, imported where it is used.
"""

import html
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.catalog import EMBEDDED, embedded_folder
from imagegen.engine import Engine
from imagegen.model import Model
from imagegen.reference_set import FILE as REFERENCE_FILE
from imagegen.request import RequestError
from imagegen.studio.blind import connect_blind, lay_out_blind
from imagegen.studio.compare import UPLOAD, connect_compare, lay_out_compare, refresh_compare
from imagegen.studio.figures import kept_figures
from imagegen.studio.generate import connect_generate, lay_out_generate, refresh_generate
from imagegen.studio.making import follow
from imagegen.studio.parts import PRIVATE, Desk, Studio, import_gradio
from imagegen.studio.sets import connect_sets, lay_out_sets, refresh_sets
from imagegen.studio.train import connect_train, lay_out_train, refresh_train
from imagegen.studio.tune import connect_tune, lay_out_tune
from imagegen.studio.visitors import Visitors

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["UPLOAD", "build", "follow", "import_gradio", "look"]
EXPLANATION = "Say what to draw and watch it appear. Every picture carries a receipt; Compare proves it against stock diffusers."
STORAGE = "imagegen-studio"


def find_offers(model: Model, loras: Path | None, references: Path | None) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the LoRA files and the reference sets that whoever starts the server offers, by name.

    Raises:
        RequestError: a folder is not there.
    """
    for what, place in (("LoRAs", loras), ("reference sets", references)):
        if place is not None and not place.is_dir():
            raise RequestError(f"there is no folder {str(place)!r} to offer {what} from")
    files = sorted(loras.glob("*.safetensors")) if loras else []
    sets = {EMBEDDED: embedded_folder() / "references"} if model.family.name == EMBEDDED else {}
    sets |= {path.parent.name: path.parent for path in sorted(references.glob(f"*/{REFERENCE_FILE}"))} if references else {}
    return {file.stem: file for file in files}, {name: place for name, place in sets.items() if place.is_dir()}


def named(models: Iterable[str | Path]) -> dict[str, str]:
    """Return models by the names that the page shows: a file's or folder's own where no other has it, else all of it."""
    sources = [str(source) for source in models]
    short = [Path(source).stem if Path(source).exists() else source for source in sources]
    return {name if short.count(name) == 1 else source: source for name, source in zip(short, sources, strict=True)}


def build(
    engine: Engine | Model,
    output_dir: str | Path,
    *,
    loras: str | Path | None = None,
    references: str | Path | None = None,
    models: Iterable[str | Path] = (),
) -> "gr.Blocks":
    """Lay out the page for a model and make it work. `server.launch` serves it.

    Args:
        engine: the queue in front of the model, or a model, which gets one.
        output_dir: every visitor's files go to a folder of its own in it.
        loras: a folder of LoRA files to choose from.
        references: a folder of reference sets to choose from.
        models: what `load` takes, each: other models to compare this one with; one is loaded while it is compared.

    Raises:
        Error: Gradio is missing, or the folder cannot be made.
    """
    import_gradio()
    import gradio as gr

    folder = Path(output_dir).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot make the folder {str(output_dir)!r}: {error.strerror}; choose another") from None
    queue = engine if isinstance(engine, Engine) else Engine(engine)
    model = queue.model
    offers = find_offers(model, Path(loras) if loras else None, Path(references) if references else None)
    others = named(models)
    studio = Studio(queue, Visitors(folder), *offers, others, figures=kept_figures(folder, model))
    dtype = str(model.dtype).removeprefix("torch.")
    about = f"Model {html.escape(Path(model.source).name)}, {dtype} on {model.device.type}, plan {html.escape(model.plan.name)}"
    model.hashes  # noqa: B018  read now, not during the first picture
    with gr.Blocks(title="imagegen studio", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        key = gr.BrowserState(None, storage_key=STORAGE, secret=STORAGE)  # the browser's own: no other visitor sees it
        gr.HTML(f"<h1>imagegen studio</h1><p>{EXPLANATION}</p><p>{about}</p>", elem_classes="head")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                made = lay_out_generate(studio)
            with gr.Tab("Compare", id="compare"), gr.Tabs():
                with gr.Tab("Picture"):
                    compared = lay_out_compare(studio)
                with gr.Tab("Set"):
                    sets = lay_out_sets(studio)
                with gr.Tab("Blind"):
                    blind = lay_out_blind()
            with gr.Tab("Tune", id="tune"):
                tuned = lay_out_tune(studio)
            with gr.Tab("Fine-tune", id="train"):
                trained = lay_out_train(studio)
        connect_generate(studio, made, compared.picture)
        connect_compare(studio, compared)
        connect_sets(studio, sets)
        connect_blind(studio, blind)
        connect_tune(studio, tuned)
        connect_train(studio, trained, made.loras, tabs)
        made.compare.click(lambda: gr.Tabs(selected="compare"), None, tabs, **PRIVATE)

        def enter(kept: Any, request: gr.Request) -> dict[Any, Any]:
            own = studio.visitors.enter(request.session_hash, kept)
            studio.desks.setdefault(request.session_hash, Desk())
            return {key: own} | refresh(request)

        def refresh(request: gr.Request) -> dict[Any, Any]:
            updates = refresh_generate(studio, made, request) | refresh_compare(studio, compared, request)
            return updates | refresh_sets(studio, sets, request) | refresh_train(studio, trained, request)

        def leave(request: gr.Request) -> None:
            studio.leave(request.session_hash)

        lists = [made.plan, made.loras, made.history, compared.plans, compared.set, sets.set, sets.plans, trained.earlier]
        page.load(enter, key, [key, *lists], **PRIVATE)
        tabs.select(refresh, None, lists, **PRIVATE)
        page.unload(leave)
    return page


def look() -> dict[str, Any]:
    """Return how the page looks, as what mounts it takes it."""
    gr = import_gradio()
    hues = {"primary_hue": "indigo", "secondary_hue": "indigo", "neutral_hue": "slate"}
    theme = gr.themes.Default(**hues, font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(body_text_color_subdued="*neutral_500")  # the default is too pale to read on white
    return {"theme": theme, "css_paths": Path(__file__).with_name("studio.css")}
