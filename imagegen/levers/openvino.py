"""A torch module computed by OpenVINO, one compilation for every set of shapes."""

import inspect
import logging
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from imagegen.levers.lever import Style, keyword_arguments, map_tensors, shapes_of, tensors_of
from imagegen.request import PlanError

MAX_SHAPES = 6  # every compilation holds a copy of the weights


def cannot_read(module: torch.nn.Module) -> str:
    """Say what OpenVINO cannot do, and the way out."""
    return f"OpenVINO cannot read this model's network, a {type(module).__name__}: use compile"


class Compiled:
    """Stands for a module's `forward`: traces it for every size of picture, compiles it for every set of shapes.

    A trace holds for any batch, not for another size: a UNet takes other branches where a side cannot be halved. What
    is no tensor is constant in it: another such argument, or another strength of a style, is traced anew.
    """

    def __init__(self, module: torch.nn.Module, precision: str, label: str) -> None:
        """Remember the module; nothing is compiled before the first call."""
        self.module = module
        self.forward = module.forward
        self.signature = inspect.signature(self.forward)
        self.precision = precision
        self.label = label
        self.style = Style(module)
        self.counts: Counter[str] = Counter()
        self.traced: dict[Any, _Trace] = {}
        self.requests: dict[Any, tuple[Any, type]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the module does; gradients are not."""
        named = keyword_arguments(self.signature, args, kwargs)
        key = (torch.get_num_threads(), shapes_of(named), self.style.key())
        if key not in self.requests:
            _keep(self.requests, key, self._compile(named))
        request, kind = self.requests[key]
        inputs = [tensor.detach().contiguous().numpy() for tensor in tensors_of(named)]
        self.counts[self.label] += 1
        output = torch.from_numpy(request.infer(inputs, share_inputs=True)[0].copy())
        return output if kind is torch.Tensor else (output,) if kind is tuple else kind(output)

    def _compile(self, named: dict[str, Any]) -> tuple[Any, type]:
        """Return what computes these shapes, and the kind of output that the module gives."""
        import openvino

        key = (str(map_tensors(lambda tensor: (tensor.dim(), tuple(tensor.shape[1:]), tensor.dtype), named)), self.style.key())
        if key not in self.traced:
            _keep(self.traced, key, self._trace(named))
        trace = self.traced[key]
        model = trace.model.clone()
        model.reshape({port: tuple(tensor.shape) for port, tensor in zip(model.inputs, tensors_of(named), strict=True)})
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.counts[f"{self.label.removesuffix(' calls')} compilations"] += 1
        return openvino.Core().compile_model(model, "CPU", settings).create_infer_request(), trace.kind

    def _trace(self, named: dict[str, Any]) -> "_Trace":
        """Convert through the front end itself: `openvino.convert_model` reports every conversion to a server.

        Raises:
            PlanError: OpenVINO lacks something that the module does.
        """
        from openvino.frontend import FrontEndManager, GeneralFailure, OpConversionFailure, OpValidationFailure
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        probe = _Positional(self.forward, self.module, named).eval()
        logging.getLogger("nncf").setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # every size is traced by itself
            example = tuple(tensors_of(named))
            graph = TorchScriptPythonDecoder(probe, example_input=example, trace_kwargs={"check_trace": False})
        frontend = FrontEndManager().load_by_framework("pytorch")
        try:
            return _Trace(frontend.convert(frontend.load(graph)), probe.kind)
        except (GeneralFailure, OpConversionFailure, OpValidationFailure) as error:
            raise PlanError(cannot_read(self.module)) from error


@dataclass(frozen=True)
class _Trace:
    """A module as OpenVINO knows it, and the kind of output that its `forward` gave."""

    model: Any
    kind: type


class _Positional(torch.nn.Module):
    """A module that takes its tensors in a row, as tracing wants them; everything else stays as it was."""

    kind: type = torch.Tensor

    def __init__(self, forward: Any, module: torch.nn.Module, named: dict[str, Any]) -> None:
        super().__init__()
        self.module = module  # so that its weights are this one's
        self.inner = forward
        self.named = named

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Put the tensors back where they came from."""
        given = iter(tensors)
        output = self.inner(**map_tensors(lambda _: next(given), self.named))
        self.kind = type(output)
        return output if isinstance(output, torch.Tensor) else output[0]


def _keep(store: dict[Any, Any], key: Any, value: Any) -> None:
    """Store a value, in the place of the oldest where there are too many."""
    if len(store) >= MAX_SHAPES:
        store.pop(next(iter(store)))
    store[key] = value
