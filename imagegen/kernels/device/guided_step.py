"""Guidance and one Euler-type update of the latents, element by element."""

import triton
import triton.language as tl


@triton.jit
def guided_step(x, uncond, cond, out, guidance, a, b, count, BLOCK: tl.constexpr, INLINE_PTX: tl.constexpr):
    """Write a·x + b·(u + guidance·(c − u)); one program per block of elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # 64 bits: a batch of latents may pass 2³¹ elements
    lane = tl.arange(0, BLOCK)
    inside = lane < count - start
    latent = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(uncond + start + lane, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cond + start + lane, mask=inside, other=0.0).to(tl.float32)
    if INLINE_PTX:
        guided = tl.inline_asm_elementwise(
            "fma.rn.ftz.f32 $0, $1, $2, $3;",
            "=f,f,f,f",
            [c - u, guidance, u],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        guided = u + guidance * (c - u)
    tl.store(out + start + lane, (a * latent + b * guided).to(out.dtype.element_ty), mask=inside)
