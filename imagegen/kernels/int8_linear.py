"""A linear layer in 8-bit whole numbers (W8A8) that ends in what follows the layer: dequantisation, bias, epilogue.

torch's own int8 product writes 32-bit sums to memory and reads them again to scale them; here they stay in registers.
The epilogues are those of diffusers' transformers:

- `none`: attention's projections and whatever else is linear;
- `gelu-tanh`: `GELU(approximate="tanh")` and FLUX' `act_mlp`, in FLUX, SD3 and PixArt;
- `gelu-erf`: `GELU()`;
- `geglu`: the UNets' `GEGLU`, value · GELU(gate), in two calls: the value by `none`, then the gate with the value as
  `operand`. Each call takes its half of the weight, so nothing is computed or written twice;
- `gate-residual`: gate · y + residual, as adaptive blocks end; no lever uses it yet, because the gate stands in the
  forward methods of whole blocks.

The tiles are chosen by what fits each architecture's registers and shared memory, not by a measurement.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from imagegen.kernels.dispatch import compute
from imagegen.kernels.kernel import Case, Kernel, Tensors, capability_of, divide_up

EPILOGUES = ("none", "gelu-tanh", "gelu-erf", "geglu", "gate-residual")
GROUP_M = 8  # rows of tiles that walk through the columns together
MIN_INNER = 32  # of K: the smallest matrix instruction takes 32 bytes


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with how much."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


FEW_ROWS = 64
SMALL = Tile(64, 64, 128, 4, 3)
TILES = {
    (8, 0): Tile(128, 128, 128, 8, 3),
    (8, 6): Tile(128, 128, 64, 8, 3),
    (8, 9): Tile(128, 128, 64, 8, 3),
    (9, 0): Tile(128, 128, 128, 8, 4),
    (10, 0): Tile(128, 128, 128, 8, 3),
    (12, 0): Tile(128, 128, 64, 8, 3),
}


def tile_for(capability: tuple[int, int], rows: int) -> Tile:
    """Return the tile for a product of so many rows."""
    return SMALL if rows <= FEW_ROWS else TILES[capability]


def _finish(y: torch.Tensor, epilogue: str, gate: torch.Tensor | None, operand: torch.Tensor | None) -> torch.Tensor:
    """Return the epilogue of (M, N), in its dtype."""
    if epilogue == "gelu-tanh":
        return F.gelu(y, approximate="tanh")
    if epilogue == "gelu-erf":
        return F.gelu(y)
    if epilogue == "geglu":
        assert operand is not None
        return F.gelu(y) * operand.to(y.dtype)
    if epilogue == "gate-residual":
        assert gate is not None and operand is not None
        return gate.to(y.dtype).repeat_interleave(len(y) // len(gate), 0) * y + operand.to(y.dtype)
    return y


def _multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return the exact x·wᵀ: in int32 where torch has it, else in float64, which holds every such sum."""
    if x.device.type == "cpu":
        return torch._int_mm(x, w.t())
    return x.double() @ w.double().t()


def _reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    gate: torch.Tensor | None,
    operand: torch.Tensor | None,
    dtype: torch.dtype,
) -> Tensors:
    y = _multiply(x, w).float() * x_scale[:, None] * w_scale
    return (_finish(y if bias is None else y + bias.float(), epilogue, gate, operand).to(dtype),)


def _exact(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    gate: torch.Tensor | None,
    operand: torch.Tensor | None,
    dtype: torch.dtype,
) -> Tensors:
    y = (x.double() @ w.double().t()) * x_scale.double()[:, None] * w_scale.double()
    return (_finish(y if bias is None else y + bias.double(), epilogue, gate, operand),)


def _allocate(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    gate: torch.Tensor | None,
    operand: torch.Tensor | None,
    dtype: torch.dtype,
) -> Tensors:
    return (x.new_empty((x.shape[0], w.shape[0]), dtype=dtype),)


