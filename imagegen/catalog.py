"""The model families and the cards of known models, as data. Knows nothing of torch."""

from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "emoji"


@dataclass(frozen=True)
class Family:
    """What one kind of model can make, and what it does when nothing is said.

    Attributes:
        name: the family's name in receipts and messages.
        pipeline: the diffusers pipeline class that its `model_index.json` names.
        size_px: native width and height.
        multiple_px: width and height are multiples of this.
        min_px: smallest side.
        max_px: largest side that the family is known to survive.
        num_steps: default number of steps.
        guidance: default guidance; 1 is off.
        reference_dtype: dtype of the reference output, and of a model loaded without `dtype=`.
        weights: the component whose hash stands for the model in other tools' metadata.
    """

    name: str
    pipeline: str
    size_px: int
    multiple_px: int
    min_px: int
    max_px: int
    num_steps: int
    guidance: float
    reference_dtype: str = "float32"
    weights: str = "unet"


@dataclass(frozen=True)
class Card:
    """One model known by name: its family, licence and terms."""

    name: str
    family: str
    licence: str
    terms: str
    summary: str


FAMILIES = {
    family.name: family
    for family in (
        Family("emoji", "StableDiffusionPipeline", 128, 8, 64, 512, num_steps=20, guidance=4.0),
        Family("stable-diffusion", "StableDiffusionPipeline", 512, 8, 64, 2048, num_steps=30, guidance=7.5),
    )
}

CARDS = {
    EMBEDDED: Card(
        name=EMBEDDED,
        family="emoji",
        licence="Apache-2.0",
        terms="Pictures are yours. Trained on Fluent Emoji (MIT), Noto Emoji and FxEmojis (Apache-2.0).",
        summary="The embedded model: sentences to emoji-like pictures, 128x128, ships with the package.",
    ),
}


def embedded_folder() -> Path:
    """Return the folder of the embedded model: package data, or the checkout's `weights/emoji`."""
    here = Path(__file__).resolve().parent
    packaged = here / "weights" / EMBEDDED
    return packaged if packaged.is_dir() else here.parent / "weights" / EMBEDDED


def family_of(source: str, pipeline_class: str) -> Family | None:
    """Return the family of a model: by its name where it has a card, else by its pipeline's class."""
    if source in CARDS:
        return FAMILIES[CARDS[source].family]
    named = [family for family in FAMILIES.values() if family.pipeline == pipeline_class and family.name != EMBEDDED]
    return named[0] if named else None
