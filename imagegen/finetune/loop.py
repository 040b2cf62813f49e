"""The training loop. Every draw is a function of the seed and the step, so that a killed run goes on bit for bit.

Knows nothing of pictures or models: it takes losses, and the weights that each of them trains. accelerate
spreads it over processes: each computes its part of every batch, and their gradients are averaged.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from imagegen.finetune.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from imagegen.finetune.recipe import Recipe
from imagegen.request import DataError

MAX_SEED = 2**63 - 1
Chosen = Sequence[tuple[int, int]]
"""Some pictures of a step's batch: each one's place in the whole batch, and its number in the data."""


def seeded(*facts: int | str) -> torch.Generator:
    """Return a generator whose seed is a function of what is given."""
    digest = sha256("\0".join(map(str, facts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") & MAX_SEED)


def batches(groups: Sequence[Any], size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield an epoch's batches, each of one group, in a drawn order; a short one is filled up from its own group.

    Args:
        groups: of each example of the data; those of equal shape share one.
        size: of a batch.
        seed: of the order.
        epoch: how often all were seen.
    """
    chance = seeded(seed, "order", epoch)
    members: dict[Any, list[int]] = {}
    for index in torch.randperm(len(groups), generator=chance).tolist():
        members.setdefault(groups[index], []).append(index)
    made = []
    for group in sorted(members):
        indices = members[group]
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            made.append([batch[position % len(batch)] for position in range(size)])
    for number in torch.randperm(len(made), generator=chance).tolist():
        yield made[number]


def batch_of(groups: Sequence[Any], size: int, seed: int, step: int) -> list[int]:
    """Return the batch of a step, whatever came before."""
    epoch, number = divmod(step, sum(-(-count // size) for count in Counter(groups).values()))
    return list(batches(groups, size, seed, epoch))[number]


@dataclass
class Learner:
    """Weights, and the loss that they are trained on.

    Attributes:
        name: in the log and in checkpoints.
        weights: float32, changed in place.
        loss_of: the mean loss of some pictures of a step.
        turns: how often in a step they are trained, each time on a batch of its own.
        rate: their learning rate beside the recipe's.
        averages: of the weights, where the recipe asks for them.
    """

    name: str
    weights: list[torch.Tensor]
    loss_of: Callable[[int, Chosen], torch.Tensor]
    turns: int = 1
    rate: float = 1.0
    averages: Sequence[torch.Tensor] = ()

    def start(self, recipe: Recipe) -> None:
        """Make the optimiser and the averages."""
        settings = {"lr": recipe.rate_at(0), "weight_decay": recipe.weight_decay}
        self.optimiser = torch.optim.AdamW(self.weights, foreach=False, **settings)
        self.averages = [weight.detach().clone() for weight in self.weights] if recipe.ema else []

    def state(self) -> dict[str, Any]:
        """Return all of it for a checkpoint."""
        weights = [weight.detach().cpu() for weight in self.weights]
        return {"weights": weights, "averages": list(self.averages), "optimiser": self.optimiser.state_dict()}

    @torch.no_grad()
    def set_state(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's."""
        for own, kept in ((self.weights, state["weights"]), (self.averages, state["averages"])):
            for value, before in zip(own, kept, strict=True):
                value.copy_(before)
        self.optimiser.load_state_dict(state["optimiser"])

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averages towards the weights."""
        for average, weight in zip(self.averages, self.weights, strict=False):
            average.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages, where there are any."""
        for average, weight in zip(self.averages, self.weights, strict=False):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


class Training:
    """A training: who learns, and where it stands."""

    def __init__(
        self,
        learners: Sequence[Learner],
        groups: Sequence[Any],
        recipe: Recipe,
        out: Path,
        facts: dict[str, Any],
        accelerator: Any,
    ) -> None:
        """Start before the first step.

        Args:
            learners: in the order of their turns; the last one's loss is shown.
            groups: of each example of the data.
            recipe: how it goes on.
            out: for checkpoints.
            facts: of data and model: what a resume has to agree with, beside the recipe's.
            accelerator: accelerate's.

        Raises:
            DataError: the batch cannot be shared out evenly.
        """
        self.learners, self.groups, self.recipe, self.out, self.accelerator = learners, groups, recipe, out, accelerator
        self.facts = facts | recipe.facts() | {"num_processes": accelerator.num_processes}
        if recipe.batch_size % (accelerator.num_processes * recipe.accumulate):
            raise DataError(
                f"batch_size {recipe.batch_size} must be a multiple of {accelerator.num_processes} processes "
                f"times accumulate {recipe.accumulate}"
            )
        for learner in learners:
            learner.start(recipe)
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
        for learner in self.learners:
            learner.set_state(state[learner.name])

    def save(self) -> None:
        """Write a checkpoint."""
        if self.accelerator.is_main_process:
            save_checkpoint(self.out, self.step, {own.name: own.state() for own in self.learners}, self.facts)

    def run(self, tell: Callable[["Training", float], Any]) -> None:
        """Train until the last step; `tell` gets the training after each step, and the steps a second so far."""
        started, first = time.monotonic(), self.step
        while self.step < self.recipe.num_steps:
            self.take_step()
            if self.step % self.recipe.save_every == 0 or self.step == self.recipe.num_steps:
                self.save()
            tell(self, (self.step - first) / (time.monotonic() - started))

    def take_step(self) -> None:
        """Let every learner have its turns."""
        for learner in self.learners:
            for turn in range(learner.turns):
                self.loss = self._teach(learner, self.step * learner.turns + turn)
        self.step += 1

    def _teach(self, learner: Learner, turn: int) -> float:
        """Take one optimiser step; return the mean loss of its whole batch."""
        for group in learner.optimiser.param_groups:
            group["lr"] = self.recipe.rate_at(self.step) * learner.rate
        world, rank, parts = self.accelerator.num_processes, self.accelerator.process_index, self.recipe.accumulate
        batch = batch_of(self.groups, self.recipe.batch_size, self.recipe.seed, turn)
        mine = list(enumerate(batch))[rank::world]
        size, whole = len(mine) // parts, torch.zeros((), device=learner.weights[0].device)
        for part in range(parts):
            with torch.autocast(whole.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                loss = learner.loss_of(turn, mine[part * size : (part + 1) * size]) / parts
            gradients = torch.autograd.grad(loss, learner.weights, allow_unused=True)
            for weight, gradient in zip(learner.weights, gradients, strict=True):
                if gradient is not None:
                    weight.grad = gradient if weight.grad is None else weight.grad + gradient
            whole += loss.detach()
        if world > 1:
            self._share_gradients(learner.weights)
            whole = self.accelerator.reduce(whole, reduction="mean")
        torch.nn.utils.clip_grad_norm_(learner.weights, self.recipe.clip)
        learner.optimiser.step()
        learner.optimiser.zero_grad(set_to_none=True)
        learner.average(self.recipe.ema)
        return float(whole)

    def _share_gradients(self, weights: Sequence[torch.Tensor]) -> None:
        """Average the gradients over all processes, in one message; every process uses the same weights."""
        found = [weight.grad for weight in weights if weight.grad is not None]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in found]), reduction="mean")
        for gradient, mean in zip(found, flat.split([gradient.numel() for gradient in found]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def finish(self) -> None:
        """Put the averaged weights in the trained ones' place, where there are any."""
        for learner in self.learners:
            learner.swap()
