"""The settings of a training: checked, and what of them a resumed one has to agree with. Knows nothing of torch."""

import difflib
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from imagegen.request import DataError

METHODS = ("lora", "full")
PRECISIONS = ("fp32", "bf16")
LAYERS = ("attention", "convolutions", "all", "text")
RATES = {"lora": 1e-4, "full": 1e-5}
FREE = ("num_steps", "save_every", "validation_prompts", "validate_every", "tracker")  # may change at a resume


@dataclass(frozen=True)
class Recipe:
    """How a training goes on.

    Attributes:
        method: `lora`, or `full` for every weight of the denoiser.
        num_steps: optimiser steps in all.
        seed: of everything that is drawn.
        batch_size: pictures of a step, over all processes.
        accumulate: parts in which each process computes its share of a step's batch, to save memory.
        learning_rate: after the warm-up; None is 1e-4 for a LoRA, 1e-5 for all weights.
        warmup: steps over which the rate rises from 0.
        clip: the largest norm of a gradient.
        weight_decay: AdamW's.
        ema: decay of averaged weights, which are then the result; 0 takes the last weights themselves.
        rank: of the LoRA.
        alpha: of the LoRA, whose output is scaled by alpha / rank; None is its rank.
        dora: learn magnitudes too. Source: Liu et al. (2024), https://arxiv.org/abs/2402.09353.
        layers: of the denoiser that get a LoRA: `attention`, `convolutions` (both), `all` that multiply, or `text`, which
            read the prompt.
        text_encoder: put a LoRA on the text encoder too; its embeddings are then computed at every step.
        min_snr: cap of the loss weights' signal-to-noise ratio; None is no weighting.
        precision: of the denoiser's arithmetic while it is trained: `fp32`, or `bf16` by autocast; weights stay fp32.
        gradient_checkpointing: compute activations twice instead of keeping them; the same gradients.
        save_every: steps between checkpoints.
        prior_prompts: the model's own pictures of these are trained on as well, so that it keeps them.
        prior_pictures: how many of those.
        validation_prompts: rendered, each with its own fixed seed, into `samples/`.
        validate_every: steps between those.
        tracker: which of accelerate's trackers is told of every step: its name, such as `tensorboard`; or
            accelerate's GeneralTracker.
    """

    method: str = "lora"
    num_steps: int = 500
    seed: int = 0
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: int = 20
    clip: float = 1.0
    weight_decay: float = 0.01
    ema: float = 0.0
    rank: int = 8
    alpha: int | None = None
    dora: bool = False
    layers: str = "attention"
    text_encoder: bool = False
    min_snr: float | None = None
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    save_every: int = 50
    prior_prompts: tuple[str, ...] = ()
    prior_pictures: int = 20
    validation_prompts: tuple[str, ...] = ()
    validate_every: int = 100
    tracker: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DataError: one is out of its range.
        """
        for name in ("num_steps", "batch_size", "accumulate", "rank", "save_every", "prior_pictures", "validate_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise DataError(f"{name} must be a whole number from 1, got {getattr(self, name)!r}")
        for name, allowed in (("method", METHODS), ("precision", PRECISIONS), ("layers", LAYERS)):
            if getattr(self, name) not in allowed:
                raise DataError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 <= self.ema < 1:
            raise DataError(f"ema must be from 0 to below 1, got {self.ema!r}")
        for name in ("learning_rate", "alpha", "min_snr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise DataError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.batch_size % self.accumulate:
            raise DataError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.method == "full" and self.text_encoder:
            raise DataError("the text encoder is trained by a LoRA only: leave text_encoder out, or use method='lora'")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: a linear rise, then constant."""
        rate = self.learning_rate if self.learning_rate is not None else RATES[self.method]
        return rate * min(1.0, (step + 1) / max(1, self.warmup))

    def facts(self) -> dict[str, Any]:
        """Return the settings that the result depends on, ready for JSON."""
        kept = {name: value for name, value in asdict(replace(self, tracker=None)).items() if name not in FREE}
        return kept | {"prior_prompts": list(self.prior_prompts)}


def make_recipe(given: dict[str, Any]) -> Recipe:
    """Return the recipe of keyword arguments.

    Raises:
        DataError: a name is unknown, or a value out of its range.
    """
    known = [field.name for field in fields(Recipe)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise DataError(
                f"no setting {name!r} of a training" + (f": did you mean {near[0]}?" if near else f": {', '.join(known)}")
            )
    return Recipe(**given)
