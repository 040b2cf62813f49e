"""One step of a denoiser of known size with random weights: each plan in turn with eager mode, in one process.

The weights are random, so the errors are indicative only; the times are a real model's.
"""

import gc
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch

from imagegen.families.denoisers import ARCHITECTURES, Architecture, make_denoiser, make_inputs
from imagegen.levers import RunFacts
from imagegen.measure import device_name, peak_memory_gib, reset_peak_memory, synchronise
from imagegen.request import PlanError
from imagegen.roofline import Estimate, Part, count, find_gpu
from imagegen.speed import AppliedPlan, Plan

EAGER = "eager"
HOPELESS = 3  # a plan that many times slower than eager mode is not worth the minutes of another round
CPU_PLANS = (*("channels-last", "bf16", "int8-dynamic", "int8-weight-only", "compile", "openvino", "openvino(precision=bf16)"),)
CUDA_PLANS = (
    *("channels-last", "fused-norm", "cuda-graph", "compile", "compile(mode=reduce-overhead)"),
    *("int8-dynamic", "int8-weight-only", "int8-fused", "fp8", "layerwise-casting", "compile + fp8", "compile + int8-dynamic"),
    *(f"attention(backend={name})" for name in ("_native_flash", "_native_cudnn", "_native_efficient", "_native_math")),
    *(f"attention(backend={name})" for name in ("flash_hub", "_flash_3_hub", "sage_hub")),
)


def plans_of(device: str) -> tuple[str, ...]:
    """Return the plans that are measured on a device, eager first."""
    return (EAGER, *(CPU_PLANS if device == "cpu" else CUDA_PLANS))


@torch.no_grad()
def measure_denoiser(
    source: str, *, tiny: bool, device: str, architecture: str, size_px: int | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Return each plan's seconds for one call with both rows of guidance, and its error against eager mode.

    Args:
        source: not used: every stage takes the model.
        tiny: a tiny denoiser of the same make.
        device: `cpu` or `cuda`.
        architecture: of `ARCHITECTURES`.
        size_px: width and height; the native ones by default.
        threads: on the CPU; as many as torch takes by default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    own = ARCHITECTURES[architecture]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    eager = make_denoiser(own, device, dtype, tiny)
    inputs = make_inputs(own, device, dtype, size_px=size_px, tiny=tiny)
    reference = eager(**inputs)[0]
    rows, refused = {}, {}
    for name in plans_of(device):
        if tiny and "compile" in name:
            refused[name] = "compiling takes most of a minute: left out of the tiny bench"
            continue
        try:
            rows[name] = _measure_plan(name, own, eager, inputs, reference, tiny)
        except (PlanError, RuntimeError, ValueError) as error:  # a plan that cannot run here leaves the others alone
            refused[name] = " ".join(str(error).split())[:300]
        gc.collect()
    found = {"rows": rows, "refused": refused, "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    return found | _predict(own, device, dtype, size_px, tiny)


def _measure_plan(
    name: str, own: Architecture, eager: torch.nn.Module, inputs: dict[str, Any], reference: torch.Tensor, tiny: bool
) -> dict[str, Any]:
    """Measure one plan and eager mode in turn; the plan's module has the same weights, and may be changed."""
    device = reference.device
    rounds = 2 if tiny else 3 if device.type == "cpu" else 20
    module = _twin(own, eager, tiny)
    applied = _apply(name, module)
    seconds: dict[str, list[float]] = {EAGER: [], name: []}

    def run(which: str) -> torch.Tensor:
        synchronise(device)
        started = time.perf_counter()
        if which == EAGER:
            output = eager(**inputs)[0]
        else:
            with applied.running(RunFacts(own.rows == 2, 1)):
                output = module(**inputs)[0]
        synchronise(device)
        seconds[which].append(time.perf_counter() - started)
        return output

    try:
        reset_peak_memory(device)
        output = run(name)  # compiles
        first_s = seconds[name].pop()
        for which in (name, EAGER):
            run(which)
        hopeless = seconds[name][-1] > HOPELESS * seconds[EAGER][-1]
        for times_s in seconds.values():
            times_s.clear()
        for _ in range(1 if hopeless else rounds):
            for which in dict.fromkeys((EAGER, name)):
                run(which)
        memory_gib, engaged = peak_memory_gib(device), applied.report()
    finally:
        applied.undo()
    error = float((output.float() - reference.float()).norm() / reference.float().norm())
    times, eager_s = _spread(seconds[name]), statistics.median(seconds[EAGER])
    row = {"first_s": first_s, "error": error, "memory_gib": memory_gib, "engaged": engaged}
    return row | times | {"eager_median_s": eager_s, "ratio": eager_s / times["median_s"]}


def _spread(seconds: list[float]) -> dict[str, float]:
    """Return a median with its 10th and 90th percentiles."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median_s": statistics.median(ordered),
        "p10_s": ordered[round(0.1 * last)],
        "p90_s": ordered[round(0.9 * last)],
    }


def _twin(own: Architecture, eager: torch.nn.Module, tiny: bool) -> torch.nn.Module:
    """Return another module on the same tensors."""
    twin = make_denoiser(own, "meta", next(eager.parameters()).dtype, tiny)
    twin.load_state_dict(eager.state_dict(), assign=True)
    for name, buffer in eager.named_buffers():  # those that no checkpoint holds
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner)._buffers[leaf] = buffer
    return twin


def _apply(name: str, module: torch.nn.Module) -> AppliedPlan:
    part = "unet" if hasattr(module, "down_blocks") else "transformer"
    pipeline = SimpleNamespace(**{part: module}, components={part: module})
    return AppliedPlan(Plan(name, () if name == EAGER else tuple(name.split(" + "))), pipeline)


def _predict(own: Architecture, device: str, dtype: torch.dtype, size_px: int | None, tiny: bool) -> dict[str, Any]:
    """Return the least time by this GPU's data sheet, an estimate; nothing where the sheet is not known."""
    if device == "cpu":
        return {"estimated_s": None}
    gpu = find_gpu(device_name(torch.device(device)))
    if gpu is None:
        return {"estimated_s": None}
    twin, inputs = make_denoiser(own, "meta", dtype, tiny), make_inputs(own, "meta", dtype, size_px=size_px, tiny=tiny)
    work = count(twin, lambda: twin(**inputs))
    return {"estimated_s": Estimate(own.name, gpu, dtype, [Part("denoiser", 1, work)]).seconds(work), "estimated_for": gpu.title}
