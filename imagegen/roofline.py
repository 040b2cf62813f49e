"""What a model must compute and move, counted on the meta device, and what a GPU needs for that at best.

An estimate: a lower bound from counted work and the GPU's data sheet, never a measurement. Nothing is
downloaded, and no weight is allocated.
"""

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from imagegen.families.denoisers import ARCHITECTURES, FACTOR, made_in, make_denoiser, make_inputs
from imagegen.families.libraries import quiet
from imagegen.measure import GIB
from imagegen.request import ModelError
from imagegen.sources import read_index


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says of a GPU.

    Attributes:
        title: as the vendor calls it.
        bf16_tflops: dense bfloat16 products with float32 accumulation, Tflop/s.
        memory_gbps: GB/s.
        memory_gib: GiB.
        source: the data sheet.
    """

    title: str
    bf16_tflops: float
    memory_gbps: float
    memory_gib: float
    source: str


NVIDIA = "https://www.nvidia.com/en-us"
GPUS = {
    "h100": Gpu("NVIDIA H100 SXM", 989, 3350, 80, f"{NVIDIA}/data-center/h100/"),
    "h200": Gpu("NVIDIA H200 SXM", 989, 4800, 141, f"{NVIDIA}/data-center/h200/"),
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 312, 2039, 80, f"{NVIDIA}/data-center/a100/"),
    "l20": Gpu("NVIDIA L20", 119.5, 864, 48, f"{NVIDIA}/data-center/"),
    "l40s": Gpu("NVIDIA L40S", 362, 864, 48, f"{NVIDIA}/data-center/l40s/"),
    "4090": Gpu("NVIDIA GeForce RTX 4090", 165, 1008, 24, f"{NVIDIA}/geforce/graphics-cards/40-series/rtx-4090/"),
    "3090": Gpu("NVIDIA GeForce RTX 3090", 71, 936, 24, f"{NVIDIA}/geforce/graphics-cards/30-series/"),
}


def find_gpu(title: str) -> Gpu | None:
    """Return the data sheet of a GPU by the name that its driver gives; None where it is not known."""
    words = title.lower().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


@dataclass(frozen=True)
class Work:
    """One call of a module.

    Attributes:
        parameters: numbers in its weights.
        weight_bytes: their size.
        flop: of products and convolutions; 2 for a multiplication with its addition.
        attention_flop: of these, attention's own two products.
        product_bytes: read and written by products, convolutions and attention.
        pointwise_bytes: read and written by everything else, each operation alone as eager mode does.
        activation_bytes: the most that is alive at once besides the weights.
    """

    parameters: int
    weight_bytes: int
    flop: int
    attention_flop: int
    product_bytes: int
    pointwise_bytes: int
    activation_bytes: int


WITHOUT_TRAFFIC = ("aten::_unsafe_view", "aten::new_empty", "aten::empty", "aten::empty_like")


class _Counter(TorchDispatchMode):
    """Counts every operation's flop and traffic, and what is alive."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.flop = self.product_bytes = self.pointwise_bytes = self.alive = self.peak = 0
        self.known = {id(weight.untyped_storage()) for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        results = list(_tensors(output))
        for value in results:
            self.note(value.untyped_storage())
        if func.is_view or func._schema.name in WITHOUT_TRAFFIC:
            return output
        moved = sum(value.nbytes for value in (*_tensors((args, kwargs)), *results))
        counts = flop_registry.get(func._overloadpacket)
        if counts is None:
            self.pointwise_bytes += moved
        else:
            self.flop += counts(*args, **(kwargs or {}), out_val=output)
            self.product_bytes += moved
        return output

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a tensor's memory as alive until it is freed."""
        if id(storage) in self.known:
            return
        self.known.add(id(storage))
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.free, id(storage), storage.nbytes())

    def free(self, storage: int, size: int) -> None:
        """Take a tensor's memory off."""
        self.known.discard(storage)
        self.alive -= size


class _Attention(TorchFunctionMode):
    """Counts attention as its two products, as a fused kernel computes it, whatever the meta device would do."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter
        self.flop = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        self.flop += 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self.counter.product_bytes += sum(tensor.nbytes for tensor in (query, key, value, output))
        return output


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


@torch.no_grad()
def count(module: torch.nn.Module, call: Callable[[], Any]) -> Work:
    """Count what one call of a module on the meta device does.

    Args:
        module: owns the weights.
        call: calls it.
    """
    weights = list(module.parameters())
    counter = _Counter([*weights, *module.buffers()])
    with counter, _Attention(counter) as attention:
        call()
    size = sum(weight.nbytes for weight in weights)
    return Work(
        sum(weight.numel() for weight in weights), size, counter.flop + attention.flop, attention.flop,
        counter.product_bytes, counter.pointwise_bytes, counter.peak,
    )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One component of a model: `calls` of it make one picture."""

    name: str
    calls: int
    work: Work


