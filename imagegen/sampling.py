"""Noise per picture and schedulers by name. Knows nothing of pipelines or of what a model draws."""

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
        own: the diffusers scheduler that came with the model; not changed.
        name: one of `known_schedulers`, or None.

    Raises:
        RequestError: no such scheduler, or none of that name for this kind of model.
    """
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


def predicted_original(scheduler: Any, latents: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Return the guess of the finished latents after a step: the scheduler's own where it keeps one.

    Args:
        scheduler: after its `step`.
        latents: the state after that step, of any shape.
        before: the state before it, or None where that is unknown.

    Returns:
        As `latents`; for a model that matches flows, the straight line through both states, followed to its end.
    """
    config = scheduler.config
    keeps_original = config.get("algorithm_type") == "dpmsolver++" or config.get("predict_x0", False)
    outputs = getattr(scheduler, "model_outputs", None)
    if keeps_original and outputs and outputs[-1] is not None:
        return outputs[-1]
    index = getattr(scheduler, "step_index", None)
    if before is None or not index or not type(scheduler).__name__.startswith("FlowMatch"):
        return latents
    last, now = (float(scheduler.sigmas[position]) for position in (index - 1, index))
    return latents + (latents - before) * (now / (last - now)) if last > now else latents
