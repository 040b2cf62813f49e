"""Levers around the denoiser: the text encoder, the decoder, and what need not lie in the GPU's memory."""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from imagegen.levers.lever import Lever, Target, shapes_of, tensors_of

OFFLOADS = frozenset({"model-offload", "group-offload"})


def text_encoders(pipeline: Any) -> list[torch.nn.Module]:
    """Return a pipeline's text encoders."""
    found = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    return [encoder for encoder in found if encoder is not None]


@dataclass
class PromptCache(Lever):
    """Remember what the text encoders made of the last prompts."""

    size: int = 64

    name: ClassVar[str] = "prompt-cache"
    per_picture: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if self.size < 1:
            return f"prompt-cache needs a size from 1, got {self.size}"
        return None if text_encoders(target.pipeline) else "this pipeline has no text encoder whose output could be kept"

    def apply(self, target: Target) -> None:
        """Stand before every text encoder."""
        for encoder in text_encoders(target.pipeline):
            self.patches.wrap(encoder, "forward", self._around)

    def _around(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        kept: OrderedDict[Any, Any] = OrderedDict()

        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors = tuple(tensors_of((args, kwargs)))
            key = (shapes_of(args, kwargs), *(tensor.cpu().numpy().tobytes() for tensor in tensors))
            if key in kept:
                kept.move_to_end(key)
                self.counts["encodings reused"] += 1
            else:
                kept[key] = compute(*args, **kwargs)
                if len(kept) > self.size:
                    kept.popitem(last=False)
            return kept[key]

        return forward


@dataclass
class DecodeSlicing(Lever):
    """Decode a batch one picture at a time: less memory, about the same time."""

    name: ClassVar[str] = "decode-slicing"
    per_picture: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        can = hasattr(getattr(target.pipeline, "vae", None), "use_slicing")
        return None if can else "this pipeline's decoder cannot slice a batch: leave decode-slicing out"

    def apply(self, target: Target) -> None:
        """Switch it on, and count the decoder's calls beyond one for each batch."""
        vae = target.pipeline.vae
        self.patches.set(vae, "use_slicing", True)
        self.patches.count(vae.decoder, "forward", self.counts, "decoder calls")
        self.patches.count(vae, "decode", self.counts, "batches decoded")

    def engaged(self) -> str:
        """Return the calls; empty if none was for a part of a batch."""
        return super().engaged() if self.counts["decoder calls"] > self.counts["batches decoded"] else ""


@dataclass
class DecodeTiling(Lever):
    """Decode large pictures in overlapping tiles: bounded memory, seams blended."""

    tile_px: int = 512

    name: ClassVar[str] = "decode-tiling"
    conflicts: ClassVar[frozenset[str]] = frozenset({"tiny-decoder"})

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if not hasattr(getattr(target.pipeline, "vae", None), "tile_latent_min_size"):
            return "this pipeline's decoder cannot work in tiles: leave decode-tiling out"
        factor = target.pipeline.vae_scale_factor
        return None if self.tile_px >= 4 * factor else f"tile_px must be at least {4 * factor}, got {self.tile_px}"

    def apply(self, target: Target) -> None:
        """Switch it on with this size of tile."""
        vae = target.pipeline.vae
        self.patches.set(vae, "use_tiling", True)
        self.patches.set(vae, "tile_sample_min_size", self.tile_px)
        self.patches.set(vae, "tile_latent_min_size", self.tile_px // target.pipeline.vae_scale_factor)
        self.patches.count(vae.decoder, "forward", self.counts, "decoder calls")
        self.patches.count(vae, "decode", self.counts, "batches decoded")

    def engaged(self) -> str:
        """Return the calls; empty if no picture was large enough for two tiles."""
        return super().engaged() if self.counts["decoder calls"] > self.counts["batches decoded"] else ""


@dataclass
class TinyDecoder(Lever):
    """Decode with a small model made for the same latents, from a local folder (an AutoencoderTiny)."""

    folder: str = ""

    name: ClassVar[str] = "tiny-decoder"
    stage: ClassVar[int] = 1
    conflicts: ClassVar[frozenset[str]] = frozenset({"decode-tiling", "decode-slicing"})

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        vae: Any = getattr(target.pipeline, "vae", None)
        try:
            config = json.loads((Path(self.folder) / "config.json").read_text(encoding="utf-8")) if self.folder and vae else {}
            factor = 2 ** (len(config["decoder_block_out_channels"]) - 1)
            made_for = (config["_class_name"], config["latent_channels"], factor)
            fits = made_for == ("AutoencoderTiny", vae.config.latent_channels, target.pipeline.vae_scale_factor)
        except (AttributeError, OSError, ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            return f"tiny-decoder needs the folder of an AutoencoderTiny for this model's latents, got {self.folder!r}"
        return None

    def apply(self, target: Target) -> None:
        """Put the small decoder in the large one's place; input pictures still go through the large one."""
        from diffusers import AutoencoderTiny

        vae = target.pipeline.vae
        tiny = AutoencoderTiny.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
        tiny = tiny.to(vae.device, vae.dtype).eval()
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0

        def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.counts["batches decoded small"] += 1
            kwargs.pop("generator", None)
            return tiny.decode((latents - shift) * scale, *args, **kwargs)

        self.patches.set(vae, "decode", decode)


@dataclass
class _NeedsGpu(Lever):
    """A lever that trades time for the GPU's memory."""

    stage: ClassVar[int] = 9

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if target.device.type == "cpu":
            return f"{self.name} saves a GPU's memory, and the model is on the CPU: leave it out"
        return None


@dataclass
class TextOffload(_NeedsGpu):
    """Keep the text encoders in host memory and bring each to the device for its encoding only."""

    name: ClassVar[str] = "text-offload"
    exact: ClassVar[bool] = True
    moves_weights: ClassVar[bool] = True
    conflicts: ClassVar[frozenset[str]] = frozenset({"model-offload"})

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        found = text_encoders(target.pipeline)
        return super().requires(target) or (None if found else "this pipeline has no text encoder to keep in host memory")

    def apply(self, target: Target) -> None:
        """Move them out, and back on undo."""
        for encoder in text_encoders(target.pipeline):
            device = next(encoder.parameters()).device
            self.patches.on_undo(partial(encoder.to, device))
            self.patches.wrap(encoder, "forward", partial(self._around, encoder, device))
            encoder.to("cpu")

    def _around(self, encoder: torch.nn.Module, device: torch.device, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.counts["encodings with the encoder brought in"] += 1
            encoder.to(device)
            try:
                return compute(*args, **kwargs)
            finally:
                encoder.to("cpu")

        return forward


@dataclass
class ModelOffload(_NeedsGpu):
    """Keep every component in host memory until it is its turn."""

    name: ClassVar[str] = "model-offload"
    moves_weights: ClassVar[bool] = True
    conflicts: ClassVar[frozenset[str]] = OFFLOADS - {"model-offload"}

    def apply(self, target: Target) -> None:
        """Install accelerate's hooks; the components come back to the device on undo."""
        pipeline, device = target.pipeline, target.device
        pipeline.enable_model_cpu_offload(device=device)
        self.patches.on_undo(lambda: pipeline.to(device))
        self.patches.on_undo(pipeline.remove_all_hooks)
        self.patches.count(target.denoiser, "forward", self.counts, "denoiser calls while offloaded")


@dataclass
class GroupOffload(_NeedsGpu):
    """Keep the denoiser's layers in host memory and fetch each group when it is due."""

    groups: int = 1

    name: ClassVar[str] = "group-offload"
    moves_weights: ClassVar[bool] = True
    conflicts: ClassVar[frozenset[str]] = OFFLOADS - {"group-offload"} | {"compile"}

    def apply(self, target: Target) -> None:
        """Install diffusers' hooks; the layers come back to the device on undo."""
        from diffusers.hooks import HookRegistry
        from diffusers.hooks.group_offloading import apply_group_offloading

        denoiser, device = target.denoiser, target.device
        settings = {"offload_type": "block_level", "num_blocks_per_group": self.groups, "use_stream": device.type == "cuda"}
        apply_group_offloading(denoiser, onload_device=device, offload_device=torch.device("cpu"), **settings)

        def remove() -> None:
            for module in denoiser.modules():
                registry = HookRegistry.check_if_exists_or_initialize(module)
                for name in ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker"):
                    registry.remove_hook(name, recurse=False)
            denoiser.to(device)

        self.patches.on_undo(remove)
        self.patches.count(denoiser, "forward", self.counts, "denoiser calls while offloaded")


@dataclass
class LayerwiseCasting(_NeedsGpu):
    """Store a copy of the denoiser in 8-bit floats and compute each layer in the model's own precision."""

    name: ClassVar[str] = "layerwise-casting"
    stage: ClassVar[int] = 1
    conflicts: ClassVar[frozenset[str]] = frozenset({"bf16", "fp16", "fp8", "int8-dynamic", "int8-weight-only", "compile"})

    def apply(self, target: Target) -> None:
        """Round the weights; the originals wait in host memory for the undo."""
        from diffusers.hooks import HookRegistry

        denoiser = target.denoiser
        kept = {name: value.detach().to("cpu", copy=True) for name, value in denoiser.state_dict().items()}
        dtype = next(denoiser.parameters()).dtype
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        self.counts["layers stored in 8 bits"] = sum(value.dtype == torch.float8_e4m3fn for value in denoiser.parameters())

        def restore() -> None:
            for module in denoiser.modules():
                HookRegistry.check_if_exists_or_initialize(module).remove_hook("layerwise_casting", recurse=False)
            for name, value in [*denoiser.named_parameters(), *denoiser.named_buffers()]:
                if name in kept:
                    value.data = kept[name].to(value.device)

        self.patches.on_undo(restore)
