"""Commands about one picture: make it, make it again, show its receipt."""

import contextlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagegen.catalog import EMBEDDED
from imagegen.cli.shell import (
    CheckFailed,
    ControlModelOption,
    ControlOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LoraOption,
    ModelOption,
    PlanOption,
    StyleEncoderOption,
    StyleImageOption,
    StyleOption,
    add_guides,
    add_loras,
    app,
    check_writable,
    load_model,
    print_json,
    print_section,
    takes_source,
    warnings_as_lines,
)
from imagegen.request import RequestError, build_request
from imagegen.startup import imports_for_one_picture, stopped_at_once

if TYPE_CHECKING:
    from imagegen.model import Model


def _parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})\s*[xX×]\s*(\d{1,5})", size.strip())
    if match is None:
        raise RequestError(f"--size must be WIDTHxHEIGHT in pixels, as in 128x128, got {size!r}")
    return int(match[1]), int(match[2])


def _parse_margins(margins: str | None) -> tuple[int, ...] | None:
    if margins is None:
        return None
    if re.fullmatch(r"\d{1,5}(,\d{1,5}){3}", margins.replace(" ", "")) is None:
        raise RequestError(f"--margins must be LEFT,RIGHT,TOP,BOTTOM in pixels, as in 64,64,0,0, got {margins!r}")
    return tuple(int(side) for side in margins.split(","))


@app.command()
@takes_source
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; several prompts make several pictures.")],
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture; the next has seed + 1. Default: drawn.")] = None,
    num: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow the prompt; 1 is off.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Scheduler by its usual name, as in 'dpm++ 2m' or euler.")] = None,
    negative: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    image: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --image is repainted, above 0 to 1.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Repaint only where this picture is white.")] = None,
    margins: Annotated[str | None, typer.Option(help="LEFT,RIGHT,TOP,BOTTOM: pixels by which --image grows.")] = None,
    control: ControlOption = None,
    control_model: ControlModelOption = None,
    control_weight: Annotated[float | None, typer.Option(help="How closely to follow --control, above 0 to 2.")] = None,
    style_image: StyleImageOption = None,
    style: StyleOption = None,
    style_encoder: StyleEncoderOption = None,
    style_weight: Annotated[float | None, typer.Option(help="How closely to follow --style-image, above 0 to 2.")] = None,
    long_prompt: Annotated[bool, typer.Option("--long-prompt", help="Read the whole of a prompt past 77 tokens.")] = False,
    true_guidance: Annotated[float | None, typer.Option(help="In two passes, where guidance is an input of the model.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of models that draw token by token; 0: the most likely.")] = None,
    lora: LoraOption = None,
    out: Annotated[Path, typer.Option(help="Where to write the pictures.")] = Path(),
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = "exact",
    memory_gib: Annotated[float | None, typer.Option(help="Choose levers that save memory, down to this.")] = None,
    as_json: JsonOption = False,
    *,
    where: dict[str, Any],
) -> None:
    """Make pictures from prompts; each PNG carries the receipt that makes it again.

    Example: imagegen generate "a red apple" --seed 7 --out pictures

    --json: {"pictures": [{"file", "prompt", "seed", "width", "height", "pixels_sha256"}], "elapsed_s", "model", "plan"}
    """
    width, height = _parse_size(size)
    grown = _parse_margins(margins)
    check_writable(out)
    with warnings_as_lines():
        quick = plan == "exact" and memory_gib is None and not lora
        with stopped_at_once(), imports_for_one_picture() if quick else contextlib.nullcontext():
            loaded = load_model(model, device, dtype, plan, where, memory_gib)
        add_loras(loaded, lora)
        add_guides(loaded, control_model, style, style_encoder)
        settings: dict[str, Any] = {
            "seed": seed,
            "num_images": num,
            "num_steps": steps,
            "guidance": guidance,
            "width": width,
            "height": height,
            "scheduler": scheduler,
            "negative_prompt": negative,
            "image": image,
            "strength": strength,
            "mask": mask,
            "margins": grown,
            "control": control,
            "control_weight": control_weight,
            "style_image": style_image,
            "style_weight": style_weight,
            "long_prompt": long_prompt or None,
            "true_guidance": true_guidance,
            "temperature": temperature,
        }
        for prompt in prompts:
            build_request(prompt, loaded.family, settings)  # a fault in the last is said before the first is drawn
        written, elapsed_s = [], 0.0
        for prompt in prompts:
            result = _follow(loaded, prompt, **settings)
            elapsed_s += result.elapsed_s
            for path, picture in zip(result.save(out), result.pictures, strict=True):
                written.append((path, picture.receipt))
                if not as_json:
                    print(path)
    if as_json:
        wanted = ("prompt", "seed", "width", "height")
        pictures = [
            {"file": str(path)} | {name: receipt.request[name] for name in wanted} | {"pixels_sha256": receipt.pixels_sha256}
            for path, receipt in written
        ]
        print_json({"pictures": pictures, "elapsed_s": round(elapsed_s, 4), "model": loaded.source, "plan": loaded.plan.name})


