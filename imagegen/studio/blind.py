"""The blind test: which of two pictures is the reference? It counts how often a person can tell."""

import html
import random
from types import SimpleNamespace
from typing import Any

from imagegen.request import RequestError
from imagegen.studio.contest import tally
from imagegen.studio.draw import pair_html
from imagegen.studio.parts import PRIVATE, Blind, Desk, Studio, errors_shown, open_upload

RULES = (
    "Two pictures of the last comparison, one of them the reference, in an order drawn by chance. Say which is the reference; "
    "after some answers it shows whether the difference can be seen."
)
NO_PAIR = "<div class='pair'><div class='cell'></div><div class='cell'></div></div>"


def lay_out_blind() -> SimpleNamespace:
    """Put the two pictures over the answers; return the parts by name."""
    import gradio as gr

    tab = SimpleNamespace()
    gr.HTML(f"<p class='hint'>{RULES}</p>")
    tab.pictures = gr.HTML(NO_PAIR)
    tab.said = gr.HTML(said_html(tally(0, 0)))
    with gr.Row():
        tab.first = gr.Button("A is the reference", interactive=False)
        tab.second = gr.Button("B is the reference", interactive=False)
        tab.next = gr.Button("Show a pair", variant="primary")
    return tab


def said_html(text: str) -> str:
    """Return a line that is read out when it changes; the text is not the visitor's."""
    return f"<p class='verdict' role='status' aria-live='polite'>{text}</p>"


def ask(desk: Desk) -> Blind:
    """Draw a pair that is not equal, and its order.

    Raises:
        RequestError: nothing was compared yet, or everything was identical.
    """
    pairs = desk.pairs or ([desk.pair] if desk.pair else [])
    if not pairs:
        raise RequestError("nothing was compared yet: compare a reference set with a plan first, or one picture")
    chance = random.SystemRandom()
    for pair in chance.sample(pairs, len(pairs)):
        if open_upload(pair[0]).tobytes() != open_upload(pair[1]).tobytes():
            desk.blind.pair, desk.blind.reference_first = pair, chance.random() < 0.5
            return desk.blind
    raise RequestError("every picture of the last comparison is identical to its reference: compare another plan")


def answer_blind(blind: Blind, says_first: bool) -> str:
    """Count an answer and say what was right.

    Raises:
        RequestError: no question is open.
    """
    if blind.pair is None:
        raise RequestError("no pair is shown: ask for one first")
    name, right = blind.pair[2], says_first == blind.reference_first
    blind.pair, blind.right, blind.of = None, blind.right + right, blind.of + 1
    place = "A" if blind.reference_first else "B"
    return f"{'Right' if right else 'No'}: {place} was the reference, the other one {name}. {tally(blind.right, blind.of)}"


def connect_blind(studio: Studio, tab: SimpleNamespace) -> None:
    """Make the tab work."""
    import gradio as gr

    def show(request: gr.Request) -> dict[Any, Any]:
        with errors_shown():
            blind = ask(studio.desk(request))
            assert blind.pair is not None
            first, second = blind.pair[:2] if blind.reference_first else blind.pair[1::-1]
            open_now = {part: gr.update(interactive=True) for part in (tab.first, tab.second)}
            return open_now | {tab.pictures: pair_html(first, second, ("A", "B"), flicker=False)}

    def take(says_first: bool, desk: Desk) -> dict[Any, Any]:
        with errors_shown():
            said = answer_blind(desk.blind, says_first)
        closed = {part: gr.update(interactive=False) for part in (tab.first, tab.second)}
        return closed | {tab.said: said_html(html.escape(said)), tab.next: gr.update(value="Show another pair")}

    def take_first(request: gr.Request) -> dict[Any, Any]:
        return take(True, studio.desk(request))

    def take_second(request: gr.Request) -> dict[Any, Any]:
        return take(False, studio.desk(request))

    outputs = [tab.pictures, tab.said, tab.first, tab.second, tab.next]
    tab.next.click(show, None, outputs, **PRIVATE)
    tab.first.click(take_first, None, outputs, **PRIVATE)
    tab.second.click(take_second, None, outputs, **PRIVATE)
