"""The stages that make whole pictures: this machine, the parts of a picture, plans in turn with stock diffusers."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from imagegen.comparison import Trial, add_case, judge
from imagegen.families import diffusion
from imagegen.loader import load
from imagegen.measure import environment, machine, peak_memory_gib, reset_peak_memory, synchronise
from imagegen.model import Model
from imagegen.prompts import confirm_prompts
from imagegen.reference import FLOOR_PSNR_DB
from imagegen.request import build_request


def measure_machine(source: str, *, tiny: bool, device: str) -> dict[str, Any]:
    """Return the machine, the versions, the GPU with its clocks, and what a matrix product reaches, in Gflop/s."""
    side = 128 if tiny else 1024 if device == "cpu" else 8192
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        first = torch.randn(side, side, device=device).to(dtype)
        seconds = []
        for _ in range(3 if device == "cpu" else 10):
            synchronise(first.device)
            started = time.perf_counter()
            first @ first
            synchronise(first.device)
            seconds.append(time.perf_counter() - started)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / statistics.median(seconds) / 1e9
    facts = {"machine": machine(), "threads": torch.get_num_threads(), "gflops": rates}
    return facts | {"environment": environment(torch.device(device), torch.float32), "gpu": _gpu_facts(device)}


def _gpu_facts(device: str) -> dict[str, str]:
    """Return what the driver says of the GPU now: clocks, power, temperature; empty where there is none."""
    if device == "cpu" or shutil.which("nvidia-smi") is None:
        return {}
    names = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout.strip() else []
    return dict(zip(names, values, strict=False))


def measure_parts(source: str, *, tiny: bool, device: str) -> dict[str, Any]:
    """Return the seconds that each part of one picture takes under the exact plan."""
    model = load(source, device=device)
    settings = _settings(model, tiny)
    spent: dict[str, float] = {}
    parts = {"text encoder": (model.pipeline.text_encoder, "forward"), "decoder": (model.pipeline.vae, "decode")}
    parts["denoiser"] = (diffusion.denoiser_of(model.pipeline), "forward")
    for name, (owner, method) in parts.items():
        setattr(owner, method, _timed(getattr(owner, method), name, spent, model.device))
    model.generate("a red apple", seed=1, **settings)
    spent.clear()
    result = model.generate("a red apple", seed=1, **settings)
    rest = result.elapsed_s - sum(spent.values())
    return {"seconds": spent | {"everything else": rest}, "whole_s": result.elapsed_s}


def _timed(compute: Callable[..., Any], name: str, spent: dict[str, float], device: torch.device) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronise(device)
        started = time.perf_counter()
        output = compute(*args, **kwargs)
        synchronise(device)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
        return output

    return timed


def _settings(model: Model, tiny: bool) -> dict[str, Any]:
    side = model.family.min_px if tiny else model.family.size_px
    return {"num_steps": 2 if tiny else model.family.num_steps, "width": side, "height": side, "guidance": model.family.guidance}


def measure_pictures(source: str, *, tiny: bool, device: str, plan: str) -> dict[str, Any]:
    """Make pictures by stock diffusers and by a plan in turn; return both times, memory and fidelity."""
    model = load(source, device=device, plan=plan)
    stock = diffusion.stock_runner(model.origin, model.device, model.dtype, model.family)
    settings = _settings(model, tiny)
    prompts = confirm_prompts(model.family.name)[: 2 if tiny else 12]
    model.generate(prompts[0], seed=1, **settings)
    stock(build_request(prompts[0], model.family, settings | {"seed": 1}))
    trial, stock_s = Trial(plan), []
    reset_peak_memory(model.device)
    for seed, prompt in enumerate(prompts):
        request = build_request(prompt, model.family, settings | {"seed": seed})
        started = time.perf_counter()
        made = stock(request)
        stock_s.append(time.perf_counter() - started)
        add_case(trial, model.generate(prompt, seed=seed, **settings), made)
    trial.memory_gib, trial.levers = peak_memory_gib(model.device), model.applied
    trial.verdict = judge(trial, FLOOR_PSNR_DB, "stock diffusers", None)
    stock_times = {"stock_median_s": statistics.median(stock_s), "stock_range_s": [min(stock_s), max(stock_s)]}
    ratio = stock_times["stock_median_s"] / trial.median_s  # type: ignore[operator]
    return {"trial": trial.summary(), "ratio": ratio, "environment": environment(model.device, model.dtype)} | stock_times
