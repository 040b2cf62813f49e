"""Count what would make the host wait for a GPU, on fake CUDA tensors: run as a script, prints JSON.

torch's CPU build has no guard for CUDA devices, without which fake CUDA tensors cannot be indexed; one that
does nothing is compiled and registered, so this needs a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
NUM_STEPS = 4


def register_guard():
    includes = [f"-I{path}" for path in torch.utils.cpp_extension.include_paths()]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        where = Path(torch.__file__).parent / "lib"
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-L{where}", "-lc10"]
        subprocess.run(["g++", str(source), *includes, *flags, "-o", str(library)], check=True)
        torch.ops.load_library(str(library))


class Waits(TorchDispatchMode):
    """Counts reads of a value, searches whose size depends on values, and copies between host and device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_gpu = any(isinstance(arg, torch.Tensor) and arg.device.type == "cuda" for arg in args)
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::equal"):  # no fake tensor has values, on the host neither
            self.counts["read"] += on_gpu
            return False if name == "aten::equal" else 1.0 if args[0].is_floating_point() else 0
        if name in ("aten::nonzero", "aten::masked_select") and on_gpu:
            self.counts["search"] += 1
            return torch.zeros(1, args[0].dim(), dtype=torch.long, device="cuda")
        output = func(*args, **kwargs)
        if name == "aten::_to_copy" and isinstance(output, torch.Tensor) and output.device.type != args[0].device.type:
            self.counts[f"copy {args[0].device.type} to {output.device.type}"] += 1
        if name == "aten::copy_" and args[0].device.type != args[1].device.type:
            self.counts[f"copy {args[1].device.type} to {args[0].device.type}"] += 1
        return output


def waits_of(scheduler, timesteps_on="cuda", begin_index=True):
    """Return what a run of a few steps would wait for, as a pipeline calls the scheduler."""
    scheduler.set_timesteps(NUM_STEPS)  # its tables are made before the loop, where waiting costs nothing
    with FakeTensorMode(allow_non_fake_inputs=True):
        times = [torch.empty((), device=timesteps_on, dtype=scheduler.timesteps.dtype) for _ in range(NUM_STEPS)]
        if begin_index and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        if timesteps_on == "cuda":
            scheduler.timesteps = torch.empty(NUM_STEPS, device="cuda", dtype=scheduler.timesteps.dtype)
        latents = torch.empty(1, 4, 8, 8, device="cuda")
        waits = Waits()
        with waits:
            for time in times:
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(latents, time)
                latents = scheduler.step(torch.empty_like(latents), time, latents, return_dict=False)[0]
    return {what: count for what, count in waits.counts.items() if count}


def waits_of_our_step():
    """Return what `step-graph` would wait for: one step of its loop, as a graph records it."""
    from diffusers import DPMSolverMultistepScheduler

    from imagegen.levers.graphs import StepLoop, read_table

    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(NUM_STEPS)
    table = read_table(scheduler)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loop = StepLoop(torch.empty(1, 4, 8, 8, device="cuda"), True, 0)
        loop.begin(table, 4.0, None)
        waits = Waits()
        with waits:
            for index in range(NUM_STEPS):
                loop.latents.copy_(torch.empty(1, 4, 8, 8, device="cuda"))
                loop.index.fill_(index)
                loop.step(torch.empty(2, 4, 8, 8, device="cuda"))
    return {what: count for what, count in waits.counts.items() if count}


def janus_sizes():
    language = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "max_position_embeddings": 128}  # fmt: skip
    return language | {"num_key_value_heads": 4}


def fake_prompts(rows, length):
    from imagegen.families.janus import Prompts

    ids = torch.zeros(rows, length, dtype=torch.long, device="cuda")
    real = torch.ones(rows, length, dtype=torch.bool, device="cuda")
    return Prompts(ids, real, torch.zeros_like(ids), torch.zeros(rows, dtype=torch.long, device="cuda"))


def waits_of_codes(temperature):
    """Return what Janus-Pro would wait for between two codes: lookup, network, guidance, drawing."""
    from imagegen.families.januspro import JanusProTransformer, Writer

    vq = {"embed_dim": 8, "num_embeddings": 64, "projection_dim": 32, "image_token_embed_dim": 32, "num_patches": 4}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            network = JanusProTransformer(janus_sizes(), vq).eval()
        writer = Writer(network, fake_prompts(2, 7), 16, 5.0, 0)
        draws = torch.empty(NUM_STEPS, 2, 64, device="cuda") if temperature else None
        waits = Waits()
        with waits:
            writer.write_row(NUM_STEPS, temperature, draws)
    return {what: count for what, count in waits.counts.items() if count}


def waits_of_janusflow():
    """Return what a step of JanusFlow's network would wait for."""
    from imagegen.families.janusflow import JanusFlowTransformer

    blocks = {"block_out_channels": [8], "layers_in_middle": 2, "hidden_size": 32, "norm_eps": 1e-6}
    encoder = blocks | {"input_channels": 4, "kernel_size": 2, "stride": 2, "padding": 0}
    decoder = blocks | {"in_channels": 8, "out_channels": 4, "upsamples": 1}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            network = JanusFlowTransformer(janus_sizes(), encoder, decoder, 4).eval()
        prefix = network.read_prompts(fake_prompts(2, 7))
        mask = torch.ones(2, 1, 17, 24, dtype=torch.bool, device="cuda")
        positions = torch.zeros(2, 17, dtype=torch.long, device="cuda")
        waits = Waits()
        with waits:
            for _ in range(NUM_STEPS):
                sample, time = torch.empty(1, 4, 8, 8, device="cuda"), torch.empty((), device="cuda")
                network(sample, time, prefix, mask, positions, return_dict=False)
    return {what: count for what, count in waits.counts.items() if count}


def main():
    import diffusers
    import torch.utils.cpp_extension  # noqa: F401

    register_guard()
    kinds = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler a": diffusers.EulerAncestralDiscreteScheduler,
        "flow": diffusers.FlowMatchEulerDiscreteScheduler,
        "dpm++ 2m": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "ddim": diffusers.DDIMScheduler,
        "lcm": diffusers.LCMScheduler,
    }
    found = {name: waits_of(kind()) for name, kind in kinds.items()}
    found["euler, no begin index"] = waits_of(kinds["euler"](), begin_index=False)
    found["our step"] = waits_of_our_step()
    found["codes, drawn"], found["codes, most likely"] = waits_of_codes(1.0), waits_of_codes(0.0)
    found["janusflow"] = waits_of_janusflow()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
