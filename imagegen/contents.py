"""What a weight file holds, told by the names and shapes of its tensors alone: a model, a part of one, or an addition to one.

Plain data and rules; no tensor is read, and nothing is loaded.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from imagegen.weights import TensorFacts

WHOLE = "whole"  # a whole model in one file
DENOISER = "denoiser"  # its UNet or transformer alone
QUANTISED = "quantised"  # a model whose values are not what its tensors hold
OTHER = "other"  # no model
OTHERWISE = ("edm_mean", "v_pred")  # tensors that mark a scheduler other than the layout's, as of Playground 2.5
UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"

# Prefixes of the parts of a whole model, as the official files of each layout name them.
PARTS = {
    "denoiser": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "clip_l": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    "clip_g": ("conditioner.embedders.1.model.", "text_encoders.clip_g."),
    "clip_h": ("cond_stage_model.model.",),
    "t5": ("text_encoders.t5xxl.",),
}


@dataclass(frozen=True)
class Contents:
    """What a weight file holds.

    Attributes:
        kind: `whole`, `denoiser` or `other`.
        what: in words, with an article.
        use: how to use it, in words.
        layout: of a model: `sd1`, `sd2`, `sdxl`, `sd3`, `flux`, …; empty where it is not known by name.
        parts: of a whole model: which keys of `PARTS` it has.
        guided: whether guidance is an input of its denoiser.
    """

    kind: str
    what: str
    use: str = ""
    layout: str = ""
    parts: frozenset[str] = frozenset()
    guided: bool = False


Names = Mapping[str, TensorFacts]


def _any(*patterns: str) -> Callable[[Names], bool]:
    """Return a test for a name that matches one of the patterns."""
    found = re.compile("|".join(patterns))
    return lambda names: any(found.search(name) for name in names)


def _all(*patterns: str) -> Callable[[Names], bool]:
    """Return a test for names that match every pattern."""
    found = [re.compile(pattern) for pattern in patterns]
    return lambda names: all(any(one.search(name) for name in names) for one in found)


def _is_embedding(names: Names) -> bool:
    """Textual inversions are a few vectors of a text encoder's width, under a word of their own or of their tool's."""
    widths = {facts.shape[-1] for facts in names.values() if facts.shape}
    flat = all(len(facts.shape) in (1, 2) and "." not in name for name, facts in names.items())
    return len(names) <= 4 and flat and bool(widths) and widths <= {768, 1024, 1280, 2048, 4096}


_LORA = _any(
    r"\.lora_(up|down|A|B)\b", r"^lora_(unet|te|transformer)", r"[._]lora\d?\.(up|down)\b",
    r"\.(hada_w1|lokr_w1|lora_magnitude)",
)  # fmt: skip
# In this order: what is added to a model is often named after the model's own layers.
ADDITIONS: tuple[tuple[Callable[[Names], bool], str, str], ...] = (
    (_LORA, "a LoRA", "load the model that it was made for, then model.add_lora(file), or --lora FILE"),
    (
        _any(r"^ip_adapter\.", r"^image_proj\.(proj|latents|norm)"),
        "an IP-Adapter",
        "load the model, then model.add_style(file, image_encoder=folder), or --style FILE --style-encoder FOLDER",
    ),
    (
        _any(r"^control_model\.", "controlnet_cond_embedding", r"^controlnet_(blocks|down_blocks)", "input_hint_block"),
        "a ControlNet",
        "load the model that it steers, then model.add_control(folder), or --control-model; "
        "one file becomes a folder by diffusers' ControlNetModel.from_single_file and save_pretrained",
    ),
    (_any(r"motion_modules\."), "a motion module (AnimateDiff)", "it makes films, which this version does not"),
    (_any(r"^adapter\.body\.", r"^body\.\d+\.block[12]\."), "a T2I-Adapter", "diffusers' T2IAdapter and its pipelines take it"),
    (
        _any(r"^model\.1\.sub\.\d+\.RDB1", r"^body\.\d+\.rdb1\.", r"^params(_ema)?\."),
        "an upscaler (ESRGAN or of its kind)",
        "it enlarges pictures and draws none: model.upscale(picture, 2) does without it",
    ),
    (
        _is_embedding,
        "a textual inversion embedding",
        "load the model that it was made for, then model.pipeline.load_textual_inversion(file)",
    ),
)
PART = "it is a part of a model: give the folder of the whole model, or its one file"
_VAE = r"^(first_stage_model\.|vae\.)?"
COMPONENTS: tuple[tuple[Callable[[Names], bool], str, str], ...] = (
    (
        _all(_VAE + r"encoder\.(conv_in|conv1|down|downsamples)", _VAE + r"decoder\.(conv_in|conv1|up|middle)"),
        "a VAE (a decoder of latents)",
        "give it as vae= beside the model, or --vae FILE",
    ),
    (
        _any(r"^(encoder|decoder)\.layers\.\d+\.(conv|weight|bias)", r"^[1-9]\d?\.conv\.0\.weight$"),
        "a tiny VAE (TAESD)",
        "give its folder to the lever: plan='tiny-decoder(folder=…)'",
    ),
    (
        _any(_VAE + r"decoder\.(conv_in|conv1)"),
        "a decoder of latents without its encoder",
        "give it as vae= in a whole VAE: pictures are read as well as drawn",
    ),
    (
        _any(r"^vision_gen_(enc|dec)_model\.", r"^gen_vision_model\."),
        "the weights of a Janus model",
        "give the folder that also holds its config.json and its tokenizer",
    ),
    (
        _any(r"^(vision_model|visual)\..*(layers|resblocks)\.\d+\."),
        "an image encoder (CLIP vision)",
        "an IP-Adapter reads pictures through it: give its folder as image_encoder= of model.add_style, or --style-encoder",
    ),
    (
        _any(r"^(text_model|text_encoder\.).*layers\.\d+\.", r"^encoder\.layers\.\d+\.self_attn"),
        "a text encoder (CLIP)",
        PART,
    ),
    (_any(r"^(encoder\.)?block\.\d+\.layer\.\d+\.SelfAttention", r"^enc\.blk\.\d+\."), "a text encoder (T5)", PART),
    (_any(r"resblocks\.\d+\.attn\.in_proj_weight"), "a text encoder (OpenCLIP)", PART),
    (_any(r"^(model\.|language_model\.)?layers\.\d+\.self_attn\.q_proj", r"^blk\.\d+\."), "a language model", PART),
)
_BLOCKS = r"(^|diffusion_model\.)(blocks|layers)\.\d+\.\w*(attn|attention)"
DENOISERS: tuple[tuple[Callable[[Names], bool], str, str], ...] = (
    (_any(r"joint_blocks\.\d+\."), "a Stable Diffusion 3 transformer", "sd3"),
    (_any(r"double_stream_modulation_img\.|single_stream_modulation\.lin"), "a FLUX.2 transformer", "flux.2"),
    (_any("distilled_guidance_layer"), "a Chroma transformer", "chroma"),
    (_any(r"double_blocks\.\d+\.(img|txt)_attn"), "a FLUX.1 transformer", "flux"),
    (_any(r"single_transformer_blocks\.\d+\."), "a FLUX transformer in diffusers' layout", ""),
    (_any(r"cap_embedder\.\d\.weight"), "a Lumina or Z-Image transformer", ""),
    (_any(r"(^|model\.)transformer_blocks\.\d+\.", _BLOCKS), "a transformer", ""),
    (_any(r"(^|model\.)input_blocks\.\d+\."), "a UNet", ""),
    (_any(r"^(down_blocks|up_blocks|mid_block)\."), "a UNet in diffusers' layout", ""),
)


def identify(names: Names) -> Contents:
    """Return what a file of these tensors is.

    Args:
        names: of its tensors, with their dtypes and shapes.
    """
    for test, what, use in ADDITIONS:
        if test(names):
            return Contents(OTHER, what, use)
    found, how = _layout(names), quantisation_of(names)
    if found and how:
        return Contents(
            QUANTISED, f"{found[0]}, quantised ({how}) in a way that is not read", "take a .gguf, or float16 or bfloat16"
        )
    parts = frozenset(part for part, prefixes in PARTS.items() if any(name.startswith(prefixes) for name in names))
    if found and "denoiser" in parts and len(parts) > 1:
        return Contents(WHOLE, _title(found, names), "", found[1], parts, _is_guided(names))
    if not found or not any(name.startswith(PARTS["denoiser"]) for name in names):
        for test, what, use in COMPONENTS:
            if test(names):
                return Contents(OTHER, what, use)
    if found:
        return Contents(DENOISER, f"{found[0]} alone", "", found[1], guided=_is_guided(names))
    first = min(names, default="none")
    return Contents(OTHER, f"of no kind known here (its first tensor is {first!r})", "give a diffusers folder, or a model's file")


_is_guided = _any(r"(^|\.)guidance_in\.", r"guidance_embedder\.")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "GGUF")
_QUANTISATIONS = (
    ("scaled float8", _any(r"(^|\.)scaled_fp8$", r"\.(scale_(weight|input)|(weight|input)_scale(_2|_inv)?)$")),
    ("bitsandbytes", _any(r"\.(absmax|quant_map|quant_state\b.*|SCB)$")),
    ("GPTQ or AWQ", _any(r"\.(qweight|qzeros)$")),
)


def quantisation_of(names: Names) -> str | None:
    """Return how weights are quantised, in words; None where tensors hold the values themselves, and of GGUF files.

    Args:
        names: of the tensors, with their dtypes and shapes.
    """
    for what, test in _QUANTISATIONS:
        if test(names):
            return what
    whole = [
        facts for name, facts in names.items() if name.endswith("weight") and len(facts.shape) > 1 and facts.dtype not in _FLOATS
    ]
    return f"weights of dtype {whole[0].dtype}" if whole else None


def _layout(names: Names) -> tuple[str, str] | None:
    """Return what the denoiser is, in words and by its layout's name."""
    found = next(((what, layout) for test, what, layout in DENOISERS if test(names)), None)
    if found is None:
        return None
    if any(name in names for name in OTHERWISE):
        return found[0], "otherwise"
    for prefix, layout_of in (
        ("conditioner.embedders.1.", "sdxl"),
        ("conditioner.embedders.0.model.", "sdxl-refiner"),
        ("cond_stage_model.model.", "sd2"),
        ("cond_stage_model.transformer.", "sd1"),
    ):
        if any(name.startswith(prefix) for name in names):
            return found[0], layout_of
    return found


def _title(found: tuple[str, str], names: Names) -> str:
    """Return the name of a whole model."""
    titles = {
        "sd1": "a Stable Diffusion 1 model", "sd2": "a Stable Diffusion 2 model", "sdxl": "a Stable Diffusion XL model",
        "sdxl-refiner": "a Stable Diffusion XL refiner", "sd3": "a Stable Diffusion 3 model", "flux": "a FLUX.1 model",
        "otherwise": "a model with a scheduler of its own",
    }  # fmt: skip
    title = titles.get(found[1], f"a model with {found[0]}")
    channels = names[UNET_INPUT].shape[1] if UNET_INPUT in names else 4
    return f"{title} for inpainting" if channels == 9 else title if channels == 4 else f"{title} of {channels} input channels"


def is_plain(names: Names) -> bool:
    """Return whether a UNet takes latents alone, without a picture or a mask beside them."""
    return UNET_INPUT not in names or names[UNET_INPUT].shape[1] == 4