def _launch(
    outputs: Tensors,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    gate: torch.Tensor | None,
    operand: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    from imagegen.kernels.device import int8_linear as code

    (rows, inner), columns = x.shape, len(w)
    tile = tile_for(capability_of(x.device), rows)
    optional = [None if tensor is None else tensor.contiguous() for tensor in (bias, gate, operand)]
    code.int8_linear[(divide_up(rows, tile.m) * divide_up(columns, tile.n),)](
        x.contiguous(), w.contiguous(), x_scale.contiguous(), w_scale.contiguous(), *optional, *outputs,
        rows, columns, inner, rows if gate is None else rows // len(gate),
        EPILOGUE=epilogue, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=GROUP_M,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _cases(device: torch.device) -> Iterator[Case]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(17, 45, 61), (70, 150, 257), (130, 144, 128)]  # rows, columns, inner: few rows, odd, and whole blocks of K
    if device.type == "cuda":
        sizes.append((1111, 1280, 1296))
    for rows, columns, inner in sizes:
        x = torch.randint(-127, 128, (rows, inner), generator=draw, dtype=torch.int8).to(device)
        w = torch.randint(-127, 128, (columns, inner), generator=draw, dtype=torch.int8).to(device)
        x_scale, w_scale = (torch.rand(size, generator=draw).to(device) / (80 * inner**0.25) for size in (rows, columns))
        bias, operand, gate = (
            torch.randn(shape, generator=draw) for shape in ((columns,), (rows, columns), (2 - rows % 2, columns))
        )
        for epilogue in EPILOGUES:
            for dtype in (torch.float32, torch.bfloat16) if epilogue == "none" else (torch.float16,):
                beside = [tensor.to(device, dtype) for tensor in (bias, gate, operand)]
                yield Case(f"{rows}x{columns}x{inner} {epilogue} {dtype}",
                           (x, x_scale, w, w_scale, beside[0], epilogue, *beside[1:], dtype), 1e-5)  # fmt: skip
        plain = (x, x_scale, w, w_scale, None, "none", None, None, torch.float32)
        yield Case(f"{rows}x{columns}x{inner} without a bias", plain, 1e-5)


KERNEL = Kernel("int8_linear", _allocate, _launch, _reference, _exact, _cases)


@torch.library.custom_op("imagegen::int8_linear", mutates_args=())
def int8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    gate: torch.Tensor | None,
    operand: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return epilogue(x·wᵀ · x_scale · w_scale + bias): sums in int32, the rest in float32, rounded once.

    Args:
        x: (M, K) int8 in [-127, 127], as `quantise_rows` returns it.
        x_scale: (M,) float32, one for each row of `x`.
        w: (N, K) int8 in [-127, 127].
        w_scale: (N,) float32, one for each output.
        bias: (N,), any floating dtype, or None.
        epilogue: one of `EPILOGUES`.
        gate: for `gate-residual` (B, N), where B divides M: each row serves M/B rows.
        operand: for `gate-residual` the residual, for `geglu` the value; (M, N).
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        (M, N) of `dtype`.

    Raises:
        ValueError: the epilogue is unknown, or lacks its tensors.

    Source: gelu: Hendrycks and Gimpel (2016), https://arxiv.org/abs/1606.08415; geglu: Shazeer (2020),
    https://arxiv.org/abs/2002.05202, equation 6.
    """
    if epilogue not in EPILOGUES:
        raise ValueError(f"unknown epilogue {epilogue!r}: there are {', '.join(EPILOGUES)}")
    needed = {"geglu": [operand], "gate-residual": [gate, operand]}.get(epilogue, [])
    if any(tensor is None for tensor in needed):
        raise ValueError(f"the epilogue {epilogue} needs its tensors: operand, and for gate-residual gate as well")
    return compute(KERNEL, x.device, x, x_scale, w, w_scale, bias, epilogue, gate, operand, dtype)[0]


@int8_linear.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    gate: torch.Tensor | None,
    operand: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _allocate(x, x_scale, w, w_scale, bias, epilogue, gate, operand, dtype)[0]
