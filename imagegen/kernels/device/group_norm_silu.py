"""GroupNorm and SiLU over memory with channels last, (N, L, C), in three kernels without atomics.

`chunk_statistics` takes each channel's mean and squared deviations over a chunk of rows, `group_scales` joins chunks
and channels into one scale and shift per channel, and `scale_shift` applies them: two reads and one write of the
tensor. Deviations are summed from the mean (Chan et al., 1979), not as a difference of squares, which cancels where
the mean is large. Sums have a fixed order, so that two runs agree bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def chunk_statistics(x, mean, deviations, L, C, chunk_rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write mean and summed squared deviations of every channel over a chunk of rows, (N, chunks, C) float32."""
    chunk, picture = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, L)
    running_mean = tl.zeros((CHANNELS,), tl.float32)
    running = tl.zeros((CHANNELS,), tl.float32)
    for block in range(0, tl.cdiv(last - first, ROWS)):
        start = first + block * ROWS
        base = x + (picture.to(tl.int64) * L + start) * C
        inside = (row[:, None] < last - start) & (channel[None, :] < C)
        tile = tl.load(base + row[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        before = (start - first).to(tl.float32)
        here = tl.minimum(last - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(tile, 0) / here
        off = tl.where(inside, tile - tile_mean[None, :], 0.0)
        apart = tile_mean - running_mean
        running += tl.sum(off * off, 0) + apart * apart * (before * here / (before + here))
        running_mean += apart * (here / (before + here))
    at = (picture * tl.num_programs(0) + chunk) * C + channel
    tl.store(mean + at, running_mean, mask=channel < C)
    tl.store(deviations + at, running, mask=channel < C)


@triton.jit
def group_scales(
    mean,
    deviations,
    weight,
    bias,
    scale,
    shift,
    L,
    C,
    chunks,
    chunk_rows,
    group_channels,
    inverse_size,
    eps,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write what every channel is multiplied by and what is added then, (N, C) float32; one program per group."""
    group, picture = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, CHANNELS)
    wanted = lane < group_channels
    channel = group * group_channels + lane
    total = tl.zeros((CHANNELS,), tl.float32)
    for block in range(0, tl.cdiv(chunks, CHUNKS)):
        chunk = block * CHUNKS + tl.arange(0, CHUNKS)
        inside = (chunk[:, None] < chunks) & wanted[None, :]
        at = (picture * chunks + chunk[:, None]) * C + channel[None, :]
        count = tl.minimum(chunk_rows, L - chunk * chunk_rows).to(tl.float32)
        total += tl.sum(tl.load(mean + at, mask=inside, other=0.0) * count[:, None], 0)
    group_mean = tl.sum(total, 0) * inverse_size
    squares = tl.zeros((CHANNELS,), tl.float32)
    for block in range(0, tl.cdiv(chunks, CHUNKS)):
        chunk = block * CHUNKS + tl.arange(0, CHUNKS)
        inside = (chunk[:, None] < chunks) & wanted[None, :]
        at = (picture * chunks + chunk[:, None]) * C + channel[None, :]
        count = tl.minimum(chunk_rows, L - chunk * chunk_rows).to(tl.float32)
        apart = tl.load(mean + at, mask=inside, other=0.0) - group_mean
        within = tl.load(deviations + at, mask=inside, other=0.0)
        squares += tl.sum(tl.where(inside, within + apart * apart * count[:, None], 0.0), 0)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) * inverse_size + eps)
    factor = tl.load(weight + channel, mask=wanted, other=0.0).to(tl.float32) * rstd
    added = tl.load(bias + channel, mask=wanted, other=0.0).to(tl.float32) - group_mean * factor
    tl.store(scale + picture * C + channel, factor, mask=wanted)
    tl.store(shift + picture * C + channel, added, mask=wanted)


@triton.jit
def scale_shift(x, out, scale, shift, L, C, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write x·scale + shift, and its SiLU if wanted; one program per tile of rows and channels."""
    picture = tl.program_id(2)
    start = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < C
    inside = (row[:, None] < L - start) & present[None, :]
    offset = (picture.to(tl.int64) * L + start) * C
    within = row[:, None] * C + channel[None, :]
    factor = tl.load(scale + picture * C + channel, mask=present, other=0.0)
    added = tl.load(shift + picture * C + channel, mask=present, other=0.0)
    y = tl.load(x + offset + within, mask=inside, other=0.0).to(tl.float32) * factor[None, :] + added[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + offset + within, y.to(out.dtype.element_ty), mask=inside)
