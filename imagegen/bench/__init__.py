"""What this machine makes of every plan, kernel and denoiser: one command, one report.

Each stage is a process of its own and appends a line to `bench.jsonl`; a second call skips what is there,
whatever stopped the first. `pictures` measures whole ones, `training` steps of a LoRA, `denoiser` one step of models
of known size with random weights, `janusflow` what its prompt cache is worth, `crowd` many people at once, `workers`
what a second process adds, `gpu` our kernels, and `table` turns the log into the report.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from imagegen.bench.table import LOG, label_of, read_log, write
from imagegen.families.denoisers import ARCHITECTURES
from imagegen.lock import only_writer
from imagegen.profile import finite
from imagegen.request import PlanError
from imagegen.speed import find_plan

PLANS = ("exact", "balanced", "fast")


def stages(plans: Sequence[str], *, tiny: bool = False, device: str = "cpu", with_denoiser: bool = False) -> list[dict[str, Any]]:
    """Return the stages in order, each with what it needs to run alone."""
    found: list[dict[str, Any]] = [{"stage": "machine"}, {"stage": "parts"}]
    found += [{"stage": "pictures", "plan": plan} for plan in plans if plan != "exact"]
    if find_spec("peft"):
        found += [{"stage": "training"}]
    on_ray = [{"stage": "workers"}] if find_spec("ray") and device == "cpu" else []
    if tiny or device != "cpu":
        found += [{"stage": "kernels"}, {"stage": "janusflow"}, {"stage": "crowd"}, *on_ray]
        found += [{"stage": "denoiser", "architecture": name} for name in ARCHITECTURES]
    elif with_denoiser:
        found += [{"stage": "janusflow"}, {"stage": "crowd"}, *on_ray]
        shapes = [(side, threads) for side in (256, 512) for threads in (1, 2)]
        found += [{"stage": "denoiser", "architecture": "sd1.5", "size_px": side, "threads": count} for side, count in shapes]
    return [stage | {"device": device, "tiny": tiny} for stage in found]


def run(
    folder: str | Path,
    *,
    source: str = "emoji",
    plans: Sequence[str] = PLANS,
    tiny: bool = False,
    device: str | None = None,
    with_denoiser: bool = False,
    budget_min: float | None = None,
    tell: Callable[[str, int, int], Any] = lambda *_: None,
) -> Path:
    """Run what is not in the folder's log yet, stage by stage, and write the report; return its path.

    Args:
        folder: of `bench.jsonl`, `bench.json`, `bench.md` and `report.html`.
        source: the model.
        plans: to measure beside stock diffusers.
        tiny: small shapes: shows that everything runs, measures nothing worth reading.
        device: `cpu` or `cuda`; by default CUDA where there is one.
        with_denoiser: on the CPU also the Stable-Diffusion-1.5-size denoiser, half an hour on two cores.
        budget_min: begin no further stage after these minutes.
        tell: is told the stage, its number, and how many there are.

    Raises:
        PlanError: a plan is unknown.
        ModelError: there is no such device.
        RequestError: another run writes there.
    """
    folder = Path(folder)
    for plan in plans:
        if not plan.endswith(".json"):
            find_plan(plan, "emoji" if source == "emoji" else "stable-diffusion")
    wanted = stages(plans, tiny=tiny, device=_find_device(device), with_denoiser=with_denoiser)
    started = time.monotonic()
    with only_writer(folder):
        for number, stage in enumerate(wanted, 1):
            tell(label_of(stage), number, len(wanted))
            if any(row["key"] == _key(stage, source) for row in read_log(folder)):
                continue
            if budget_min is not None and (time.monotonic() - started) / 60 > budget_min:
                continue  # its row says so in the report, and a later call measures it
            append(folder, finite({"key": _key(stage, source), "stage": stage} | _in_a_process(stage, source)))
        return write(folder, wanted, budget_min)


def _find_device(device: str | None) -> str:
    from imagegen.loader import find_device

    return find_device(device).type


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
    """Add a line to the log, on disk before the next stage; a line that was cut short is ended first."""
    path = folder / LOG
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


__all__ = ["LOG", "PLANS", "PlanError", "append", "label_of", "read_log", "run", "stages", "write"]
