"""Each row of activations scaled to 8-bit whole numbers by its own largest value."""

import triton
import triton.language as tl

# In float32 a number below 2²² plus this has no bits left behind the point: adding and taking it away rounds to the
# nearest whole number, halves to the even one, as torch.round does, in the interpreter as well as on a device.
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³


@triton.jit
def quantise_rows(x, quantised, scale, K, BLOCK: tl.constexpr):
    """Write x/scale rounded, int8, and the row's scale; one program per row, which it reads twice."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * K
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, tl.cdiv(K, BLOCK)):
        at = block * BLOCK + lane
        largest = tl.maximum(largest, tl.abs(tl.load(x + start + at, mask=at < K, other=0.0).to(tl.float32)))
    peak = tl.maximum(tl.max(largest, 0), 1e-30)
    factor = tl.div_rn(127.0, peak)
    for block in range(0, tl.cdiv(K, BLOCK)):
        at = block * BLOCK + lane
        value = tl.load(x + start + at, mask=at < K, other=0.0).to(tl.float32) * factor
        value = tl.minimum(tl.maximum(value, -127.0), 127.0)  # also keeps product and sum apart: fused, they round once
        tl.store(quantised + start + at, ((value + ROUNDER) - ROUNDER).to(tl.int8), mask=at < K)
    tl.store(scale + row, tl.div_rn(peak, 127.0))
