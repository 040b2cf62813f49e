"""The stage that trains: our loop in turn with the plain one of diffusers' examples; same model, data and settings."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imagegen.families import adapters
from imagegen.families.diffusion import denoiser_of
from imagegen.finetune.cache import Cache
from imagegen.finetune.data import make_buckets, read_dataset
from imagegen.finetune.denoising import Example, denoising_loss
from imagegen.finetune.loop import Learner, Training
from imagegen.finetune.objective import objective_of
from imagegen.finetune.recipe import Recipe
from imagegen.finetune.workplace import Workplace, start_accelerator
from imagegen.loader import load
from imagegen.measure import peak_memory_gib, reset_peak_memory, synchronise
from imagegen.model import Model

BATCH, PICTURES, WARM_UP = 4, 8, 2
LOOPS = ("plain", "imagegen")


def write_pictures(folder: Path, side: int) -> None:
    """Write pictures of noise with captions: speed does not depend on what they show."""
    chance = torch.Generator().manual_seed(0)
    for number in range(PICTURES):
        pixels = torch.randint(256, (side, side, 3), generator=chance, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of noise, number {number}")


def plain_steps(model: Model, folder: Path, recipe: Recipe) -> Iterator[None]:
    """Train as diffusers' LoRA example does: pictures and captions are encoded anew at every step; yield after each."""
    pipeline, denoiser = model.pipeline, denoiser_of(model.pipeline)
    layers = adapters.find_layers(denoiser)
    weights = adapters.add_adapter(denoiser, layers, rank=recipe.rank, alpha=recipe.rank, dora=False, seed=recipe.seed)
    optimiser = torch.optim.AdamW(weights, lr=1e-4, weight_decay=recipe.weight_decay)
    objective, vae, step = objective_of(pipeline.scheduler), pipeline.vae, 0
    files = sorted(folder.glob("*.png"))
    while True:
        chosen = [files[(step * BATCH + number) % len(files)] for number in range(BATCH)]
        pixels = pipeline.image_processor.preprocess([Image.open(file).convert("RGB") for file in chosen])
        with torch.no_grad():
            found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample()
            clean = (found - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
            captions = [file.with_suffix(".txt").read_text() for file in chosen]
            text = pipeline.encode_prompt(captions, pipeline.device, 1, False)[0]
        noised = objective.noise(clean, [torch.Generator().manual_seed(step * BATCH + number) for number in range(BATCH)])
        output = denoiser(noised.latents, noised.times, encoder_hidden_states=text, return_dict=False)[0]
        torch.nn.functional.mse_loss(output.float(), noised.target.float()).backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        yield


def own_steps(model: Model, folder: Path, recipe: Recipe, out: Path) -> Iterator[None]:
    """Train as `finetune` does, its data encoded once; yield after each step."""
    family = model.family
    cache = Cache(out, model.pipeline, model.hashes, make_buckets(family.size_px, family.multiple_px))
    items = read_dataset(folder).items
    examples = [Example(cache.latents(item), item.text, cache.text(item.text)) for item in items]
    with Workplace(model, recipe) as place:
        loss_of = denoising_loss(model.pipeline, place.denoiser, objective_of(model.pipeline.scheduler), examples, recipe.seed)
        learner, accelerator = Learner("lora", place.weights, loss_of), start_accelerator(model, recipe, out)
        training = Training([learner], [example.group for example in examples], recipe, out, {}, accelerator)
        while True:
            training.take_step()
            yield


def measure_training(source: str, *, tiny: bool, device: str) -> dict[str, Any]:
    """Time both loops' steps in turn, each on a model of its own; then each one's peak memory in a process of its own."""
    rounds, steps = (2, 1) if tiny else (8, 3)
    times: dict[str, list[float]] = {name: [] for name in LOOPS}
    with tempfile.TemporaryDirectory() as place:
        loops = {name: _start(name, source, device, Path(place)) for name in LOOPS}
        for number in range(rounds):
            for name in LOOPS if number % 2 else LOOPS[::-1]:
                began = time.perf_counter()
                for _ in range(steps):
                    next(loops[name])
                synchronise(torch.device(device))
                times[name].append((time.perf_counter() - began) / steps)
        for loop in loops.values():
            loop.close()  # type: ignore[attr-defined]  # a generator
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            memory = {name: pool.submit(_peak_gib, name, source, device, place).result() for name in LOOPS}
    rows: dict[str, dict[str, Any]] = {
        name: {"median_s": statistics.median(found), "range_s": [min(found), max(found)], "peak_gib": memory[name]}
        for name, found in times.items()
    }
    return {"loops": rows, "ratio": rows["plain"]["median_s"] / rows["imagegen"]["median_s"], "batch": BATCH}


def _start(name: str, source: str, device: str, place: Path) -> Iterator[None]:
    """Return a loop that has warmed up."""
    model, data = load(source, device=device), place / "data"
    if not data.exists():
        data.mkdir()
        write_pictures(data, model.family.size_px)
    recipe = Recipe(num_steps=10**6, batch_size=BATCH)
    make: dict[str, Callable[[], Iterator[None]]] = {
        "plain": lambda: plain_steps(model, data, recipe),
        "imagegen": lambda: own_steps(model, data, recipe, place),
    }
    loop = make[name]()
    for _ in range(WARM_UP):
        next(loop)
    return loop


def _peak_gib(name: str, source: str, device: str, place: str) -> float | None:
    """Return the peak memory of a few steps of a loop, the model and its libraries included."""
    loop = _start(name, source, device, Path(place))
    reset_peak_memory(torch.device(device))
    for _ in range(3):
        next(loop)
    return peak_memory_gib(torch.device(device))
