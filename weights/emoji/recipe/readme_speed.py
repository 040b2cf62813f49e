"""The README's tables of speed: what the tuner finds, what the tiers keep, what a large denoiser gains.

Each function measures and returns Markdown; `readme.py` puts it in its place. Let the machine be idle.
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from rich.progress import track

import imagegen
from imagegen import bench
from imagegen.bench.denoiser import plans_of
from imagegen.profile import Profile
from imagegen.weights import cache_folder

BUDGETS_DB = (30, 45)
SHAPES = tuple((side, threads) for side in (256, 512) for threads in (1, 2))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decibels(value: float | None, mean: float | None = None) -> str:
    """Return a PSNR in words, with the mean behind it; None and infinity stand for the same pixels."""
    said = "identical" if value is None or value == float("inf") else f"{value:.1f} dB"
    return said if mean in (None, float("inf")) else f"{said}, mean {mean:.1f} dB"


def measure_stage(stage: str) -> dict:
    """Run a stage of the bench in a process of its own; return what it measured."""
    wanted = json.dumps({"stage": stage, "tiny": False, "device": "cpu"})
    done = subprocess.run([sys.executable, "-m", "imagegen.bench", wanted, "emoji"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_training() -> str:
    """Return the table of our training step in turn with the plain loop's."""
    found = measure_stage("training")
    names = {"plain": "plain loop of diffusers' example, everything encoded anew", "imagegen": "imagegen, encoded once"}
    rows = []
    for name, said in names.items():
        row = found["loops"][name]
        low, high = row["range_s"]
        ratio = found["loops"]["plain"]["median_s"] / row["median_s"]
        rows.append((said, f"{row['median_s']:.3f} s ({low:.3f}–{high:.3f})", f"{ratio:.2f} ×", f"{row['peak_gib']:.2f} GiB"))
    return table((f"a LoRA step, batch {found['batch']}, in turn", "median (range)", "faster by", "peak memory"), rows)


def measure_janusflow() -> str:
    """Return the table of JanusFlow's step with the prompt kept, in turn with reading all anew."""
    found = measure_stage("janusflow")
    rows = []
    for tokens, row in found["rows"].items():
        took = row["seconds"]
        kept, anew, once = (took[name] for name in ("prompt kept", "all read anew", "reading the prompt"))
        rows.append(
            (tokens, f"{anew:.3f} s", f"{kept:.3f} s, and {once:.3f} s once", f"{row['ratio']:.2f} ×", f"{row['error']:.0e}")
        )
    head = ("tokens of the prompt", "a step, all read anew", "a step, prompt kept", "faster by", "largest difference")
    return table(head, rows)


def measure_crowd() -> str:
    """Return the table of many clients at once, measured now."""
    return describe_crowd(measure_stage("crowd"))


def describe_crowd(found: dict) -> str:
    """Return the table of many clients at once, in batches and one at a time, and what became of memory and pictures."""
    rows = []
    for way, said in (("batched", "in batches of up to 8"), ("single", "one at a time")):
        row = found[way]
        counts = tuple(str(row.get(name, 0)) for name in ("finished", "left", "busy"))
        rows.append((said, f"{row['per_minute']:.1f}", *counts, str(len(row["errors"]))))
    first, second = found["memory_gib"]
    said = (
        f"**{found['ratio']:.2f} ×**; peak memory {first:.2f} GiB in the first minute, {second:.2f} GiB in the second; of "
        f"{found['compared']} pictures made in batches the worst is {decibels(found['worst_psnr_db'])} from the one made alone."
    )
    head = (f"{found['clients']} clients", "pictures a minute", "finished", "left", "told busy", "errors")
    return f"{said}\n\n{table(head, rows)}"


def measure_workers() -> str:
    """Return the table of a batch on one worker and on two, measured now."""
    found = measure_stage("workers")
    rows = [
        (said, f"{statistics.median(found[way]):.1f} ({min(found[way]):.1f}–{max(found[way]):.1f})")
        for way, said in (("one", "one worker, one core"), ("two", "two workers on Ray, a core each"))
    ]
    head = (f"{found['pictures']} pictures, {len(found['one'])} runs in turn", "pictures a minute, median (range)")
    return f"**{found['ratio']:.2f} ×**\n\n{table(head, rows)}"


