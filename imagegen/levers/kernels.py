"""Levers that let the package's own Triton kernels compute parts of the denoiser and the decoder on CUDA.

Neither has been measured on a GPU, so no plan and no tuner takes them by itself. Beside `compile` they would stand in
its way: it fuses these operations too, and cannot look into a kernel of ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn

from imagegen.kernels import Kernel, group_norm_silu, int8_linear, may_run, row_quantisation
from imagegen.levers.compute import PRECISIONS, _OnACopy
from imagegen.levers.lever import Lever, Target

norm = group_norm_silu.group_norm_silu
quantise = row_quantisation.quantise_rows
multiply = int8_linear.int8_linear


def why_not(kernels: tuple[Kernel, ...], device: torch.device) -> str | None:
    """Return why one of the kernels may not run on a device; None where all may. The first call checks them there."""
    verdicts = (may_run(kernel, device) for kernel in kernels)
    return next((reason for passed, reason in verdicts if not passed), None)


@dataclass
class FusedNorm(Lever):
    """GroupNorm by one kernel, together with the SiLU behind it, in the denoiser and the decoder.

    The result has channels last in memory, and so have the convolutions' from there on: best with `channels-last`.
    """

    name: ClassVar[str] = "fused-norm"
    stage: ClassVar[int] = 3  # after copies and layouts, before whatever wraps whole modules
    conflicts: ClassVar[frozenset[str]] = frozenset({"compile", "openvino"})

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if not self._norms(target):
            return "fused-norm acts on group norms, and neither denoiser nor decoder has one: leave it out"
        reason = why_not((group_norm_silu.KERNEL,), target.device)
        return f"fused-norm cannot engage: {reason}; leave it out, or use compile, which fuses norms too" if reason else None

    def _norms(self, target: Target) -> list[nn.GroupNorm]:
        return [part for module in self._parts(target) for part in module.modules() if _is_affine_norm(part)]

    def _parts(self, target: Target) -> list[nn.Module]:
        decoder = getattr(getattr(target.pipeline, "vae", None), "decoder", None)
        return [target.worker] if decoder is None else [target.worker, decoder]

    def apply(self, target: Target) -> None:
        """Replace the norms' forward methods, and let the SiLU behind one pass on what holds it already."""
        pairs = [pair for module in self._parts(target) for part in module.modules() for pair in _pairs(part)]
        fused = {id(module): activation for module, activation in pairs}
        passed: list[torch.Tensor] = []  # what a norm has just returned with its SiLU done
        for module in self._norms(target):
            self._replace(module, id(module) in fused, passed)
        for activation in {id(activation): activation for activation in fused.values()}.values():
            self.patches.wrap(activation, "forward", lambda compute: _pass_on(compute, passed))

    def _replace(self, module: nn.GroupNorm, silu: bool, passed: list[torch.Tensor]) -> None:
        label = "norms with SiLU computed" if silu else "norms computed"

        def forward(x: torch.Tensor) -> torch.Tensor:
            self.counts[label] += 1
            output = norm(x, module.num_groups, module.weight, module.bias, module.eps, silu)
            passed[:] = [output] if silu else []
            return output

        self.patches.set(module, "forward", forward)


def _pass_on(compute: Callable[..., Any], passed: list[torch.Tensor]) -> Callable[..., Any]:
    """Return an activation that leaves alone what a norm returned with its SiLU done; it has other inputs as well."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if passed and x is passed[0]:
            passed.clear()
            return x
        return compute(x)

    return forward


def _is_affine_norm(module: nn.Module) -> bool:
    return type(module) is nn.GroupNorm and module.affine


def _pairs(module: nn.Module) -> Iterator[tuple[nn.GroupNorm, nn.SiLU]]:
    """Yield a module's own group norms that SiLU follows directly, by what diffusers' forward methods do."""
    if type(module).__name__ == "ResnetBlock2D":
        direct = ["norm1"] if module.time_embedding_norm == "scale_shift" else ["norm1", "norm2"]
        candidates = [(getattr(module, name), module.nonlinearity) for name in direct]
    else:
        candidates = [(getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None))]
    yield from ((first, then) for first, then in candidates if _is_affine_norm(first) and type(then) is nn.SiLU)


class Int8Linear(nn.Module):
    """A linear layer in 8-bit whole numbers with one scale an output, followed by an epilogue of `int8_linear`."""

    def __init__(self, linear: nn.Linear, epilogue: str = "none") -> None:
        """Quantise a layer's weights; its bias stays."""
        super().__init__()
        self.in_features, self.out_features, self.epilogue = linear.in_features, linear.out_features, epilogue
        quantised, scale = quantise(linear.weight.detach())
        self.register_buffer("quantised", quantised)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (…, N) of the dtype of `x`, (…, K)."""
        rows, row_scale = quantise(x.reshape(-1, self.in_features))
        return self.multiply(rows, row_scale, x.dtype).reshape(*x.shape[:-1], self.out_features)

    def multiply(
        self, rows: torch.Tensor, row_scale: torch.Tensor, dtype: torch.dtype, operand: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return (M, N) for quantised rows, (M, K) int8."""
        return multiply(rows, row_scale, self.quantised, self.scale.float(), self.bias, self.epilogue, None, operand, dtype)


