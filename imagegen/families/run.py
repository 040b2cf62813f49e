"""One run of a stock pipeline, told or read step by step.

For a stream the pipeline runs in a thread of its own, in lock-step with the reader, and stops within one
step when the reader leaves. Otherwise it runs in the caller's thread: a second thread means a second pool of
OpenMP threads, and with more threads than processors libgomp stops spinning at barriers, a tenth of a small
picture's time.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from imagegen.canvas import put_back
from imagegen.families.arguments import call_of
from imagegen.families.latents import unpack
from imagegen.request import Request
from imagegen.sampling import make_generators, predicted_original


@dataclass(frozen=True)
class StepState:
    """The pipeline after one step.

    Attributes:
        index: number of the step, from 0.
        num_steps: steps of this run (fewer than asked for where `strength` is below 1).
        latents: (B, C, h, w), the state after this step; (B, n) codes so far, of models that draw tokens.
        original: (B, C, h, w), the scheduler's guess of the finished latents; the codes, of those.
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

    def __init__(self, runner: Any, settings: dict[str, Any], request: Request) -> None:
        """Keep the pipeline, its arguments and what they were asked for."""
        self._runner, self._settings, self._request = runner, settings, request
        if request.control is not None:
            vars(runner)["vae"] = _SeededEncoder(runner.vae, request)  # of the run's own pipeline object
        self.scheduler = runner.scheduler
        given = settings["generator"]
        self.generators: tuple[torch.Generator, ...] = tuple(given) if isinstance(given, list) else (given,)

    def __call__(self, on_step: OnStep | None) -> list[Any]:
        """Make the PIL pictures; tell `on_step`, if any, the state after every step. What it raises ends the work."""
        for generator in self.generators:
            generator.manual_seed(generator.initial_seed())  # a second try, after an error, begins like the first
        request = self._request
        tell = None if on_step is None else self._told(on_step)
        if request.style_weight is not None:  # a property of the denoiser, which other runs share
            self._runner.set_ip_adapter_scale(request.style_weight)
        with watched(self._runner, tell) as more:
            images = self._runner(**self._settings, **more).images
        if request.margins is None or request.image is None:
            return images
        return [put_back(image, request.image, request.margins) for image in images]

    def _told(self, on_step: OnStep) -> Callable[[int, int, torch.Tensor], None]:
        size = (self._request.width, self._request.height)
        before: torch.Tensor | None = None

        def told(index: int, num_steps: int, packed: torch.Tensor) -> None:
            nonlocal before
            original = predicted_original(self.scheduler, packed, before)
            before = packed
            latents, original = (unpack(self._runner, tensor, size) for tensor in (packed, original))
            on_step(StepState(index, num_steps, latents, original))

        return told


@contextlib.contextmanager
def watched(runner: Any, tell: Callable[[int, int, torch.Tensor], None] | None) -> Iterator[dict[str, Any]]:
    """Tell a function the index, the number of steps and the latents after every step of a pipeline's next run.

    Yields the arguments that the run needs for it. Where the pipeline calls nobody back, its scheduler is watched.
    """
    scheduler = runner.scheduler
    if tell is None:
        yield {}
    elif "callback_on_step_end" in call_of(runner):

        def after_step(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tell(index, getattr(pipe, "num_timesteps", None) or len(scheduler.timesteps), tensors["latents"])
            return {}

        yield {"callback_on_step_end": after_step}
    else:
        own, compute, index = vars(scheduler).get("step"), scheduler.step, 0

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal index
            output = compute(*args, **kwargs)
            tell(index, len(scheduler.timesteps), output[0])
            index += 1
            return output

        scheduler.step = step
        try:
            yield {}
        finally:
            del scheduler.step
            if own is not None:  # a lever's
                scheduler.step = own


class _SeededEncoder:
    """A pipeline's VAE that draws what it encodes from each picture's seed, where the pipeline gives no generator.

    SD3 encodes its control so: the draw would be torch's own, and a picture would depend on its batch.
    """

    def __init__(self, vae: Any, request: Request) -> None:
        """Take the VAE, which is left as it is, and the request that the pictures are made for."""
        self._vae, self._request = vae, request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Encode as the VAE does; rows are the pictures, once or more often."""
        encoded = self._vae.encode(pixels, *args, **kwargs)
        spread = getattr(encoded, "latent_dist", None)
        if spread is not None:
            draw = spread.sample
            spread.sample = lambda generator=None: (
                spread.mean + spread.std * self._noise(spread.mean) if generator is None else draw(generator)
            )
        return encoded

    def _noise(self, mean: torch.Tensor) -> torch.Tensor:
        request = self._request
        count = request.num_images if len(mean) % request.num_images == 0 else 1
        shape = (len(mean) // count, *mean.shape[1:])
        drawn = [
            randn_tensor(shape, generator=own, device=mean.device, dtype=mean.dtype)
            for own in make_generators(request.seed, count)
        ]
        return torch.stack(drawn, dim=1).flatten(0, 1)


class _Left(BaseException):
    """Raised inside the pipeline's thread when the reader of the stream has left."""


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
