"""What every command shares: its options, its way to print, warn, show progress and load a model."""

import contextlib
import functools
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagegen.profile import finite
from imagegen.request import RequestError
from imagegen.startup import stopped_at_once

if TYPE_CHECKING:
    from imagegen.model import Model

app = typer.Typer(
    name="imagegen",
    help="Text-to-image in one line, with proof that it is still the same picture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str, typer.Option("--model", help="emoji (embedded), a folder, a .safetensors or .gguf file, or a hub id (org/name).")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 …; default: CUDA where there is one.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the model's own.")]
PlanOption = Annotated[
    str, typer.Option("--plan", help="exact, balanced, fast, a profile.json of imagegen tune, or levers joined by +.")
]
PlansOption = Annotated[list[str], typer.Option("--plan", help="As for generate; give it again for another plan.")]
ControlOption = Annotated[Path | None, typer.Option("--control", help="Follow the structure of this picture.")]
ControlModelOption = Annotated[Path | None, typer.Option("--control-model", help="Folder of the ControlNet that does.")]
StyleImageOption = Annotated[Path | None, typer.Option("--style-image", help="Follow the style of this picture.")]
StyleOption = Annotated[Path | None, typer.Option("--style", help="The IP-Adapter that does, a .safetensors file.")]
StyleEncoderOption = Annotated[Path | None, typer.Option("--style-encoder", help="Folder of its CLIP vision model.")]
LoraOption = Annotated[list[str] | None, typer.Option("--lora", help="FILE or FILE:WEIGHT, a LoRA to add; again for another.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps; default: the model's own.")]
GuidanceOption = Annotated[float | None, typer.Option("--guidance", help="1 is off; default: the model's own.")]
SOURCE_OPTIONS = {  # what else `load` takes to find a model
    "revision": Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")],
    "variant": Annotated[str | None, typer.Option("--variant", help="Of the weights, as in fp16.")],
    "base": Annotated[str | None, typer.Option("--base", help="For one file: the model that has what the file lacks.")],
    "vae": Annotated[str | None, typer.Option("--vae", help="Another decoder: a folder, a .safetensors file or a hub id.")],
}
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]


class CheckFailed(Exception):
    """A check said no: exit code 1."""


def takes_source(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say more of its model; it gets them as `where`."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        where = {name: given.pop(name) for name in SOURCE_OPTIONS}
        command(**given, where=where)

    parameters = [one for one in inspect.signature(command).parameters.values() if one.name != "where"]
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, kind, default=None, annotation=option) for name, option in SOURCE_OPTIONS.items()]
    run.__signature__ = inspect.Signature([*(one.replace(kind=kind) for one in parameters), *more])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in (*parameters, *more)}
    return run


def add_loras(model: "Model", given: list[str] | None) -> None:
    """Add the LoRAs of `--lora FILE[:WEIGHT]`.

    Raises:
        RequestError: a weight is no number.
        ModelError: a file is no LoRA for this model.
    """
    for text in given or ():
        path, weight = parse_lora(text)
        model.add_lora(path, weight=weight)


def parse_lora(text: str) -> tuple[str, float]:
    """Split `FILE` or `FILE:WEIGHT`.

    Raises:
        RequestError: the weight is no number.
    """
    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise RequestError(f"--lora must be FILE or FILE:WEIGHT, got {text!r}") from None


def add_guides(model: "Model", control: Path | None, style: Path | None, encoder: Path | None) -> None:
    """Add the ControlNet of `--control-model` and the IP-Adapter of `--style`.

    Raises:
        ModelError: a file is none, or is for another family.
    """
    if control is not None:
        model.add_control(control)
    if style is not None:
        model.add_style(style, image_encoder=encoder)


def print_json(data: object) -> None:
    """Print one JSON object; numbers that JSON lacks become null."""
    print(json.dumps(finite(data), ensure_ascii=False, indent=2))


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show imagegen's own warnings as one line on stderr each, and no others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "imagegen" in warning.filename or str(warning.message).startswith("the prompt"):
            print(f"imagegen: {warning.message}", file=sys.stderr)


def load_model(
    model: str,
    device: str | None,
    dtype: str | None,
    plan: str,
    where: dict[str, Any],
    memory_gib: float | None = None,
) -> "Model":
    """Load a model, of whose source `where` says more.

    What libraries warn of at their import is not shown, and Ctrl-C ends the process there and then.
    """
    with stopped_at_once(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own, at import
        warnings.filterwarnings("always", module=r"imagegen\.")
        from imagegen.loader import load

        return load(model, device=device, dtype=dtype, plan=plan, memory_gib=memory_gib, **where)


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """Show long work on stderr: a bar on a terminal, else a line for each kind of work."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console, last = Console(stderr=True), [""]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def tell(what: str, done: int, total: int) -> None:
            if not console.is_terminal and what != last[0]:
                print(f"imagegen: {what}", file=sys.stderr, flush=True)
            last[0] = what
            progress.update(task, description=what[:60], completed=done, total=total)

        yield tell


def print_section(title: str, values: dict[str, Any]) -> None:
    """Print values under a title; those that say nothing are left out."""
    print(title)
    for name, value in values.items():
        if value in (None, "", [], (), {}, False):
            continue
        if isinstance(value, dict):
            print(f"  {name}:")
            for inner, detail in value.items():
                print(f"    {inner}: {detail}")
        else:
            print(f"  {name}: {', '.join(value) if isinstance(value, tuple) else value}")


def check_writable(folder: Path) -> None:
    """Find out before the work whether pictures can be written there.

    Raises:
        RequestError: they cannot.
    """
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(f"cannot write into {str(folder)!r}: {error.strerror}; choose another --out") from None
