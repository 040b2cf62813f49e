"""The loss of fine-tuning: a denoiser's error on encoded pictures at random times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from imagegen.families.conditioning import Conditions, Prediction, encode_captions, predict
from imagegen.finetune.cache import draw_latents
from imagegen.finetune.loop import Chosen, seeded
from imagegen.finetune.objective import Objective


@dataclass(frozen=True)
class Example:
    """One encoded picture with its caption.

    Attributes:
        latents: (2C, h, w), mean and spread.
        caption: its text.
        conditions: what the denoiser is told of the caption, by the text encoder as it was.
        is_prior: the model's own picture, on which its prediction has to stay what it was.
    """

    latents: torch.Tensor
    caption: str
    conditions: Conditions
    is_prior: bool = False

    @property
    def group(self) -> tuple[Any, ...]:
        """Those that share a batch: pictures of equal shape, of one kind."""
        return self.is_prior, *self.latents.shape


SILENT_SHARE = 0.2


@dataclass(frozen=True)
class Prior:
    """The denoiser as it was: on its own pictures the trained one has to predict the same.

    A prediction of the model itself, where DreamBooth has the noise that was drawn: equal on average, and without
    the noise. Guidance also asks the model about nothing at all, which therefore has to stay as well. After Ruiz et al.
    (2023), https://arxiv.org/abs/2208.12242, section 3.2.

    Attributes:
        predict: the old prediction, of noisy latents, times and conditions; without gradients.
        silence: what the denoiser is told where nothing is asked for.
    """

    predict: Prediction
    silence: Conditions

    def silence_some(self, told: Conditions, silent: Sequence[bool]) -> Conditions:
        """Put silence in the place of some captions."""

        def put(name: str, value: torch.Tensor) -> torch.Tensor:
            where = torch.tensor(silent, device=value.device).reshape(-1, *[1] * (value.dim() - 1))
            return torch.where(where, self.silence[name].to(value), value)

        return {name: put(name, value) for name, value in told.items()}


def stack(conditions: Sequence[Conditions], device: torch.device) -> Conditions:
    """Put the conditions of single captions together."""
    return {name: torch.stack([one[name] for one in conditions]).to(device) for name in conditions[0]}


def denoising_loss(
    pipeline: Any,
    denoiser: torch.nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    seed: int,
    before: Prior | None = None,
    learns_text: bool = False,
) -> Callable[[int, Chosen], torch.Tensor]:
    """Return the loss of a step's pictures, whose noise and times are functions of seed, step and place in the batch.

    Args:
        pipeline: whose kind the denoiser is.
        denoiser: is trained.
        objective: of its scheduler.
        examples: what to learn.
        seed: of every draw.
        before: the denoiser as it was, for the prior's examples.
        learns_text: the text encoder is trained too: captions are encoded anew at every step.
    """

    def tell(picked: Sequence[Example], silent: Sequence[bool]) -> Conditions:
        if learns_text:
            return encode_captions(
                pipeline, ["" if own else example.caption for example, own in zip(picked, silent, strict=True)]
            )
        return stack([example.conditions for example in picked], next(denoiser.parameters()).device)

    def loss_of(step: int, chosen: Chosen) -> torch.Tensor:
        device = next(denoiser.parameters()).device
        chance = [seeded(seed, "noise", step, position) for position, _ in chosen]
        picked = [examples[index] for _, index in chosen]
        clean = torch.stack([draw_latents(example.latents, own) for example, own in zip(picked, chance, strict=True)]).to(device)
        noised = objective.noise(clean, chance)
        told, target = tell(picked, [False] * len(picked)), noised.target
        if before is not None and picked[0].is_prior:
            silent = [float(torch.rand((), generator=own)) < SILENT_SHARE for own in chance]
            as_before = before.silence_some(stack([example.conditions for example in picked], device), silent)
            told = tell(picked, silent) if learns_text else as_before
            target = before.predict(noised.latents, noised.times, as_before)
        output = predict(pipeline, denoiser, noised.latents, noised.times, told)
        return ((output.float() - target.float()).square().mean(dim=(1, 2, 3)) * noised.weights).mean()

    return loss_of
