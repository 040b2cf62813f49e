"""What guides a picture besides its words: another picture's structure (ControlNet) or its style (IP-Adapter).

Both are read from local files; diffusers does the work.
"""

import json
from pathlib import Path
from typing import Any

import torch

from imagegen.families.diffusion import control_class, quiet
from imagegen.request import ModelError


def load_control(pipeline: Any, folder: Path) -> torch.nn.Module:
    """Load a ControlNet for a pipeline, in its dtype and on its device.

    Raises:
        ModelError: there is none in the folder, or the family has no pipeline for one.
    """
    if control_class(pipeline, "text-to-image") is None:
        raise ModelError(f"diffusers has no ControlNet for a {type(pipeline).__name__}: use image= and strength= instead")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
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
    return loaded.to(pipeline.device).eval()


def load_style(pipeline: Any, file: Path, image_encoder: Path | None) -> None:
    """Load an IP-Adapter into a pipeline.

    Args:
        pipeline: changed: its denoiser gets attention to a picture, until `remove_style`.
        file: .safetensors.
        image_encoder: folder of the CLIP vision model that the adapter was trained with; None where the
            pipeline has its own.

    Raises:
        ModelError: the family takes none, or a file is missing or of another model.
    """
    if not hasattr(pipeline, "load_ip_adapter"):
        raise ModelError(f"a {type(pipeline).__name__} takes no IP-Adapter: use image= and strength= instead")
    if not file.is_file() or file.suffix != ".safetensors":
        raise ModelError(f"no IP-Adapter {str(file)!r}: give its .safetensors file")
    if image_encoder is None and getattr(pipeline, "image_encoder", None) is None:
        raise ModelError("an IP-Adapter sees through an image encoder: give its folder as image_encoder=")
    with quiet():
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        try:
            if image_encoder is not None:
                encoder = CLIPVisionModelWithProjection.from_pretrained(
                    image_encoder, dtype=pipeline.dtype, local_files_only=True, use_safetensors=True
                )
                side = encoder.config.image_size
                sees = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
                pipeline.register_modules(image_encoder=encoder.to(pipeline.device).eval(), feature_extractor=sees)
            pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise ModelError(f"{str(file)!r} does not fit this model: {' '.join(str(error).split())[:200]}") from None


def remove_style(pipeline: Any) -> None:
    """Remove the IP-Adapter; nothing of it is left."""
    pipeline.unload_ip_adapter()
