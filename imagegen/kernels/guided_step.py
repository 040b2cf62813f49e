"""Classifier-free guidance and an Euler-type update of the latents in one pass: the example to read first.

It is no speed-up worth having: at 1024² the latents are about 2 MB, under 1 % of a step's traffic, so no lever uses
it. It is here because it is small enough to show how every kernel of this folder is written and tested:

1. The formula is one function over tensors (`_formula`). In float32, rounded at the end, it is the reference; in
   float64 it is what the check compares with.
2. `_allocate` alone decides the outputs' shapes, dtypes and strides; the op's fake implementation uses it too.
3. `_launch` starts the Triton code, which stands in `device/` under the same name: only there is triton imported.
   Every load has a mask and an `other=`, every store a mask.
4. `_cases` yields sizes that divide by nothing, beside one that fills its blocks, and every dtype. The same cases run
   in Triton's interpreter in the tests, and on a device before the kernel is first used there (`check`).
5. The op (`guided_step`) asks `dispatch.compute`, which takes the kernel where it passed, else the reference.
6. The tests assemble each launch for six architectures and read the machine code: no spills, shared memory and
   registers inside their limits, vector loads and matrix instructions where they belong. Mutants show that each of
   these gates can fail.

The kernel has a second branch in inline PTX: `fma.rn.ftz.f32` fixes that guidance is one fused multiply-add, whatever
the compiler makes of the formula. That branch assembles, and has never run; the interpreter cannot run it, nothing
selects it but the check on a device, and no gain is claimed for it.

Source: Ho and Salimans (2022), https://arxiv.org/abs/2207.12598, equation 6, in the form that diffusers computes; the
update is the Euler step of Karras et al. (2022), https://arxiv.org/abs/2206.00364, algorithm 1, as a·x + b·prediction.
"""

from collections.abc import Iterator

import torch

from imagegen.kernels.dispatch import compute
from imagegen.kernels.kernel import Case, Kernel, Tensors, divide_up

BLOCK = 1024  # elements a program; eight for each of 128 threads, so that 16-bit inputs load 16 bytes at a time


def _formula(
    x: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, guidance: float, a: float, b: float, dtype: torch.dtype
) -> torch.Tensor:
    x, uncond, cond = x.to(dtype), uncond.to(dtype), cond.to(dtype)
    return a * x + b * (uncond + guidance * (cond - uncond))


def _reference(x: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, guidance: float, a: float, b: float) -> Tensors:
    return (_formula(x, uncond, cond, guidance, a, b, torch.float32).to(x.dtype).contiguous(),)


def _exact(x: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, guidance: float, a: float, b: float) -> Tensors:
    return (_formula(x, uncond, cond, guidance, a, b, torch.float64),)


def _allocate(x: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, guidance: float, a: float, b: float) -> Tensors:
    return (x.new_empty(x.shape),)


def _launch(
    outputs: Tensors,
    x: torch.Tensor,
    uncond: torch.Tensor,
    cond: torch.Tensor,
    guidance: float,
    a: float,
    b: float,
    inline_ptx: bool = False,
) -> None:
    from imagegen.kernels.device import guided_step as code

    inputs = (x.contiguous(), uncond.contiguous(), cond.contiguous())
    grid = (divide_up(x.numel(), BLOCK),)
    code.guided_step[grid](*inputs, *outputs, guidance, a, b, x.numel(), BLOCK=BLOCK, INLINE_PTX=inline_ptx, num_warps=4)


def _cases(device: torch.device) -> Iterator[Case]:
    draw = torch.Generator().manual_seed(0)
    branches = (False, True) if device.type == "cuda" else (False,)  # the interpreter knows no PTX
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((1, 4, 7, 5), (2, 4, 16, 16), (3, 4, 17, 23)):  # less than a block, whole blocks, blocks and a rest
            x, uncond, cond = (torch.randn(shape, generator=draw) for _ in range(3))
            tensors = (x.to(device), uncond.to(device, dtype), cond.to(device, dtype))
            for inline_ptx in branches:
                label = f"{dtype} {shape}{' in PTX' if inline_ptx else ''}"
                yield Case(label, (*tensors, 7.5, 0.9, -0.3), 1e-5, {"inline_ptx": inline_ptx})
            yield Case(f"latents in {dtype} {shape}", (tensors[0].to(dtype), *tensors[1:], 7.5, 0.9, -0.3), 1e-5)


KERNEL = Kernel("guided_step", _allocate, _launch, _reference, _exact, _cases)


@torch.library.custom_op("imagegen::guided_step", mutates_args=())
def guided_step(x: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, guidance: float, a: float, b: float) -> torch.Tensor:
    """Return a·x + b·(uncond + guidance·(cond − uncond)) in float32 arithmetic, rounded once.

    Args:
        x: the latents, (B, C, H, W), float32, float16 or bfloat16.
        uncond: the prediction without the prompt, of the same shape; its dtype may be another.
        cond: the prediction with the prompt, as `uncond`.
        guidance: the scale; 1 gives `cond`.
        a: the factor of the latents.
        b: the factor of the guided prediction.

    Returns:
        The next latents, contiguous, (B, C, H, W), of the dtype of `x`.
    """
    return compute(KERNEL, x.device, x, uncond, cond, guidance, a, b)[0]


@guided_step.register_fake
def _(x: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, guidance: float, a: float, b: float) -> torch.Tensor:
    return _allocate(x, uncond, cond, guidance, a, b)[0]
