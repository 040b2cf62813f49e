"""What this machine makes of every plan and of a Stable-Diffusion-size denoiser: one command, one report.

Each stage is a process of its own and appends lines to `bench.jsonl`; a second call skips what is there.
Stock diffusers runs in turn with what is measured, in the same process.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from imagegen.comparison import Trial, add_case, judge
from imagegen.families import diffusion
from imagegen.measure import environment, machine, peak_memory_gib, reset_peak_memory
from imagegen.model import Model, load
from imagegen.profile import finite
from imagegen.prompts import confirm_prompts
from imagegen.reference import FLOOR_PSNR_DB
from imagegen.report import write_report
from imagegen.request import Error, PlanError, build_request
from imagegen.speed import AppliedPlan, Plan, find_plan

LOG = "bench.jsonl"
PLANS = ("exact", "balanced", "fast")
DENOISER_PLANS = (
    "eager",
    "channels-last",
    "bf16",
    "int8-dynamic",
    "int8-weight-only",
    "compile",
    "openvino",
    "openvino(precision=bf16)",
)
SD15 = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # fmt: skip
TINY = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4,
    "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def stages(tiny: bool, plans: Sequence[str], with_denoiser: bool) -> list[dict[str, Any]]:
    """Return the stages in order, each with what it needs to run alone."""
    found: list[dict[str, Any]] = [{"stage": "machine"}, {"stage": "parts"}]
    found += [{"stage": "pictures", "plan": plan} for plan in plans if plan != "exact"]
    if with_denoiser:
        found += [{"stage": "denoiser", "side_px": side, "threads": threads} for side in (256, 512) for threads in (1, 2)]
    return [stage | {"tiny": tiny} for stage in found]


def run(
    folder: str | Path,
    *,
    source: str = "emoji",
    plans: Sequence[str] = PLANS,
    tiny: bool = False,
    with_denoiser: bool = False,
    budget_min: float | None = None,
    tell: Callable[[str, int, int], Any] = lambda *_: None,
) -> Path:
    """Run what is not in the folder's log yet, stage by stage, and write the report; return its path.

    Args:
        folder: of `bench.jsonl`, `bench.json` and `report.html`.
        source: the model.
        plans: to measure beside stock diffusers.
        tiny: small shapes: shows that everything runs, measures nothing worth reading.
        with_denoiser: also the Stable-Diffusion-1.5-size denoiser with random weights, half an hour on two cores.
        budget_min: begin no further stage after these minutes.
        tell: is told the stage, its number, and how many there are.

    Raises:
        PlanError: a plan is unknown.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for plan in plans:
        if not plan.endswith(".json"):
            find_plan(plan, "emoji" if source == "emoji" else "stable-diffusion")
    wanted, started = stages(tiny, plans, with_denoiser), time.monotonic()
    for number, stage in enumerate(wanted, 1):
        label = " ".join(str(value) for key, value in stage.items() if key != "tiny")
        tell(label, number, len(wanted))
        if any(row["key"] == _key(stage, source) for row in read_log(folder)):
            continue
        if budget_min is not None and (time.monotonic() - started) / 60 > budget_min:
            row: dict[str, Any] = {"skipped": f"the budget of {budget_min:g} minutes was spent"}
        else:
            row = _in_a_process(stage, source)
        if "skipped" not in row:
            append(folder, finite({"key": _key(stage, source), "stage": stage} | row))
    return write(folder)


def _key(stage: dict[str, Any], source: str) -> str:
    return json.dumps([source, stage], sort_keys=True)


def _in_a_process(stage: dict[str, Any], source: str) -> dict[str, Any]:
    """Run a stage in a process of its own and return what it measured, or why it did not."""
    command = [sys.executable, "-m", "imagegen.bench", json.dumps(stage), source]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = child.communicate()
    except BaseException:
        child.kill()
        raise
    if child.returncode:
        return {"failed": (errors.strip().splitlines() or ["it died"])[-1][:300]}
    return json.loads(out.splitlines()[-1])


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add a line to the log, on disk before the next stage."""
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the log's whole lines."""
    rows = []
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut short
            continue
    return rows


def measure_machine(source: str, tiny: bool) -> dict[str, Any]:
    """Return the machine, the versions, and what a matrix product reaches in each precision, in Gflop/s."""
    side = 128 if tiny else 1024
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        first = torch.randn(side, side).to(dtype)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            first @ first
            seconds.append(time.perf_counter() - started)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / statistics.median(seconds) / 1e9
    return {"machine": machine(), "threads": torch.get_num_threads(), "gflops": rates}


def measure_parts(source: str, tiny: bool) -> dict[str, Any]:
    """Return the seconds that each part of one picture takes under the exact plan."""
    model = load(source)
    settings = _settings(model, tiny)
    spent: dict[str, float] = {}
    parts = {"text encoder": (model.pipeline.text_encoder, "forward"), "decoder": (model.pipeline.vae, "decode")}
    parts["denoiser"] = (diffusion.denoiser_of(model.pipeline), "forward")
    for name, (owner, method) in parts.items():
        setattr(owner, method, _timed(getattr(owner, method), name, spent))
    model.generate("a red apple", seed=1, **settings)
    spent.clear()
    result = model.generate("a red apple", seed=1, **settings)
    rest = result.elapsed_s - sum(spent.values())
    return {"seconds": spent | {"everything else": rest}, "whole_s": result.elapsed_s}


