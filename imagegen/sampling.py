"""Noise per picture, schedulers by name, and noise levels. Knows nothing of pipelines or of what a model draws."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from imagegen.request import RequestError

# name -> (diffusers class, config overrides). `None` in a request keeps the model's own scheduler.
Known = dict[str, tuple[str, dict[str, Any]]]


def _entry(class_name: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Return a line of the tables: a name means the same whatever options the model's own scheduler has."""
    return class_name, {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False} | options


def _dpm(**options: Any) -> tuple[str, dict[str, Any]]:
    plain = {"solver_order": 2, "solver_type": "midpoint", "algorithm_type": "dpmsolver++", "use_lu_lambdas": False}
    return _entry("DPMSolverMultistepScheduler", **plain | options)


SCHEDULERS: Known = {
    "dpm++ 2m": _dpm(),
    "dpm++ 2m karras": _dpm(use_karras_sigmas=True),
    "dpm++ 2m sde": _dpm(algorithm_type="sde-dpmsolver++"),
    "dpm++ 2m sde karras": _dpm(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
    "unipc": _entry("UniPCMultistepScheduler"),
    "euler": _entry("EulerDiscreteScheduler"),
    "euler karras": _entry("EulerDiscreteScheduler", use_karras_sigmas=True),
    "euler a": _entry("EulerAncestralDiscreteScheduler"),
    "ddim": _entry("DDIMScheduler"),
    "ddpm": _entry("DDPMScheduler"),
    "pndm": _entry("PNDMScheduler", skip_prk_steps=True),
    "lms": _entry("LMSDiscreteScheduler"),
    "heun": _entry("HeunDiscreteScheduler"),
    "dpm2": _entry("KDPM2DiscreteScheduler"),
    "dpm2 a": _entry("KDPM2AncestralDiscreteScheduler"),
    "deis": _entry("DEISMultistepScheduler", algorithm_type="deis"),
    "lcm": _entry("LCMScheduler"),
    "tcd": _entry("TCDScheduler"),
}
STAND_IN = "dpm++ 2m"  # for a scheduler whose levels are not known
# Flow-matching models need a scheduler that knows their noise; first order of DPM++ is Euler there.
FLOW_SCHEDULERS: Known = {"dpm++ 2m": _dpm(), "euler": _dpm(solver_order=1), "unipc": _entry("UniPCMultistepScheduler")}
# Pipelines made for `FlowMatch` schedulers set their sigmas themselves, which only schedulers of this kind take.
FLOW_MATCH_SCHEDULERS: Known = {
    "euler": _entry("FlowMatchEulerDiscreteScheduler"),
    "euler karras": _entry("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True),
    "lcm": _entry("FlowMatchLCMScheduler"),
}
# A model distilled for one of these was trained to step as it does, and no other way.
ONE_OF_A_KIND: dict[str, Known] = {
    "LCMScheduler": {"lcm": SCHEDULERS["lcm"]},
    "SCMScheduler": {"scm": _entry("SCMScheduler")},
}
SAME = {"plms": "pndm"}  # by another name


def known_schedulers(own: Any, calls: Collection[str] | None = None) -> Known:
    """Return the schedulers that a model can run with, by name.

    Args:
        own: the diffusers scheduler that came with it.
        calls: what its pipeline's code calls, where that is known. Most scale what the denoiser sees unless the model
            matches flows; one that does otherwise was written for its own kind of scheduler.
    """
    kind = type(own).__name__
    if kind in ONE_OF_A_KIND:
        return ONE_OF_A_KIND[kind]
    if prediction_of(own) == "flow" and not kind.startswith("FlowMatch"):
        return FLOW_SCHEDULERS
    table = FLOW_MATCH_SCHEDULERS if kind.startswith("FlowMatch") else SCHEDULERS
    usual = calls is None or ("scale_model_input" in calls) == (table is SCHEDULERS)
    return table if usual else {name: entry for name, entry in table.items() if entry[0] == kind}


def make_generators(seed: int, num_images: int) -> list[torch.Generator]:
    """Return one CPU generator per picture: picture *i* has `seed + i`, whatever its batch."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in range(num_images)]


def make_scheduler(own: Any, name: str | None, calls: Collection[str] | None = None) -> Any:
    """Return a scheduler with no state yet: the model's own kind, or another by name.

    Args:
        own: the diffusers scheduler that came with the model, not changed; None where the model has none.
        name: one of `known_schedulers` in any usual spelling, or None.
        calls: what the model's pipeline calls, where that is known.

    Raises:
        RequestError: no such scheduler, or none of that name for this kind of model.
    """
    if own is None:
        return None
    if name is None:
        return type(own).from_config(own.config)
    known = known_schedulers(own, calls)
    spelled = {_spelling(one): entry for one, entry in known.items()}
    key = _spelling(name)
    if key not in spelled:
        kind = "models that match flows, as this one" if prediction_of(own) == "flow" else "this model"
        exists = key in map(_spelling, SCHEDULERS)
        what = f"scheduler {name!r} is not for {kind}" if exists else f"unknown scheduler {name!r} for this model"
        raise RequestError(f"{what}: it takes {', '.join(known) or 'only its own'}")
    class_name, overrides = spelled[key]
    import diffusers

    return getattr(diffusers, class_name).from_config(own.config, **overrides)


def _spelling(name: str) -> str:
    """Return what every spelling of a scheduler's name has in common: `DPM++ 2M Karras`, `dpmpp_2m_karras`."""
    letters = re.sub(r"[^a-z0-9+]", "", name.lower()).replace("ancestral", "a").replace("dpmpp", "dpm++")
    return SAME.get(letters, letters)


def check_steps(scheduler: Any, num_steps: int, share: float = 1.0) -> None:
    """Refuse more steps than a scheduler has levels to choose from.

    Args:
        scheduler: of one run.
        num_steps: asked for.
        share: of its levels, where the pipeline hands it the strength.

    Raises:
        RequestError: there are fewer.
    """
    if type(scheduler).__name__ not in ("LCMScheduler", "TCDScheduler"):
        return
    most = int(scheduler.config.original_inference_steps * share)
    if num_steps > most:
        raise RequestError(f"{type(scheduler).__name__} takes up to {most} steps here, got {num_steps}: lower num_steps")


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
