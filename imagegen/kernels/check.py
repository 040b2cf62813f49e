"""Whether a kernel computes right on a device: against float64, inside its buffers, and the same every time.

Inputs lie between poison (NaN, or the lowest whole number), so that a load without its mask spoils the result.
Outputs lie between canaries, so that a store without its mask is seen. Several launches are compared bit for bit:
a race shows as a difference. Knows nothing of what may run, or of what is remembered.
"""

from collections.abc import Iterator
from typing import Any

import torch

from imagegen.kernels.kernel import Case, Kernel, Tensors

GUARD = 1 << 16  # elements on either side, more than any block of these cases reaches: a stray store stays in the buffer
REPEATS = 5
CANARY = 77


def check_kernel(kernel: Kernel, device: torch.device, repeats: int = REPEATS) -> str:
    """Return what is wrong with a kernel on a device, in words; empty where every case passes.

    Args:
        kernel: the kernel.
        device: where it runs; the CPU for Triton's interpreter.
        repeats: launches of each case, which must agree; 1 will do where nothing runs at the same time.

    Raises:
        Exception: whatever the compiler, the driver or the memory raises; the check then says nothing.
    """
    for case in kernel.cases(device):
        wanted = kernel.exact(*case.arguments)
        for aligned in (True, False):  # without alignment to 16 bytes other code is compiled
            for wrong in _run_case(kernel, case, wanted, aligned, repeats):
                return f"{case.label}, {'aligned' if aligned else 'not aligned'}: {wrong}"
    return ""


def _run_case(kernel: Kernel, case: Case, wanted: Tensors, aligned: bool, repeats: int) -> Iterator[str]:
    """Yield what is wrong with a case."""
    margin = GUARD if aligned else GUARD + 1
    arguments = [_poisoned(argument, margin) for argument in case.arguments]
    first: list[torch.Tensor] = []
    for _ in range(repeats):
        buffers, outputs = zip(*(_guarded(output, margin) for output in kernel.allocate(*arguments)), strict=True)
        kernel.launch(outputs, *arguments, **case.options)
        for buffer, output, exact in zip(buffers, outputs, wanted, strict=True):
            yield from _compare(output, exact, case.tolerance)
            if (buffer[:margin] != CANARY).any() or (buffer[margin + output.numel() :] != CANARY).any():
                yield "it writes outside its output"
        first = first or [output.clone() for output in outputs]
        if not all(torch.equal(output, before) for output, before in zip(outputs, first, strict=True)):
            yield "two launches differ"


def _compare(output: torch.Tensor, exact: torch.Tensor, tolerance: float) -> Iterator[str]:
    """Yield by how much an output leaves one unit in its last place, or for whole numbers any difference, if it does."""
    if not output.dtype.is_floating_point:
        wrong = int((output != exact).sum())
        if wrong:
            yield f"{wrong} of {exact.numel()} whole numbers are wrong"
        return
    error = (output.double() - exact).abs()
    excess = error - (unit_in_last_place(exact, output.dtype) + tolerance)
    if not bool((excess <= 0).all()):  # NaN is no number below zero
        yield f"the largest error is {error.max().item():.3g}, {excess.max().item():.3g} more than it may be"


def unit_in_last_place(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the spacing of a dtype's numbers around exact values, (…) float64."""
    _, exponent = torch.frexp(exact)
    return torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent - 1)


def _poisoned(argument: Any, margin: int) -> Any:
    """Return a tensor with equal values and strides inside a buffer of poison; other arguments as they are."""
    if not isinstance(argument, torch.Tensor):
        return argument
    poison = float("nan") if argument.dtype.is_floating_point else torch.iinfo(argument.dtype).min
    buffer = argument.new_full((argument.numel() + 2 * margin,), poison)
    return buffer.as_strided(argument.shape, argument.stride(), margin).copy_(argument)


def _guarded(output: torch.Tensor, margin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a buffer of canaries, and an output like this one inside."""
    buffer = output.new_full((output.numel() + 2 * margin,), CANARY)
    return buffer, buffer.as_strided(output.shape, output.stride(), margin)