def describe_profile(profile: Profile) -> str:
    """Return a sentence on a tuned profile and the table of its levers' blame."""
    evidence, speed = profile.evidence, profile.speed
    low, high = speed["range_s"]
    stock_low, stock_high = speed["stock_range_s"]
    said = (
        f"`tune --min-psnr {profile.budget['bound']:g}`: {speed['median_s']:.3f} s a picture ({low:.3f}–{high:.3f}), stock "
        f"diffusers in turn {speed['stock_median_s']:.3f} s ({stock_low:.3f}–{stock_high:.3f}): **{speed['ratio']:.2f} ×**; "
        f"worst {decibels(evidence['worst'])}, mean {decibels(evidence['mean'])} of {evidence['n']} unseen pictures."
    )
    if not evidence["blame"]:
        return f"{said} The plan: `{' + '.join(profile.plan)}`."
    rows = [
        (
            f"`{part['lever']}`",
            f"{part['factor']:.2f} ×",
            f"{part['share_of_drift']:.0%}",
            decibels(part["worst_psnr_db_after"]),
        )
        for part in evidence["blame"]
    ]
    head = ("each lever added in turn", "faster by", "of the drift", f"worst after it, {evidence['searched_on']} pictures")
    return f"{said}\n\n{table(head, rows)}"


def describe_frontier(profile: Profile) -> str:
    """Return the table of the plans of a search that no other beat in both time and drift."""
    rows = [
        (f"`{step['plan']}`", f"{step['median_s']:.3f} s", decibels(step["fidelity"]["psnr_db"]["worst"]))
        for step in profile.frontier
    ]
    return table(("the frontier of that search", "a picture", "worst of 6"), rows)


def measure_tuning(model: imagegen.Model) -> str:
    """Tune anew for each budget."""
    shutil.rmtree(cache_folder() / "tune", ignore_errors=True)
    profiles = [
        imagegen.tune(model, min_psnr_db=bound, num_steps=20, guidance=4.0, minutes=9)
        for bound in track(BUDGETS_DB, description="tuning")
    ]
    return "\n\n".join([*map(describe_profile, profiles), describe_frontier(profiles[0])])


def measure_tiers(model: imagegen.Model) -> str:
    """Hold the tiers against the embedded model's reference set."""
    found = imagegen.compare(model.folder / "references", model, ["exact", "balanced", "fast"])
    if not found.holds:
        raise SystemExit("a tier leaves its budget: change speed.TIERS before the README says anything of it")
    exact_s = found.trials[0].median_s
    rows = []
    for trial in found.trials:
        levers = " + ".join(f"`{lever['lever']}`" for lever in trial.levers) or "none: stock diffusers"
        ssim = f"{trial.worst('ssim'):.3f}" if trial.measured[0].get("ssim") is not None else "not measured"
        flip = f"{trial.worst('flip'):.3f}" if trial.measured[0].get("flip") is not None else "not measured"
        rows.append(
            (f"`{trial.plan}`", levers, f"{trial.median_s:.3f} s", f"{exact_s / trial.median_s:.2f} ×",
             decibels(trial.worst(), trial.mean()), ssim, flip)
        )  # fmt: skip
    head = ("plan", "levers", "a picture", "of `exact`", f"worst PSNR of {len(found.references)}", "worst SSIM", "worst FLIP")
    return table(head, rows)


def describe_denoiser(folder: Path) -> str:
    """Return the table of a bench's denoiser stages, measuring those that its log lacks.

    Raises:
        SystemExit: a stage failed.
    """
    bench.run(folder, plans=["exact"], device="cpu", with_denoiser=True, tell=lambda stage, *_: print(stage, flush=True))
    stages = {}
    for row in bench.read_log(folder):
        if row["stage"]["stage"] == "denoiser":
            if "failed" in row:
                raise SystemExit(f"{json.dumps(row['stage'])} failed: {row['failed']}")
            stages[row["stage"]["size_px"], row["stage"]["threads"]] = row
    rows = []
    for plan in plans_of("cpu"):
        cells = []
        for shape in SHAPES:
            figures = stages[shape]["rows"].get(plan)
            cells.append(f"{figures['median_s']:.2f} s, {figures['ratio']:.2f} ×" if figures else "refused")
        errors = [stages[shape]["rows"][plan]["error"] for shape in SHAPES if plan in stages[shape]["rows"]]
        rows.append((f"`{plan}`", *cells, f"{max(errors):.1e}" if errors else "no such instructions here"))
    names = (f"{side}², {threads} thread{'s' * (threads > 1)}" for side, threads in SHAPES)
    return table(("one step, two guidance rows", *names, "relative error"), rows)
