"""Latents and text embeddings, computed once: training then never runs the autoencoder or the text encoder again.

Each is a file of its own, named by a hash of what it was computed from, written beside its place and moved in;
a killed run finds what is there and computes the rest.
"""

from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from imagegen.families.conditioning import Conditions, encode_captions
from imagegen.finetune.data import Item, find_bucket, fit_to_bucket, open_rgb
from imagegen.weights import save_weights

FOLDER = "cache"


class Cache:
    """Encoded pictures and captions of one model, on disk."""

    def __init__(self, out: Path, pipeline: Any, hashes: dict[str, str], buckets: list[tuple[int, int]]) -> None:
        """Compute nothing yet.

        Args:
            out: the training's folder.
            pipeline: encodes; needed only for what is not there.
            hashes: of the model's weight files.
            buckets: the sizes that pictures are brought to.
        """
        self.folder, self.pipeline, self.buckets = out / FOLDER, pipeline, buckets
        parts = {name: digest for name, digest in sorted(hashes.items()) if not name.startswith(("unet", "transformer"))}
        self.model = sha256(repr(parts).encode()).hexdigest()

    def _path(self, kind: str, *facts: Any) -> Path:
        digest = sha256("\0".join(map(str, (kind, self.model, *facts))).encode()).hexdigest()
        return self.folder / f"{kind}-{digest[:32]}.safetensors"

    def latents(self, item: Item) -> torch.Tensor:
        """Return the mean and spread of a picture's latents, (2C, h, w) float32, scaled as the denoiser wants them."""
        bucket = find_bucket(item.size, self.buckets)
        found = self._find(self._path("latents", item.sha256, bucket), lambda: {"value": self._encode_picture(item, bucket)})
        return found["value"]

    def text(self, caption: str) -> Conditions:
        """Return what the denoiser is told of a caption, float32 tensors without a batch's axis."""
        return self._find(self._path("text", caption), lambda: self._encode_text(caption))

    def fill(self, items: Iterable[Item], captions: Iterable[str], tell: Callable[[str, int, int], Any]) -> None:
        """Compute what is missing of pictures and captions."""
        pictures, texts = list(items), sorted(set(captions))
        for number, item in enumerate(pictures, 1):
            self.latents(item)
            tell("encoding pictures", number, len(pictures))
        for number, caption in enumerate(texts, 1):
            self.text(caption)
            tell("encoding captions", number, len(texts))

    def _find(self, path: Path, compute: Callable[[], Conditions]) -> Conditions:
        try:
            return load_file(path)
        except (OSError, SafetensorError):  # not there, or damaged
            made = {name: value.float().contiguous().cpu() for name, value in compute().items()}
            save_weights(path, made, {})
            return made

    @torch.no_grad()
    def _encode_picture(self, item: Item, bucket: tuple[int, int]) -> torch.Tensor:
        vae = self.pipeline.vae
        picture = fit_to_bucket(open_rgb(item), bucket)
        pixels = self.pipeline.image_processor.preprocess(picture).to(vae.device, vae.dtype)
        found = vae.encode(pixels).latent_dist
        shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        return torch.cat([(found.mean - shift) * scale, found.std * scale], dim=1)[0]

    @torch.no_grad()
    def _encode_text(self, caption: str) -> Conditions:
        return {name: value[0] for name, value in encode_captions(self.pipeline, [caption]).items()}


def draw_latents(kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw latents from their mean and spread: (2C, h, w) to (C, h, w)."""
    mean, spread = kept.chunk(2)
    return mean + spread * torch.randn(mean.shape, generator=generator)
