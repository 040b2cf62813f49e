"""Several processes for one picture: diffusers' context parallelism, each process with a part of the tokens.

Start the processes with `torchrun`; every one runs the same program with the same seed.
"""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from imagegen.families.diffusion import quiet
from imagegen.levers.blocks import CACHES
from imagegen.levers.lever import Lever, Target
from imagegen.levers.memory import OFFLOADS


def join_processes(device: torch.device) -> int:
    """Join the processes that `torchrun` started, once; return how many there are, 1 where there is no torchrun."""
    if not torch.distributed.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.distributed.get_world_size()


@dataclass
class ContextParallel(Lever):
    """Split the tokens over all processes; attention exchanges them (Ulysses), or passes them round (ring).

    Source: Jacobs et al. (2023), DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509; Liu et al. (2023), ring
    attention, https://arxiv.org/abs/2310.01889.
    """

    kind: str = "ulysses"

    name: ClassVar[str] = "context-parallel"
    stage: ClassVar[int] = 3
    conflicts: ClassVar[frozenset[str]] = CACHES | OFFLOADS | {"compile", "cuda-graph", "step-graph", "openvino"}

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        if self.kind not in ("ulysses", "ring"):
            return f"context-parallel: kind is ulysses or ring, got {self.kind!r}"
        if getattr(target.worker, "_cp_plan", None) is None:
            kind = type(target.worker).__name__
            return f"diffusers cannot split the tokens of a {kind}; it can for FLUX and Qwen-Image: leave context-parallel out"
        if join_processes(target.device) < 2:
            return "context-parallel needs several processes: start them with torchrun --nproc-per-node N"
        return None

    def apply(self, target: Target) -> None:
        """Install diffusers' hooks, and count the calls."""
        from diffusers import ContextParallelConfig
        from diffusers.hooks.context_parallel import remove_context_parallel

        worker, processes = target.worker, torch.distributed.get_world_size()
        degrees: dict[str, Any] = {f"{self.kind}_degree": processes, f"{self.kind}_anything": True}
        self.patches.keep(worker, "_parallel_config")
        for module in worker.modules():
            for name in ("forward", "_diffusers_hook"):
                self.patches.keep(module, name)
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                self.patches.keep(module.processor, "_parallel_config")
        self.patches.on_undo(lambda: remove_context_parallel(worker, worker._cp_plan))
        with quiet():
            worker.enable_parallelism(config=ContextParallelConfig(**degrees))
        self.patches.count(target.denoiser, "forward", self.counts, f"denoiser calls over {processes} processes")
