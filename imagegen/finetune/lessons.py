"""What a student of few steps and no guidance learns from its teacher: three losses, to be chosen by measurement."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from imagegen.families.conditioning import Conditions, predict
from imagegen.finetune.denoising import stack
from imagegen.finetune.loop import Chosen, seeded
from imagegen.finetune.trajectory import Teacher, Trajectories
from imagegen.sampling import Levels

LESSONS = ("trajectory", "consistency", "distribution")


@dataclass(frozen=True)
class Course:
    """What all lessons share.

    Attributes:
        pipeline: whose kind the student is.
        student: learns.
        levels: of the teacher's run.
        every: so many steps of the teacher are one of the student.
        trajectories: the teacher's runs.
        conditions: of each run's prompt.
        seed: of everything that is drawn.
    """

    pipeline: Any
    student: torch.nn.Module
    levels: Levels
    every: int
    trajectories: Trajectories
    conditions: Sequence[Conditions]
    seed: int

    @property
    def num_levels(self) -> int:
        """How many steps the teacher takes."""
        return len(self.levels.times)

    def draw(self, what: str, turn: int, chosen: Chosen, count: int) -> torch.Tensor:
        """Draw a number below `count` for each picture, (B,): a function of seed, turn and place in the batch."""
        chance = (seeded(self.seed, what, turn, position) for position, _ in chosen)
        return torch.stack([torch.randint(count, (), generator=own) for own in chance])

    def noise(self, what: str, turn: int, chosen: Chosen, like: torch.Tensor) -> torch.Tensor:
        """Draw noise for each picture in the same way."""
        chance = (seeded(self.seed, what, turn, position) for position, _ in chosen)
        return torch.stack([torch.randn(like.shape[1:], generator=own) for own in chance]).to(like)

    def told(self, chosen: Chosen) -> Conditions:
        """Return what the denoiser is told of some runs."""
        return stack([self.conditions[index] for _, index in chosen], self.device)

    @property
    def device(self) -> torch.device:
        """Where the student computes."""
        return next(self.student.parameters()).device

    def states(self, chosen: Chosen) -> torch.Tensor:
        """Return the runs' states, (B, N + 1, C, h, w)."""
        return torch.stack([self.trajectories.states(index) for _, index in chosen]).to(self.device)

    def predict(self, module: torch.nn.Module, latents: torch.Tensor, level: torch.Tensor, told: Conditions) -> torch.Tensor:
        """Return a module's prediction at numbered levels."""
        return predict(self.pipeline, module, latents, self.levels.times[level].to(latents.device), told).float()

    def jump(self, latents: torch.Tensor, prediction: torch.Tensor, start: torch.Tensor, end: torch.Tensor | int) -> torch.Tensor:
        """Return the latents after one deterministic step."""
        first, second = (_wide(part, latents) for part in self.levels.jump(start, end))
        return first * latents + second * prediction


def _wide(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1).to(like.device)


