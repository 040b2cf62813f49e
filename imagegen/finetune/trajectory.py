"""What a teacher does from noise to picture, step by step, kept on disk: a student learns from it as often as it likes."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from imagegen.families.conditioning import Conditions, Prediction
from imagegen.finetune.cache import FOLDER
from imagegen.finetune.denoising import stack
from imagegen.finetune.loop import seeded
from imagegen.sampling import make_deterministic
from imagegen.weights import save_weights

TOGETHER = 8  # pictures that the teacher makes at a time


class Teacher:
    """A denoiser with guidance.

    Attributes:
        pipeline: whose kind it is.
        plain: the prediction without guidance, of latents, times and conditions.
        guidance: 1 is off.
        silence: what it is told where nothing is asked for.
    """

    def __init__(self, pipeline: Any, plain: Prediction, guidance: float, silence: Conditions) -> None:
        """Keep them."""
        self.pipeline, self.plain, self.guidance, self.silence = pipeline, plain, guidance, silence

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, times: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Return the guided prediction, (B, C, h, w). Source: Ho and Salimans (2022), https://arxiv.org/abs/2207.12598."""
        if self.guidance == 1:
            return self.plain(latents, times, conditions)
        size = len(latents)
        told = {name: torch.cat([self.silence[name].expand_as(value), value]) for name, value in conditions.items()}
        both = self.plain(torch.cat([latents, latents]), torch.cat([times, times]), told)
        without, with_prompt = both[:size], both[size:]
        return without + self.guidance * (with_prompt - without)


class Trajectories:
    """A teacher's runs: number *i* is of prompt *i* modulo their number, from a noise of its own."""

    def __init__(
        self, out: Path, teacher: Teacher, facts: dict[str, Any], prompts: Sequence[str], num_steps: int, seed: int
    ) -> None:
        """Compute nothing yet.

        Args:
            out: the training's folder.
            teacher: makes them.
            facts: of the teacher: files of another one are not found.
            prompts: what it is told.
            num_steps: of a run.
            seed: of the noise.
        """
        self.folder, self.teacher, self.prompts, self.num_steps, self.seed = out / FOLDER, teacher, prompts, num_steps, seed
        self.scheduler = make_deterministic(teacher.pipeline.scheduler)
        self.scheduler.set_timesteps(num_steps)
        own = {"guidance": teacher.guidance, "num_steps": num_steps, "seed": seed, "scheduler": dict(self.scheduler.config)}
        self.key = json.dumps(facts | own, sort_keys=True, default=str)

    def path(self, number: int) -> Path:
        """Return the place of a run."""
        digest = sha256(f"{self.key}\0{number}\0{self.prompt(number)}".encode()).hexdigest()
        return self.folder / f"trajectory-{digest[:32]}.safetensors"

    def prompt(self, number: int) -> str:
        """Return the prompt of a run."""
        return self.prompts[number % len(self.prompts)]

    def states(self, number: int) -> torch.Tensor:
        """Return a run's latents, from noise to clean: (num_steps + 1, C, h, w) float32."""
        return load_file(self.path(number))["states"]

    def fill(self, count: int, shape: tuple[int, int, int], conditions: Any, tell: Any) -> None:
        """Compute the runs that are missing or damaged; stopped at any moment, the next call goes on.

        Args:
            count: how many runs.
            shape: (C, h, w) of the latents.
            conditions: returns what the denoiser is told of a prompt.
            tell: is told how far it is.
        """
        missing = [number for number in range(count) if not self._is_whole(number)]
        for start in range(0, len(missing), TOGETHER):
            numbers = missing[start : start + TOGETHER]
            noise = torch.stack([torch.randn(shape, generator=seeded(self.seed, "trajectory", number)) for number in numbers])
            told = stack([conditions(self.prompt(number)) for number in numbers], self.teacher.pipeline.device)
            states = self._run(noise, told)
            for row, number in enumerate(numbers):
                save_weights(self.path(number), {"states": states[row]}, {})
            tell("following the teacher", count - len(missing) + start + len(numbers), count)

    def _is_whole(self, number: int) -> bool:
        try:
            return len(load_file(self.path(number))["states"]) == self.num_steps + 1
        except (OSError, SafetensorError, KeyError):
            return False

    @torch.no_grad()
    def _run(self, noise: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Return (B, num_steps + 1, C, h, w) on the CPU."""
        scheduler = self.scheduler
        scheduler.set_timesteps(self.num_steps)
        latents = noise.to(self.teacher.pipeline.device)  # the first level of these schedulers is unit noise
        states = [latents]
        for time in scheduler.timesteps:
            prediction = self.teacher.predict(latents, time.expand(len(latents)).to(latents.device), conditions)
            latents = scheduler.step(prediction, time, latents, return_dict=False)[0]
            states.append(latents)
        return torch.stack(states, dim=1).float().cpu()
