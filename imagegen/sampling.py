"""Noise per picture, schedulers by name, and noise levels. Knows nothing of pipelines or of what a model draws."""

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from imagegen.request import RequestError

# name -> (diffusers class, config overrides). `None` in a request keeps the model's own scheduler.
Known = dict[str, tuple[str, dict[str, Any]]]
SCHEDULERS: Known = {
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": False}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": True}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "dpm++ 2m sde karras": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
STAND_IN = "dpm++ 2m"  # for a scheduler whose levels are not known
# Flow-matching models need a scheduler that knows their noise; first order of DPM++ is Euler there.
FLOW_SCHEDULERS: Known = {
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "euler": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# Pipelines made for `FlowMatch` schedulers set their sigmas themselves, which only schedulers of this kind take.
FLOW_MATCH_SCHEDULERS: Known = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "lcm": ("FlowMatchLCMScheduler", {}),
}


def known_schedulers(own: Any) -> Known:
    """Return the schedulers that a model can run with, by name.

    Args:
        own: the diffusers scheduler that came with it.
    """
    if type(own).__name__.startswith("FlowMatch"):
        return FLOW_MATCH_SCHEDULERS
    flows = own.config.get("prediction_type") == "flow_prediction"
    return FLOW_SCHEDULERS if flows else SCHEDULERS


def make_generators(seed: int, num_images: int) -> list[torch.Generator]:
    """Return one CPU generator per picture: picture *i* has `seed + i`, whatever its batch."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in range(num_images)]


def make_scheduler(own: Any, name: str | None) -> Any:
    """Return a scheduler with no state yet: the model's own kind, or another by name.

    Args:
        own: the diffusers scheduler that came with the model, not changed; None where the model has none.
        name: one of `known_schedulers`, or None.

    Raises:
        RequestError: no such scheduler, or none of that name for this kind of model.
    """
    if own is None:
        return None
    if name is None:
        return type(own).from_config(own.config)
    known = known_schedulers(own)
    key = name.lower().strip() if isinstance(name, str) else name
    if key in SCHEDULERS and key not in known:
        raise RequestError(f"scheduler {name!r} is not for models that match flows, as this one: it takes {', '.join(known)}")
    if key not in known:
        raise RequestError(f"unknown scheduler {name!r} for this model: it takes {', '.join(known)}")
    class_name, overrides = known[key]
    import diffusers

    return getattr(diffusers, class_name).from_config(own.config, **overrides)


def draw_from(scheduler: Any, generators: Any) -> None:
    """Let a scheduler that draws noise draw each picture's from its own generator, where its pipeline hands it none.

    Those of flow-matching pipelines don't; diffusers' flow-matching LCM would draw from torch's own.

    Args:
        scheduler: of one run.
        generators: one for each picture, or a single one.
    """
    if scheduler is None or not type(scheduler).__name__.startswith("FlowMatch"):
        return
    compute = scheduler.step

    @wraps(compute)
    def step(*args: Any, **kwargs: Any) -> Any:
        return compute(*args, **({"generator": generators} | kwargs))

    scheduler.step = step


def predicted_original(scheduler: Any, latents: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Return the guess of the finished latents after a step: the scheduler's own where it keeps one.

    Args:
        scheduler: after its `step`; None where the model has none.
        latents: the state after that step, of any shape.
        before: the state before it, or None where that is unknown.

    Returns:
        As `latents`; for a model that matches flows, the straight line through both states, followed to its end.
    """
    if scheduler is None:
        return latents
    config = scheduler.config
    keeps_original = config.get("algorithm_type") == "dpmsolver++" or config.get("predict_x0", False)
    outputs = getattr(scheduler, "model_outputs", None)
    if keeps_original and outputs and outputs[-1] is not None:
        return outputs[-1]
    index = getattr(scheduler, "step_index", None)
    if before is None or not index or not type(scheduler).__name__.startswith("FlowMatch"):
        return latents
    last, now, end = (float(scheduler.sigmas[position]) for position in (index - 1, index, -1))
    return latents + (latents - before) * ((end - now) / (now - last)) if now != last else latents


