"""Denoisers of known sizes, from their configurations alone: random weights, or none on the meta device.

For benchmarks and predictions that need no download. Knows the models' shapes, not their pipelines.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Architecture:
    """One denoiser's shape.

    Attributes:
        name: as people call the model.
        kind: diffusers' class.
        config: its configuration.
        tiny: what changes for a small one of the same make, for tests.
        channels: of the latents.
        tokens: of the prompt, as the denoiser sees it.
        rows: of a call for one picture: 2 where guidance is computed from two predictions.
        text_parameters: of its text encoders.
        size_px: native width and height.
        source: where the configuration is published.
        arguments: makes those of one call.
    """

    name: str
    kind: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    channels: int
    tokens: int
    rows: int
    text_parameters: int
    size_px: int
    source: str
    arguments: Callable[["Architecture", int, int, dict[str, Any], "Maker"], dict[str, Any]] = field(repr=False)


class Maker:
    """Makes random tensors of one device and dtype."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Remember both."""
        self.device, self.dtype = torch.device(device), dtype

    def randn(self, *shape: int) -> torch.Tensor:
        """Return standard normal values; none on the meta device."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a constant tensor."""
        return torch.full(shape, value, device=self.device, dtype=dtype or self.dtype)


def _for_sd(own: Architecture, rows: int, side: int, config: dict[str, Any], make: Maker) -> dict[str, Any]:
    return {
        "sample": make.randn(rows, own.channels, side, side),
        "timestep": make.full((), 500, torch.long),
        "encoder_hidden_states": make.randn(rows, own.tokens, config["cross_attention_dim"]),
    }


def _for_sdxl(own: Architecture, rows: int, side: int, config: dict[str, Any], make: Maker) -> dict[str, Any]:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    more = {"text_embeds": make.randn(rows, pooled), "time_ids": make.full((rows, 6), 1024)}
    return _for_sd(own, rows, side, config, make) | {"added_cond_kwargs": more}


def _for_sd3(own: Architecture, rows: int, side: int, config: dict[str, Any], make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.randn(rows, own.channels, side, side),
        "timestep": make.full((rows,), 500),
        "encoder_hidden_states": make.randn(rows, own.tokens, config["joint_attention_dim"]),
        "pooled_projections": make.randn(rows, config["pooled_projection_dim"]),
    }


def _for_flux(own: Architecture, rows: int, side: int, config: dict[str, Any], make: Maker) -> dict[str, Any]:
    """FLUX takes the latents packed: each token is a square of 2x2."""
    return {
        "hidden_states": make.randn(rows, (side // 2) ** 2, config["in_channels"]),
        "timestep": make.full((rows,), 0.5),
        "guidance": make.full((rows,), 3.5),
        "encoder_hidden_states": make.randn(rows, own.tokens, config["joint_attention_dim"]),
        "pooled_projections": make.randn(rows, config["pooled_projection_dim"]),
        "img_ids": make.full(((side // 2) ** 2, 3), 0),
        "txt_ids": make.full((own.tokens, 3), 0),
    }


TINY_UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
TINY_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CLIP_L, CLIP_BIG_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656  # parameters of the text encoders
HUB = "https://huggingface.co"
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "sd1.5",
            "UNet2DConditionModel",
            {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            TINY_UNET | TINY_BLOCKS | {"cross_attention_dim": 32, "attention_head_dim": 4},
            channels=4, tokens=77, rows=2, text_parameters=CLIP_L, size_px=512,
            source=f"{HUB}/stable-diffusion-v1-5/stable-diffusion-v1-5/blob/main/unet/config.json",
            arguments=_for_sd,
        ),
        Architecture(
            "sdxl",
            "UNet2DConditionModel",
            {
                "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            TINY_UNET | {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4), "cross_attention_dim": 32,
                "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
            },
            channels=4, tokens=77, rows=2, text_parameters=CLIP_L + CLIP_BIG_G, size_px=1024,
            source=f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/blob/main/unet/config.json",
            arguments=_for_sdxl,
        ),
        Architecture(
            "sd3.5-large",
            "SD3Transformer2DModel",
            {
                "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 38,
                "attention_head_dim": 64, "num_attention_heads": 38, "joint_attention_dim": 4096,
                "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
            },
            {
                "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32,
                "caption_projection_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
            },
            channels=16, tokens=333, rows=2, text_parameters=CLIP_L + CLIP_BIG_G + T5_XXL, size_px=1024,
            source=f"{HUB}/stabilityai/stable-diffusion-3.5-large/blob/main/transformer/config.json",
            arguments=_for_sd3,
        ),
        Architecture(
            "flux.1",
            "FluxTransformer2DModel",
            {
                "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
                "axes_dims_rope": (16, 56, 56),
            },
            {
                "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
                "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
            },
            channels=16, tokens=512, rows=1, text_parameters=CLIP_L + T5_XXL, size_px=1024,
            source=f"{HUB}/black-forest-labs/FLUX.1-dev/blob/main/transformer/config.json",
            arguments=_for_flux,
        ),
    )
}  # fmt: skip
FACTOR = 8  # pixels of a latent's side, in all of them


def make_denoiser(
    architecture: Architecture, device: torch.device | str, dtype: torch.dtype = torch.float32, tiny: bool = False
) -> torch.nn.Module:
    """Return the denoiser with random weights (none on the meta device), the same at every call."""
    import diffusers

    config = architecture.config | (architecture.tiny if tiny else {})
    torch.manual_seed(0)
    with made_in(device, dtype):
        return getattr(diffusers, architecture.kind)(**config).eval()


@contextmanager
def made_in(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Make modules on a device in a dtype from the start: a large model has no room for float32 first."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def make_inputs(
    architecture: Architecture,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    size_px: int | None = None,
    num_images: int = 1,
    tiny: bool = False,
) -> dict[str, Any]:
    """Return the arguments of one call for pictures of that size, guidance included.

    Args:
        architecture: of the denoiser.
        device: of the tensors.
        dtype: of the floating ones.
        size_px: width and height; the native ones by default, 64 for a tiny one.
        num_images: pictures of the call.
        tiny: for a tiny denoiser.
    """
    config = architecture.config | (architecture.tiny if tiny else {})
    side = (size_px or (64 if tiny else architecture.size_px)) // FACTOR
    made = architecture.arguments(architecture, architecture.rows * num_images, side, config, Maker(device, dtype))
    return made | {"return_dict": False}
