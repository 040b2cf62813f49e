"""Commands that train: finetune and distill."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagegen.catalog import EMBEDDED
from imagegen.cli.shell import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    app,
    check_writable,
    load_model,
    print_json,
    takes_source,
)
from imagegen.startup import stopped_at_once

if TYPE_CHECKING:
    from imagegen.finetune import Trained

RightOption = Annotated[
    bool, typer.Option("--i-have-the-right", help="Where a licence forbids this use: you have the right; it is recorded.")
]


@app.command()
@takes_source
def finetune(
    data: Annotated[Path, typer.Argument(help="A folder of pictures with captions: metadata.jsonl, or NAME.txt beside each.")],
    out: Annotated[Path, typer.Option(help="Gets the weights, checkpoints/ and cache/.")],
    method: Annotated[str, typer.Option(help="lora, or full for every weight of the denoiser.")] = "lora",
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 500,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures of a step, over all processes.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Parts in which a step's batch is computed, to save memory.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 1e-4 for a LoRA, 1e-5 for all weights.")] = None,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 8,
    alpha: Annotated[int | None, typer.Option(help="Scale of the LoRA; its rank by default.")] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Learn magnitudes too.")] = False,
    layers: Annotated[str, typer.Option(help="That get a LoRA: attention, convolutions (both), all, or text.")] = "attention",
    text_encoder: Annotated[bool, typer.Option("--text-encoder", help="Put a LoRA on the text encoder too.")] = False,
    min_snr: Annotated[float | None, typer.Option(help="Cap of the loss weights' signal-to-noise ratio.")] = None,
    ema: Annotated[float, typer.Option(help="Decay of averaged weights; 0 is none.")] = 0.0,
    precision: Annotated[str, typer.Option(help="fp32, or bf16.")] = "fp32",
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")] = False,
    prior: Annotated[list[str] | None, typer.Option(help="A prompt whose pictures have to stay; again for more.")] = None,
    prior_pictures: Annotated[int, typer.Option(help="Pictures of those prompts to train on.")] = 20,
    validation: Annotated[list[str] | None, typer.Option(help="A prompt to render on the way; again for more.")] = None,
    validate_every: Annotated[int, typer.Option(help="Steps between those.")] = 100,
    tracker: Annotated[str | None, typer.Option(help="One of accelerate's, such as tensorboard: into OUT/logs.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    data_licence: Annotated[str | None, typer.Option(help="Of the pictures, such as CC-BY-SA-4.0; recorded.")] = None,
    kohya: Annotated[Path | None, typer.Option(help="Write the LoRA in kohya's layout too, into this file.")] = None,
    i_have_the_right: RightOption = False,
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    *,
    where: dict[str, Any],
) -> None:
    """Fine-tune a model on pictures with captions; killed at any moment, --resume goes on as if nothing had happened.

    Example: imagegen finetune photos --out my-style --steps 300 --rank 8

    On several GPUs or machines: accelerate launch -m imagegen finetune …

    --json: {"weights", "num_steps", "loss", "notes": [...]}
    """
    with stopped_at_once():
        from imagegen.finetune.data import read_dataset
    checked = read_dataset(data)  # before the model is loaded
    check_writable(out)
    loaded = load_model(model, device, dtype, "exact", where)
    from imagegen.families import adapters
    from imagegen.finetune import finetune as train

    made = train(
        loaded, checked, out, method=method, num_steps=steps, seed=seed, batch_size=batch_size, accumulate=accumulate,
        learning_rate=learning_rate, rank=rank, alpha=alpha, dora=dora, layers=layers, text_encoder=text_encoder,
        min_snr=min_snr, ema=ema, precision=precision, gradient_checkpointing=gradient_checkpointing,
        prior_prompts=tuple(prior or ()), prior_pictures=prior_pictures, validation_prompts=tuple(validation or ()),
        validate_every=validate_every, tracker=tracker, save_every=save_every, resume=resume,
        data_licence=data_licence, i_have_the_right=i_have_the_right, progress=_lines(),
    )  # fmt: skip
    if kohya is not None:
        adapters.export_kohya(made.weights, kohya)
    _show(made, as_json)


@app.command()
@takes_source
def distill(
    out: Annotated[Path, typer.Option(help="Gets the student's weights, checkpoints/ and cache/.")],
    student_steps: Annotated[int, typer.Option(help="Of the student; must divide the teacher's.")] = 4,
    lesson: Annotated[str, typer.Option(help="trajectory, consistency or distribution.")] = "trajectory",
    teacher_steps: Annotated[int | None, typer.Option(help="Default: the family's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Of the teacher; the student has it built in. Default: the family's.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="What to learn on, one prompt a line.")] = None,
    trajectories: Annotated[int, typer.Option(help="Runs of the teacher to learn from.")] = 1000,
    method: Annotated[str, typer.Option(help="lora, or full weights.")] = "lora",
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures of a step, over all processes.")] = 16,
    learning_rate: Annotated[float, typer.Option()] = 3e-4,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 32,
    validation: Annotated[list[str] | None, typer.Option(help="A prompt to render on the way; again for more.")] = None,
    validate_every: Annotated[int, typer.Option(help="Steps between those.")] = 100,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    i_have_the_right: RightOption = False,
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    *,
    where: dict[str, Any],
) -> None:
    """Distil a model into a student that needs a few steps and no guidance.

    Example: imagegen distill --out my-student --student-steps 4; then imagegen generate "a fox" --plan "student(file=my-student)"

    --json: {"weights", "num_steps", "loss", "notes": [...]}
    """
    from imagegen.prompts import read_prompts

    said = tuple(read_prompts(prompts)) if prompts else ()
    check_writable(out)
    loaded = load_model(model, device, dtype, "exact", where)
    from imagegen.finetune import distill as train

    made = train(
        loaded, out, student_steps=student_steps, lesson=lesson, teacher_steps=teacher_steps, guidance=guidance, prompts=said,
        num_trajectories=trajectories, method=method, num_steps=steps, seed=seed, batch_size=batch_size,
        learning_rate=learning_rate, rank=rank, validation_prompts=tuple(validation or ()), validate_every=validate_every,
        save_every=save_every, resume=resume, i_have_the_right=i_have_the_right, progress=_lines(),
    )  # fmt: skip
    _show(made, as_json)


def _show(made: "Trained", as_json: bool) -> None:
    for note in made.notes:
        print(f"imagegen: {note}", file=sys.stderr)
    if as_json:
        print_json({"weights": str(made.weights), "num_steps": made.num_steps, "loss": made.loss, "notes": list(made.notes)})
    else:
        print(made.weights)


def _lines(every_s: float = 1.0) -> Any:
    """Return what shows progress as lines on stderr, a second apart at least: 'step/total' first, then the time left."""
    began: dict[str, tuple[float, int]] = {}
    last = [0.0]

    def tell(what: str, done: int, total: int) -> None:
        kind, now = what.split(",")[0], time.monotonic()
        first_s, first_done = began.setdefault(kind, (now, done))
        if done < total and now - last[0] < every_s:
            return
        last[0] = now
        pace_s = (now - first_s) / max(1, done - first_done)
        print(f"imagegen: {done}/{total} {what}, {pace_s * (total - done):.0f} s left", file=sys.stderr, flush=True)

    return tell
