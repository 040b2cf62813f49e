"""The state of a run as pictures of latents: unpacked for readers, packed for pipelines, decoded for previews.

Some pipelines keep their latents as a row of tokens, some keep a frame axis, some scale them by statistics.
What a pipeline does is read off its own methods and its decoder's configuration; a pipeline that does
something else needs one more case here, and nothing anywhere else.
"""

import inspect
import math
from typing import Any

import torch

PREVIEW_PX = 256  # a preview decodes at most about this many pixels a side, whatever the size of the picture


def decoder_of(pipeline: Any) -> Any:
    """Return the module that decodes latents; None for a pipeline that draws pixels."""
    parts = pipeline.components
    return next((parts[name] for name in ("vae", "movq", "vqgan") if parts.get(name) is not None), None)


def latent_channels(pipeline: Any) -> int:
    """Return how many channels a picture of latents has: 3 for a pipeline that draws pixels."""
    decoder = decoder_of(pipeline)
    if decoder is None:
        return 3
    return decoder.config.get("latent_channels") or decoder.config["z_dim"]


def noise_shape(pipeline: Any, num_images: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the shape of the noise that a pipeline starts from, unpacked."""
    channels, factor = latent_channels(pipeline), _decoder_factor(pipeline)
    if hasattr(pipeline, "_patchify_latents"):  # squares of 2x2 are channels there
        channels, factor = 4 * channels, 2 * factor
    return num_images, channels, height // factor, width // factor


def _decoder_factor(pipeline: Any) -> int:
    """Return how many pixels wide a latent of the decoder is; what pipelines call so counts their packing, in some."""
    decoder = decoder_of(pipeline)
    if decoder is None:
        return 1
    stated, blocks = (decoder.config.get(name) for name in ("spatial_compression_ratio", "block_out_channels"))
    return stated or (2 ** (len(blocks) - 1) if blocks else pipeline.vae_scale_factor)


def pack(pipeline: Any, noise: torch.Tensor) -> torch.Tensor:
    """Return unpacked noise, (B, C, h, w), as the pipeline's `latents=` takes it."""
    method = getattr(pipeline, "_pack_latents", None)
    if method is None or len(inspect.signature(method).parameters) == 1:  # that one packs what it is given
        return noise
    return method(noise, *noise.shape, **_known(pipeline, method, "patch_size"))


def unpack(pipeline: Any, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return a pipeline's latents as (B, C, h, w); codes as they are.

    Args:
        pipeline: whose they are.
        latents: (B, C, h, w), (B, C, 1, h, w), tokens (B, N, D), or codes (B, N).
        size: the picture's width and height in pixels.
    """
    if latents.dim() == 5:
        return latents.squeeze(2)
    if latents.dim() in (2, 4):
        return latents
    num_images, tokens, channels = latents.shape
    method = getattr(pipeline, "_unpack_latents", None)
    if method is not None:
        known = _known(pipeline, method, "width", "height", "vae_scale_factor", "patch_size", size=size)
        return unpack(pipeline, method(latents, **known), size)
    rows = round(math.sqrt(tokens * size[1] / size[0]))
    return latents.reshape(num_images, rows, tokens // rows, channels).permute(0, 3, 1, 2)


def _known(pipeline: Any, method: Any, *names: str, size: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Return those arguments that a method names."""
    values = {"width": size[0], "height": size[1], "vae_scale_factor": getattr(pipeline, "vae_scale_factor", 1)}
    values["patch_size"] = getattr(pipeline, "patch_size", None) or pipeline.config.get("patch_size")
    wanted = inspect.signature(method).parameters
    return {name: values[name] for name in names if name in wanted}


def unscale(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return latents as the decoder takes them, their scale and shift undone.

    Args:
        pipeline: whose they are.
        latents: (B, C, h, w).
    """
    decoder = decoder_of(pipeline)
    config = decoder.config
    if decoder is not pipeline.components.get("vae"):  # the others decode latents as they are
        return latents
    latents = latents / (pipeline.scheduler.config.get("sigma_data") or 1.0)  # consistency models work at the data's scale
    if hasattr(pipeline, "_unpatchify_latents"):
        mean, variance = (value.view(1, -1, 1, 1).to(latents) for value in (decoder.bn.running_mean, decoder.bn.running_var))
        return pipeline._unpatchify_latents(latents * torch.sqrt(variance + config.batch_norm_eps) + mean)
    mean, deviation = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is not None and deviation is not None:
        mean, deviation = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, deviation))
        return latents * deviation / (config.get("scaling_factor") or 1.0) + mean
    return latents / config.get("scaling_factor", 1.0) + (config.get("shift_factor") or 0.0)


@torch.inference_mode()
def decode(pipeline: Any, latents: torch.Tensor, limit_px: int | None = None) -> Any:
    """Decode one picture's latents.

    Args:
        pipeline: the model's pipeline.
        latents: (C, h, w), unpacked.
        limit_px: larger pictures are averaged down to about this many pixels a side first; None decodes all.

    Returns:
        A PIL image, RGB.
    """
    decoder, batch = decoder_of(pipeline), latents.unsqueeze(0)
    if limit_px is not None:
        side = max(limit_px // noise_factor(pipeline), 8)
        factor = -(-max(batch.shape[-2:]) // side)
        if factor > 1:
            batch = torch.nn.functional.avg_pool2d(batch, factor, ceil_mode=True)
    if decoder is not None:
        batch = unscale(pipeline, batch).to(decoder.dtype)
        frames = any(isinstance(module, torch.nn.Conv3d) for module in decoder.modules())
        unquantised = {"force_not_quantize": True} if "force_not_quantize" in inspect.signature(decoder.decode).parameters else {}
        batch = decoder.decode(batch.unsqueeze(2) if frames else batch, return_dict=False, **unquantised)[0]
        batch = batch.squeeze(2) if frames else batch
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor().postprocess(batch, output_type="pil")[0]


def noise_factor(pipeline: Any) -> int:
    """Return how many pixels wide a latent is."""
    return 1024 // noise_shape(pipeline, 1, 1024, 1024)[3]


def decode_preview(pipeline: Any, original: torch.Tensor, size: tuple[int, int]) -> Any:
    """Decode one picture's latents cheaply.

    Args:
        pipeline: the model's pipeline.
        original: (C, h, w) latents, or what a pipeline with a `preview` of its own has in their place.
        size: width and height in pixels of the picture returned.

    Returns:
        A PIL image, RGB.
    """
    if hasattr(pipeline, "preview"):
        return pipeline.preview(original, size)
    picture = decode(pipeline, original, PREVIEW_PX)
    return picture if picture.size == size else picture.resize(size)
