"""Levers that compute the same denoiser by other means: precision, layout, compilers, threads, attention.

Each lets the denoiser's own weights stand: precision and quantisation work on a copy, compilers beside it.
"""

import copy
import os
import shutil
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from imagegen.families.diffusion import quiet
from imagegen.levers.lever import Lever, RunFacts, Style, Target, map_tensors, tensors_of, weights_stamp
from imagegen.levers.openvino import Compiled, cannot_read
from imagegen.weights import cache_folder

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
MAX_SHAPES = 64
# Denoisers that OpenVINO 2026.4 cannot convert: they compute with complex numbers, or take lists of changing lengths; it
# crashes on the last.
NOT_FOR_OPENVINO = frozenset(
    {"QwenImageTransformer2DModel", "ZImageTransformer2DModel", "LuminaNextDiT2DModel", "Lumina2Transformer2DModel"}
    | {"HiDreamImageTransformer2DModel", "Kandinsky3UNet"}
)
PRECISIONS = frozenset({"bf16", "fp16", "int8-dynamic", "int8-weight-only", "int8-fused", "fp8"})


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16; without them it is a hundred times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class _OnACopy(Lever):
    """Let a changed copy of the denoiser compute; the pipeline keeps its own, and its dtype."""

    stage: ClassVar[int] = 1
    dtype: ClassVar[torch.dtype | None] = None

    @abstractmethod
    def change(self, worker: torch.nn.Module) -> None:
        """Change the copy."""

    def apply(self, target: Target) -> None:
        """Make the copy and send the denoiser's calls to it."""
        before, worker = target.worker, copy.deepcopy(target.worker)
        self.change(worker)
        target.worker = worker
        self.patches.on_undo(lambda: setattr(target, "worker", before))
        style, copied = Style(target.denoiser), Style(worker)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.counts["denoiser calls"] += 1
            style.carry_to(copied)
            cast = lambda tensor: tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor  # noqa: E731
            back = next(tensor.dtype for tensor in tensors_of((args, kwargs)) if tensor.is_floating_point())
            output = worker(*map_tensors(cast, args), **map_tensors(cast, kwargs))
            return map_tensors(lambda tensor: tensor.to(back), output)

        self.patches.set(target.denoiser, "forward", forward)


@dataclass
class Bf16(_OnACopy):
    """Compute the denoiser in bfloat16; latents and scheduler keep their precision."""

    name: ClassVar[str] = "bf16"
    conflicts: ClassVar[frozenset[str]] = PRECISIONS - {"bf16"} | {"openvino"}
    dtype: ClassVar[torch.dtype | None] = torch.bfloat16

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if next(target.denoiser.parameters()).dtype == torch.bfloat16:
            return "the denoiser is in bfloat16 already"
        if has_fast_bf16(target.device):
            return None
        return "this processor has no bfloat16 instructions and would be a hundred times slower: leave bf16 out"

    def change(self, worker: torch.nn.Module) -> None:
        """Round the weights."""
        worker.to(torch.bfloat16)


@dataclass
class Fp16(_OnACopy):
    """Compute the denoiser in float16; not on a CPU."""

    name: ClassVar[str] = "fp16"
    conflicts: ClassVar[frozenset[str]] = PRECISIONS - {"fp16"} | {"openvino"}
    dtype: ClassVar[torch.dtype | None] = torch.float16

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if target.device.type == "cpu":
            return "float16 on a CPU is a hundred times slower than float32: use bf16, where the processor has it"
        return None

    def change(self, worker: torch.nn.Module) -> None:
        """Round the weights."""
        worker.to(torch.float16)