class Int8Geglu(nn.Module):
    """Diffusers' GEGLU, value · GELU(gate), from the two halves of one layer; the input is quantised once."""

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise a layer's halves."""
        super().__init__()
        value, gate = _halves(linear)
        self.value, self.gate = Int8Linear(value), Int8Linear(gate, "geglu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (…, N/2) of the dtype of `x`, (…, K)."""
        rows, row_scale = quantise(x.reshape(-1, self.value.in_features))
        value = self.value.multiply(rows, row_scale, x.dtype)
        return self.gate.multiply(rows, row_scale, x.dtype, value).reshape(*x.shape[:-1], self.value.out_features)


def _halves(linear: nn.Linear) -> Iterator[nn.Linear]:
    """Yield two layers on the upper and lower halves of a layer's outputs, which share its memory."""
    biases = (None, None) if linear.bias is None else linear.bias.detach().chunk(2)
    for weight, bias in zip(linear.weight.detach().chunk(2), biases, strict=True):
        half = nn.Linear(linear.in_features, linear.out_features // 2, bias is not None, device="meta")
        half.weight = nn.Parameter(weight, requires_grad=False)
        half.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        yield half


@dataclass
class Int8Fused(_OnACopy):
    """8-bit weights and activations through our own kernel, which dequantises, adds the bias and computes GELU at once.

    It leaves out embeddings and modulations: they have few rows, and an error in them reaches everything.
    """

    min_features: int = 512

    name: ClassVar[str] = "int8-fused"
    conflicts: ClassVar[frozenset[str]] = PRECISIONS - {"int8-fused"} | {"compile", "openvino", "layerwise-casting"}

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if not any(self._fits(name, module) for name, module in target.worker.named_modules()):
            return f"int8-fused acts on linear layers, and this denoiser has none of {self.min_features} features or more"
        reason = why_not((row_quantisation.KERNEL, int8_linear.KERNEL), target.device)
        return f"int8-fused cannot engage: {reason}; use int8-dynamic" if reason else None

    def _fits(self, name: str, module: nn.Module) -> bool:
        """Return whether a layer is large enough, no embedding or modulation, and laid out in whole 16 bytes."""
        if type(module) is not nn.Linear or "emb" in name or "norm" in name:
            return False
        return min(module.in_features, module.out_features) >= self.min_features and module.in_features % 16 == 0

    def change(self, worker: nn.Module) -> None:
        """Replace the copy's layers: first where an epilogue can take what follows, then those that are left."""
        for name, module in list(worker.named_modules()):
            self._fuse(name, module)
        for name, module in list(worker.named_modules()):
            if self._fits(name, module):
                self._put(worker, name, Int8Linear(module))

    def _fuse(self, name: str, module: nn.Module) -> None:
        """Replace a module's layer together with the activation behind it."""
        for child_name, child in list(module.named_children()):
            layer, kind = getattr(child, "proj", None), type(child).__name__
            if kind in ("GELU", "GEGLU") and layer is not None and self._fits(f"{name}.{child_name}.proj", layer):
                gelu = "gelu-tanh" if getattr(child, "approximate", "") == "tanh" else "gelu-erf"
                self._put(module, child_name, Int8Geglu(layer) if kind == "GEGLU" else Int8Linear(layer, gelu))
        act = getattr(module, "act_mlp", None)  # of FLUX' single blocks
        if isinstance(act, nn.GELU) and self._fits(f"{name}.proj_mlp", module.proj_mlp):
            gelu = "gelu-tanh" if act.approximate == "tanh" else "gelu-erf"
            self._put(module, "proj_mlp", Int8Linear(module.proj_mlp, gelu))
            module.act_mlp = nn.Identity()

    def _put(self, root: nn.Module, name: str, module: nn.Module) -> None:
        """Set a module by its path."""
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, module)
        self.counts["layers quantised"] += 1

    def engaged(self) -> str:
        """Return the layers and calls; empty if no layer was quantised."""
        return super().engaged() if self.counts["layers quantised"] and self.counts["denoiser calls"] else ""
