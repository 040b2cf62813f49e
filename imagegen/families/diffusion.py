"""Models that diffusers runs: loading them and turning their pipelines into streams of steps.

The only module that knows diffusers' pipelines and their names for things. The stock pipeline does
all the work, so that the `exact` plan is the stock picture bit for bit. For a stream it runs in a
thread of its own, in lock-step with the reader, and stops within one step when the reader leaves.
Otherwise it runs in the caller's thread: a second thread means a second pool of OpenMP threads, and
with more threads than processors libgomp stops spinning at barriers, a tenth of a small picture's time.
"""

import contextlib
import copy
import json
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imagegen.request import ModelError, Request, RequestError
from imagegen.sampling import make_generators, make_scheduler, predicted_original
from imagegen.weights import check_weights

NOISY = ("torchao", "torch.utils._pytree", "py.warnings")
PREVIEW_SIDE = 32  # a preview decodes at most 32x32 latents, whatever the size of the picture


@dataclass(frozen=True)
class StepState:
    """The pipeline after one step.

    Attributes:
        index: number of the step, from 0.
        num_steps: steps of this run (fewer than asked for where `strength` is below 1).
        latents: (B, C, h, w), the state after this step.
        original: (B, C, h, w), the scheduler's guess of the finished latents.
    """

    index: int
    num_steps: int
    latents: torch.Tensor
    original: torch.Tensor


OnStep = Callable[[StepState], None]