def _timed(compute: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = compute(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
        return output

    return timed


def _settings(model: Model, tiny: bool) -> dict[str, Any]:
    side = model.family.min_px if tiny else model.family.size_px
    return {"num_steps": 2 if tiny else model.family.num_steps, "width": side, "height": side, "guidance": model.family.guidance}


def measure_pictures(source: str, tiny: bool, plan: str) -> dict[str, Any]:
    """Make pictures by stock diffusers and by a plan in turn; return both times, memory and fidelity."""
    model = load(source, plan=plan)
    stock = diffusion.stock_runner(model.folder, model.device, model.dtype)
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


def measure_denoiser(source: str, tiny: bool, side_px: int, threads: int) -> dict[str, Any]:
    """Return each plan's seconds for one forward pass of two guidance rows, in turn, and its error against eager.

    The UNet has Stable Diffusion 1.5's architecture and random weights: the errors are indicative only.
    """
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(threads)
    config = TINY if tiny else SD15
    side, words = (8, 32) if tiny else (side_px // 8, 768)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval()
    weights = unet.state_dict()
    inputs = (torch.randn(2, 4, side, side), torch.tensor(500), torch.randn(2, 77, words))
    runs, refused = {}, {}
    for name in DENOISER_PLANS:
        with torch.device("meta"):
            twin = UNet2DConditionModel(**config).eval()
        twin.load_state_dict(weights, assign=True)  # the same tensors, in a module that a plan may change
        try:
            plan = Plan(name, () if name == "eager" else (name,))
            runs[name] = (AppliedPlan(plan, SimpleNamespace(unet=twin, components={"unet": twin})), twin)
        except PlanError as error:
            refused[name] = str(error)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rows: dict[str, dict[str, Any]] = {}
    eager: Any = None  # comes first
    with torch.no_grad():
        for number in range(2 if tiny else 4):
            for name, (applied, module) in runs.items():
                with applied.running(True, 1):
                    started = time.perf_counter()
                    output = module(inputs[0], inputs[1], encoder_hidden_states=inputs[2], return_dict=False)[0]
                    spent = time.perf_counter() - started
                if number == 0:
                    eager = output if eager is None else eager
                    rows[name] = {"first_s": spent, "error": float((output - eager).norm() / eager.norm())}
                else:
                    seconds[name].append(spent)
    for name, row in rows.items():
        median_s = statistics.median(seconds[name])
        row |= {"median_s": median_s, "range_s": [min(seconds[name]), max(seconds[name])]}
        row |= {"ratio": statistics.median(seconds["eager"]) / median_s, "engaged": runs[name][0].report()}
    return {"rows": rows, "refused": refused, "memory_gib": peak_memory_gib(torch.device("cpu"))}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": measure_machine,
    "parts": measure_parts,
    "pictures": measure_pictures,
    "denoiser": measure_denoiser,
}


def write(folder: Path) -> Path:
    """Write `report.html` from the log, and return its path.

    Raises:
        PlanError: it cannot be written.
    """
    rows = read_log(folder)
    about: dict[str, str] = {}
    trials, notes = [], []
    for row in rows:
        stage = row["stage"]
        label = " ".join(str(value) for key, value in stage.items() if key != "tiny")
        if "failed" in row:
            notes.append(f"{label} failed: {row['failed']}")
        elif stage["stage"] == "machine":
            about |= {name: str(value) for name, value in row["machine"].items()} | {"threads": str(row["threads"])}
            about["matrix product"] = ", ".join(f"{name} {rate:.0f} Gflop/s" for name, rate in row["gflops"].items())
        elif stage["stage"] == "parts":
            about["one picture, exact"] = ", ".join(f"{name} {spent:.3f} s" for name, spent in row["seconds"].items())
        elif stage["stage"] == "pictures":
            trial = row["trial"]
            trial["verdict"] = f"{row['ratio']:.2f} × stock diffusers ({row['stock_median_s']:.3f} s in turn); {trial['verdict']}"
            trials.append(trial)
        else:
            for name, figures in row["rows"].items():
                about[f"{label}, {name}"] = (
                    f"{figures['median_s']:.3f} s, {figures['ratio']:.2f} × eager, relative error {figures['error']:.1e}"
                )
            notes += [f"{label}, {name}: {reason}" for name, reason in row["refused"].items()]
        if stage["tiny"]:
            notes = [note for note in notes if "tiny" not in note] + ["tiny shapes: nothing here is worth reading"]
    return write_report(folder / "report.html", "imagegen bench", about, notes, trials, [], [], {})


def main(arguments: Sequence[str]) -> int:
    """Run one stage in this process and print what it measured as the last line."""
    stage = json.loads(arguments[0])
    name, settings = stage["stage"], {key: value for key, value in stage.items() if key != "stage"}
    try:
        measured = MEASURES[name](arguments[1], **settings)
    except Error as error:
        print(str(error), file=sys.stderr)
        return 1
    print(json.dumps(finite(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
