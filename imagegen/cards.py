"""Published checkpoints that are known by name: their family, licence, and what they do differently. Plain data."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EMBEDDED = "emoji"


@dataclass(frozen=True)
class Card:
    """One model known by name: its family, licence and terms.

    Attributes:
        name: `emoji`, or the name that it is published under.
        family: a key of `catalog.FAMILIES`.
        licence: SPDX's name where it has one, else the publisher's.
        terms: what the licence asks, in a sentence.
        summary: what the model is, in a sentence.
        changes: attributes of the family that differ for this checkpoint.
    """

    name: str
    family: str
    licence: str
    terms: str
    summary: str
    changes: dict[str, Any] = field(default_factory=dict)


_UNGUIDED: dict[str, Any] = {"guided_by": "nothing", "guidance": 1.0, "negative": False, "distilled": True}
_FREE = "Pictures are yours; the licence text travels with the weights."
_RAIL = "Pictures are yours, within the restrictions of use, which derivatives inherit."
_STABILITY = "Free below a yearly revenue that the licence names; outputs may not train a foundational model."
_DEEPSEEK = "DeepSeek-Model-License-1.0"
_JANUS = "Commercial use is permitted; the restrictions of use in its Attachment A are passed on with the weights."
_BFL = "Weights for non-commercial use; outputs may not train a competing model."

_PRECISION = r"(-(fp?\d+|bf16|e\dm\d(fn)?|scaled|i?q\d(-\w+)*))+$"


def _plain(name: str) -> str:
    """Return a model's name as it is compared: without what folders, suffixes, spelling and precisions add to it."""
    name = name.lower().rpartition("--")[2].removesuffix(".safetensors").removesuffix(".gguf")
    return re.sub(_PRECISION, "", re.sub(r"[^a-z0-9]+", "-", name))