@dataclass(frozen=True)
class Levels:
    """The noise levels that a sampler goes through: latents are signal * clean + noise * standard normal.

    Attributes:
        kind: what the denoiser predicts: `epsilon`, `v_prediction` or `flow`.
        times: (N,), as the denoiser takes them.
        signal: (N + 1,), float64.
        noise: (N + 1,), float64; the last level is clean.
    """

    kind: str
    times: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor

    def jump(self, start: torch.Tensor, end: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a and b of the deterministic step from one level to another: end = a * latents + b * prediction.

        Args:
            start: (B,) numbers of levels.
            end: (B,) numbers of levels, or one for all; -1 is the clean one.

        Source: Song et al. (2021), https://arxiv.org/abs/2010.02502, equation 12; for flow matching it is Euler's step.
        """
        signal, noise = self.signal[start], self.noise[start]
        to_signal, to_noise = self.signal[end], self.noise[end]
        if self.kind == "flow":  # the prediction is noise - clean
            first, second = torch.ones_like(noise), to_noise - noise
        elif self.kind == "epsilon":
            first = to_signal / signal
            second = to_noise - to_signal * noise / signal
        else:
            first, second = to_signal * signal + to_noise * noise, to_noise * signal - to_signal * noise
        return first.float(), second.float()


def prediction_of(scheduler: Any) -> str:
    """Return what the denoiser of a scheduler predicts: `epsilon`, `v_prediction`, `flow`, or another of diffusers' names."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    return "flow" if kind == "flow_prediction" or type(scheduler).__name__.startswith("FlowMatch") else kind


def has_known_levels(scheduler: Any) -> bool:
    """Return whether a scheduler steps without noise of its own over levels that `levels_of` can read."""
    name = type(scheduler).__name__
    if name == "DPMSolverMultistepScheduler":
        return scheduler.config.algorithm_type == "dpmsolver++"
    return name == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.get("use_dynamic_shifting")


def make_deterministic(own: Any) -> Any:
    """Return a scheduler of known levels: the model's own, or DPM++ of its configuration."""
    if has_known_levels(own):
        return make_scheduler(own, None)
    made = make_scheduler(own, None if prediction_of(own) == "flow" else STAND_IN)
    _settle(made)
    return made


def _settle(scheduler: Any) -> None:
    """Let a scheduler that stands in for one without known levels begin at pure noise, and at the same levels for every size."""
    changes = {"timestep_spacing": "trailing", "use_dynamic_shifting": False}
    scheduler.register_to_config(**{name: value for name, value in changes.items() if name in scheduler.config})


def levels_of(scheduler: Any) -> Levels:
    """Return the noise levels of a scheduler of `make_deterministic` whose steps are set."""
    sigmas, kind = scheduler.sigmas.double().cpu(), prediction_of(scheduler)
    signal = 1 - sigmas if kind == "flow" else 1 / (sigmas**2 + 1).sqrt()
    noise = sigmas if kind == "flow" else sigmas * signal
    return Levels(kind, scheduler.timesteps.cpu(), signal, noise)


def follow_teacher(scheduler: Any, teacher_steps: int, stands_in: bool) -> None:
    """Let a run's scheduler take steps of first order, over the levels that `make_deterministic` gave the teacher.

    A student that was distilled for N steps goes from every n-th level of its teacher's run to the next. A
    number of steps that does not divide the teacher's is spaced as the scheduler would.

    Args:
        scheduler: of one run, changed in place; its steps are not set yet.
        teacher_steps: of the run that the student learned from.
        stands_in: the model's own scheduler has no known levels, and this one is in its place.
    """
    if stands_in:
        _settle(scheduler)
    if "solver_order" in scheduler.config:
        scheduler.register_to_config(solver_order=1)
    own = scheduler.set_timesteps

    @wraps(own)
    def set_timesteps(num_inference_steps: int | None = None, *args: Any, sigmas: Any = None, **kwargs: Any) -> None:
        count = num_inference_steps or len(sigmas)  # some pipelines bring levels of their own, which are not the teacher's
        if teacher_steps % count:
            own(count, *args, **kwargs)
            return
        own(teacher_steps, *args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[:: teacher_steps // count]
        scheduler.sigmas = torch.cat([scheduler.sigmas[:-1][:: teacher_steps // count], scheduler.sigmas[-1:]])
        scheduler.num_inference_steps = count

    scheduler.set_timesteps = set_timesteps
