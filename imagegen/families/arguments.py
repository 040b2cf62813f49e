"""A request in a pipeline's own words: what each of diffusers' pipelines calls a setting is read off its signature."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from imagegen.canvas import grow
from imagegen.catalog import AN_INPUT, TWO_PASSES, Family
from imagegen.families import latents
from imagegen.families.weighting import encode
from imagegen.request import Request, RequestError
from imagegen.sampling import make_generators


def call_of(pipeline: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call by name."""
    return dict(inspect.signature(type(pipeline).__call__).parameters)


def methods_called(pipeline: Any) -> set[str]:
    """Return what the code that steps a pipeline's scheduler calls, by name."""
    inner = [part for part in vars(pipeline).values() if hasattr(part, "components") and hasattr(part, "scheduler")]
    steps = [part for part in inner if part.scheduler is pipeline.scheduler] or [pipeline]
    return {name for part in steps for name in inspect.unwrap(type(part).__call__).__code__.co_names}


def is_guided(request: Request, family: Family) -> bool:
    """Return whether guidance is computed, in two passes."""
    return (family.guided_by == TWO_PASSES and request.guidance > 1) or (request.true_guidance or 1.0) > 1


def translate(
    runner: Any, request: Request, family: Family, noise: torch.Tensor | None = None, beside: Sequence[Request] = ()
) -> dict[str, Any]:
    """Return the arguments of a pipeline's call for a request.

    Args:
        runner: the pipeline of the request's mode.
        request: checked.
        family: the loaded model's.
        noise: (B, C, h, w) of unit variance to start from, or None to draw it from the seeds.
        beside: others of its batch, from text alone, which differ in prompt, negative prompt, seed and number of pictures.

    Raises:
        RequestError: `noise` has another shape than the latents, or the mode takes none.
    """
    known, together = call_of(runner), (request, *beside)
    count = sum(one.num_images for one in together)
    generators = [generator for one in together for generator in make_generators(one.seed, one.num_images)]
    settings: dict[str, Any] = {
        "prompt": [one.prompt for one in together for _ in range(one.num_images)],
        "num_inference_steps": request.num_steps,
        "generator": generators if count > 1 else generators[0],
    }
    settings |= _guidance(known, request, family)
    if "negative_prompt" in settings:
        settings["negative_prompt"] = [one.negative_prompt for one in together for _ in range(one.num_images)]
    settings |= _pictures(known, request)
    if request.temperature is not None:
        settings["temperature"] = request.temperature
    if "intermediate_timesteps" in known and request.num_steps != 2:
        settings["intermediate_timesteps"] = None  # its default is for two steps
    if noise is not None:
        settings["latents"] = _start(runner, request, family, noise)
    if "num_images_per_prompt" in known and request.mode == "editing":  # a list of pictures means several to edit as one
        settings |= {"prompt": request.prompt, "num_images_per_prompt": count}
        settings |= {"negative_prompt": request.negative_prompt} if "negative_prompt" in settings else {}
    encoded = encode(runner, family, request, is_guided(request, family))
    if encoded:
        settings.pop("negative_prompt", None)
        settings = encoded | {name: value for name, value in settings.items() if name != "prompt"}
    return settings


def _guidance(known: dict[str, Any], request: Request, family: Family) -> dict[str, Any]:
    """Return the guidance and the negative prompt under the pipeline's names."""
    scale = request.guidance if request.guidance > 1 or family.guided_by == AN_INPUT else family.off
    plain = known["guidance_scale"].default if "guidance_scale" in known else None
    if plain is not None:
        settings: dict[str, Any] = {"guidance_scale": scale}
    else:
        names = ("true_cfg_scale", "prior_guidance_scale")
        settings = {name: scale for name in names if name in known}
    if request.true_guidance is not None:
        if "true_cfg_scale" not in known:
            raise RequestError("diffusers' pipeline of this mode takes no true_guidance: leave it out")
        settings["true_cfg_scale"] = request.true_guidance
    # Some pipelines compute the second pass from zeros where there is no text, others not at all.
    if "negative_prompt" in known and (request.negative_prompt or "true_cfg_scale" in settings) and is_guided(request, family):
        settings["negative_prompt"] = [request.negative_prompt] * request.num_images
    return settings


def _pictures(known: dict[str, Any], request: Request) -> dict[str, Any]:
    """Return the pictures, what is repainted of them, and the size."""
    count = request.num_images
    settings: dict[str, Any] = {"width": request.width, "height": request.height}
    image, mask = request.image, request.mask
    if image is not None and request.margins is not None:
        image, mask = grow(image, request.margins)
    if image is not None:
        settings["image"] = image if request.mode == "editing" else [image] * count
    if request.strength is not None:
        settings["strength"] = request.strength
    if mask is not None:
        settings["mask_image"] = [mask] * count
    if request.control is not None:
        name = "control_image" if "control_image" in known else "image"
        settings |= {name: [request.control] * count, "controlnet_conditioning_scale": request.control_weight}
    if request.style_image is not None:
        settings["ip_adapter_image"] = request.style_image
    if "max_area" in known:  # else it draws as many pixels as it was made for, whatever the size
        settings["max_area"] = request.width * request.height
    return {name: value for name, value in settings.items() if name in known}


def _start(runner: Any, request: Request, family: Family, noise: torch.Tensor) -> torch.Tensor:
    """Return given noise as the pipeline takes it."""
    if request.mode != "text-to-image":
        raise RequestError("noise starts a text-to-image run: leave image and mask out")
    if "latents" not in call_of(runner):
        raise RequestError(f"{family.name} takes no noise: its pipeline draws it itself; use seed=")
    shape = latents.noise_shape(runner, request.num_images, request.width, request.height)
    if tuple(noise.shape) != shape:
        raise RequestError(f"noise must have the shape {shape} here, got {tuple(noise.shape)}")
    dtype = torch.float32 if family.float32_state else runner.dtype
    return latents.pack(runner, noise.to(runner.device, dtype))
