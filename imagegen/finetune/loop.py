"""The training loop. Every draw is a function of the seed and the step, so that a killed run goes on bit for bit.

Knows nothing of files of pictures: it takes encoded ones. accelerate spreads it over processes; each takes its
part of every batch.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from imagegen.finetune.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from imagegen.finetune.objective import Objective
from imagegen.request import DataError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Example:
    """One encoded picture with its caption.

    Attributes:
        latents: (2C, h, w), mean and spread.
        text: (n, d).
        weight: of its loss.
        group: pictures of equal shape share one.
    """

    latents: torch.Tensor
    text: torch.Tensor
    weight: float
    group: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """How a training goes on.

    Attributes:
        num_steps: optimiser steps.
        seed: of everything that is drawn.
        batch_size: pictures of a step, over all processes.
        accumulate: parts in which a step's batch is computed, to save memory.
        learning_rate: after the warm-up.
        warmup: steps over which the rate rises from 0.
        clip: the largest norm of a gradient.
        weight_decay: AdamW's.
        ema: decay of the averaged weights, which are the result; 0 takes the last weights themselves.
        save_every: steps between checkpoints.
    """

    num_steps: int
    seed: int = 0
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 20
    clip: float = 1.0
    weight_decay: float = 0.01
    ema: float = 0.0
    save_every: int = 50

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DataError: one is out of its range.
        """
        for name in ("num_steps", "batch_size", "accumulate", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise DataError(f"{name} must be a whole number from 1, got {getattr(self, name)!r}")
        if not 0 <= self.ema < 1:
            raise DataError(f"ema must be from 0 to below 1, got {self.ema!r}")
        if not self.learning_rate > 0:
            raise DataError(f"learning_rate must be above 0, got {self.learning_rate!r}")
        if self.batch_size % self.accumulate:
            raise DataError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: a linear rise, then constant."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))


def seeded(*facts: int | str) -> torch.Generator:
    """Return a generator whose seed is a function of what is given."""
    digest = sha256("\0".join(map(str, facts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") & MAX_SEED)


def batches(examples: Sequence[Example], size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield an epoch's batches of equal shape, in a drawn order; a short one is filled up from its own group."""
    chance = seeded(seed, "order", epoch)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in torch.randperm(len(examples), generator=chance).tolist():
        groups.setdefault(examples[index].group, []).append(index)
    made = []
    for group in sorted(groups):
        indices = groups[group]
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            made.append([batch[position % len(batch)] for position in range(size)])
    for number in torch.randperm(len(made), generator=chance).tolist():
        yield made[number]


def batch_of(examples: Sequence[Example], schedule: Schedule, step: int) -> list[int]:
    """Return the batch of a step, whatever came before."""
    sizes = Counter(example.group for example in examples)
    epoch, number = divmod(step, sum(-(-size // schedule.batch_size) for size in sizes.values()))
    return list(batches(examples, schedule.batch_size, schedule.seed, epoch))[number]


class Training:
    """A training: what is trained, and where it stands."""

    def __init__(
        self,
        denoiser: torch.nn.Module,
        trained: list[torch.Tensor],
        objective: Objective,
        examples: Sequence[Example],
        schedule: Schedule,
        out: Path,
        facts: dict[str, Any],
        accelerator: Any,
    ) -> None:
        """Start before the first step.

        Args:
            denoiser: computes.
            trained: its weights that change.
            objective: of its scheduler.
            examples: encoded.
            schedule: how it goes on.
            out: for checkpoints.
            facts: of data, model and settings: what a resume has to agree with.
            accelerator: accelerate's.
        """
        self.trained, self.objective, self.examples, self.schedule, self.out = trained, objective, examples, schedule, out
        self.facts = facts | {name: value for name, value in asdict(schedule).items() if name not in ("num_steps", "save_every")}
        self.accelerator = accelerator
        optimiser = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, foreach=False)
        self.denoiser, self.optimiser = accelerator.prepare(denoiser, optimiser)
        self.averages = [weight.detach().clone() for weight in trained] if schedule.ema else []
        self.step, self.loss = 0, math.nan

    def resume(self) -> None:
        """Go on from the last whole checkpoint; where there is none, start afresh.

        Raises:
            DataError: it is of another training.
        """
        found = list_checkpoints(self.out)
        if not found:
            return
        self.step, state = load_checkpoint(found[-1], self.facts)
        with torch.no_grad():
            for weight, kept in zip(self.trained, state["weights"], strict=True):
                weight.copy_(kept)
            for average, kept in zip(self.averages, state["averages"], strict=True):
                average.copy_(kept)
        self.optimiser.load_state_dict(state["optimiser"])

    def save(self) -> None:
        """Write a checkpoint."""
        if self.accelerator.is_main_process:
            state = {"weights": [weight.detach().cpu() for weight in self.trained], "averages": self.averages}
            save_checkpoint(self.out, self.step, state | {"optimiser": self.optimiser.state_dict()}, self.facts)

    def run(self, tell: Callable[[int, int, float, float], Any]) -> None:
        """Train until the last step; `tell` gets the step, how many there are, the loss and the steps a second."""
        schedule, started, first = self.schedule, time.monotonic(), self.step
        while self.step < schedule.num_steps:
            self.loss = self.take_step()
            self.step += 1
            if self.step % schedule.save_every == 0 or self.step == schedule.num_steps:
                self.save()
            tell(self.step, schedule.num_steps, self.loss, (self.step - first) / (time.monotonic() - started))

    def take_step(self) -> float:
        """Take one optimiser step; return the mean loss of its batch."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(self.step)
        indices = batch_of(self.examples, self.schedule, self.step)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if len(indices) % (world * self.schedule.accumulate):
            raise DataError(
                f"batch_size {len(indices)} must be a multiple of {world} processes and {self.schedule.accumulate} parts"
            )
        mine = list(enumerate(indices))[rank::world]
        size, whole = len(mine) // self.schedule.accumulate, 0.0
        for part in range(self.schedule.accumulate):
            chosen = mine[part * size : (part + 1) * size]
            loss = self.loss_of(chosen) / self.schedule.accumulate
            self.accelerator.backward(loss)
            whole += float(loss.detach())
        self.accelerator.clip_grad_norm_(self.trained, self.schedule.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._average()
        return whole

    def loss_of(self, chosen: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the weighted loss of pictures, each with its position in the step's batch."""
        from imagegen.finetune.cache import draw_latents

        device = self.trained[0].device
        chance = [seeded(self.schedule.seed, "noise", self.step, position) for position, _ in chosen]
        picked = [self.examples[index] for _, index in chosen]
        clean = torch.stack([draw_latents(example.latents, own) for example, own in zip(picked, chance, strict=True)]).to(device)
        noised = self.objective.noise(clean, chance)
        text = torch.stack([example.text for example in picked]).to(device)
        output = self.denoiser(noised.latents, noised.times, encoder_hidden_states=text, return_dict=False)[0]
        weights = noised.weights * torch.tensor([example.weight for example in picked], device=device)
        return ((output.float() - noised.target.float()).square().mean(dim=(1, 2, 3)) * weights).mean()

    @torch.no_grad()
    def _average(self) -> None:
        for average, weight in zip(self.averages, self.trained, strict=False):
            average.lerp_(weight, 1 - self.schedule.ema)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averaged weights in the trained ones' place, where there are any."""
        for weight, average in zip(self.trained, self.averages, strict=False):
            weight.copy_(average)
