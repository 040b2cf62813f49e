"""What a denoiser is trained on: noisy latents, the target of its own prediction type, and the weight of each time.

Knows nothing of pictures, captions or optimisers. Every draw comes from a generator that the caller seeds.
"""

from dataclasses import dataclass
from typing import Any

import torch

from imagegen.request import DataError
from imagegen.sampling import prediction_of


@dataclass(frozen=True)
class Noised:
    """A batch as the denoiser sees it.

    Attributes:
        latents: (B, C, h, w), noisy.
        times: (B,), as the denoiser takes them.
        target: (B, C, h, w), what it should return.
        weights: (B,), float32, of each picture's loss.
    """

    latents: torch.Tensor
    times: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """The objective of a model's own scheduler.

    Attributes:
        kind: `epsilon`, `v_prediction` or `flow`.
        num_times: training times, 1000 as a rule.
        alphas: (num_times,) cumulative products, where the kind is not `flow`.
        shift: of flow matching's times.
        min_snr: caps the signal-to-noise ratio of the weights; None leaves all at 1.
            Source: Hang et al. (2023), https://arxiv.org/abs/2303.09556.
    """

    kind: str
    num_times: int
    alphas: torch.Tensor | None = None
    shift: float = 1.0
    min_snr: float | None = None

    def noise(self, clean: torch.Tensor, generators: list[torch.Generator]) -> Noised:
        """Return a batch at random times.

        Args:
            clean: (B, C, h, w) latents, unit scale.
            generators: one for each picture, on the CPU, so that a batch may be split over processes.
        """
        noise = torch.stack([torch.randn(clean.shape[1:], generator=own) for own in generators]).to(clean)
        if self.kind == "flow":
            sigmas = torch.stack([self._draw_sigma(own) for own in generators]).to(clean.device)
            mixed = sigmas.reshape(-1, 1, 1, 1).to(clean.dtype)
            latents = (1 - mixed) * clean + mixed * noise
            return Noised(latents, sigmas * self.num_times, noise - clean, torch.ones_like(sigmas))
        assert self.alphas is not None
        drawn = [torch.randint(self.num_times, (), generator=own) for own in generators]
        times = torch.stack(drawn).to(clean.device)
        alphas = self.alphas.to(clean.device)[times]
        signal, spread = (part.sqrt().reshape(-1, 1, 1, 1).to(clean.dtype) for part in (alphas, 1 - alphas))
        latents = signal * clean + spread * noise
        target = noise if self.kind == "epsilon" else signal * noise - spread * clean
        return Noised(latents, times, target, self._weights(alphas))

    def _draw_sigma(self, generator: torch.Generator) -> torch.Tensor:
        """Draw a time of flow matching: logit-normal, shifted. Source: Esser et al. (2024), https://arxiv.org/abs/2403.03206."""
        sigma = torch.sigmoid(torch.randn((), generator=generator))
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def _weights(self, alphas: torch.Tensor) -> torch.Tensor:
        if self.min_snr is None:
            return torch.ones_like(alphas)
        ratio = alphas / (1 - alphas)
        capped = ratio.clamp(max=self.min_snr)
        return capped / ratio if self.kind == "epsilon" else capped / (ratio + 1)


def objective_of(scheduler: Any, min_snr: float | None = None) -> Objective:
    """Return the objective that a model was trained on, as its scheduler says.

    Raises:
        DataError: its prediction type is none that training knows, or `min_snr` does not fit it.
    """
    config = scheduler.config
    kind = prediction_of(scheduler)
    if min_snr is not None and not min_snr > 0:
        raise DataError(f"min_snr must be above 0, got {min_snr!r}")
    if kind == "flow":
        if min_snr is not None:
            raise DataError(
                "min_snr weighs the losses of noise and v prediction, and this model is of flow matching: leave it out"
            )
        shift = config.get("flow_shift", config.get("shift", 1.0)) or 1.0
        return Objective("flow", config.num_train_timesteps, shift=float(shift))
    if kind not in ("epsilon", "v_prediction"):
        raise DataError(f"training knows noise, v and flow prediction, and this model predicts {kind!r}")
    return Objective(kind, config.num_train_timesteps, scheduler.alphas_cumprod.clone(), min_snr=min_snr)
