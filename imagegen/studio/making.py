"""How the Generate tab's pictures come about: followed step by step, under another plan, from a painted mask, larger.

Knows nothing of the page.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.engine import Engine, Waiting
from imagegen.model import Step
from imagegen.request import RequestError
from imagegen.result import Result
from imagegen.studio.draw import Frame
from imagegen.studio.parts import Studio, check_upload, look_at

if TYPE_CHECKING:
    from PIL.Image import Image

    from imagegen.model import Model

PREVIEW_SHARE = 0.2  # of the time may go into previews
UPSCALED, UPSCALE_STRENGTH = 2, 0.3


def follow(
    engine: Engine, prompt: str, settings: dict[str, Any], folder: Path, stop: threading.Event, warn: Callable[[str], Any],
    made_by: Callable[[], Iterator[Waiting | Step]] | None = None, asked: str = "",
) -> Iterator[Frame]:  # fmt: skip
    """Make pictures, save them with their receipts, and say after every step what there is to show.

    Args:
        engine: the queue in front of the model.
        prompt: what to draw.
        settings: what `Model.stream` takes.
        folder: where the PNGs go.
        stop: once set, from any thread, the work ends within one step.
        warn: is told what the user should know, such as a prompt that is too long.
        made_by: starts other steps than the engine's own, such as those of another plan.
        asked: what was typed before the prompt was enhanced, for the receipts.

    Raises:
        Error: a setting is wrong, too many wait, or the folder cannot be written.
    """
    steps = made_by() if made_by else engine.stream(prompt, **settings)
    notice = engine.model.notice_about(prompt)  # not caught as a warning: other threads change what is done with those
    if notice:
        warn(notice)
    count = settings.get("num_images") or 1
    previews: list[Image] = []
    due_s = 0.0
    ended = Frame("Stopped before the first step", 0.0, count=count)
    with contextlib.closing(steps):  # type: ignore[type-var]
        for step in steps:
            if stop.is_set():
                break
            if isinstance(step, Waiting):
                before = f"{step.position} before you" if step.position else "you are next"
                yield Frame(f"Waiting for the model: {before}", 0.0, count=count)
                continue
            done, of = step.index + 1, step.num_steps
            if step.result is not None:
                yield _finished(step.result, of, folder, asked)
                return
            now_s = time.perf_counter()
            if now_s >= due_s:
                previews = [step.preview(index) for index in range(len(step.latents))]
                due_s = now_s + (time.perf_counter() - now_s) / PREVIEW_SHARE
            left_s = step.elapsed_s / done * (of - done)
            ended = Frame(f"Stopped after step {done} of {of}", done / of, previews, count=count)
            yield replace(ended, message=f"Step {done} of {of} · about {left_s:.0f} s left")
    yield ended  # the work has ended by now


def _finished(result: Result, num_steps: int, folder: Path, asked: str) -> Frame:
    """Save a result's pictures; return the frame that says so."""
    pictures = result.pictures
    if asked:
        pictures = [
            replace(one, receipt=replace(one.receipt, request=one.receipt.request | {"asked_prompt": asked})) for one in pictures
        ]
    seeds = [picture.receipt.request["seed"] for picture in pictures]
    message = f"{num_steps} steps in {result.elapsed_s:.1f} s · seed {seeds[0]}" + (f" to {seeds[-1]}" if seeds[1:] else "")
    paths = Result(pictures, result.elapsed_s).save(folder)
    return Frame(message, 1.0, result.images, paths, len(paths))


def stream_alone(
    studio: Studio, prompt: str, settings: dict[str, Any], plan: str | Path, loras: list[Path], weight: float
) -> Iterator[Waiting | Step]:
    """Make pictures under another plan or with LoRAs: with the model to oneself, which is left as it was."""
    yield Waiting(0)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(studio.engine.alone())
        stack.enter_context(_changed(model, plan, loras, weight))
        for step in stack.enter_context(contextlib.closing(model.stream(prompt, **settings))):
            for image in step.result.images if step.result else ():
                look_at(studio, prompt, image)
            yield step if studio.engine.safety is None or step.result else step.without_preview()


@contextlib.contextmanager
def _changed(model: "Model", plan: str | Path, loras: list[Path], weight: float) -> Iterator[None]:
    """Put LoRAs and a plan on a model for a while."""
    if loras and model.loras:
        raise RequestError("this server's model has LoRAs of its own: choose none")
    try:
        for path in loras:
            model.add_lora(path, weight=weight)
        with model.plan_for_a_while(plan):
            yield
    finally:
        if loras:
            model.remove_loras()


def layers_of(painting: Any) -> list[str]:
    """Return the files of an editor's layers, unopened: Gradio would open them before anybody looked at their sizes."""
    return [layer.path for layer in painting.layers or ()] if painting is not None else []


def painted(layers: list[str], size: tuple[int, int]) -> "Image":
    """Return the mask that was painted, white where it was, L, in a size.

    Args:
        layers: the files of an editor's layers, as Gradio put them in its cache.
        size: of the picture below them.

    Raises:
        RequestError: nothing was painted, or a layer is no picture or too large.
    """
    from PIL import Image, ImageChops

    mask = Image.new("L", size)
    for layer in layers:
        check_upload(layer)
        with Image.open(layer) as opened:
            alpha = opened.convert("RGBA").getchannel("A").resize(size, Image.Resampling.BILINEAR)
        mask = ImageChops.lighter(mask, alpha.point(lambda value: 255 if value > 16 else 0))
    if mask.getbbox() is None:
        raise RequestError("nothing is painted: paint over what is to be drawn anew")
    return mask


def larger(picture: "Image", family: Any) -> dict[str, Any]:
    """Return the settings that make a picture twice as large, in the family's multiples."""
    step = family.multiple_px
    width, height = (round(side * UPSCALED / step) * step for side in picture.size)
    return {"image": picture, "strength": UPSCALE_STRENGTH, "width": width, "height": height}
