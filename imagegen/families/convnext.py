"""ConvNeXt blocks told of the time: what turns JanusFlow's latents into tokens, and tokens back into a velocity.

Knows nothing of language models. Names of layers are those of the published weights.
Source: Liu et al. (2022), ConvNeXt, https://arxiv.org/abs/2201.03545; global response normalisation from Woo et al.
(2023), ConvNeXt V2, https://arxiv.org/abs/2301.00808; put together by Ma et al. (2024), JanusFlow,
https://arxiv.org/abs/2411.07975.
"""

from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn


class GlobalResponseNorm(nn.Module):
    """Lets channels compete by their energy over the whole picture. Weight and bias are zero, and it the identity, at birth."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        """Take the number of channels."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return (B, h, w, C) from the same (Woo et al., Equations 1 to 3)."""
        energy = torch.linalg.vector_norm(states, dim=(1, 2), keepdim=True)
        share = energy / (energy.mean(dim=-1, keepdim=True) + self.eps)
        return self.bias + (self.weight * share + 1) * states


class ConvNextBlock(nn.Module):
    """A ConvNeXt V2 block, its whole output then scaled and shifted by the time."""

    def __init__(self, channels: int, time_width: int, eps: float) -> None:
        """Take the channels, the width of the time's embedding and the norm's epsilon."""
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.RMSNorm(channels, eps=eps)
        self.channelwise_linear_1 = nn.Linear(channels, 4 * channels)
        self.channelwise_norm = GlobalResponseNorm(4 * channels)
        self.channelwise_linear_2 = nn.Linear(4 * channels, channels)
        self.cond_embeds_mapper = nn.Linear(time_width, 2 * channels)

    def forward(self, states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return (B, C, h, w) from states of that shape and the time's embedding, (B, time_width)."""
        inner = self.norm(self.depthwise(states).permute(0, 2, 3, 1))
        inner = nn.functional.gelu(self.channelwise_linear_1(inner))
        inner = self.channelwise_linear_2(self.channelwise_norm(inner))
        states = states + inner.permute(0, 3, 1, 2)
        scale, shift = self.cond_embeds_mapper(nn.functional.silu(time))[..., None, None].chunk(2, dim=1)
        return states * (1 + scale) + shift


class Blocks(nn.Module):
    """ConvNeXt blocks one after the other."""

    def __init__(self, number: int, channels: int, time_width: int, eps: float) -> None:
        """Make that many."""
        super().__init__()
        self.res_blocks = nn.ModuleList(ConvNextBlock(channels, time_width, eps) for _ in range(number))

    def forward(self, states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return (B, C, h, w)."""
        for block in self.res_blocks:
            states = block(states, time)
        return states


class LatentEncoder(nn.Module):
    """Patches of latents and the time, as features."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Take the checkpoint's `vision_gen_enc_config` parameters."""
        super().__init__()
        channels, width = config["block_out_channels"][0], config["hidden_size"]
        patch = {"kernel_size": config["kernel_size"], "stride": config["stride"], "padding": config["padding"]}
        self.time_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(channels, width)
        self.in_conv = nn.Conv2d(config["input_channels"], channels, **patch)
        self.mid_block = Blocks(config["layers_in_middle"], channels, width, config["norm_eps"])

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode.

        Args:
            latents: (B, 4, 2g, 2g).
            timestep: (B,), 1000 times the time, which is 0 at noise and 1 at data.

        Returns:
            Features (B, C, g, g), and the time's embedding (B, hidden_size).
        """
        time = self.time_embed(self.time_proj(timestep).to(latents.dtype))
        return self.mid_block(self.in_conv(latents), time), time


class Unpatch(nn.Module):
    """Features to patches of twice their sides."""

    def __init__(self, channels: int, out_channels: int, factor: int, eps: float) -> None:
        """Take the channels on both sides and the factor of the sides."""
        super().__init__()
        self.norm = nn.RMSNorm(channels, eps=eps)
        self.unpatch_conv = nn.Conv2d(channels, out_channels * factor**2, kernel_size=1)
        self.shuffle = nn.PixelShuffle(factor)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return (B, out_channels, factor·g, factor·g) from (B, C, g, g)."""
        return self.shuffle(self.unpatch_conv(over_channels(self.norm, states)))


class VelocityDecoder(nn.Module):
    """Features of the language model, and the encoder's, as a velocity."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Take the checkpoint's `vision_gen_dec_config` parameters."""
        super().__init__()
        inner, eps = config["in_channels"] + config["block_out_channels"][0], config["norm_eps"]
        self.input_norm = nn.RMSNorm(config["in_channels"], eps=eps)
        self.mid_block = Blocks(config["layers_in_middle"], inner, config["hidden_size"], eps)
        self.out_convs = nn.ModuleList([Unpatch(inner, config["out_channels"], 2 ** config["upsamples"], eps)])

    def forward(self, states: torch.Tensor, skipped: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the velocity, (B, 4, 2g, 2g), from states and the encoder's features, both (B, C, g, g), and the time."""
        states = torch.cat([over_channels(self.input_norm, states), skipped], dim=1)
        return self.out_convs[0](self.mid_block(states, time))


def over_channels(norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Apply a norm of the last dimension to the channels of (B, C, h, w)."""
    return norm(states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