@dataclass
class _Quantised(_OnACopy):
    """Quantise the denoiser's linear layers through torchao."""

    min_features: int = 32

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if find_spec("torchao") is None:
            return f"{self.name} needs torchao: pip install 'imagegen-diffusion[fast]'"
        if self._layers(target.worker) == 0:
            return f"{self.name} acts on linear layers, and this denoiser has none of {self.min_features} features or more"
        return None

    def _fits(self, module: torch.nn.Module, name: str) -> bool:
        if not isinstance(module, torch.nn.Linear) or "pooler" in name.split("."):  # whose weights are read past the layers
            return False
        return min(module.in_features, module.out_features) >= self.min_features

    def _layers(self, worker: torch.nn.Module) -> int:
        return sum(self._fits(module, name) for name, module in worker.named_modules())

    @abstractmethod
    def config(self) -> Any:
        """Return torchao's configuration."""

    def change(self, worker: torch.nn.Module) -> None:
        """Quantise the weights and count the layers that changed."""
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import quantize_

            before = {name: module.weight for name, module in worker.named_modules() if self._fits(module, name)}
            quantize_(worker, self.config(), filter_fn=self._fits)
        after = dict(worker.named_modules())
        self.counts["layers quantised"] = sum(type(after[name].weight) is not type(old) for name, old in before.items())

    def engaged(self) -> str:
        """Return the layers and calls; empty if no layer was quantised."""
        return super().engaged() if self.counts["layers quantised"] and self.counts["denoiser calls"] else ""


@dataclass
class Int8Dynamic(_Quantised):
    """8-bit weights and activations, scales found at run time."""

    name: ClassVar[str] = "int8-dynamic"
    conflicts: ClassVar[frozenset[str]] = PRECISIONS - {"int8-dynamic"} | {"openvino"}

    def config(self) -> Any:
        """Return torchao's configuration."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()


@dataclass
class Int8WeightOnly(_Quantised):
    """8-bit weights: a quarter of the memory, no less arithmetic."""

    name: ClassVar[str] = "int8-weight-only"
    conflicts: ClassVar[frozenset[str]] = PRECISIONS - {"int8-weight-only"} | {"openvino"}

    def config(self) -> Any:
        """Return torchao's configuration."""
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()


@dataclass
class Fp8(_Quantised):
    """8-bit floating point on GPUs that have it (compute capability 8.9 and up)."""

    name: ClassVar[str] = "fp8"
    conflicts: ClassVar[frozenset[str]] = PRECISIONS - {"fp8"} | {"openvino"}

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if target.device.type != "cuda" or torch.cuda.get_device_capability(target.device) < (8, 9):
            return "fp8 needs a CUDA device of compute capability 8.9 or higher: use int8-dynamic"
        return super().requires(target)

    def config(self) -> Any:
        """Return torchao's configuration."""
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

        return Float8DynamicActivationFloat8WeightConfig()


