"""Activations as 8-bit whole numbers with one scale a row, found at run time: the first half of an int8 linear layer."""

from collections.abc import Iterator

import torch

from imagegen.kernels.dispatch import compute
from imagegen.kernels.kernel import Case, Kernel, Tensors, next_power_of_two

MAX_BLOCK = 2048  # elements of a row at a time
LEAST_PEAK = 1e-30  # a row of zeros is divided by this, not by zero


def _reference(x: torch.Tensor) -> Tensors:
    """Every operation rounds as IEEE 754 says, so that the kernel gives the same bits."""
    values = x.float()
    peak = values.abs().amax(1).clamp(min=LEAST_PEAK)
    top = torch.full_like(peak, 127)  # a tensor: torch divides by a number, or a number, through its reciprocal
    quantised = (values * (top / peak)[:, None]).clamp(-127, 127).round()
    return quantised.to(torch.int8), peak / top


def _exact(x: torch.Tensor) -> Tensors:
    quantised, scale = _reference(x)
    return quantised, scale.double()


def _allocate(x: torch.Tensor) -> Tensors:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _launch(outputs: Tensors, x: torch.Tensor) -> None:
    from imagegen.kernels.device import row_quantisation as code

    rows, features = x.shape
    block = min(MAX_BLOCK, next_power_of_two(features))
    code.quantise_rows[(rows,)](x.contiguous(), *outputs, features, BLOCK=block, num_warps=4)


def _cases(device: torch.device) -> Iterator[Case]:
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((3, 13), (5, 128), (2, 2200)):  # less than a block, whole blocks, blocks and a rest
            x = torch.randn(shape, generator=draw)
            x[0] = 0
            yield Case(f"{dtype} {shape}", (x.to(device, dtype),))
    halves = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5]], device=device)
    yield Case("halves", (halves,))


KERNEL = Kernel("row_quantisation", _allocate, _launch, _reference, _exact, _cases)


@torch.library.custom_op("imagegen::quantise_rows", mutates_args=())
def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as whole numbers, and what they are multiplied by to come back.

    Args:
        x: (M, K), float32, float16 or bfloat16, finite.

    Returns:
        (M, K) int8 in [-127, 127], and (M,) float32 above 0.
    """
    quantised, scale = compute(KERNEL, x.device, x)
    return quantised, scale


@quantise_rows.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quantised, scale = _allocate(x)
    return quantised, scale
