"""Noise per picture and schedulers by name. Knows nothing of pipelines or of what a model draws."""

from typing import Any

import torch

from imagegen.request import RequestError

# name -> (diffusers class, config overrides). `None` in a request keeps the model's own scheduler.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": False}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
# Flow-matching models need a scheduler that knows their noise; first order of DPM++ is Euler there.
FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "euler": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def make_generators(seed: int, num_images: int) -> list[torch.Generator]:
    """Return one CPU generator per picture: picture *i* has `seed + i`, whatever its batch."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in range(num_images)]


def make_scheduler(own: Any, name: str | None) -> Any:
    """Return a scheduler with no state yet: the model's own kind, or another by name.

    Args:
        own: the diffusers scheduler that came with the model; not changed.
        name: a key of `SCHEDULERS` (of `FLOW_SCHEDULERS` for a flow-matching model), or None.

    Raises:
        RequestError: no such scheduler, or none of that name for this kind of model.
    """
    if name is None:
        return type(own).from_config(own.config)
    known = FLOW_SCHEDULERS if own.config.get("prediction_type") == "flow_prediction" else SCHEDULERS
    key = name.lower().strip() if isinstance(name, str) else name
    if key not in known:
        raise RequestError(f"unknown scheduler {name!r} for this model: it takes {', '.join(known)}")
    class_name, overrides = known[key]
    import diffusers

    return getattr(diffusers, class_name).from_config(own.config, **overrides)


def predicted_original(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return the scheduler's guess of the finished latents where it keeps one, else the latents.

    Args:
        scheduler: after its `step`.
        latents: (B, C, h, w), the state after that step.
    """
    config = scheduler.config
    keeps_original = config.get("algorithm_type") == "dpmsolver++" or config.get("predict_x0", False)
    outputs = getattr(scheduler, "model_outputs", None)
    return outputs[-1] if keeps_original and outputs and outputs[-1] is not None else latents
