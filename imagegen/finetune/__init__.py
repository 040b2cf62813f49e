"""Fine-tuning that people trust with a night: checked data, encoded once, trained step by step, resumed bit for bit.

`data` reads and checks pictures with captions, `cache` encodes them once, `objective` says what a denoiser is
trained on, `loop` trains, `checkpoint` keeps, `adapters` writes and reads LoRAs.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from imagegen.families import adapters
from imagegen.families.diffusion import denoiser_of, quiet
from imagegen.finetune.cache import Cache
from imagegen.finetune.checkpoint import list_checkpoints
from imagegen.finetune.data import Dataset, make_buckets, read_dataset
from imagegen.finetune.loop import Example, Schedule, Training
from imagegen.finetune.objective import objective_of
from imagegen.request import DataError
from imagegen.weights import save_weights

if TYPE_CHECKING:
    from imagegen.model import Model

METHODS = ("lora", "full")
PRIOR = "prior"


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Attributes:
        folder: its `--out`.
        weights: the file of weights.
        loss: of the last step.
        num_steps: steps done.
        notes: what should be known of the data.
    """

    folder: Path
    weights: Path
    loss: float
    num_steps: int
    notes: tuple[str, ...]


def finetune(
    model: "Model",
    data: str | Path | Dataset,
    out: str | Path,
    *,
    method: str = "lora",
    num_steps: int = 500,
    seed: int = 0,
    batch_size: int = 4,
    accumulate: int = 1,
    learning_rate: float | None = None,
    rank: int = 8,
    alpha: int | None = None,
    dora: bool = False,
    convolutions: bool = False,
    min_snr: float | None = None,
    ema: float = 0.0,
    save_every: int = 50,
    prior_prompts: tuple[str, ...] = (),
    prior_pictures: int = 20,
    resume: bool = False,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Trained:
    """Fine-tune a model on a folder of pictures with captions; the model itself stays as it was.

    Args:
        model: to start from.
        data: the folder, or what `read_dataset` made of it: `metadata.jsonl`, or `NAME.txt` beside `NAME.png`.
        out: gets the weights, `checkpoints/` and `cache/`.
        method: `lora`, or `full` for every weight of the denoiser.
        num_steps: optimiser steps in all.
        seed: of everything that is drawn.
        batch_size: pictures of a step, over all processes.
        accumulate: parts in which a step's batch is computed.
        learning_rate: 1e-4 for a LoRA, 1e-5 for all weights, where none is given.
        rank: of the LoRA.
        alpha: of the LoRA; its rank by default.
        dora: learn magnitudes too.
        convolutions: put LoRAs on convolutions too.
        min_snr: cap of the loss weights' signal-to-noise ratio.
        ema: decay of averaged weights; 0 is none.
        save_every: steps between checkpoints.
        prior_prompts: for prior preservation: the model's own pictures of these are trained on as well, so
            that it keeps them.
        prior_pictures: how many of those.
        resume: go on from the last checkpoint in `out`.
        progress: is told what is going on, the work done, and all of it.

    Raises:
        DataError: the data or a setting is wrong, or a resume is of another training.
    """
    if method not in METHODS:
        raise DataError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    tell = progress or (lambda *_: None)
    rate = learning_rate if learning_rate is not None else 1e-4 if method == "lora" else 1e-5
    schedule = Schedule(num_steps, seed, batch_size, accumulate, rate, ema=ema, save_every=save_every)
    adapter = {"rank": rank, "alpha": alpha or rank, "dora": dora, "convolutions": convolutions}
    if rank < 1:
        raise DataError(f"rank must be at least 1, got {rank}")
    missing = adapters.peft_is_missing() if method == "lora" else None
    if missing:
        raise DataError(missing)
    dataset, out = data if isinstance(data, Dataset) else read_dataset(data), Path(out)
    if not resume and list_checkpoints(out):
        raise DataError(f"{str(out)!r} holds another training's checkpoints: resume it, or choose another folder")
    objective = objective_of(model.pipeline.scheduler, min_snr)
    facts: dict[str, Any] = {"method": method, "data_sha256": dataset.sha256, "model_sha256": model.hashes, "min_snr": min_snr}
    facts |= {"prior": list(prior_prompts), "prior_pictures": prior_pictures if prior_prompts else 0}
    facts |= adapter if method == "lora" else {}
    examples = _encode(model, dataset, out, prior_prompts, prior_pictures, seed, tell)
    denoiser = denoiser_of(model.pipeline)
    kept = [(weight, weight.requires_grad) for weight in denoiser.parameters()]
    originals = [weight.detach().clone() for weight, _ in kept] if method == "full" else []
    try:
        trained = _choose_weights(denoiser, method, adapter, seed)
        with quiet():
            from accelerate import Accelerator

            training = Training(denoiser, trained, objective, examples, schedule, out, facts, Accelerator())
        if resume:
            training.resume()
        training.run(lambda step, steps, loss, rate: tell(f"step, loss {loss:.4f}, {rate:.2f} a second", step, steps))
        training.finish()
        weights = _save(denoiser, method, out, facts | asdict(schedule) | {"family": model.family.name})
        return Trained(out, weights, training.loss, training.step, dataset.notes)
    finally:
        _restore(denoiser, kept, originals)


def _encode(
    model: "Model", dataset: Dataset, out: Path, prior_prompts: tuple[str, ...], prior_pictures: int, seed: int, tell: Any
) -> list[Example]:
    """Return the data encoded, and the model's own pictures for prior preservation."""
    family = model.family
    cache = Cache(out, model.pipeline, model.hashes, make_buckets(family.size_px, family.multiple_px))
    sets = [dataset]
    if prior_prompts:
        sets.append(_draw_prior(model, out / "cache" / PRIOR, prior_prompts, prior_pictures, seed, tell))
    found = []
    for part in sets:
        cache.fill(part.items, [item.text for item in part.items], tell)
        for item in part.items:
            latents = cache.latents(item)
            found.append(Example(latents, cache.text(item.text), 1.0, tuple(latents.shape)))
    return found


def _draw_prior(model: "Model", folder: Path, prompts: tuple[str, ...], count: int, seed: int, tell: Any) -> Dataset:
    """Draw the pictures that are missing, and read them as data."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        place = folder / f"{number:04d}.png"
        caption = place.with_suffix(".txt")
        if not (place.exists() and caption.exists()):
            picture = model.generate(prompt, seed=seed + number).pictures[0]
            from imagegen.receipt import png_bytes

            for file, content in ((place, png_bytes(picture.image, picture.receipt)), (caption, prompt.encode())):
                part = file.with_name(f".{file.name}.part")
                part.write_bytes(content)
                part.replace(file)
        tell("drawing the prior's pictures", number + 1, count)
    return read_dataset(folder)


def _choose_weights(denoiser: torch.nn.Module, method: str, adapter: dict[str, Any], seed: int) -> list[torch.Tensor]:
    if method == "lora":
        return adapters.add_adapter(denoiser, seed=seed, **adapter)
    denoiser.requires_grad_(True)
    return list(denoiser.parameters())


def _save(denoiser: torch.nn.Module, method: str, out: Path, facts: dict[str, Any]) -> Path:
    if method == "lora":
        return adapters.save_adapter(denoiser, out, facts)
    denoiser.save_config(out)
    metadata = {"format": "pt", "imagegen": json.dumps(facts, sort_keys=True)}
    return save_weights(out / "diffusion_pytorch_model.safetensors", denoiser.state_dict(), metadata)


def _restore(denoiser: torch.nn.Module, kept: list[tuple[torch.Tensor, bool]], originals: list[torch.Tensor]) -> None:
    """Leave the model as it was: without the adapter, or with its own weights."""
    if adapters.ADAPTER in getattr(denoiser, "peft_config", {}):
        denoiser.unload_lora()
    with torch.no_grad():
        for (weight, _), original in zip(kept, originals, strict=False):
            weight.copy_(original)
    for weight, needed in kept:
        weight.requires_grad_(needed)
        weight.grad = None


class _Callable(ModuleType):
    """Lets `imagegen.finetune(...)` be the function, whichever of the two Python has bound to that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Trained:
        return finetune(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

__all__ = ["Trained", "finetune", "read_dataset"]