@dataclass
class ChannelsLast(Lever):
    """Lay the weights of convolutions out with channels last."""

    name: ClassVar[str] = "channels-last"
    stage: ClassVar[int] = 2
    conflicts: ClassVar[frozenset[str]] = frozenset({"openvino"})

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: only convolutions over two dimensions, of several channels, have such a layout."""
        found = self._convolutions(target.worker)
        return None if found else "channels-last acts on convolutions, and this denoiser has none: leave it out"

    def _convolutions(self, worker: torch.nn.Module) -> list[torch.nn.Conv2d]:
        found = (module for module in worker.modules() if isinstance(module, torch.nn.Conv2d))
        return [module for module in found if module.weight.shape[2:] != (1, 1) and module.weight.shape[1] > 1]

    def apply(self, target: Target) -> None:
        """Lay out anew; every value stays."""
        for module in self._convolutions(target.worker):
            self._lay_out(module.weight)

        def lay_out(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

        def around(compute: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self.counts["denoiser calls"] += 1
                return compute(*map_tensors(lay_out, args), **map_tensors(lay_out, kwargs))

            return forward

        self.patches.wrap(target.worker, "forward", around)

    def _lay_out(self, weight: torch.nn.Parameter) -> None:
        before = weight.data
        weight.data = before.contiguous(memory_format=torch.channels_last)
        self.counts["weights laid out"] += weight.data.stride() != before.stride()
        self.patches.on_undo(lambda: setattr(weight, "data", weight.data.contiguous()))

    def engaged(self) -> str:
        """Return the weights and calls; empty if no weight changed or none was used."""
        return super().engaged() if self.counts["weights laid out"] and self.counts["denoiser calls"] else ""


@dataclass
class Threads(Lever):
    """Compute with this many threads during a run."""

    count: int = 1

    name: ClassVar[str] = "threads"
    per_picture: ClassVar[bool] = True
    stage: ClassVar[int] = 0
    exact: ClassVar[bool] = True  # the noise floor is measured over thread counts

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if target.device.type != "cpu":
            return "threads acts on the CPU, and the model is elsewhere: leave it out"
        return None if self.count >= 1 else f"threads needs a count from 1, got {self.count}"

    def apply(self, target: Target) -> None:
        """Change nothing yet: the number belongs to a run and its thread."""

    def begin(self, run: RunFacts) -> None:
        """Set the number of threads."""
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)
        self.counts[f"runs on {self.count} threads instead of {self.before}"] += torch.get_num_threads() != self.before

    def end(self) -> None:
        """Set it back."""
        torch.set_num_threads(self.before)


@dataclass
class Compile(Lever):
    """Compile the denoiser with torch.compile: its repeated blocks where it has them, else the whole.

    One compilation per shape: prompts are padded and time steps are tensors, so neither compiles again. `mode`
    is torch's: `reduce-overhead` records CUDA graphs, `max-autotune` also tries kernels. On CUDA what was
    compiled is found again by the next process.
    """

    mode: str = "default"

    name: ClassVar[str] = "compile"
    stage: ClassVar[int] = 4
    conflicts: ClassVar[frozenset[str]] = frozenset({"openvino", "deep-cache"})

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if target.device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            return "compile needs a C++ compiler for the CPU: install g++"
        if self.mode not in COMPILE_MODES:
            return f"compile: mode is one of {', '.join(COMPILE_MODES)}, got {self.mode!r}"
        if self.mode == "reduce-overhead" and target.device.type == "cpu":
            return "compile(mode=reduce-overhead) records CUDA graphs, and the model is on the CPU: leave mode= out"
        return None

    def _parts(self, worker: torch.nn.Module) -> list[torch.nn.Module]:
        repeated = getattr(worker, "_repeated_blocks", None) or ()
        blocks = [module for module in worker.modules() if type(module).__name__ in repeated]
        return blocks if blocks and not hasattr(worker, "down_blocks") else [worker]

    def apply(self, target: Target) -> None:
        """Put compiled code before every part; the first call of each shape compiles."""
        from torch._inductor import list_mode_options

        options = list_mode_options(self.mode) if self.mode != "default" else {}
        if target.device.type == "cpu":
            options["freezing"] = True  # packs the weights for oneDNN
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))  # torch's own is /tmp
        self._allow_shapes()

        def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
            from torch._inductor.compile_fx import compile_fx

            self.counts["graphs compiled"] += 1
            run = compile_fx(graph, examples, config_patches=options)

            def counted(*inputs: Any) -> Any:
                self.counts["compiled calls"] += 1
                return run(*inputs)

            return counted

        for part in self._parts(target.worker):
            self.patches.wrap(part, "forward", lambda forward: torch.compile(forward, backend=backend, dynamic=False))

    def _allow_shapes(self) -> None:
        """Let more shapes compile than torch's few, after which it falls back to eager mode and says nothing."""
        from torch._dynamo import config

        before = config.recompile_limit
        config.recompile_limit = max(before, MAX_SHAPES)
        self.patches.on_undo(lambda: setattr(config, "recompile_limit", before))

    def undo(self) -> None:
        """Give the calls back and forget the compiled code, which may hold weights."""
        super().undo()
        torch.compiler.reset()

    def engaged(self) -> str:
        """Return the graphs and calls; empty if no compiled code ran."""
        return super().engaged() if self.counts["compiled calls"] else ""


