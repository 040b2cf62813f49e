"""The model families and the cards of known models, as data. Knows nothing of torch.

A family is what one diffusers pipeline class draws with; a card is one published checkpoint, known by name,
with what differs from its family. What a folder's configuration tells by itself stands in `variants`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imagegen.cards import CARDS, EMBEDDED, Card, card_of

__all__ = ["CARDS", "EMBEDDED", "FAMILIES", "Card", "Family", "card_of", "embedded_folder", "family_of", "fit_family"]

# How guidance is computed.
TWO_PASSES = "two passes"  # classifier-free: with the prompt and without, so that it can be off, and takes a negative prompt
AN_INPUT = "an input"  # distilled into the denoiser, which is told the scale: one pass, no negative prompt
NOTHING = "nothing"  # distilled away: there is none to set

PAINTING = ("text-to-image", "image-to-image", "inpainting", "outpainting")
TEXT_ONLY = ("text-to-image",)
EDITING = ("editing",)


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
        guided_by: `two passes`, `an input` or `nothing`.
        negative: whether it takes a negative prompt where guidance is computed in two passes.
        true_guidance: whether two passes can be computed on top of guidance that is an input.
        off: what its pipeline calls guidance that is off.
        distilled: whether it was distilled to few steps or without guidance.
        scheduler: the diffusers scheduler that it is published with.
        reference_dtype: dtype of the reference output, and of a model loaded without `dtype=`.
        float32_state: its pipeline keeps the latents in float32, whatever the model computes in.
        sized_by_config: the native size stands in the denoiser's configuration, where that has one.
        chat: the text encoder reads the prompt inside its chat template.
        temperature: default temperature of models that draw one token after the other; None where nothing is so drawn.
        fixed: settings that nobody can change, and why, in words.
        joins: its pipeline pads every prompt to one length, so that pictures of several prompts can be one batch.
        modes: what it can do; of a loaded model, what diffusers has a pipeline for.
        takes: what a loaded model was given besides: `control` (a ControlNet), `style` (an IP-Adapter).
        variants: what changes where an entry of the denoiser's or the pipeline's configuration has a value.
    """

    name: str
    pipeline: str
    size_px: int
    multiple_px: int
    min_px: int
    max_px: int
    num_steps: int
    guidance: float
    guided_by: str = TWO_PASSES
    negative: bool = True
    true_guidance: bool = False
    off: float = 1.0
    distilled: bool = False
    scheduler: str = ""
    reference_dtype: str = "float32"
    float32_state: bool = False
    sized_by_config: bool = True
    chat: bool = False
    temperature: float | None = None
    fixed: Mapping[str, str] = field(default_factory=dict, repr=False)
    joins: bool = False
    modes: tuple[str, ...] = PAINTING
    takes: tuple[str, ...] = ()
    variants: tuple[tuple[str, Any, dict[str, Any]], ...] = field(default=(), repr=False)


FLOW = "FlowMatchEulerDiscreteScheduler"
UNGUIDED: dict[str, Any] = {"guided_by": NOTHING, "guidance": 1.0, "negative": False, "distilled": True}


def _large(name: str, pipeline: str, num_steps: int, guidance: float, multiple_px: int = 16, **more: Any) -> Family:
    """Return a family of about 1024x1024 pixels, published in bfloat16, that matches flows; `more` says what differs."""
    facts: dict[str, Any] = {"size_px": 1024, "min_px": 64, "max_px": 2048, "scheduler": FLOW, "reference_dtype": "bfloat16"}
    return Family(name, pipeline, multiple_px=multiple_px, num_steps=num_steps, guidance=guidance, **(facts | more))


JANUS: dict[str, Any] = {"size_px": 384, "multiple_px": 384, "min_px": 384, "max_px": 384, "negative": False, "modes": TEXT_ONLY}
ONE_WAY = {"scheduler": "it was trained for one way of stepping"}
ROWS = {"num_steps": "it draws one row of codes in each step, and every picture has as many", "scheduler": "it has none"}

