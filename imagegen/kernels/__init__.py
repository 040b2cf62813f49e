"""Triton kernels, each under one `torch.library` op beside its torch reference, which computes wherever the kernel may not.

Nothing here has run on a GPU yet: the kernels are interpreted and assembled by the tests, and checked on a device
before they are first used there (`may_run`). Knows nothing of models. Importing it imports no triton: only the code
in `device/` does, when a kernel is first needed.
"""

from imagegen.kernels import group_norm_silu, guided_step, int8_linear, row_quantisation
from imagegen.kernels.dispatch import may_run
from imagegen.kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL for module in (guided_step, group_norm_silu, row_quantisation, int8_linear)
}

__all__ = ["KERNELS", "Kernel", "may_run"]
