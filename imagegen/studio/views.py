"""Two pictures of one size, looked at: a slider, flicker, side by side, and maps of where they differ."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from imagegen import fidelity
from imagegen.request import RequestError
from imagegen.studio.draw import pair_html
from imagegen.studio.parts import LOSSLESS, PRIVATE, errors_shown, open_upload

SLIDER, FLICKER, PAIR, FLIP, DIFFERENCE = KINDS = ("Slider", "Flicker", "Side by side", "FLIP map", "Difference")
# Colours from black over violet and orange to light yellow, equally far apart to the eye: matplotlib's magma, at ninths.
HEAT = np.array(
    [(0, 0, 4), (24, 15, 62), (69, 16, 119), (114, 31, 129), (159, 47, 127), (205, 64, 113), (241, 96, 93), (253, 149, 103),
     (254, 201, 141), (252, 253, 191)], np.float32,
)  # fmt: skip
NOTES = {
    SLIDER: "Left of the handle the first picture, right of it the reference.",
    FLICKER: "The two in turn in one place: what moves, differs. It holds still while you point at it.",
    PAIR: "Each picture as its file has it.",
    FLIP: "What an eye sees when the two are flipped, black none, yellow most (LDR-FLIP).",
    DIFFERENCE: "Where they differ, amplified to the largest difference; black is equal.",
}


def heat(values: np.ndarray) -> np.ndarray:
    """Return (H, W) values from 0 to 1 as colours: (H, W, 3) uint8."""
    places = np.clip(values, 0, 1) * (len(HEAT) - 1)
    lower = np.minimum(places.astype(int), len(HEAT) - 2)
    share = (places - lower)[..., None]
    return np.round(HEAT[lower] * (1 - share) + HEAT[lower + 1] * share).astype(np.uint8)


def lay_out_views() -> SimpleNamespace:
    """Put the choice of a view over the views, which all take the same place; return the parts by name."""
    import gradio as gr

    views = SimpleNamespace()
    views.kind = gr.Radio(list(KINDS), value=SLIDER, label="View", elem_classes="tight")
    with gr.Column(elem_classes="view"):
        views.slider = gr.ImageSlider(label="Picture | reference", height=420, max_height=420, buttons=["fullscreen"], **LOSSLESS)
        views.pair = gr.HTML("", visible=False)
        views.map = gr.Image(show_label=False, height=420, visible=False, buttons=["download", "fullscreen"], **LOSSLESS)
        views.note = gr.HTML(f"<p class='hint'>{NOTES[SLIDER]}</p>")
    views.all = [views.slider, views.pair, views.map, views.note]
    return views


def show_pair(views: SimpleNamespace, kind: str, pair: tuple[Path, Path, str] | None) -> dict[Any, Any]:
    """Return the updates that show a pair (reference, picture, what it is) in one view, or none.

    Raises:
        RequestError: the view is unknown, or FLIP's package is missing.
    """
    import gradio as gr

    if kind not in KINDS:
        raise RequestError(f"there is no view {kind!r}: choose one of {', '.join(KINDS)}")
    shown = {views.slider: kind == SLIDER, views.pair: kind in (FLICKER, PAIR), views.map: kind in (FLIP, DIFFERENCE)}
    values: dict[Any, Any] = {views.slider: None, views.pair: "", views.map: None}
    if pair is not None:
        reference, picture, name = pair
        if kind == SLIDER:
            values[views.slider] = (str(picture), str(reference))
        elif kind in (FLICKER, PAIR):
            values[views.pair] = pair_html(picture, reference, (name, "reference"), flicker=kind == FLICKER)
        else:
            values[views.map] = draw_map(kind, reference, picture)
    updates = {part: gr.update(value=values[part], visible=visible) for part, visible in shown.items()}
    return updates | {views.note: f"<p class='hint'>{NOTES[kind]}</p>"}


def draw_map(kind: str, reference: Path, picture: Path) -> np.ndarray:
    """Return a map of where two pictures differ: (H, W, 3) uint8."""
    first, second = open_upload(reference), open_upload(picture)
    if kind == FLIP:
        return heat(fidelity.flip_map(first, second))
    return fidelity.difference_map(second, first, gain=255 / max(fidelity.max_difference(first, second), 1))


def connect_views(views: SimpleNamespace, find_pair: Any) -> None:
    """Let the choice of a view show the pair that `find_pair` returns for a request."""
    import gradio as gr

    def show(kind: str, request: gr.Request) -> dict[Any, Any]:
        with errors_shown():
            return show_pair(views, kind, find_pair(request))

    views.kind.change(show, views.kind, views.all, **PRIVATE)