# Steps and guidance are those of the publisher's card or, where that is silent, of diffusers' pipeline.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "emoji", "StableDiffusionPipeline", 128, 8, 64, 512, 20, 4.0, scheduler="DPMSolverMultistepScheduler", joins=True
        ),
        Family("stable-diffusion", "StableDiffusionPipeline", 512, 8, 64, 2048, 30, 7.5, scheduler="PNDMScheduler", joins=True),
        Family(
            "stable-diffusion-xl", "StableDiffusionXLPipeline", 1024, 8, 64, 2048, 30, 5.0,
            scheduler="EulerDiscreteScheduler", joins=True,
        ),
        _large("stable-diffusion-3", "StableDiffusion3Pipeline", 28, 7.0, joins=True),
        _large(
            "flux.1", "FluxPipeline", 28, 3.5, guided_by=AN_INPUT, true_guidance=True, joins=True,
            variants=(("guidance_embeds", False, UNGUIDED | {"num_steps": 4}),),
        ),
        _large(
            "flux.1-kontext", "FluxKontextPipeline", 28, 2.5, guided_by=AN_INPUT, true_guidance=True,
            modes=("text-to-image", *EDITING),
        ),
        _large("flux.1-fill", "FluxFillPipeline", 50, 30.0, guided_by=AN_INPUT, modes=("inpainting", "outpainting")),
        _large("flux.2", "Flux2Pipeline", 50, 4.0, guided_by=AN_INPUT, modes=("text-to-image", *EDITING)),
        _large(
            "flux.2-klein", "Flux2KleinPipeline", 50, 4.0, negative=False, chat=True, modes=("text-to-image", *EDITING),
            variants=(("is_distilled", True, UNGUIDED | {"num_steps": 4}),),
        ),
        _large(
            "pixart-sigma", "PixArtSigmaPipeline", 20, 4.5, scheduler="DPMSolverMultistepScheduler",
            reference_dtype="float32", modes=TEXT_ONLY, joins=True,
        ),
        _large(
            "pixart-alpha", "PixArtAlphaPipeline", 20, 4.5, scheduler="DPMSolverMultistepScheduler",
            reference_dtype="float32", modes=TEXT_ONLY, joins=True,
        ),
        _large(
            "sana", "SanaPipeline", 20, 4.5, 32, scheduler="DPMSolverMultistepScheduler", max_px=4096,
            float32_state=True, modes=TEXT_ONLY, joins=True,
        ),
        _large(
            "sana-sprint", "SanaSprintPipeline", 2, 4.5, 32, scheduler="SCMScheduler", guided_by=AN_INPUT, negative=False,
            distilled=True, float32_state=True, modes=("text-to-image", "image-to-image"),
        ),
        _large("qwen-image", "QwenImagePipeline", 50, 4.0, size_px=1328, max_px=3072),
        _large("qwen-image-edit", "QwenImageEditPipeline", 50, 4.0, modes=EDITING),
        _large("qwen-image-edit-plus", "QwenImageEditPlusPipeline", 40, 4.0, modes=EDITING),
        _large("z-image", "ZImagePipeline", 50, 4.0, off=0.0, float32_state=True, chat=True),
        _large("auraflow", "AuraFlowPipeline", 50, 3.5, sized_by_config=False, modes=TEXT_ONLY),
        _large("lumina", "LuminaPipeline", 30, 4.0, modes=TEXT_ONLY),
        _large("lumina2", "Lumina2Pipeline", 50, 4.0, modes=TEXT_ONLY),
        _large("chroma", "ChromaPipeline", 35, 5.0),
        _large("cogview3", "CogView3PlusPipeline", 50, 5.0, scheduler="CogVideoXDDIMScheduler", modes=TEXT_ONLY),
        _large("cogview4", "CogView4Pipeline", 50, 3.5, 32, float32_state=True, modes=TEXT_ONLY),
        _large(
            "hunyuan-dit", "HunyuanDiTPipeline", 50, 5.0, scheduler="DDPMScheduler", reference_dtype="float32", modes=TEXT_ONLY,
            sized_by_config=False,
        ),
        _large("hunyuan-image", "HunyuanImagePipeline", 50, 3.5, 32, size_px=2048, max_px=4096, modes=TEXT_ONLY),
        _large("hidream", "HiDreamImagePipeline", 50, 5.0, scheduler="UniPCMultistepScheduler", modes=TEXT_ONLY),
        _large("bria", "BriaPipeline", 30, 5.0, modes=TEXT_ONLY),
        _large("kolors", "KolorsPipeline", 50, 5.0, 8, scheduler="EulerDiscreteScheduler", reference_dtype="float32"),
        _large("kandinsky3", "Kandinsky3Pipeline", 25, 3.0, 64, scheduler="DDPMScheduler", reference_dtype="float32"),
        _large("omnigen", "OmniGenPipeline", 50, 2.5, negative=False, float32_state=True, modes=TEXT_ONLY),
        _large("ovis-image", "OvisImagePipeline", 50, 5.0, modes=TEXT_ONLY),
        _large("longcat-image", "LongCatImagePipeline", 50, 4.5, modes=TEXT_ONLY),
        _large("prx", "PRXPipeline", 28, 5.0, modes=TEXT_ONLY),
        _large("ernie-image", "ErnieImagePipeline", 50, 4.0, modes=TEXT_ONLY),
        _large(
            "krea2", "Krea2Pipeline", 28, 4.5, off=0.0, modes=TEXT_ONLY, variants=(("is_distilled", True, {"distilled": True}),)
        ),
        Family(
            "janusflow", "JanusFlowPipeline", **JANUS, num_steps=30, guidance=2.0, scheduler=FLOW, float32_state=True,
            fixed=ONE_WAY,
        ),
        Family("janus-pro", "JanusProPipeline", **JANUS, num_steps=24, guidance=5.0, temperature=1.0, fixed=ROWS),
        Family(
            "latent-consistency", "LatentConsistencyModelPipeline", 512, 8, 64, 2048, 4, 8.5, guided_by=AN_INPUT,
            negative=False, distilled=True, scheduler="LCMScheduler",
        ),
    )
}  # fmt: skip


def embedded_folder() -> Path:
    """Return the folder of the embedded model: package data, or the checkout's `weights/emoji`."""
    here = Path(__file__).resolve().parent
    packaged = here / "weights" / EMBEDDED
    return packaged if packaged.is_dir() else here.parent / "weights" / EMBEDDED


def family_of(pipeline_class: str, *names: str) -> Family | None:
    """Return the family of a model: by the card of the first of its names that has one, else by its pipeline's class."""
    for card in map(card_of, names):
        if card and FAMILIES[card.family].pipeline == pipeline_class:
            return replace(FAMILIES[card.family], **card.changes)
    named = [family for family in FAMILIES.values() if family.pipeline == pipeline_class and family.name != EMBEDDED]
    return named[0] if named else None


def fit_family(family: Family, *configs: Mapping[str, Any]) -> Family:
    """Return a family with what configurations tell of a checkpoint: those of its denoiser and its pipeline."""
    for entry, value, changes in family.variants:
        if any(config.get(entry) == value for config in configs):
            family = replace(family, **changes)
    return family
