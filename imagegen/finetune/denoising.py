"""The loss of fine-tuning: a denoiser's error on encoded pictures at random times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from imagegen.families.conditioning import Conditions, encode_captions, predict
from imagegen.finetune.cache import draw_latents
from imagegen.finetune.loop import Chosen, seeded
from imagegen.finetune.objective import Objective


@dataclass(frozen=True)
class Example:
    """One encoded picture with its caption.

    Attributes:
        latents: (2C, h, w), mean and spread.
        caption: its text.
        conditions: what the denoiser is told of the caption; None where the text encoder is trained too.
    """

    latents: torch.Tensor
    caption: str
    conditions: Conditions | None

    @property
    def group(self) -> tuple[int, ...]:
        """Pictures of equal shape share one."""
        return tuple(self.latents.shape)


def stack(conditions: Sequence[Conditions], device: torch.device) -> Conditions:
    """Put the conditions of single captions together."""
    return {name: torch.stack([one[name] for one in conditions]).to(device) for name in conditions[0]}


def denoising_loss(
    pipeline: Any, denoiser: torch.nn.Module, objective: Objective, examples: Sequence[Example], seed: int
) -> Callable[[int, Chosen], torch.Tensor]:
    """Return the loss of a step's pictures, whose noise and times are functions of seed, step and place in the batch."""

    def loss_of(step: int, chosen: Chosen) -> torch.Tensor:
        device = next(denoiser.parameters()).device
        chance = [seeded(seed, "noise", step, position) for position, _ in chosen]
        picked = [examples[index] for _, index in chosen]
        clean = torch.stack([draw_latents(example.latents, own) for example, own in zip(picked, chance, strict=True)]).to(device)
        noised = objective.noise(clean, chance)
        known = [example.conditions for example in picked if example.conditions is not None]
        told = stack(known, device) if known else encode_captions(pipeline, [example.caption for example in picked])
        output = predict(pipeline, denoiser, noised.latents, noised.times, told)
        return ((output.float() - noised.target.float()).square().mean(dim=(1, 2, 3)) * noised.weights).mean()

    return loss_of
