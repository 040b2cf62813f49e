"""A linear layer of whole numbers: int8 · int8 summed in int32, and everything that follows before the one write."""

import triton
import triton.language as tl

INVERSE_ROOT_2 = tl.constexpr(0.7071067811865476)
ROOT_8_OVER_PI = tl.constexpr(1.5957691216057308)  # twice √(2/π): tanh(u) is 2·sigmoid(2u) − 1


@triton.jit
def gelu_erf(y):
    """GELU as it is defined."""
    return 0.5 * y * (1.0 + tl.erf(y * INVERSE_ROOT_2))


@triton.jit
def gelu_tanh(y):
    """GELU by its approximation with tanh, which is what torch calls `approximate="tanh"`."""
    return y * tl.sigmoid((y + 0.044715 * y * y * y) * ROOT_8_OVER_PI)


@triton.jit
def int8_linear(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    gate,
    operand,
    out,
    M,
    N,
    K,
    rows_per_gate,
    EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Write epilogue(x·wᵀ·scales + bias) for x (M, K) and w (N, K); one program per tile of (M, N).

    Programs walk through groups of `GROUP_M` rows of tiles, so that those running together share what they read in
    the second-level cache. The 32-bit sums never leave the registers.
    """
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    start_m = (group * GROUP_M + within % group_rows) * BLOCK_M
    start_n = (within // group_rows) * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    has_row, has_column = m < M - start_m, n < N - start_n

    x_tile = x + start_m.to(tl.int64) * K + m[:, None] * K + k[None, :]
    w_tile = w + start_n.to(tl.int64) * K + n[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for block in range(0, tl.cdiv(K, BLOCK_K)):
        has_k = k < K - block * BLOCK_K
        left = tl.load(x_tile, mask=has_row[:, None] & has_k[None, :], other=0)
        right = tl.load(w_tile, mask=has_k[:, None] & has_column[None, :], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        x_tile += BLOCK_K
        w_tile += BLOCK_K

    row_scale = tl.load(x_scale + start_m + m, mask=has_row, other=0.0)
    column_scale = tl.load(w_scale + start_n + n, mask=has_column, other=0.0)
    y = total.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    if bias is not None:
        y += tl.load(bias + start_n + n, mask=has_column, other=0.0).to(tl.float32)[None, :]
    inside = has_row[:, None] & has_column[None, :]
    offset = start_m.to(tl.int64) * N + start_n
    place = m[:, None] * N + n[None, :]
    if EPILOGUE == "gelu-tanh":
        y = gelu_tanh(y)
    if EPILOGUE == "gelu-erf":
        y = gelu_erf(y)
    if EPILOGUE == "geglu":
        y = gelu_erf(y) * tl.load(operand + offset + place, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == "gate-residual":
        gated = ((start_m + m) // rows_per_gate)[:, None] * N + (start_n + n)[None, :]
        y = y * tl.load(gate + gated, mask=inside, other=0.0).to(tl.float32)
        y += tl.load(operand + offset + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset + place, y.to(out.dtype.element_ty), mask=inside)
