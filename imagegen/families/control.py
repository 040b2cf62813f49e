"""What guides a picture besides its words: another picture's structure (ControlNet) or its style (IP-Adapter).

Both are read from local files; diffusers does the work.
"""

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imagegen.contents import identify
from imagegen.families.components import reading
from imagegen.families.diffusion import control_class, denoiser_of, quiet
from imagegen.request import ModelError
from imagegen.weights import component_weights, hash_file, read_header


def load_control(pipeline: Any, folder: Path) -> torch.nn.Module:
    """Load a ControlNet for a pipeline, in its dtype and on its device.

    Raises:
        ModelError: there is none in the folder, or the family has no pipeline for one.
    """
    takes = control_class(pipeline, "text-to-image")
    if takes is None:
        raise ModelError(f"diffusers has no ControlNet for a {type(pipeline).__name__}: use image= and strength= instead")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"no ControlNet {str(folder)!r}: give the folder of one, with its config.json") from None
    with quiet():
        import diffusers

        try:
            if "ControlNet" not in kind:
                raise ValueError(f"it is a {kind}")
            loaded = getattr(diffusers, kind).from_pretrained(
                folder, dtype=pipeline.dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise ModelError(f"{str(folder)!r} cannot be loaded as a ControlNet: {' '.join(str(error).split())[:200]}") from None
    _check_control(pipeline, takes, kind, loaded.config, folder)
    return loaded.to(pipeline.device).eval()


def _check_control(pipeline: Any, takes: type, kind: str, config: Any, folder: Path) -> None:
    """Refuse a ControlNet of another family, whose shapes would not meet."""
    wanted = str(inspect.signature(takes.__init__).parameters["controlnet"].annotation)  # type: ignore[misc]
    if not re.search(rf"\b{kind}\b", wanted):
        raise ModelError(f"{str(folder)!r} is a {kind}, a ControlNet for another kind of model than a {type(pipeline).__name__}")
    own = denoiser_of(pipeline).config
    for name in ("cross_attention_dim", "joint_attention_dim", "pooled_projection_dim", "addition_embed_type"):
        if name in own and name in config and own[name] != config[name]:
            raise ModelError(
                f"{str(folder)!r} is a ControlNet for another model: its {name} is {config[name]}, this model's {own[name]}"
            )


@dataclass(frozen=True)
class Eyes:
    """What an IP-Adapter sees through.

    Attributes:
        encoder: a CLIP vision model; None where a pipeline has none.
        extractor: prepares pictures for it.
        sha256: of the encoder's file; None where it is the model's own.
    """

    encoder: Any
    extractor: Any
    sha256: str | None = None


def eyes_of(pipeline: Any) -> Eyes:
    """Return what a pipeline sees pictures through now."""
    return Eyes(getattr(pipeline, "image_encoder", None), getattr(pipeline, "feature_extractor", None))


def load_eyes(pipeline: Any, folder: Path) -> Eyes:
    """Load a CLIP vision model from its folder.

    Raises:
        ModelError: there is none.
    """
    files = component_weights(folder, None) if (folder / "config.json").is_file() else []
    if not files:
        raise ModelError(f"no image encoder {str(folder)!r}: give the folder of a CLIP vision model, with its config.json")
    with quiet(), reading(folder):
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        encoder = CLIPVisionModelWithProjection.from_pretrained(
            folder, dtype=pipeline.dtype, local_files_only=True, use_safetensors=True
        )
        side = encoder.config.image_size
        extractor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return Eyes(encoder.to(pipeline.device).eval(), extractor, hash_file(files[0]))


def check_style(pipeline: Any, file: Path, eyes: Eyes) -> None:
    """Refuse what is no IP-Adapter for a pipeline, or for those eyes, before anything is changed.

    Raises:
        ModelError: the family takes none, or the file is missing or of another model.
    """
    if not hasattr(pipeline, "load_ip_adapter"):
        raise ModelError(f"a {type(pipeline).__name__} takes no IP-Adapter: use image= and strength= instead")
    if not file.is_file() or file.suffix != ".safetensors":
        raise ModelError(f"no IP-Adapter {str(file)!r}: give its .safetensors file")
    if eyes.encoder is None:
        raise ModelError("an IP-Adapter sees through an image encoder: give its folder as image_encoder=")
    names = read_header(file)
    if not any(name.startswith("image_proj.") for name in names) or not any(name.startswith("ip_adapter.") for name in names):
        raise ModelError(f"{str(file)!r} is {identify(names).what}, no IP-Adapter")
    config = eyes.encoder.config
    for name, width in (("image_proj.proj.weight", config.projection_dim), ("image_proj.proj_in.weight", config.hidden_size)):
        if name in names and names[name].shape[-1] != width:
            raise ModelError(
                f"{str(file)!r} reads {names[name].shape[-1]} numbers of a picture, and this image encoder gives {width}: "
                "give the encoder that it was trained with as image_encoder="
            )


def load_style(pipeline: Any, file: Path, eyes: Eyes) -> None:
    """Load an IP-Adapter that was checked into a pipeline, whose denoiser gets attention to a picture until `remove_style`.

    Raises:
        ModelError: it is of another model.
    """
    pipeline.register_modules(image_encoder=eyes.encoder, feature_extractor=eyes.extractor)
    with quiet():
        try:
            pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise ModelError(f"{str(file)!r} does not fit this model: {' '.join(str(error).split())[:200]}") from None


def remove_style(pipeline: Any, eyes: Eyes) -> None:
    """Remove the IP-Adapter and give the pipeline its own eyes back; nothing of it is left."""
    pipeline.unload_ip_adapter()
    pipeline.register_modules(image_encoder=eyes.encoder, feature_extractor=eyes.extractor)