class Run:
    """The stock pipeline, ready to make a request's pictures.

    Attributes:
        scheduler: its own.
        generators: one for each picture.
    """

    def __init__(self, runner: Any, settings: dict[str, Any]) -> None:
        """Keep the pipeline and its arguments."""
        self._runner, self._settings = runner, settings
        self.scheduler = runner.scheduler
        given = settings["generator"]
        self.generators: tuple[torch.Generator, ...] = tuple(given) if isinstance(given, list) else (given,)

    def __call__(self, on_step: OnStep | None) -> list[Any]:
        """Make the PIL pictures; tell `on_step`, if any, the state after every step. What it raises ends the work."""

        def after_step(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                latents = tensors["latents"]
                on_step(StepState(index, pipe.num_timesteps, latents, predicted_original(pipe.scheduler, latents)))
            return {}

        for generator in self.generators:
            generator.manual_seed(generator.initial_seed())  # a second try, after an error, begins like the first
        return self._runner(**self._settings, callback_on_step_end=after_step).images


class _Left(BaseException):
    """Raised inside the pipeline's thread when the reader of the stream has left."""


def read_index(folder: Path) -> dict[str, Any]:
    """Read a model folder's `model_index.json`.

    Raises:
        ModelError: the folder is none, or holds no diffusers model.
    """
    if not folder.is_dir():
        raise ModelError(f"no folder {str(folder)!r}: give 'emoji' (the embedded model) or the folder of a diffusers model")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if not isinstance(index["_class_name"], str):
            raise ValueError("_class_name is no text")
    except FileNotFoundError:
        raise ModelError(f"{str(folder)!r} is no diffusers model: it has no model_index.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{str(folder / 'model_index.json')!r} cannot be read: {error}") from None
    return index


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' loading bars and notices, torchao's at its import among them, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", *NOISY)]
    levels = [logger.level for logger in loggers]
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_shown in zip(libraries, shown, strict=True):
            if was_shown:
                library.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model folder as its stock diffusers pipeline, from local files and safetensors only.

    Raises:
        ModelError: weights are missing, truncated or of another model.
    """
    for file, wrong in check_weights(folder).items():
        if wrong:
            raise ModelError(f"{str(folder / file)!r} {'; '.join(wrong)}")
    class_name = read_index(folder)["_class_name"]
    with quiet():
        import diffusers

        pipeline_class = getattr(diffusers, class_name)
        try:
            pipeline = pipeline_class.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{str(folder)!r} cannot be loaded: {reason}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            missing = [tensor for tensor, value in component.state_dict().items() if value.is_meta]
            if missing:
                raise ModelError(
                    f"{str(folder)!r} cannot be loaded: {name} lacks {len(missing)} tensors, {missing[0]!r} among them"
                )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """Return the module that a pipeline calls at every step."""
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def native_size(pipeline: Any) -> int | None:
    """Return the width and height in pixels that the denoiser was made for, where it says so."""
    side = getattr(pipeline.unet.config, "sample_size", None)
    return side * pipeline.vae_scale_factor if isinstance(side, int) else None


def cut_text(pipeline: Any, prompt: str) -> tuple[int, str]:
    """Return how many tokens the text encoder reads, and the end of the prompt that it will not see."""
    tokenizer = pipeline.tokenizer
    tokens = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)
    limit = tokenizer.model_max_length
    if len(tokens.input_ids) <= limit:
        return limit, ""
    last_read = tokens.offset_mapping[limit - 2][1]  # the closing token takes the last place
    return limit, prompt[last_read:].strip()


def prepare_run(pipeline: Any, request: Request, noise: torch.Tensor | None) -> Run:
    """Return the stock pipeline's run for a request.

    Every run has a scheduler and a pipeline object of its own, so that two runs of one model never meet.

    Args:
        pipeline: the text-to-image pipeline, left as it is.
        request: checked; its pictures already have its size.
        noise: (B, C, h, w) of unit variance to start from, or None to draw it from the seeds.

    Raises:
        RequestError: `noise` has another shape than the latents, or the scheduler is unknown.
    """
    runner = _for_mode(pipeline, request)
    runner.scheduler = make_scheduler(pipeline.scheduler, request.scheduler)
    return Run(runner, _translate(runner, request, noise))


def _for_mode(pipeline: Any, request: Request) -> Any:
    """Return the pipeline for the request's mode, sharing the components."""
    if request.mode == "text-to-image":
        return copy.copy(pipeline)
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    kind = AutoPipelineForInpainting if request.mode == "inpainting" else AutoPipelineForImage2Image
    with quiet():
        runner = kind.from_pipe(pipeline)
    runner.set_progress_bar_config(disable=True)
    return runner


def _translate(runner: Any, request: Request, noise: torch.Tensor | None) -> dict[str, Any]:
    """Return the request in diffusers' own words."""
    generators = make_generators(request.seed, request.num_images)
    settings: dict[str, Any] = {
        "prompt": [request.prompt] * request.num_images,
        "negative_prompt": [request.negative_prompt] * request.num_images,
        "num_inference_steps": request.num_steps,
        "guidance_scale": request.guidance,
        "generator": generators if len(generators) > 1 else generators[0],
    }
    if request.mode != "image-to-image":
        settings |= {"width": request.width, "height": request.height}
    if request.image is not None:
        settings |= {"image": [request.image] * request.num_images, "strength": request.strength}
    if request.mask is not None:
        settings |= {"mask_image": [request.mask] * request.num_images}
    if noise is not None:
        factor = runner.vae_scale_factor
        shape = (request.num_images, runner.unet.config.in_channels, request.height // factor, request.width // factor)
        if request.mode != "text-to-image":
            raise RequestError("noise starts a text-to-image run: leave image and mask out")
        if tuple(noise.shape) != shape:
            raise RequestError(f"noise must have the shape {shape} here, got {tuple(noise.shape)}")
        settings["latents"] = noise.to(runner.device, runner.unet.dtype)
    return settings


def in_lock_step(run: Callable[[OnStep | None], list[Any]]) -> Generator[StepState | list[Any], None, None]:
    """Turn a run, which calls back after every step, into an iterator of the steps and, last, the pictures.

    The function runs in a thread that waits, after each step, until the reader asks for the next.
    Closing the iterator raises inside the waiting callback, and returns once the thread has ended.
    """
    to_reader: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    go_on: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def on_step(state: Any) -> None:
        to_reader.put(("step", state))
        if not go_on.get():
            raise _Left

    def work() -> None:
        try:
            to_reader.put(("end", run(on_step)))
        except _Left:
            to_reader.put(("left", None))
        except BaseException as error:  # handed to the reader, who raises it
            to_reader.put(("error", error))

    thread = threading.Thread(target=work, name="imagegen-stream", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = to_reader.get()
            if kind == "error":
                raise value
            yield value
            if kind == "end":
                return
            go_on.put(True)
    finally:
        go_on.put(False)
        thread.join()


@torch.inference_mode()
def decode_preview(pipeline: Any, original: torch.Tensor, size: tuple[int, int]) -> Any:
    """Decode one picture's latents cheaply: large ones are averaged down to 32x32 first.

    Args:
        pipeline: the model's pipeline.
        original: (C, h, w) latents.
        size: width and height in pixels of the picture returned.

    Returns:
        A PIL image, RGB.
    """
    latents = original.unsqueeze(0)
    factor = -(-max(latents.shape[-2:]) // PREVIEW_SIDE)
    if factor > 1:
        latents = torch.nn.functional.avg_pool2d(latents, factor, ceil_mode=True)
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    picture = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    return picture if picture.size == size else picture.resize(size)


def stock_runner(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[..., list[Any]]:
    """Load diffusers' own pipeline, and nothing that imagegen has loaded.

    Args:
        folder: the model's.
        device: where to run.
        dtype: what to compute in.

    Returns:
        A function of a text-to-image request, which returns its PIL pictures, each from its own seed. Its
        second argument, if any, is told the steps done and all, and ends the work by returning False:
        that raises RequestError.
    """
    with quiet():
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    pipeline.to(device).set_progress_bar_config(disable=True)
    own = pipeline.scheduler

    def run(request: Request, on_step: Callable[[int, int], bool] | None = None) -> list[Any]:
        def after_step(running: Any, index: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None and not on_step(index + 1, running.num_timesteps):
                raise RequestError("stopped before the reference was finished")
            return {}

        pipeline.scheduler = make_scheduler(own, request.scheduler)
        seeds = range(request.seed, request.seed + request.num_images)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        settings: dict[str, Any] = {"width": request.width, "height": request.height, "callback_on_step_end": after_step}
        settings |= {"num_inference_steps": request.num_steps, "guidance_scale": request.guidance, "generator": generators}
        prompts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        return pipeline(**{name: [text] * len(seeds) for name, text in prompts.items()}, **settings).images

    return run
