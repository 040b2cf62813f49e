"""Prompts with weights, `(word:1.3)`, and prompts longer than a text encoder reads: what the compel library makes of them.

A prompt without either never comes here: it is the stock pipeline's to encode.
"""

import re
from importlib.util import find_spec
from typing import Any

import torch

from imagegen.catalog import Family
from imagegen.request import Request, RequestError

WEIGHTED = re.compile(r"\(([^():]+):([0-9]*\.?[0-9]+)\)")
# The families that compel encodes for, with its class, and whether it reads on where the encoder stops.
COMPEL = {
    "StableDiffusionPipeline": ("CompelForSD", True),
    "StableDiffusionXLPipeline": ("CompelForSDXL", True),
    "FluxPipeline": ("CompelForFlux", False),
}
NEEDED = "compel: pip install 'imagegen-diffusion[prompts]'"


def has_weights(prompt: str) -> bool:
    """Return whether a prompt weighs some of its words."""
    return WEIGHTED.search(prompt) is not None


def why_not(pipeline: Any, family: Family) -> str | None:
    """Return why weights are not understood here; None where they are."""
    clip = type(pipeline.components.get("text_encoder")).__name__.startswith("CLIP")
    if family.pipeline not in COMPEL or not clip:
        return f"{family.name} reads neither weights nor long prompts"
    return None if find_spec("compel") else f"weights need {NEEDED}"


def reads_on(pipeline: Any, family: Family, request: Request) -> bool:
    """Return whether the whole of a prompt is read, however long it is."""
    asked = request.long_prompt or has_weights(request.prompt)
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
    negative = [_translate(request.negative_prompt)] if guided and not zeros else None
    with torch.no_grad():
        made = getattr(compel, COMPEL[family.pipeline][0])(pipeline)([_translate(request.prompt)], negative_prompt=negative)
    found = {
        "prompt_embeds": made.embeds,
        "pooled_prompt_embeds": made.pooled_embeds,
        "negative_prompt_embeds": made.negative_embeds,
        "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
    }
    count = request.num_images
    return {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in found.items() if value is not None}


def _translate(prompt: str) -> str:
    """Write `(word:1.3)` as compel does, `(word)1.3`; other brackets are words to it only with a backslash."""
    pieces, end = [], 0
    for match in WEIGHTED.finditer(prompt):
        pieces += [re.sub(r"([()])", r"\\\1", prompt[end : match.start()]), f"({match[1]}){match[2]}"]
        end = match.end()
    return "".join([*pieces, re.sub(r"([()])", r"\\\1", prompt[end:])])