CARDS = {
    card.name: card
    for card in (
        Card(
            EMBEDDED, EMBEDDED, "Apache-2.0",
            "Pictures are yours. Trained on Fluent Emoji (MIT), Noto Emoji and FxEmojis (Apache-2.0).",
            "The embedded model: sentences to emoji-like pictures, 128x128, ships with the package.",
        ),
        Card(
            "stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion", "CreativeML-OpenRAIL-M", _RAIL,
            "Stable Diffusion 1.5, 512x512.",
        ),
        Card(
            "stabilityai/sd-turbo", "stable-diffusion", "Stability-AI-Community-License", _STABILITY,
            "Stable Diffusion 2.1 distilled to one to four steps.", _UNGUIDED | {"num_steps": 1},
        ),
        Card(
            "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl", "CreativeML-OpenRAIL++-M", _RAIL,
            "Stable Diffusion XL, 1024x1024.",
        ),
        Card(
            "stabilityai/sdxl-turbo", "stable-diffusion-xl", "Stability-AI-Community-License", _STABILITY,
            "Stable Diffusion XL distilled to one to four steps, 512x512.", _UNGUIDED | {"num_steps": 1},
        ),
        Card(
            "stabilityai/stable-diffusion-3-medium-diffusers", "stable-diffusion-3", "Stability-AI-Community-License", _STABILITY,
            "Stable Diffusion 3, the 2 B model.",
        ),
        Card(
            "stabilityai/stable-diffusion-3.5-medium", "stable-diffusion-3", "Stability-AI-Community-License", _STABILITY,
            "Stable Diffusion 3.5, the 2.5 B model.", {"num_steps": 40, "guidance": 4.5},
        ),
        Card(
            "stabilityai/stable-diffusion-3.5-large", "stable-diffusion-3", "Stability-AI-Community-License", _STABILITY,
            "Stable Diffusion 3.5, the 8 B model.", {"guidance": 3.5},
        ),
        Card(
            "stabilityai/stable-diffusion-3.5-large-turbo", "stable-diffusion-3", "Stability-AI-Community-License", _STABILITY,
            "Stable Diffusion 3.5 distilled to four steps.", _UNGUIDED | {"num_steps": 4},
        ),
        Card(
            "black-forest-labs/FLUX.1-dev", "flux.1", "FLUX.1-dev-Non-Commercial-License", _BFL,
            "FLUX.1, 12 B, guidance distilled into an input.",
        ),
        Card(
            "black-forest-labs/FLUX.1-schnell", "flux.1", "Apache-2.0", _FREE,
            "FLUX.1 distilled to one to four steps.", _UNGUIDED | {"num_steps": 4},
        ),
        Card(
            "black-forest-labs/FLUX.1-Kontext-dev", "flux.1-kontext", "FLUX.1-dev-Non-Commercial-License", _BFL,
            "FLUX.1 that edits a picture as told.",
        ),
        Card(
            "black-forest-labs/FLUX.1-Fill-dev", "flux.1-fill", "FLUX.1-dev-Non-Commercial-License", _BFL,
            "FLUX.1 that fills what a mask leaves open.",
        ),
        Card(
            "black-forest-labs/FLUX.2-dev", "flux.2", "unknown", "Not read: see the publisher's page.",
            "FLUX.2, 32 B, makes and edits.",
        ),
        Card(
            "black-forest-labs/FLUX.2-klein-4B", "flux.2-klein", "Apache-2.0", _FREE,
            "FLUX.2, 4 B, distilled to four steps.", _UNGUIDED | {"num_steps": 4},
        ),
        Card(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "pixart-sigma", "CreativeML-OpenRAIL++-M", _RAIL,
            "PixArt-Sigma, 0.6 B, 1024x1024.",
        ),
        Card(
            "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "sana", "unknown", "Not read: see the publisher's page.",
            "Sana, 1.6 B, 1024x1024.",
        ),
        Card("Qwen/Qwen-Image", "qwen-image", "Apache-2.0", _FREE, "Qwen-Image, 20 B, draws text well."),
        Card("Qwen/Qwen-Image-Edit", "qwen-image-edit", "Apache-2.0", _FREE, "Qwen-Image that edits a picture as told."),
        Card(
            "Tongyi-MAI/Z-Image-Turbo", "z-image", "Apache-2.0", _FREE,
            "Z-Image, 6 B, distilled to eight evaluations.", _UNGUIDED | {"num_steps": 9},
        ),
        Card(
            "deepseek-ai/JanusFlow-1.3B", "janusflow", _DEEPSEEK, f"{_JANUS} Its decoder, stabilityai/sdxl-vae, is MIT.",
            "A language model that denoises, 1.3 B, 384x384; published GenEval 0.63. Needs stabilityai/sdxl-vae as vae=.",
        ),
        Card(
            "deepseek-ai/Janus-1.3B", "janus-pro", _DEEPSEEK, _JANUS,
            "A language model that writes pictures as codes, 1.3 B, 384x384; published GenEval 0.61.",
        ),
        Card(
            "deepseek-ai/Janus-Pro-1B", "janus-pro", _DEEPSEEK, _JANUS,
            "A language model that writes pictures as codes, 1 B, 384x384; published GenEval 0.73.",
        ),
        Card(
            "deepseek-ai/Janus-Pro-7B", "janus-pro", _DEEPSEEK, _JANUS,
            "A language model that writes pictures as codes, 7 B, 384x384; published GenEval 0.80.",
        ),
        Card("fal/AuraFlow", "auraflow", "Apache-2.0", _FREE, "AuraFlow, 6.8 B."),
        Card("HiDream-ai/HiDream-I1-Full", "hidream", "MIT", _FREE, "HiDream-I1, 17 B."),
        Card(
            "HiDream-ai/HiDream-I1-Dev", "hidream", "MIT", _FREE,
            "HiDream-I1 distilled to 28 steps.", _UNGUIDED | {"num_steps": 28},
        ),
        Card(
            "HiDream-ai/HiDream-I1-Fast", "hidream", "MIT", _FREE,
            "HiDream-I1 distilled to 16 steps.", _UNGUIDED | {"num_steps": 16},
        ),
    )
}  # fmt: skip


# What the publishers, and those who repack their weights, call files, where it is not the name of the repository.
FILES = {
    "v1-5-pruned": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v1-5-pruned-emaonly": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-xl-base-1-0": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd-xl-turbo-1-0": "stabilityai/sdxl-turbo",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3-medium-incl-clips": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3-5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3-5-large": "stabilityai/stable-diffusion-3.5-large",
    "sd3-5-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
    "flux1-dev": "black-forest-labs/FLUX.1-dev",
    "flux1-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux1-kontext-dev": "black-forest-labs/FLUX.1-Kontext-dev",
    "flux1-dev-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "flux1-fill-dev": "black-forest-labs/FLUX.1-Fill-dev",
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
}
_NAMES = {_plain(name.split("/")[1]): card for name, card in CARDS.items() if "/" in name}
_NAMES |= {file: CARDS[name] for file, name in FILES.items()}


def card_of(source: str) -> Card | None:
    """Return the card of a model; None where there is none.

    Args:
        source: its published name; or where it is: in the hub's cache, in a folder or a file of its name, or a link to them.
    """
    path = Path(source)
    places = [path, path.resolve()] if path.is_absolute() else [path]
    names = [name for place in places for name in (place.name, *(part for part in place.parts if part.startswith("models--")))]
    return CARDS.get(source) or next((_NAMES[name] for name in map(_plain, names) if name in _NAMES), None)
