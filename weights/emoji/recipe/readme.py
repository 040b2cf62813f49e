"""Write every table and picture of the README and of the model card, from these weights on this machine.

Everything between `<!-- begin:NAME -->` and `<!-- end:NAME -->` is replaced; nothing else is touched.
Times are medians of runs that alternate with stock diffusers: let the machine be idle. Needs the
package installed with its `dev` extra, Chromium, and `evaluation.json` from `evaluate.py`.
Without arguments everything is measured, in under an hour; `readme.py times floor` writes those parts only.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from PIL import Image
from readme_demo import photograph
from readme_speed import (
    describe_denoiser,
    measure_crowd,
    measure_janusflow,
    measure_tiers,
    measure_training,
    measure_tuning,
    measure_workers,
    table,
)
from rich.progress import track

import imagegen
from imagegen.fidelity import max_difference, psnr_db
from imagegen.measure import machine, versions
from imagegen.weights import cache_folder

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent
ROOT = MODEL.parent.parent
SAMPLES = MODEL / "samples"
PROMPTS = (
    *("a red apple", "a cat face", "a sunflower", "a rocket", "a frog", "a pizza"),
    *("a blue heart on a yellow background", "a penguin", "a bus on a pink background", "a mushroom", "a guitar", "a snowman"),
)
SEED = 7
RUNS = 7


def fill(file: Path, name: str, text: str) -> None:
    """Replace what stands between a name's markers, in place or in lines of its own."""
    content = file.read_text()
    begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"{file.name} must hold the markers of {name!r} once")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    body = f"\n{text}\n" if "\n" in text else text
    part = file.with_suffix(".part")
    part.write_text(pattern.sub(lambda _: begin + body + end, content))
    os.replace(part, file)


def spread(times_s: list[float]) -> str:
    """Return a median with its range."""
    return f"{statistics.median(times_s):.2f} s ({min(times_s):.2f}–{max(times_s):.2f})"


def alternate(first: Callable[[], None], second: Callable[[], None], what: str) -> tuple[list[float], list[float]]:
    """Time two things in turn, each once unmeasured first; return the seconds of each run."""
    first(), second()
    found: tuple[list[float], list[float]] = ([], [])
    for _ in track(range(RUNS), description=what):
        for times_s, run in zip(found, (first, second), strict=True):
            started = time.perf_counter()
            run()
            times_s.append(time.perf_counter() - started)
    return found


