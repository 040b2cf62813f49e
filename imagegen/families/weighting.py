"""Prompts with weights, `(word:1.3)`, and prompts longer than a text encoder reads: what the compel library makes of them.

A prompt without either never comes here: it is the stock pipeline's to encode. Where one part is weighed, the
whole prompt is read as the field's programs read it: `(words:1.3)`, and there `(words)` is 1.1 times, `[words]`
1 / 1.1 times, brackets multiply where they nest, and a backslash makes a bracket a letter.
"""

import re
from importlib.util import find_spec
from typing import Any, Self

import torch

from imagegen.catalog import Family
from imagegen.request import Request, RequestError

NUMBER = r"[0-9]+\.?[0-9]*|\.[0-9]+"
MARK = re.compile(rf"\\.|(?P<opening>[(\[])|(?::\s*(?P<number>{NUMBER})\s*(?=\)))?(?P<closing>[)\]])", re.DOTALL)
ESCAPED = re.compile(r"\\([\\()\[\]])")
PARTNER = {"(": ")", "[": "]"}
# The families that compel encodes for, with its class, and whether it reads on where the encoder stops.
COMPEL = {
    "StableDiffusionPipeline": ("CompelForSD", True),
    "StableDiffusionXLPipeline": ("CompelForSDXL", True),
    "FluxPipeline": ("CompelForFlux", False),
}
NEEDED = "compel: pip install 'imagegen-diffusion[prompts]'"


def has_weights(prompt: str) -> bool:
    """Return whether a prompt weighs some of its words by a number."""
    return any(closing["number"] for _, closing in _pairs(prompt))


def read_weights(prompt: str) -> list[tuple[str, float]]:
    """Return a prompt's pieces with the weight of each, in its order; brackets without a partner are letters.

    A prompt in which nothing is weighed by a number is one piece, letter for letter.
    """
    if not has_weights(prompt):
        return [(prompt, 1.0)]
    marks: dict[tuple[int, int], float | None] = {}
    for opening, closing in _pairs(prompt):
        factor = float(closing["number"] or 1.1) if closing["closing"] == ")" else 1 / 1.1
        marks[opening.span()], marks[closing.span()] = factor, None
    pieces: list[tuple[str, float]] = []
    weights, read = [1.0], 0
    for (start, end), opened in [*sorted(marks.items()), ((len(prompt), len(prompt)), None)]:
        text, weight = ESCAPED.sub(r"\1", prompt[read:start]), round(weights[-1], 6)
        if pieces and (not text.strip() or pieces[-1][1] == weight):  # blanks alone hold no word to weigh
            pieces[-1] = (pieces[-1][0] + text, pieces[-1][1])
        elif text.strip():
            pieces.append((text, weight))
        read = end
        if opened is None:
            weights.pop()
        else:
            weights.append(weights[-1] * opened)
    return pieces or [("", 1.0)]


class Weighed(str):
    """A prompt's words without its marks, as an encoder without weights reads them, and `pieces` (see `read_weights`)."""

    pieces: list[tuple[str, float]]

    def __new__(cls, prompt: str) -> Self:
        """Read the marks of `prompt`."""
        pieces = read_weights(prompt)
        weighed = super().__new__(cls, "".join(text for text, _ in pieces))
        weighed.pieces = pieces
        return weighed


def why_not(pipeline: Any, family: Family) -> str | None:
    """Return why weights are not understood here; None where they are."""
    clip = type(pipeline.components.get("text_encoder")).__name__.startswith("CLIP")
    if family.pipeline not in COMPEL or not clip:
        return f"{family.name} reads neither weights nor long prompts"
    return None if find_spec("compel") else f"weights need {NEEDED}"


def reads_on(pipeline: Any, family: Family, request: Request) -> bool:
    """Return whether the whole of a prompt is read, however long it is."""
    asked = request.long_prompt or has_weights(request.prompt) or has_weights(request.negative_prompt)
    return asked and why_not(pipeline, family) is None and COMPEL[family.pipeline][1]


def encode(pipeline: Any, family: Family, request: Request, guided: bool) -> dict[str, Any]:
    """Return the encoded prompts as the pipeline's arguments; none where it encodes them itself.

    Args:
        pipeline: of any mode.
        family: the loaded model's.
        request: checked.
        guided: whether the negative prompt is wanted.

    Raises:
        RequestError: a long prompt is asked for where none can be read.
    """
    reason = why_not(pipeline, family)
    if request.long_prompt and (reason or not COMPEL[family.pipeline][1]):
        raise RequestError(f"long_prompt is for Stable Diffusion and SDXL ({reason or family.name}): leave it out")
    if reason or not (request.long_prompt or has_weights(request.prompt) or has_weights(request.negative_prompt)):
        return {}
    import compel

    zeros = family.pipeline == "StableDiffusionXLPipeline" and not request.negative_prompt  # there, none is not an empty one
    negative = [Weighed(request.negative_prompt)] if guided and not zeros else None
    encoder = getattr(compel, COMPEL[family.pipeline][0])(pipeline)
    for part in vars(encoder).values():
        if isinstance(part, compel.Compel):
            part.parse_prompt_string = _as_conjunction  # theirs reads `dog-`, `C++` and quotes as marks of its own
    with torch.no_grad():
        made = encoder([Weighed(request.prompt)], negative_prompt=negative)
    found = {
        "prompt_embeds": made.embeds,
        "pooled_prompt_embeds": made.pooled_embeds,
        "negative_prompt_embeds": made.negative_embeds,
        "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
    }
    count = request.num_images
    return {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in found.items() if value is not None}


def _pairs(prompt: str) -> list[tuple[re.Match[str], re.Match[str]]]:
    """Return the brackets that belong together, opening and closing; one behind a backslash is a letter."""
    found, opened = [], []
    for mark in MARK.finditer(prompt):
        if mark["opening"]:
            opened.append(mark)
        elif mark["closing"]:
            while opened and PARTNER[opened[-1]["opening"]] != mark["closing"]:
                opened.pop()
            if opened:
                found.append((opened.pop(), mark))
    return found


def _as_conjunction(prompt: str) -> Any:
    """Return a prompt in compel's form: its pieces, or for a text of compel's own (the empty one) that text."""
    from compel.prompt_parser import Conjunction, FlattenedPrompt, Fragment

    pieces = getattr(prompt, "pieces", [(prompt, 1.0)])
    return Conjunction([FlattenedPrompt([Fragment(*piece) for piece in pieces])])
