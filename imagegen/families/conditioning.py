"""What a denoiser is told besides the noisy latents: a caption as tensors, and one call with them.

For training, which goes round diffusers' pipelines: they encode captions, and never ask for gradients.
"""

from collections.abc import Callable
from typing import Any

import torch

from imagegen.families.latents import pack, unpack
from imagegen.request import DataError

Conditions = dict[str, torch.Tensor]
Prediction = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
"""Of noisy latents, times and conditions."""


def encode_captions(pipeline: Any, captions: list[str]) -> Conditions:
    """Return what the denoiser is told of captions, each tensor with a first axis of their number, on the device.

    Raises:
        DataError: training does not know this kind of pipeline.
    """
    return _kind_of(pipeline)[0](pipeline, captions)


def predict(pipeline: Any, denoiser: Any, latents: torch.Tensor, times: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """Call a denoiser once, with gradients.

    Args:
        pipeline: whose kind it is.
        denoiser: the module itself, or a copy of it.
        latents: (B, C, h, w), noisy.
        times: (B,), from 0 to the scheduler's number of training times.
        conditions: of `encode_captions`.

    Returns:
        The prediction, (B, C, h, w).
    """
    told = {name: value.to(denoiser.dtype) for name, value in conditions.items()}
    return _kind_of(pipeline)[1](pipeline, denoiser, latents.to(denoiser.dtype), times, told)


@torch.no_grad()
def silence_of(pipeline: Any) -> Conditions:
    """Return what the denoiser is told where nothing is asked for, each tensor with a first axis of one."""
    return encode_captions(pipeline, [""])


def check_trainable(pipeline: Any) -> None:
    """Refuse a kind of pipeline that training does not know.

    Raises:
        DataError: it does not.
    """
    _kind_of(pipeline)


def _encode_sd(pipeline: Any, captions: list[str]) -> Conditions:
    return {"encoder_hidden_states": pipeline.encode_prompt(captions, pipeline.device, 1, False)[0]}


def _predict_sd(_: Any, denoiser: Any, latents: torch.Tensor, times: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    return denoiser(latents, timestep=times, return_dict=False, **conditions)[0]


def _encode_sdxl(pipeline: Any, captions: list[str]) -> Conditions:
    text, _, pooled, _ = pipeline.encode_prompt(captions, device=pipeline.device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text, "text_embeds": pooled}


def _predict_sdxl(
    pipeline: Any, denoiser: Any, latents: torch.Tensor, times: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    """SDXL is told the sizes of picture and cut: the bucket itself, uncut. Source: Podell et al. (2023), section 2.2."""
    height, width = (side * pipeline.vae_scale_factor for side in latents.shape[-2:])
    sizes = torch.tensor([height, width, 0, 0, height, width], device=latents.device, dtype=latents.dtype)
    more = {"text_embeds": conditions["text_embeds"], "time_ids": sizes.repeat(len(latents), 1)}
    text = conditions["encoder_hidden_states"]
    return denoiser(latents, times, encoder_hidden_states=text, added_cond_kwargs=more, return_dict=False)[0]


def _encode_sd3(pipeline: Any, captions: list[str]) -> Conditions:
    found = pipeline.encode_prompt(captions, captions, captions, device=pipeline.device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}


def _encode_flux(pipeline: Any, captions: list[str]) -> Conditions:
    text, pooled, _ = pipeline.encode_prompt(captions, captions, device=pipeline.device)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def _predict_flux(
    pipeline: Any, denoiser: Any, latents: torch.Tensor, times: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    """FLUX takes latents packed by 2x2 with a place for each token; a guidance-distilled one is trained at guidance 1."""
    size, _, height, width = latents.shape
    text = conditions["encoder_hidden_states"]
    told = torch.ones(size, device=latents.device, dtype=latents.dtype) if denoiser.config.guidance_embeds else None
    output = denoiser(
        pack(pipeline, latents),
        timestep=times / pipeline.scheduler.config.num_train_timesteps,
        guidance=told,
        txt_ids=torch.zeros(text.shape[1], 3, device=latents.device, dtype=latents.dtype),
        img_ids=pipeline._prepare_latent_image_ids(size, height // 2, width // 2, latents.device, latents.dtype),
        return_dict=False,
        **conditions,
    )[0]
    factor = pipeline.vae_scale_factor
    return unpack(pipeline, output, (width * factor, height * factor))


KINDS: dict[str, tuple[Callable[..., Conditions], Callable[..., torch.Tensor]]] = {
    "StableDiffusionPipeline": (_encode_sd, _predict_sd),
    "StableDiffusionXLPipeline": (_encode_sdxl, _predict_sdxl),
    "StableDiffusion3Pipeline": (_encode_sd3, _predict_sd),
    "FluxPipeline": (_encode_flux, _predict_flux),
}


def _kind_of(pipeline: Any) -> tuple[Callable[..., Conditions], Callable[..., torch.Tensor]]:
    kind = type(pipeline).__name__
    if kind not in KINDS:
        raise DataError(f"training knows the pipelines {', '.join(KINDS)}; this model is a {kind}")
    return KINDS[kind]