def write_pictures(model: imagegen.Model) -> None:
    """Make the samples and the strip of all of them."""
    SAMPLES.mkdir(exist_ok=True)
    for old in SAMPLES.glob(f"{SEED}-*.png"):
        old.unlink()
    results = [model(prompt, seed=SEED) for prompt in track(PROMPTS, description="pictures")]
    for result in results:
        result.save(SAMPLES)
    columns, gap = 6, 8
    side = 128 + gap
    strip = Image.new("RGB", (columns * side + gap, -(-len(results) // columns) * side + gap), "white")
    for index, result in enumerate(results):
        strip.paste(result.images[0], (gap + index % columns * side, gap + index // columns * side))
    strip.save(SAMPLES / "strip.png")


def measure_times(model: imagegen.Model, stock: object) -> str:
    """Cold start and warm picture, ours and stock in turn, and whether the pictures are the same."""
    with tempfile.TemporaryDirectory() as out:
        ours = [sys.executable, "-m", "imagegen", "generate", "a red apple", "--steps", "20", "--guidance", "4", "--seed", "7"]
        theirs = [sys.executable, str(HERE / "stock.py"), str(MODEL), f"{out}/stock.png"]

        def run(command: list[str]) -> None:
            subprocess.run(command, check=True, capture_output=True, cwd=out)

        cold = alternate(lambda: run([*ours, "--out", out]), lambda: run(theirs), "cold start")
        made = sorted(Path(out).glob("7-a-red-apple*.png"))[0]
        same_cold = psnr_db(Image.open(made), Image.open(f"{out}/stock.png"))

    def make_stock() -> None:
        chance = torch.Generator("cpu").manual_seed(SEED)
        made_warm["stock"] = stock("a red apple", num_inference_steps=20, guidance_scale=4.0, generator=chance).images[0]

    def make_ours() -> None:
        made_warm["ours"] = model("a red apple", seed=SEED, num_steps=20, guidance=4.0).images[0]

    made_warm: dict[str, Image.Image] = {}
    warm = alternate(make_ours, make_stock, "warm picture")
    same_warm = psnr_db(made_warm["ours"], made_warm["stock"])
    rows = []
    for what, (mine, others), same in (
        ("`imagegen generate`, whole process, against a stock script", cold, same_cold),
        ("one picture, model loaded", warm, same_warm),
    ):
        ratio = statistics.median(mine) / statistics.median(others)
        shown = "identical" if same == float("inf") else f"{same:.1f} dB"
        rows.append((what, spread(mine), spread(others), f"{ratio:.2f}", shown))
    head = ("20 steps, guidance 4, 128×128, fp32", "imagegen, `exact`", "stock diffusers", "ratio of medians", "picture")
    return table(head, rows)


def measure_floor(model: imagegen.Model) -> str:
    """Picture i of a batch of 4 against the same picture alone, on one thread and two."""
    before = torch.get_num_threads()
    rows = []
    try:
        for threads in (1, 2):
            worst_db, worst = float("inf"), 0
            for prompt in track(PROMPTS[:4], description=f"noise floor, {threads} threads"):
                torch.set_num_threads(2)
                batch = model(prompt, seed=SEED, num_images=4).images
                torch.set_num_threads(threads)
                for index in range(4):
                    alone = model(prompt, seed=SEED + index).images[0]
                    worst_db, worst = min(worst_db, psnr_db(alone, batch[index])), max(worst, max_difference(alone, batch[index]))
            rows.append((f"batch of 4 on two threads, alone on {threads}", f"{worst_db:.1f} dB", f"{worst}/255"))
    finally:
        torch.set_num_threads(before)
    return table(("16 pictures each", "worst PSNR", "largest difference"), rows)


def describe_evaluation(report: dict, first: dict) -> str:
    """Return the table of `evaluation.json`, each figure beside version 1's."""
    made, before = figures_of(report), figures_of(first)
    real = report["compositions"]["real"]
    beside = {
        "Concepts recognised, top-1": f"{report['judge']['accuracy_twemoji']['top1']:.1%} of Twemoji, never seen",
        "Concepts recognised, top-5": f"{report['judge']['accuracy_twemoji']['top5']:.1%}",
        "Style obeyed": f"{report['styles']['real']:.1%} of real drawings",
        "Fréchet distance from Twemoji": f"{report['frechet']['fluent']:.1f}, Fluent's own",
    }
    beside |= {f"{task.capitalize()}": f"{share:.1%} of real scenes" for task, share in real.items()}
    near = report["nearest"]["twemoji_shifted"]
    beside["Distance to the nearest training picture, median"] = f"{near['median']:.3f}, Twemoji's"
    rows = [(what, before.get(what, "–"), value, beside.get(what, "")) for what, value in made.items()]
    return table(("What", "Version 1", "Now", "The judge on real pictures"), rows)


def figures_of(report: dict) -> dict[str, str]:
    """Return what an evaluation measured, in words."""
    concepts, backgrounds, vae, near = report["concepts"], report["backgrounds"], report["autoencoder"], report["nearest"]
    found = {
        "Concepts recognised, top-1": f"{concepts['top1']:.1%} of {concepts['num']}",
        "Concepts recognised, top-5": f"{concepts['top5']:.1%}",
        "Paraphrases, top-5": f"{report['paraphrases']['top5']:.1%} of {report['paraphrases']['num']}",
        "Background colour right": f"{backgrounds['accuracy']:.1%} of {backgrounds['num']}",
        "The concept on that background, top-1": f"{backgrounds['concept_top1']:.1%}",
        "Style obeyed": f"{report['styles']['accuracy']:.1%} of {report['styles']['num']}",
    }
    tasks = report["compositions"]["made"]
    found |= {task.capitalize(): f"{share:.1%} of {report['compositions']['num'] // len(tasks)}" for task, share in tasks.items()}
    found |= {
        "Fréchet distance from Twemoji": f"{report['frechet']['made']:.1f}",
        "Autoencoder, held-out pictures": f"{vae['heldout_db']:.2f} dB PSNR of {vae['heldout_num']}",
        "Autoencoder, Twemoji": f"{vae['unseen_db']:.2f} dB PSNR of {vae['unseen_num']}",
        "Distance to the nearest training picture, median": f"{near['made_shifted']['median']:.3f}",
    }
    if "named_blind" in report:
        found["Named blind by a vision model"] = f"{report['named_blind']['right']} of {report['named_blind']['of']}"
    return found


def describe_training(trained: dict) -> str:
    """Return what `training.json` says that the two trainings took."""
    rows = [
        (
            part.capitalize(),
            f"{sum(run['num_pictures'] for run in runs.values()):,}",
            f"{sum(run['hours'] for run in runs.values()):.2f} hours, one or two shared CPU cores",
        )
        for part, runs in trained.items()
    ]
    return table(("Part", "Pictures seen", "Time"), rows)


def write_model(model: imagegen.Model, readme: Path, card: Path) -> None:
    """Write what the evaluation and the trainings found, and the sizes."""
    report = json.loads((HERE / "evaluation.json").read_text())
    for file in (readme, card):
        fill(file, "model", describe_evaluation(report, json.loads((HERE / "evaluation-first.json").read_text())))
    fill(card, "training", describe_training(json.loads((HERE / "training.json").read_text())))
    counts = {
        name: sum(p.numel() for p in getattr(model.pipeline, name).parameters()) for name in ("vae", "unet", "text_encoder")
    }
    for name, count in counts.items():
        fill(card, name, f"{count / 1e6:.1f} M")
    size_mb = sum(file.stat().st_size for file in MODEL.rglob("*.safetensors")) / 1e6
    fill(readme, "size", f"{sum(counts.values()) / 1e6:.0f} M parameters, {size_mb:.0f} MB")


def write_times(model: imagegen.Model, readme: Path) -> None:
    """Measure in turn with stock diffusers, and say on what machine."""
    from diffusers import DiffusionPipeline

    stock = DiffusionPipeline.from_pretrained(MODEL)
    stock.set_progress_bar_config(disable=True)
    here, libraries = machine(), versions()
    pins = ", ".join(f"{name} {libraries[name]}" for name in ("torch", "diffusers", "transformers"))
    place = f"{here['cpu']}, {here['cores']} cores, Python {here['python']}, {pins}"
    fill(readme, "machine", f"{place}; {date.today().isoformat()}; {RUNS} runs each in turn, median (range).\n")
    fill(readme, "times", measure_times(model, stock))


def count_fuzzing() -> str:
    """Say how much was thrown at the parsers, from what `tests/fuzz.py` wrote down."""
    tried = json.loads((ROOT / "tests" / "fuzz" / "results.json").read_text()).values()
    runs, least = sum(one["runs"] for one in tried), int(min(one["minutes"] for one in tried))
    return f"{len(tried)} parsers, at least {least} minutes of processor time each: {runs / 1e6:.1f} million files"


PARTS: dict[str, Callable[[imagegen.Model, Path, Path], None]] = {
    "pictures": lambda model, readme, card: write_pictures(model),
    "demo": lambda model, readme, card: photograph(model, SAMPLES),
    "times": lambda model, readme, card: write_times(model, readme),
    "floor": lambda model, readme, card: fill(readme, "floor", measure_floor(model)),
    "tiers": lambda model, readme, card: fill(readme, "tiers", measure_tiers(model)),
    "tuning": lambda model, readme, card: fill(readme, "tuning", measure_tuning(model)),
    "denoiser": lambda model, readme, card: fill(readme, "denoiser", describe_denoiser(cache_folder() / "bench-readme")),
    "training": lambda model, readme, card: fill(readme, "training", measure_training()),
    "janusflow": lambda model, readme, card: fill(readme, "janusflow", measure_janusflow()),
    "crowd": lambda model, readme, card: fill(readme, "crowd", measure_crowd()),
    "workers": lambda model, readme, card: fill(readme, "workers", measure_workers()),
    "fuzz": lambda model, readme, card: fill(readme, "fuzz", count_fuzzing()),
    "model": write_model,
}


def main(parts: list[str] | str) -> None:
    """Write these parts, or `all`."""
    model = imagegen.load()
    for part in PARTS if "all" in parts else parts:
        print(part, flush=True)
        PARTS[part](model, ROOT / "README.md", MODEL / "README.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "all"], default="all", help="what to write")
    main(parser.parse_args().parts)
