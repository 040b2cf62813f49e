"""Half precision where the processor computes in it: elsewhere bfloat16 on a CPU is a hundred times slower than float32."""

import torch


def fast_autocast() -> torch.autocast:
    """Return bfloat16 autocast on a CPU with AVX-512 BF16 or AMX, and plain float32 on any other.

    Casts are not kept: threads that share a model would clear each other's.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported(), cache_enabled=False)
