"""A torch module computed by OpenVINO, one compilation for every set of shapes."""

import inspect
import logging
import warnings
from collections import Counter
from typing import Any

import torch

from imagegen.levers.lever import keyword_arguments

MAX_SHAPES = 6  # every compilation holds a copy of the weights


class Compiled:
    """Stands for a module's `forward`: traces it for every size of picture, compiles it for every set of shapes.

    A trace holds for any batch, not for another size: a UNet takes other branches where a side cannot be halved.
    """

    def __init__(self, module: torch.nn.Module, precision: str, label: str) -> None:
        """Remember the module; nothing is compiled before the first call."""
        self.module = module
        self.forward = module.forward
        self.signature = inspect.signature(self.forward)
        self.precision = precision
        self.label = label
        self.counts: Counter[str] = Counter()
        self.traced: dict[Any, Any] = {}
        self.requests: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the module does; gradients are not."""
        named = {key: value for key, value in keyword_arguments(self.signature, args, kwargs).items() if value is not None}
        tensors = _flatten(named)
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())
        key = (torch.get_num_threads(), shapes)
        if key not in self.requests:
            if len(self.requests) >= MAX_SHAPES:
                self.requests.pop(next(iter(self.requests)))
            self.requests[key] = self._compile(named, tensors)
        inputs = [tensor.detach().contiguous().numpy() for tensor in tensors.values()]
        self.counts[self.label] += 1
        output = torch.from_numpy(self.requests[key].infer(inputs, share_inputs=True)[0].copy())
        return output if self.module_returns_tensor else (output,)

    def _compile(self, named: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
        import openvino

        kinds = tuple((name, tensor.dim(), tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tensors.items())
        if kinds not in self.traced:
            self.traced[kinds] = self._trace(named, tensors)
        model = self.traced[kinds].clone()
        model.reshape({port: tuple(tensor.shape) for port, tensor in zip(model.inputs, tensors.values(), strict=True)})
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.counts[f"{self.label.removesuffix(' calls')} compilations"] += 1
        return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def _trace(self, named: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
        """Convert through the front end itself: `openvino.convert_model` reports every conversion to a server."""
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        probe = _Positional(self.forward, self.module, named, list(tensors)).eval()
        self.module_returns_tensor = named.get("return_dict") is None
        logging.getLogger("nncf").setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # every size is traced by itself
            example = tuple(tensors.values())
            graph = TorchScriptPythonDecoder(probe, example_input=example, trace_kwargs={"check_trace": False})
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(graph))


class _Positional(torch.nn.Module):
    """A module that takes its tensors in a row, as tracing wants them; everything else stays as it was."""

    def __init__(self, forward: Any, module: torch.nn.Module, named: dict[str, Any], names: list[str]) -> None:
        super().__init__()
        self.module = module  # so that its weights are this one's
        self.inner = forward
        self.named = named
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Put the tensors back where they came from."""
        given = dict(zip(self.names, tensors, strict=True))
        output = self.inner(**_unflatten(self.named, given))
        return output[0] if isinstance(output, tuple) else output


def _flatten(named: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value
        elif isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{name}.")
    return found


def _unflatten(named: dict[str, Any], given: dict[str, torch.Tensor], prefix: str = "") -> dict[str, Any]:
    return {
        name: given[prefix + name] if isinstance(value, torch.Tensor)
        else _unflatten(value, given, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in named.items()
    }  # fmt: skip
