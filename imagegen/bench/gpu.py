"""Our kernels on a GPU: whether each passes its check there, and its time in turn with what torch has for the same."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from imagegen.kernels import KERNELS, may_run
from imagegen.measure import device_name
from imagegen.roofline import find_gpu

FLUSH_BYTES = 256 * 2**20  # more than any GPU's second-level cache
# Shapes of SDXL, FLUX and the decoder at 1024²; the last of each is the tiny bench's.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "int8_linear": ((8192, 640, 640), (2048, 10240, 1280), (4608, 12288, 3072), (4608, 3072, 12288), (64, 48, 32)),
    "row_quantisation": ((8192, 640), (4608, 3072), (4608, 12288), (8, 32)),
    "group_norm_silu": ((2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32), (1, 128, 1024, 1024), (1, 32, 8, 8)),
    "guided_step": ((1, 4, 128, 128), (1, 16, 128, 128), (1, 4, 8, 8)),
}
Call = Callable[[], Any]


def measure_kernels(source: str, *, tiny: bool, device: str) -> dict[str, Any]:
    """Return for each kernel the verdict of its check, and its times in turn with torch's; or why it was skipped."""
    found: dict[str, Any] = {}
    for name, kernel in KERNELS.items():
        passed, reason = may_run(kernel, torch.device(device))
        shapes = SHAPES[name][-1:] if tiny else SHAPES[name][:-1]
        if passed:
            found[name] = {"passed": reason, "cases": [_measure(name, shape, device) for shape in shapes]}
        else:
            found[name] = {"skipped": reason}
    return {"kernels": found}


def _measure(name: str, shape: tuple[int, ...], device: str) -> dict[str, Any]:
    ours, torchs, flop, moved = CALLS[name](shape, torch.device(device))
    mine, others = _time_in_turn(ours, torchs, torch.device(device))
    gpu = find_gpu(device_name(torch.device(device))) if device != "cpu" else None
    share = None
    if gpu is not None:  # int8 products run at twice the rate of bfloat16
        least_s = max(flop / (2 * gpu.bf16_tflops * 1e12), moved / (gpu.memory_gbps * 1e9))
        share = least_s / statistics.median(mine)
    return {
        "shape": "x".join(map(str, shape)),
        "median_s": statistics.median(mine),
        "p10_s": _quantile(mine, 0.1),
        "p90_s": _quantile(mine, 0.9),
        "torch_median_s": statistics.median(others),
        "ratio": statistics.median(others) / statistics.median(mine),
        "share_of_peak": share,
    }


def _quantile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[round(share * (len(seconds) - 1))]


def _time_in_turn(first: Call, second: Call, device: torch.device) -> tuple[list[float], list[float]]:
    """Return the seconds of each call, one after the other, with the cache emptied before each."""
    on_gpu = device.type == "cuda"
    rounds = 50 if on_gpu else 3
    flush = torch.empty(FLUSH_BYTES if on_gpu else 1, dtype=torch.int8, device=device)
    for call in (first, second) * 3:
        call()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for seconds, call in zip(times, (first, second), strict=True):
            flush.zero_()
            seconds.append(_time_on_gpu(call) if on_gpu else _time_on_cpu(call))
    return times


def _time_on_gpu(call: Call) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _time_on_cpu(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _int8_linear(shape: tuple[int, ...], device: torch.device) -> tuple[Call, Call, int, int]:
    """Beside bfloat16's product with bias: what the layer would compute without quantisation."""
    rows, columns, inner = shape
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    w = torch.randn(columns, inner, device=device, dtype=torch.bfloat16) / inner**0.5
    bias = torch.randn(columns, device=device, dtype=torch.bfloat16)
    x8, x_scale = torch.ops.imagegen.quantise_rows(x)
    w8, w_scale = torch.ops.imagegen.quantise_rows(w)
    arguments = (x8, x_scale, w8, w_scale, bias, "none", None, None, torch.bfloat16)
    moved = x8.nbytes + w8.nbytes + 2 * rows * columns
    ours = lambda: torch.ops.imagegen.int8_linear(*arguments)  # noqa: E731
    return ours, lambda: F.linear(x, w, bias), 2 * rows * columns * inner, moved


def _quantise_rows(shape: tuple[int, ...], device: torch.device) -> tuple[Call, Call, int, int]:
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def by_torch() -> torch.Tensor:
        scale = x.abs().amax(1, keepdim=True).float() / 127
        return (x.float() / scale).round().to(torch.int8)

    return lambda: torch.ops.imagegen.quantise_rows(x), by_torch, 0, x.nbytes + x.numel()


def _group_norm_silu(shape: tuple[int, ...], device: torch.device) -> tuple[Call, Call, int, int]:
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], device=device, dtype=torch.bfloat16) for _ in range(2))
    ours = lambda: torch.ops.imagegen.group_norm_silu(x, 32, weight, bias, 1e-5, True)  # noqa: E731
    return ours, lambda: F.silu(F.group_norm(x, 32, weight, bias, 1e-5)), 0, 2 * x.nbytes


def _guided_step(shape: tuple[int, ...], device: torch.device) -> tuple[Call, Call, int, int]:
    x, without, given = (torch.randn(shape, device=device) for _ in range(3))
    ours = lambda: torch.ops.imagegen.guided_step(x, without, given, 4.0, 1.0, -0.1)  # noqa: E731
    return ours, lambda: x - 0.1 * (without + 4.0 * (given - without)), 0, 4 * x.nbytes


CALLS: dict[str, Callable[[tuple[int, ...], torch.device], tuple[Call, Call, int, int]]] = {
    "int8_linear": _int8_linear,
    "row_quantisation": _quantise_rows,
    "group_norm_silu": _group_norm_silu,
    "guided_step": _guided_step,
}
