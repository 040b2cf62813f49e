"""Making a model fit: which memory levers a budget needs, in the order of what they cost.

The first rungs leave every picture as it was; the last ones are for when nothing else is left. What a rung
needs is predicted from the weights' sizes and from the activations counted on the meta device.
"""

from dataclasses import dataclass
from typing import Any

import torch

from imagegen.families.diffusion import denoiser_of, quiet
from imagegen.levers.memory import text_encoders
from imagegen.measure import GIB
from imagegen.request import PlanError

GROUP_SHARE = 20  # group offload keeps about this part of the denoiser on the device, and what it prefetches


@dataclass(frozen=True)
class Rung:
    """One way to keep a model in memory.

    Attributes:
        levers: that do it, besides the plan's own.
        gpu: whether it is for GPUs only.
        same: whether every picture stays as it was.
    """

    levers: tuple[str, ...]
    gpu: bool = True
    same: bool = True


LADDER = (
    Rung((), gpu=False),
    Rung(("decode-slicing",), gpu=False),
    Rung(("decode-slicing", "text-offload")),
    Rung(("decode-slicing", "model-offload")),
    Rung(("decode-slicing", "group-offload", "text-offload")),
    Rung(("decode-slicing", "decode-tiling"), gpu=False, same=False),
    Rung(("decode-slicing", "decode-tiling", "group-offload", "text-offload"), same=False),
    Rung(("decode-slicing", "decode-tiling", "layerwise-casting", "text-offload"), same=False),
)


HARMLESS = frozenset(lever for rung in LADDER if rung.same for lever in rung.levers)  # they change no picture


def rungs(device: torch.device) -> list[Rung]:
    """Return the rungs of a device, the cheapest first."""
    return [rung for rung in LADDER if device.type != "cpu" or not rung.gpu]


@dataclass(frozen=True)
class Needs:
    """What a pipeline's parts take, in bytes.

    Attributes:
        text: the text encoders' weights.
        denoiser: the denoiser's weights.
        others: every other component's.
        denoising: the activations of one call of the denoiser.
        decoding: the activations of decoding one picture.
    """

    text: int
    denoiser: int
    others: int
    denoising: int
    decoding: int

    def of(self, rung: Rung) -> int:
        """Return the peak under a rung."""
        levers = set(rung.levers)
        decoding = self.decoding // 4 if "decode-tiling" in levers else self.decoding
        denoiser = self.denoiser
        if "group-offload" in levers:
            denoiser //= GROUP_SHARE
        elif "layerwise-casting" in levers:
            denoiser //= 2
        if "model-offload" in levers:
            return max(self.text, self.denoiser + self.denoising, self.others + decoding)
        resident = denoiser + self.others
        text_stays = 0 if "text-offload" in levers else self.text
        return max(resident + self.text, resident + text_stays + max(self.denoising, decoding))


def measure_needs(pipeline: Any, size_px: int) -> Needs:
    """Return what a loaded pipeline's parts need for a picture of that size; nothing is computed.

    Args:
        pipeline: a Stable Diffusion pipeline.
        size_px: width and height.
    """
    from imagegen.roofline import count  # a command that makes one picture does without

    sizes = {name: _size(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    text = sum(_size(encoder) for encoder in text_encoders(pipeline))
    denoiser = denoiser_of(pipeline)
    dtype, side = denoiser.dtype, size_px // pipeline.vae_scale_factor
    with quiet(), torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config).to(dtype).eval()
        decoder = type(pipeline.vae).from_config(pipeline.vae.config).to(dtype).eval()
        sample = torch.empty(2, denoiser.config.in_channels, side, side, dtype=dtype)
        time, words = torch.zeros((), dtype=torch.long), torch.empty(2, 77, denoiser.config.cross_attention_dim, dtype=dtype)
        latents = torch.empty(1, pipeline.vae.config.latent_channels, side, side, dtype=dtype)
    denoising = count(twin, lambda: twin(sample, time, words)).activation_bytes
    decoding = count(decoder, lambda: decoder.decode(latents)).activation_bytes
    whole = _size(denoiser)
    return Needs(text, whole, sum(sizes.values()) - text - whole, denoising, decoding)


def _size(module: torch.nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def choose_rung(needs: Needs, memory_gib: float, device: torch.device) -> tuple[int, str]:
    """Return the number of the first rung of a device inside a budget, and the choice in words.

    Raises:
        PlanError: no rung fits.
    """
    predicted = [needs.of(rung) / GIB for rung in rungs(device)]
    for number, (rung, gib) in enumerate(zip(rungs(device), predicted, strict=True)):
        if gib <= memory_gib:
            levers = " + ".join(rung.levers) or "no memory lever"
            return number, f"memory_gib={memory_gib:g}: {levers}, {gib:.2f} GiB estimated; none needs {predicted[0]:.2f} GiB"
    least = min(predicted)
    raise PlanError(
        f"memory_gib={memory_gib:g} is too little: the least that this model needs is {least:.2f} GiB (estimated); "
        "give more, or make smaller pictures"
    )


def out_of_memory(error: Exception) -> str | None:
    """Return in a few words what an error says if it is one of memory; else None."""
    said = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in said:
        return said.split(". ")[0][:200] or "no memory left"
    return None