@dataclass(frozen=True)
class Estimate:
    """What a model needs on a GPU, at best.

    Attributes:
        model: its name or folder.
        gpu: the GPU.
        dtype: of weights and activations.
        parts: the components that compute; text encoders count with their weights alone.
    """

    model: str
    gpu: Gpu
    dtype: torch.dtype
    parts: list[Part]

    def seconds(self, work: Work) -> float:
        """Return the least time of one call in eager mode: products at peak, everything else at full bandwidth."""
        return self.fused_seconds(work) + work.pointwise_bytes / (self.gpu.memory_gbps * 1e9)

    def fused_seconds(self, work: Work) -> float:
        """Return the least time of one call if nothing but products took any."""
        return max(work.flop / (self.gpu.bf16_tflops * 1e12), work.product_bytes / (self.gpu.memory_gbps * 1e9))

    def memory_bytes(self) -> dict[str, int]:
        """Return what each way of keeping the weights needs, by the levers of its plan."""
        activations = max(part.work.activation_bytes for part in self.parts)
        denoiser = next(part.work for part in self.parts if part.name == "denoiser")
        others = sum(part.work.weight_bytes for part in self.parts) - denoiser.weight_bytes
        largest = max(part.work.weight_bytes for part in self.parts)
        text = sum(part.work.weight_bytes for part in self.parts if part.name.startswith("text"))
        return {
            "exact": denoiser.weight_bytes + others + activations,
            "text-offload": max(text, denoiser.weight_bytes + others - text + activations),
            "model-offload": largest + activations,
            "layerwise-casting": denoiser.parameters + others + activations,
            "group-offload": others + denoiser.weight_bytes // 20 + activations,
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything, each figure an estimate."""
        parts = []
        for part in self.parts:
            work = part.work
            parts.append(
                {"part": part.name, "calls": part.calls, "estimated_s": self.seconds(work), "fused_s": self.fused_seconds(work)}
                | {"tflop": work.flop / 1e12, "attention_share": work.attention_flop / work.flop if work.flop else 0.0}
                | {
                    "parameters": work.parameters,
                    "weight_gib": work.weight_bytes / GIB,
                    "pointwise_gb": work.pointwise_bytes / 1e9,
                }
            )
        memory = {name: size / GIB for name, size in self.memory_bytes().items()}
        picture_s = sum(part.calls * self.seconds(part.work) for part in self.parts)
        return {
            "kind": "estimated", "model": self.model, "gpu": self.gpu.title, "source": self.gpu.source,
            "dtype": str(self.dtype).removeprefix("torch."), "parts": parts, "picture_s": picture_s, "memory_gib": memory,
            "fits": {name: size <= self.gpu.memory_gib for name, size in memory.items()},
        }  # fmt: skip


def estimate(model: str | Path, gpu: str, *, dtype: torch.dtype = torch.bfloat16, num_steps: int = 20) -> Estimate:
    """Estimate a model on a GPU.

    Args:
        model: a name of `ARCHITECTURES`, or a model's folder, of which only the configurations are read.
        gpu: a name of `GPUS`.
        dtype: of weights and activations: bfloat16 or float16, whose rates the data sheets give.
        num_steps: denoising steps of a picture.

    Raises:
        ModelError: the model or the GPU is not known.
    """
    if gpu not in GPUS:
        raise ModelError(f"no data sheet of {gpu!r} here: there are {', '.join(GPUS)}")
    if str(model) in ARCHITECTURES:
        parts = _parts_of_architecture(str(model), dtype, num_steps)
    elif Path(model).is_dir():
        parts = _parts_of_folder(Path(model), dtype, num_steps)
    else:
        raise ModelError(f"no model {str(model)!r}: give {', '.join(ARCHITECTURES)}, emoji, or the folder of a diffusers model")
    return Estimate(str(model), GPUS[gpu], dtype, parts)


def _parts_of_architecture(name: str, dtype: torch.dtype, num_steps: int) -> list[Part]:
    """Return the parts of a known architecture; its text encoders are known by their size."""
    with quiet():
        from diffusers import AutoencoderKL

        architecture = ARCHITECTURES[name]
        denoiser = make_denoiser(architecture, "meta", dtype)
        inputs = make_inputs(architecture, "meta", dtype)
        with made_in("meta", dtype):
            vae = AutoencoderKL(latent_channels=architecture.channels, **DECODER).eval()
    size = architecture.text_parameters * dtype.itemsize
    text = Work(architecture.text_parameters, size, 2 * architecture.text_parameters * architecture.tokens, 0, size, 0, 0)
    side = architecture.size_px // FACTOR
    decoder = count(vae, lambda: vae.decode(torch.empty(1, architecture.channels, side, side, device="meta", dtype=dtype)))
    work = count(denoiser, lambda: denoiser(**inputs))
    return [Part("text encoders", 1, text), Part("denoiser", num_steps, work), Part("decoder", 1, decoder)]


DECODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def _parts_of_folder(folder: Path, dtype: torch.dtype, num_steps: int) -> list[Part]:
    """Return the parts of a model's folder, from its configurations."""
    index = read_index(folder)
    with quiet():
        import diffusers
        import transformers

        def config(part: str) -> dict[str, Any]:
            try:
                return json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise ModelError(f"{str(folder / part / 'config.json')!r} cannot be read: {error}") from None

        with made_in("meta", dtype):
            unet = diffusers.UNet2DConditionModel.from_config(config("unet")).eval()
            vae = diffusers.AutoencoderKL.from_config(config("vae")).eval()
            kind = getattr(transformers, index["text_encoder"][1])
            text = kind(kind.config_class(**config("text_encoder"))).eval()
    side, factor = unet.config.sample_size, 2 ** (len(vae.config.block_out_channels) - 1)
    made = lambda *shape: torch.empty(*shape, device="meta", dtype=dtype)  # noqa: E731
    tokens = torch.zeros(2, 77, dtype=torch.long, device="meta")
    embeddings = made(2, 77, unet.config.cross_attention_dim)
    time = torch.zeros((), dtype=torch.long, device="meta")
    latents = made(1, vae.config.latent_channels, side, side)
    return [
        Part("text encoder", 1, count(text, lambda: text(tokens))),
        Part("denoiser", num_steps, count(unet, lambda: unet(made(2, unet.config.in_channels, side, side), time, embeddings))),
        Part(f"decoder to {side * factor}²", 1, count(vae, lambda: vae.decode(latents))),
    ]
