"""Models that diffusers runs: loading them and turning their pipelines into streams of steps.

This folder alone knows diffusers' pipelines and their names for things. The stock pipeline does all the
work, so that the `exact` plan is the stock picture bit for bit.
"""

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from imagegen.catalog import FAMILIES, TWO_PASSES, Family, fit_family
from imagegen.families.arguments import call_of, methods_called, translate
from imagegen.families.latents import decode_preview, noise_factor
from imagegen.families.libraries import quiet
from imagegen.families.loading import load_pipeline, load_stock
from imagegen.families.run import OnStep, Run, StepState, in_lock_step, watched
from imagegen.families.texts import cut_text
from imagegen.request import ModelError, Request, RequestError
from imagegen.sampling import check_steps, draw_from, make_scheduler
from imagegen.sources import Source

__all__ = [  # what a model needs of this folder
    "OnStep",
    "Run",
    "StepState",
    "cut_text",
    "decode_preview",
    "in_lock_step",
    "load_pipeline",
    "quiet",
]

MODES_OF = {"Inpaint": ("inpainting", "outpainting"), "Img2Img": ("image-to-image",)}  # by what is in the class's name
GIVEN = ("self", "prompt", "image", "mask_image", "strength", "args", "kwargs")  # parameters that a request always fills
DENOISERS = ("transformer", "unet", "decoder")  # what pipelines call the module that they run at every step


def denoiser_name(pipeline: Any) -> str:
    """Return what a pipeline calls the module that it runs at every step.

    Raises:
        ModelError: it has none.
    """
    for name in DENOISERS:
        if getattr(pipeline, name, None) is not None:
            return name
    raise ModelError(f"this {type(pipeline).__name__} has no {' or '.join(DENOISERS[:2])}: its model_index.json names none")


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """Return the module that a pipeline calls at every step."""
    return getattr(pipeline, denoiser_name(pipeline))