def _follow(model: "Model", prompt: str, **settings: Any) -> Any:
    """Make pictures with a progress bar (step count, time left) on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps,"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(prompt if len(prompt) <= 40 else prompt[:39] + "…", total=None)
        return model.run(prompt, lambda step: progress.update(task, total=step.num_steps, completed=step.index + 1), **settings)


@app.command()
def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG made by imagegen.")],
    image: Annotated[Path | None, typer.Option(help="The picture it was made from, for image-to-image.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask it was made with, for inpainting.")] = None,
    control: ControlOption = None,
    control_model: ControlModelOption = None,
    style_image: StyleImageOption = None,
    style: StyleOption = None,
    style_encoder: StyleEncoderOption = None,
    lora: LoraOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a picture again from its receipt: exit 0 where it is the same, 1 where it is not.

    Example: imagegen replay 7-a-red-apple.png

    --json: {"same", "psnr_db" (null: identical), "max_difference", "reasons": [...]}
    """
    with warnings_as_lines():
        from imagegen.receipt import open_picture

        _, receipt = open_picture(picture)  # a file without a receipt is refused before any model is loaded
        quick = not (receipt.plan.get("levers") or lora)
        with stopped_at_once(), imports_for_one_picture() if quick else contextlib.nullcontext():
            loaded = load_model(receipt.model["source"], device, receipt.environment.get("dtype"), "exact", receipt.where())
        add_loras(loaded, lora)
        add_guides(loaded, control_model, style, style_encoder)
        from imagegen.reference import replay as replay_picture

        verdict = replay_picture(picture, image=image, mask=mask, control=control, style_image=style_image, model=loaded)
    if as_json:
        figures = ("same", "psnr_db", "max_difference", "reasons")
        print_json({name: getattr(verdict, name) for name in figures})
    elif verdict.same:
        how = "identical" if verdict.max_difference == 0 else f"{verdict.psnr_db:.1f} dB, within the noise floor"
        print(f"the same picture ({how})")
    else:
        print("not the same picture: " + "; ".join(verdict.reasons))
    if not verdict.same:
        raise CheckFailed


@app.command()
def show(
    picture: Annotated[Path, typer.Argument(help="A PNG made by imagegen.")],
    as_json: JsonOption = False,
) -> None:
    """Show a picture's receipt, readable.

    Example: imagegen show 7-a-red-apple.png

    --json: the receipt as it stands in the file (imagegen/receipt.schema.json)
    """
    from imagegen.receipt import read_receipt

    receipt = read_receipt(picture)
    if as_json:
        print_json(json.loads(receipt.to_json()))
        return
    for title, values in (("request", receipt.request), ("model", receipt.model), ("plan", receipt.plan)):
        print_section(title, values)
    print_section("environment", receipt.environment)
    print(f"pixels\n  sha256: {receipt.pixels_sha256}")
