"""The levers by name. Plans put them together (`speed`); each module here holds one kind."""

from imagegen.levers import blocks, compute, graphs, kernels, memory, parallel, steps, student
from imagegen.levers.lever import Lever, RunFacts, Target

LEVERS: dict[str, type[Lever]] = {
    lever.name: lever
    for lever in (
        compute.Threads,
        steps.FewerSteps,
        student.Student,
        compute.Bf16,
        compute.Fp16,
        compute.Int8Dynamic,
        compute.Int8WeightOnly,
        compute.Fp8,
        kernels.Int8Fused,
        compute.ChannelsLast,
        kernels.FusedNorm,
        compute.AttentionBackend,
        compute.Compile,
        compute.OpenVino,
        parallel.ContextParallel,
        graphs.CudaGraph,
        graphs.StepGraph,
        memory.PromptCache,
        memory.TinyDecoder,
        memory.DecodeSlicing,
        memory.DecodeTiling,
        memory.TextOffload,
        memory.ModelOffload,
        memory.GroupOffload,
        memory.LayerwiseCasting,
        blocks.FirstBlockCache,
        blocks.TaylorSeerCache,
        blocks.MagCache,
        blocks.SeaCache,
        steps.DeepCache,
        steps.GuidanceCache,
        steps.GuidanceInterval,
        steps.StepCache,
    )
}

for _lever in LEVERS.values():  # what one lever says of two holds for the other
    _lever.conflicts = _lever.conflicts | {name for name, other in LEVERS.items() if _lever.name in other.conflicts}

__all__ = ["LEVERS", "Lever", "RunFacts", "Target"]