def trajectory_loss(course: Course) -> Callable[[int, Chosen], torch.Tensor]:
    """Learn the teacher's way from each level that the student starts from to the one where it arrives.

    Source: Salimans and Ho (2022), https://arxiv.org/abs/2202.00512, with all of the teacher's steps at once.
    """

    def loss_of(turn: int, chosen: Chosen) -> torch.Tensor:
        start = course.draw("level", turn, chosen, course.num_levels // course.every) * course.every
        states, rows = course.states(chosen), torch.arange(len(chosen))
        latents, end = states[rows, start], states[rows, start + course.every]
        first, second = (_wide(part, latents) for part in course.levels.jump(start, start + course.every))
        target = (end - first * latents) / second
        return (course.predict(course.student, latents, start, course.told(chosen)) - target).square().mean()

    return loss_of


def consistency_loss(course: Course) -> Callable[[int, Chosen], torch.Tensor]:
    """Agree with oneself one teacher's step further on about where a part of the way ends.

    Sources: Luo et al. (2023), https://arxiv.org/abs/2310.04378, for guided teachers in latents; the way is cut
    into the student's steps as in Wang et al. (2024), https://arxiv.org/abs/2405.18407; the target is the
    student's own without gradient, as in Song and Dhariwal (2023), https://arxiv.org/abs/2310.14189.
    """

    def loss_of(turn: int, chosen: Chosen) -> torch.Tensor:
        start = course.draw("level", turn, chosen, course.num_levels)
        end = (start // course.every + 1) * course.every
        states, rows, told = course.states(chosen), torch.arange(len(chosen)), course.told(chosen)
        latents, further = states[rows, start], states[rows, start + 1]
        with torch.no_grad():
            inside = (start + 1).clamp(max=course.num_levels - 1)
            arrived = course.jump(further, course.predict(course.student, further, inside, told), inside, end)
            arrived = torch.where(_wide(start + 1 == end, latents), further, arrived)
        first, second = (_wide(part, latents) for part in course.levels.jump(start, end))
        target = (arrived - first * latents) / second
        return (course.predict(course.student, latents, start, told) - target).square().mean()

    return loss_of


def distribution_losses(
    course: Course, teacher: Teacher, critic: torch.nn.Module, anchor: float
) -> tuple[Callable[[int, Chosen], torch.Tensor], Callable[[int, Chosen], torch.Tensor]]:
    """Return the critic's loss and the student's: make pictures whose distribution is the teacher's.

    The critic learns to denoise what the student makes; where it and the teacher disagree about a noised picture
    of the student's, the picture is moved. Source: Yin et al. (2024), https://arxiv.org/abs/2311.18828 and
    https://arxiv.org/abs/2405.14867.

    Args:
        course: what all lessons share.
        teacher: with guidance.
        critic: a copy of the teacher's denoiser, trained.
        anchor: how much of `trajectory_loss` is added, which holds the student near its teacher's own pictures.
    """
    follow = trajectory_loss(course)
    last = course.num_levels - 1

    def make(turn: int, chosen: Chosen, what: str, told: Conditions) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's latents at a level that it starts a step from, coming from noise on its own, and the level."""
        noise = course.states(chosen)[:, 0]
        wanted = course.draw(what, turn, chosen, course.num_levels // course.every) * course.every
        latents, kept = noise, noise.clone()
        for level in range(0, int(wanted.max()), course.every):
            here = torch.full((len(chosen),), level)
            latents = course.jump(latents, course.predict(course.student, latents, here, told), here, here + course.every)
            kept = torch.where(_wide(wanted == level + course.every, latents), latents, kept)
        return kept, wanted

    def noised(turn: int, chosen: Chosen, what: str, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        level = course.draw(f"{what} level", turn, chosen, last) + 1  # pure noise says nothing
        noise = course.noise(f"{what} noise", turn, chosen, clean)
        signal, spread = (_wide(part[level].float(), clean) for part in (course.levels.signal, course.levels.noise))
        return signal * clean + spread * noise, noise, level

    def critic_loss(turn: int, chosen: Chosen) -> torch.Tensor:
        told = course.told(chosen)
        with torch.no_grad():
            latents, start = make(turn, chosen, "critic start", told)
            clean = course.jump(latents, course.predict(course.student, latents, start, told), start, -1)
            noisy, noise, level = noised(turn, chosen, "critic", clean)
            signal, spread = (_wide(part[level].float(), clean) for part in (course.levels.signal, course.levels.noise))
            target = {"flow": noise - clean, "epsilon": noise}.get(course.levels.kind, signal * noise - spread * clean)
        return (course.predict(critic, noisy, level, told) - target).square().mean()

    def student_loss(turn: int, chosen: Chosen) -> torch.Tensor:
        told = course.told(chosen)
        with torch.no_grad():
            latents, start = make(turn, chosen, "student start", told)
        clean = course.jump(latents, course.predict(course.student, latents, start, told), start, -1)
        with torch.no_grad():
            noisy, _, level = noised(turn, chosen, "student", clean)
            times = course.levels.times[level].to(noisy.device)
            wanted = course.jump(noisy, teacher.predict(noisy, times, told).float(), level, -1)
            made = course.jump(noisy, course.predict(critic, noisy, level, told), level, -1)
            scale = (clean - wanted).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
            moved = clean - (made - wanted) / scale
        loss = 0.5 * (clean - moved).square().mean()
        return loss + anchor * follow(turn, chosen) if anchor else loss

    return critic_loss, student_loss