def family_of_class(class_name: str) -> Family | None:
    """Return the family of a pipeline class that the catalogue lacks, from its signature; None where it makes no pictures.

    Its licence and its terms are unknown, and its size is that of the signature.
    """
    with quiet():
        import diffusers

        kind = getattr(diffusers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        return None
    known = {name: parameter.default for name, parameter in inspect.signature(kind.__call__).parameters.items()}
    if any(default is inspect.Parameter.empty for name, default in known.items() if name not in GIVEN):
        return None  # it needs more than a request holds
    if "prompt" not in known or "num_inference_steps" not in known or "num_frames" in known or "generator" not in known:
        return None
    if "ControlNet" in class_name:
        return None  # the model itself is loaded, and the ControlNet added
    modes = next((modes for word, modes in MODES_OF.items() if word in class_name), FAMILIES["stable-diffusion"].modes)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", class_name.removesuffix("Pipeline")).lower().replace("img2-img", "img2img")
    guidance = known.get("guidance_scale") or known.get("true_cfg_scale") or known.get("prior_guidance_scale") or 1.0
    height = known.get("height")
    size = height if isinstance(height, int) else 1024
    return replace(
        FAMILIES["stable-diffusion"], name=name, pipeline=class_name, size_px=size, multiple_px=16, scheduler="",
        num_steps=known["num_inference_steps"], guidance=float(guidance), negative="negative_prompt" in known, modes=modes,
    )  # fmt: skip


def describe(pipeline: Any, family: Family) -> Family:
    """Return what a loaded model can make: its family, and what its configuration and diffusers' classes tell."""
    config = denoiser_of(pipeline).config
    family = fit_family(family, config, pipeline.config)
    side = config.get("sample_size")
    if isinstance(side, int) and family.sized_by_config:
        family = replace(family, size_px=side * noise_factor(pipeline))
    import diffusers

    classes = {*dir(diffusers), type(pipeline).__name__}  # by name: to import those of every mode takes a second
    modes = [mode for mode in family.modes if _class_name(pipeline, mode) in classes]
    negative = family.negative and "negative_prompt" in call_of(pipeline)
    return replace(family, modes=tuple(modes), negative=negative, size_px=min(family.size_px, family.max_px))


def control_class(pipeline: Any, mode: str) -> type | None:
    """Return the class of the pipeline with a ControlNet for a mode; None where diffusers has none that takes its pictures."""
    known = {"text-to-image": ["Pipeline"], "image-to-image": ["Img2ImgPipeline"]}
    stem = type(pipeline).__name__.removesuffix("Pipeline") + "ControlNet"
    kind = _first_class([stem + suffix for suffix in known.get(mode, ["InpaintPipeline", "InpaintingPipeline"])])
    pictures = {"text-to-image": (), "image-to-image": ("image", "strength")}.get(mode, ("image", "mask_image"))
    takes = inspect.signature(kind.__call__).parameters if kind else {}
    return kind if all(name in takes for name in (*pictures, "controlnet_conditioning_scale")) else None


def _class_name(pipeline: Any, mode: str) -> str:
    """Return what the class of the pipeline for a mode would be called: diffusers names them alike."""
    kind = type(pipeline)
    needs = {"image-to-image": "strength", "inpainting": "mask_image", "outpainting": "mask_image", "editing": "image"}
    if mode == "text-to-image" or needs[mode] in inspect.signature(kind.__call__).parameters:
        return kind.__name__
    suffix = {"image-to-image": "Img2ImgPipeline", "editing": "Pipeline"}.get(mode, "InpaintPipeline")
    return kind.__name__.removesuffix("Pipeline") + suffix


def _first_class(names: list[str]) -> type | None:
    """Return diffusers' first class of those names that exists; only that one is imported."""
    import diffusers

    known = set(dir(diffusers))
    return next((getattr(diffusers, name) for name in names if name in known), None)


def with_class(kind: type, pipeline: Any, **more: Any) -> Any:
    """Return a pipeline of another class over the same components and options, none of them changed or moved."""
    modules, options = kind._get_signature_keys(kind)  # type: ignore[attr-defined]
    parts = {name: part for name, part in pipeline.components.items() if name in modules and name not in more}
    parts |= {name: pipeline.config[name] for name in options if name in pipeline.config and name not in more}
    with quiet():
        made = kind(**parts, **more)
    made.set_progress_bar_config(disable=True)
    return made


def check_scheduler(pipeline: Any, request: Request) -> None:
    """Refuse a scheduler that a model cannot run with.

    Raises:
        RequestError: it is unknown, or none for this kind of model.
    """
    make_scheduler(pipeline.scheduler, request.scheduler, methods_called(pipeline))


def prepare_run(
    pipeline: Any,
    request: Request,
    family: Family,
    noise: torch.Tensor | None = None,
    control: Any = None,
    beside: Sequence[Request] = (),
) -> Run:
    """Return the stock pipeline's run for a request.

    Every run has a scheduler and a pipeline object of its own, so that two runs of one model never meet.

    Args:
        pipeline: the model's pipeline, left as it is.
        request: checked; its pictures already have its size.
        family: of the loaded model.
        noise: (B, C, h, w) of unit variance to start from, or None to draw it from the seeds.
        control: the ControlNet, where the request has a picture for it.
        beside: others of its batch (see `translate`).

    Raises:
        RequestError: `noise` has another shape than the latents, or the scheduler is unknown.
    """
    runner = _for_mode(pipeline, request, control)
    runner.scheduler = make_scheduler(pipeline.scheduler, request.scheduler, methods_called(pipeline))
    limited = "original_inference_steps" in call_of(runner) and request.strength is not None
    check_steps(runner.scheduler, request.num_steps, request.strength or 1.0 if limited else 1.0)
    for name, part in vars(runner).items():
        if hasattr(part, "components") and hasattr(part, "scheduler"):  # a pipeline inside a combined one
            own = copy.copy(part)
            own.scheduler = runner.scheduler if part.scheduler is pipeline.scheduler else make_scheduler(part.scheduler, None)
            setattr(runner, name, own)
    if family.guided_by == TWO_PASSES and getattr(runner, "guider", None) is not None:
        runner.guider = runner.guider.new(guidance_scale=request.guidance)
    settings = translate(runner, request, family, noise, beside)
    draw_from(runner.scheduler, settings["generator"])
    return Run(runner, settings, request)


def _for_mode(pipeline: Any, request: Request, control: Any) -> Any:
    """Return the pipeline for the request's mode, sharing the components."""
    if request.control is not None:
        kind = control_class(pipeline, request.mode)
        if kind is None:
            raise RequestError(f"diffusers has no {request.mode} with a ControlNet for this model: leave control or image out")
        return with_class(kind, pipeline, controlnet=control)
    name = _class_name(pipeline, request.mode)
    if name == type(pipeline).__name__:
        return copy.copy(pipeline)
    kind = _first_class([name])
    assert kind is not None  # else the request was refused
    return with_class(kind, pipeline)


def check_stock(source: Source) -> None:
    """Refuse what compares with stock diffusers where diffusers has no pipeline of its own.

    Raises:
        ModelError: it has none.
    """
    if not (source.diffusers_folder / "model_index.json").is_file():
        raise ModelError(f"diffusers has no pipeline for {source.name!r} to compare with: use reference and compare instead")


def stock_runner(
    source: Source, device: torch.device, dtype: torch.dtype = torch.float32, family: Family = FAMILIES["emoji"]
) -> Callable[..., list[Any]]:
    """Load diffusers' own pipeline, and nothing that imagegen has loaded.

    Args:
        source: the model's.
        device: where to run.
        dtype: what to compute in.
        family: the loaded model's.

    Returns:
        A function of a text-to-image request, which returns its PIL pictures, each from its own seed. Its
        second argument, if any, is told the steps done and all, and ends the work by returning False:
        that raises RequestError.

    Raises:
        ModelError: diffusers has no pipeline of its own for this model.
    """
    check_stock(source)
    pipeline = load_stock(source, dtype)
    pipeline.to(device).set_progress_bar_config(disable=True)

    def run(request: Request, on_step: Callable[[int, int], bool] | None = None) -> list[Any]:
        def told(index: int, num_steps: int, _latents: torch.Tensor) -> None:
            if on_step is not None and not on_step(index + 1, num_steps):
                raise RequestError("stopped before the reference was finished")

        pipeline.scheduler = make_scheduler(own, request.scheduler)
        settings = translate(pipeline, request, family)
        draw_from(pipeline.scheduler, settings["generator"])
        with watched(pipeline, told if on_step else None) as more:
            return pipeline(**settings, **more).images

    own = pipeline.scheduler
    return run
