"""The command about many pictures: a file of prompts becomes a folder."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from imagegen.catalog import EMBEDDED
from imagegen.cli.shell import (
    CheckFailed,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LoraOption,
    ModelOption,
    PlanOption,
    app,
    parse_lora,
    print_json,
    progress,
    takes_source,
    warnings_as_lines,
)


@app.command()
@takes_source
def batch(
    prompts: Annotated[
        Path, typer.Argument(help='A file with a JSON object a line: {"prompt", "id"?, "seed"?, "num_steps"?, …}.')
    ],
    out: Annotated[str, typer.Option(help="Where ID.png and manifest.jsonl go: a folder, or an address that fsspec knows.")],
    workers: Annotated[int, typer.Option(help="Processes that each hold the model; more than one run on Ray.")] = 1,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster, as in ray://host:10001 or auto.")] = None,
    max_batch: Annotated[int, typer.Option(help="How many pictures of equal shape are made at once.")] = 8,
    lora: LoraOption = None,
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = "exact",
    as_json: JsonOption = False,
    *,
    where: dict[str, Any],
) -> None:
    """Make one picture for every line of a file. Whatever stops it: run it again, and it finishes what is missing.

    Example: imagegen batch prompts.jsonl --out pictures --workers 2

    A line that cannot be made fails alone, and the exit code is 1 then.

    --json: {"folder", "made", "adopted", "present", "failed", "faults": [[line, id, reason]], "elapsed_s"}
    """
    with warnings_as_lines():
        from imagegen.batch import ModelRecipe, generate_batch

        options = {"device": device, "dtype": dtype, "plan": plan} | where
        recipe = ModelRecipe(model, options, tuple(parse_lora(text) for text in lora or ()))
        with progress() as tell:
            summary = generate_batch(
                prompts, out, model=recipe, workers=workers, address=address, max_batch=max_batch, on_progress=tell
            )
    for number, _, reason in summary.faults:
        print(f"imagegen: line {number}: {' '.join(reason.split())}", file=sys.stderr)
    if as_json:
        print_json(asdict(summary))
    else:
        there = f", {summary.present + summary.adopted} were there" if summary.present + summary.adopted else ""
        print(f"{summary.made} made{there}, {summary.failed} failed: {summary.folder}/manifest.jsonl")
    if summary.failed:
        raise CheckFailed