@dataclass
class AttentionBackend(Lever):
    """Compute attention by another of diffusers' backends, by its name there."""

    backend: str = "_native_flash"

    name: ClassVar[str] = "attention"
    stage: ClassVar[int] = 3
    conflicts: ClassVar[frozenset[str]] = frozenset({"openvino"})

    def _processors(self, target: Target) -> list[Any]:
        processors = (getattr(module, "processor", None) for module in target.worker.modules())
        return [processor for processor in processors if hasattr(processor, "_attention_backend")]

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: diffusers accepts any name and may change no processor."""
        from diffusers.models.attention_dispatch import AttentionBackendName

        if self.backend not in {name.value for name in AttentionBackendName}:
            return f"diffusers has no attention backend {self.backend!r}"
        if not self._processors(target):
            return f"no attention processor of {type(target.worker).__name__} can change its backend: leave attention out"
        if target.device.type == "cpu" and self.backend not in ("native", "_native_math", "flex"):
            return f"the attention backend {self.backend!r} needs a GPU: on a CPU there are native, _native_math and flex"
        return None

    def apply(self, target: Target) -> None:
        """Set every processor's own backend; diffusers' process-wide one stays."""
        from diffusers.models.attention_dispatch import AttentionBackendName

        name = AttentionBackendName(self.backend)
        for processor in self._processors(target):
            self.patches.set(processor, "_attention_backend", name)
            self.counts["processors changed"] += 1

        self.patches.count(target.worker, "forward", self.counts, "denoiser calls")

    def engaged(self) -> str:
        """Return the processors and calls; empty if there were none."""
        return super().engaged() if self.counts["processors changed"] and self.counts["denoiser calls"] else ""


@dataclass
class OpenVino(Lever):
    """Let OpenVINO compute the denoiser and the decoder on the CPU, in float32 or bfloat16.

    A module is traced at its first call; every set of shapes compiles once, for later runs too.
    """

    precision: str = "f32"

    name: ClassVar[str] = "openvino"
    stage: ClassVar[int] = 3
    conflicts: ClassVar[frozenset[str]] = (
        PRECISIONS
        | {"channels-last", "compile", "deep-cache", "attention"}
        | {*("first-block-cache", "taylorseer-cache", "mag-cache", "sea-cache")}
    )

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if target.device.type != "cpu":
            return "openvino computes on the CPU, and the model is elsewhere: use compile"
        if find_spec("openvino") is None:
            return "openvino is not installed: pip install 'imagegen-diffusion[fast]'"
        scaled = getattr(getattr(target.worker, "config", None), "resnet_time_scale_shift", None) == "scale_shift"
        if type(target.worker).__name__ in NOT_FOR_OPENVINO or scaled:  # on norms with a scale it crashes as well
            return cannot_read(target.worker)
        if next(target.denoiser.parameters()).dtype != torch.float32:
            return "openvino takes a model in float32 and computes in what precision= says: load it with dtype='float32'"
        if self.precision not in ("f32", "bf16"):
            return f"openvino computes in f32 or bf16, got {self.precision!r}"
        if self.precision == "bf16" and not has_fast_bf16(target.device):
            return "this processor has no bfloat16 instructions: use openvino(precision=f32)"
        return None

    def apply(self, target: Target) -> None:
        """Stand before the denoiser and the decoder."""
        parts = {"denoiser": target.worker, "decoder": getattr(getattr(target.pipeline, "vae", None), "decoder", None)}
        for name, part in parts.items():
            if part is None:
                continue
            key, stamp = ("openvino", name, self.precision), weights_stamp([part])
            kept_stamp, compiled = target.kept.get(key, (None, None))
            if kept_stamp != stamp:
                compiled = Compiled(part, self.precision, f"{name} calls")
                target.kept[key] = (stamp, compiled)
            compiled.counts = self.counts
            self.patches.set(part, "forward", compiled)

    def engaged(self) -> str:
        """Return the calls; empty if the denoiser made none."""
        return super().engaged() if self.counts["denoiser calls"] else ""
