"""GroupNorm with or without the SiLU that follows it, for memory with channels last; statistics in float32.

Stock torch turns such a tensor round, normalises it and reads it once more for SiLU; the kernel reads it twice and
writes it once. Knows nothing of the modules that it stands in for.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from imagegen.kernels.dispatch import compute
from imagegen.kernels.kernel import Case, Kernel, Tensors, divide_up, next_power_of_two

ROWS, CHANNELS = 32, 64  # the tile: 64 channels of 16 bits are the 128 bytes of a cache line
MIN_CHUNK_ROWS = 128
MAX_CHUNKS = 256  # enough to fill a GPU together with pictures and channel blocks, few enough to join quickly
JOINED_CHUNKS = 16  # chunks that `group_scales` joins at a time


def _to_rows(x: torch.Tensor) -> torch.Tensor:
    """Return (N, …, C), contiguous: no copy where the channels are last in memory already."""
    return x.movedim(1, -1).contiguous()


def _reference(x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, silu: bool) -> Tensors:
    x_float = x.float().contiguous()  # with channels last torch's CPU loses digits: 5e-4 at a mean of 30
    y = F.group_norm(x_float, num_groups, weight.float(), bias.float(), eps)
    return (_to_rows((F.silu(y) if silu else y).to(x.dtype)).movedim(-1, 1),)


def _exact(x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, silu: bool) -> Tensors:
    """Written out, so that it shares nothing with the reference."""
    groups = x.double().reshape(x.shape[0], num_groups, -1)
    off = groups - groups.mean(2, keepdim=True)
    y = (off / (off.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    along = (1, -1) + (1,) * (x.dim() - 2)
    y = y * weight.double().reshape(along) + bias.double().reshape(along)
    return (y / (1 + torch.exp(-y)) if silu else y,)


def _allocate(x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, silu: bool) -> Tensors:
    return (x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1),)


def _launch(
    outputs: Tensors,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
) -> None:
    from imagegen.kernels.device import group_norm_silu as code

    pictures, channels = x.shape[:2]
    rows = _to_rows(x)
    length = rows.shape[1:-1].numel()
    chunk_rows = max(MIN_CHUNK_ROWS, next_power_of_two(divide_up(length, MAX_CHUNKS)))
    chunks, blocks = divide_up(length, chunk_rows), divide_up(channels, CHANNELS)
    group_channels = channels // num_groups
    mean, deviations = x.new_empty((2, pictures, chunks, channels), dtype=torch.float32)
    scale, shift = x.new_empty((2, pictures, channels), dtype=torch.float32)

    tile = {"ROWS": ROWS, "CHANNELS": CHANNELS, "num_warps": 4}
    code.chunk_statistics[(chunks, blocks, pictures)](rows, mean, deviations, length, channels, chunk_rows, **tile)
    code.group_scales[(num_groups, pictures)](
        mean, deviations, weight.contiguous(), bias.contiguous(), scale, shift,
        length, channels, chunks, chunk_rows, group_channels, 1 / (length * group_channels), eps,
        CHUNKS=JOINED_CHUNKS, CHANNELS=next_power_of_two(group_channels), num_warps=4,
    )  # fmt: skip
    grid = (divide_up(length, ROWS), blocks, pictures)
    code.scale_shift[grid](rows, outputs[0], scale, shift, length, channels, SILU=silu, **tile)


def _cases(device: torch.device) -> Iterator[Case]:
    draw = torch.Generator().manual_seed(0)
    shapes = [((1, 12, 3, 5), 3, 0.0), ((2, 72, 13, 11), 8, 0.0), ((1, 96, 8, 16), 8, 30.0)]
    if device.type == "cuda":
        shapes += [((2, 320, 67, 61), 32, 0.0), ((1, 128, 300, 301), 32, 3.0)]
    for shape, num_groups, offset in shapes:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = (torch.randn(shape, generator=draw) + offset).to(device, dtype, memory_format=torch.channels_last)
            weight, bias = (torch.randn(shape[1], generator=draw).to(device, dtype) for _ in range(2))
            tolerance = 1e-5 * (1 + offset)
            for silu in (True, False) if dtype == torch.float32 else (True,):
                yield Case(f"{dtype} {shape} SiLU {silu}", (x, num_groups, weight, bias, 1e-5, silu), tolerance)
    sequence = torch.randn(2, 24, 65, generator=draw).to(device)
    yield Case("(N, C, L)", (sequence, 4, torch.ones(24, device=device), torch.zeros(24, device=device), 1e-6, False), 1e-5)


KERNEL = Kernel("group_norm_silu", _allocate, _launch, _reference, _exact, _cases)


@torch.library.custom_op("imagegen::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, silu: bool
) -> torch.Tensor:
    """Return GroupNorm of `x`, and its SiLU if wanted, in float32 arithmetic, rounded once.

    Args:
        x: (N, C, …), float32, float16 or bfloat16; with channels last in memory nothing is copied.
        num_groups: divides C.
        weight: (C,), any floating dtype.
        bias: (C,), any floating dtype.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        (N, C, …) of the dtype of `x`, always with channels last in memory, as convolutions want it.

    Source: Wu and He (2018), https://arxiv.org/abs/1803.08494, equation 1.
    """
    return compute(KERNEL, x.device, x, num_groups, weight, bias, eps, silu)[0]


@group_norm_silu.register_fake
def _(x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float, silu: bool) -> torch.Tensor:
    return _allocate(x, num_groups, weight, bias, eps, silu)[0]
