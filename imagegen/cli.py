"""The shell's edge: `imagegen COMMAND`. Knows nothing of torch until a command needs a model.

Exit codes: 0 done, 1 a check said no, 2 bad use (one line on stderr), 130 stopped.
"""

import contextlib
import difflib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagegen.catalog import CARDS, EMBEDDED, FAMILIES, embedded_folder
from imagegen.profile import finite
from imagegen.request import FOREIGN_NAMES, Error, ModelError, RequestError
from imagegen.startup import imports_for_one_picture

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
models_app = typer.Typer(help="List the known models, show one, verify its files.", no_args_is_help=True)
app.add_typer(models_app, name="models")

ModelOption = Annotated[str, typer.Option("--model", help="emoji (embedded) or the folder of a diffusers model.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 …; default: CUDA where there is one.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the model's own.")]
PlanOption = Annotated[
    str, typer.Option("--plan", help="exact, balanced, fast, a profile.json of imagegen tune, or levers joined by +.")
]
PlansOption = Annotated[list[str], typer.Option("--plan", help="As for generate; give it again for another plan.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps; default: the model's own.")]
GuidanceOption = Annotated[float | None, typer.Option("--guidance", help="1 is off; default: the model's own.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
# Options in other tools' words, by the option that means the same here.
FOREIGN_OPTIONS = {
    "num_steps": "--steps",
    "num_images": "--num",
    "negative_prompt": "--negative",
    "width and height": "--size WxH",
    "width": "--size WxH",
    "height": "--size WxH",
}


# Typer carries its own copy of click: the base of its errors is reached through a public one.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

STOPPED = 130


class CheckFailed(Exception):
    """A check said no: exit code 1."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error is one line on stderr."""
    as_json = "--json" in arguments
    try:
        left_with = app(args=list(arguments), standalone_mode=False)
    except CheckFailed:
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", as_json, STOPPED)
    except UsageError as error:
        given = getattr(error, "option_name", None)  # an unknown option names itself
        return _fail(_explain_option(given) if type(error).__name__ == "NoSuchOption" and given else _say(error), as_json)
    except Error as error:
        return _fail(str(error), as_json)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'no file named'}", as_json)
    if left_with == STOPPED:  # Typer turns Ctrl-C into this code
        return _fail("stopped", as_json, STOPPED)
    return left_with if isinstance(left_with, int) else 0


def _say(error: Any) -> str:
    """Return a usage error's message; a command group without a command prints its help as its message."""
    message = error.format_message()
    return message if message.strip() else "no command given: see --help"


def _fail(message: str, as_json: bool, code: int = 2) -> int:
    line = " ".join(message.split())
    if as_json:
        print(json.dumps({"error": line}))
    print(f"imagegen: {line}", file=sys.stderr)
    return code


def _explain_option(given: str) -> str:
    """Say what an unknown option is called here."""
    name = given.lstrip("-").replace("-", "_")
    setting = FOREIGN_NAMES.get(name, name)
    options = ("seed", "num", "steps", "guidance", "size", "scheduler", "negative", "image", "strength", "mask", "out")
    if setting in FOREIGN_OPTIONS or setting in options:
        return f"no option {given}: it is {FOREIGN_OPTIONS.get(setting, '--' + setting)} here"
    near = difflib.get_close_matches(name, options, n=1)
    return f"no option {given}: did you mean --{near[0]}?" if near else f"no option {given}: see --help"


def _print_json(data: object) -> None:
    """Print one JSON object; numbers that JSON lacks become null."""
    print(json.dumps(finite(data), ensure_ascii=False, indent=2))


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show imagegen's own warnings as one line on stderr each, and no others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "imagegen" in warning.filename or str(warning.message).startswith("the prompt"):
            print(f"imagegen: {warning.message}", file=sys.stderr)


def _load(model: str, device: str | None, dtype: str | None, plan: str) -> "Model":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own, at import
        from imagegen.model import load

        return load(model, device=device, dtype=dtype, plan=plan)


def _parse_size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})\s*[xX×]\s*(\d{1,5})", size.strip())
    if match is None:
        raise RequestError(f"--size must be WIDTHxHEIGHT in pixels, as in 128x128, got {size!r}")
    return int(match[1]), int(match[2])


def _check_writable(folder: Path) -> None:
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


@app.command()
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
    out: Annotated[Path, typer.Option(help="Where to write the pictures.")] = Path(),
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = "exact",
    as_json: JsonOption = False,
) -> None:
    """Make pictures from prompts; each PNG carries the receipt that makes it again.

    Example: imagegen generate "a red apple" --seed 7 --out pictures

    --json: {"pictures": [{"file", "prompt", "seed", "width", "height", "pixels_sha256"}], "elapsed_s", "model", "plan"}
    """
    width, height = _parse_size(size)
    _check_writable(out)
    with _warnings_as_lines():
        with imports_for_one_picture() if plan == "exact" else contextlib.nullcontext():
            loaded = _load(model, device, dtype, plan)
        written, elapsed_s = [], 0.0
        for prompt in prompts:
            result = _follow(
                loaded,
                prompt,
                seed=seed,
                num_images=num,
                num_steps=steps,
                guidance=guidance,
                width=width,
                height=height,
                scheduler=scheduler,
                negative_prompt=negative,
                image=image,
                strength=strength,
                mask=mask,
            )
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
        _print_json({"pictures": pictures, "elapsed_s": round(elapsed_s, 4), "model": loaded.source, "plan": loaded.plan.name})


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
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a picture again from its receipt: exit 0 where it is the same, 1 where it is not.

    Example: imagegen replay 7-a-red-apple.png

    --json: {"same", "psnr_db" (null: identical), "max_difference", "reasons": [...]}
    """
    with _warnings_as_lines():
        from imagegen.receipt import open_picture

        _, receipt = open_picture(picture)  # a file without a receipt is refused before any model is loaded
        with contextlib.nullcontext() if receipt.plan.get("levers") else imports_for_one_picture():
            loaded = _load(receipt.model["source"], device, receipt.environment.get("dtype"), "exact")
        from imagegen.reference import replay as replay_picture

        verdict = replay_picture(picture, image=image, mask=mask, model=loaded)
    if as_json:
        figures = ("same", "psnr_db", "max_difference", "reasons")
        _print_json({name: getattr(verdict, name) for name in figures})
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
        _print_json(json.loads(receipt.to_json()))
        return
    for title, values in (("request", receipt.request), ("model", receipt.model), ("plan", receipt.plan)):
        _print_section(title, values)
    _print_section("environment", receipt.environment)
    print(f"pixels\n  sha256: {receipt.pixels_sha256}")


def _print_section(title: str, values: dict[str, Any]) -> None:
    print(title)
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"  {name}:")
            for inner, detail in value.items():
                print(f"    {inner}: {detail}")
        elif value not in (None, "", [], False):
            print(f"  {name}: {value}")


def _model_folder(name: str) -> Path:
    folder = embedded_folder() if name == EMBEDDED else Path(name)
    if not folder.is_dir():
        raise ModelError(f"no model {name!r}: give {', '.join(CARDS)} or the folder of a diffusers model")
    return folder


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List the models known by name.

    Example: imagegen models list

    --json: {"models": [{"name", "family", "licence", "terms", "summary"}]}
    """
    if as_json:
        _print_json({"models": [vars(card) for card in CARDS.values()]})
        return
    for card in CARDS.values():
        print(f"{card.name}  ({card.licence})  {card.summary}")
    print(f"and any folder of a diffusers model of class {', '.join(sorted({f.pipeline for f in FAMILIES.values()}))}")


@models_app.command("show")
def models_show(model: Annotated[str, typer.Argument(help="emoji or a folder.")] = EMBEDDED, as_json: JsonOption = False) -> None:
    """Show a model's family, licence, defaults, files and hashes.

    Example: imagegen models show emoji

    --json: {"name", "folder", "card", "defaults", "files": [{"file", "bytes", "sha256"}]}
    """
    from imagegen.weights import hash_weights

    folder = _model_folder(model)
    card = CARDS.get(model)
    files: list[dict[str, Any]] = [
        {"file": name, "bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in hash_weights(folder).items()
    ]
    defaults = vars(FAMILIES[card.family]) if card else {}
    if as_json:
        shown = vars(card) if card else None
        _print_json({"name": model, "folder": str(folder), "card": shown, "defaults": defaults, "files": files})
        return
    print(f"{model}: {folder}")
    for title, values in (("card", vars(card) if card else {}), ("defaults", defaults)):
        if values:
            _print_section(title, values)
    for file in files:
        print(f"  {file['sha256']}  {file['bytes'] / 1e6:7.1f} MB  {file['file']}")


@models_app.command("verify")
def models_verify(
    model: Annotated[str, typer.Argument(help="emoji or a folder.")] = EMBEDDED, as_json: JsonOption = False
) -> None:
    """Check that a model's weight files are whole: exit 1 where one is not.

    Example: imagegen models verify emoji

    --json: {"ok", "files": {file: [what is wrong with it]}}
    """
    from imagegen.weights import check_weights

    found = check_weights(_model_folder(model))
    ok = not any(found.values())
    if as_json:
        _print_json({"ok": ok, "files": found})
    else:
        for name, wrong in found.items():
            print(f"{name}: {'; '.join(wrong) or 'whole'}")
    if not ok:
        raise CheckFailed


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, whether the embedded model is whole, and which extras are installed.

    Example: imagegen doctor

    --json: {"machine", "versions", "device", "extras": {name: installed}, "embedded_model": {"ok", "files"}}
    """
    from importlib.util import find_spec

    from imagegen.measure import machine, versions
    from imagegen.weights import check_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
    files = check_weights(embedded_folder())
    ok = not any(files.values())
    extras = {"demo": "gradio", "train": "peft", "ray": "ray", "fast": "torchao"}
    found = {
        "machine": machine(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu (this torch sees no CUDA device)",
        "extras": {extra: find_spec(module) is not None for extra, module in extras.items()},
        "embedded_model": {"ok": ok, "files": files},
    }
    if as_json:
        _print_json(found)
    else:
        for title in ("machine", "versions"):
            _print_section(title, found[title])  # type: ignore[arg-type]
        print(f"device\n  {found['device']}")
        print("extras")
        for extra, module in extras.items():
            print(f"  {extra}: {'installed' if found['extras'][extra] else f'''{module} is not installed'''}")  # type: ignore[index]
        print(f"embedded model\n  {'whole' if ok else files}")
    if not ok:
        raise CheckFailed


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
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


@app.command()
def reference(
    folder: Annotated[Path, typer.Argument(help="A new folder for the pictures; with --import, the folder to import.")],
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line; default: thirty of ours.")] = None,
    import_folder: Annotated[Path | None, typer.Option("--import", help="Import this folder's pictures into DIR.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next has seed + 1.")] = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record the pictures that plans are held against, and the noise floor; or import another tool's.

    Example: imagegen reference my-reference --prompts prompts.txt

    --json: {"folder", "source", "pictures", "dtype", "noise_floor": {"psnr_db", "max_difference", "pictures"} or null}
    """
    with _warnings_as_lines(), _progress() as tell:
        if import_folder is not None:
            from imagegen.reference_set import import_reference

            made = import_reference(import_folder, folder if folder.resolve() != import_folder.resolve() else None)
        else:
            loaded = _load(model, device, None, "exact")
            from imagegen.reference_set import record_reference

            made = record_reference(loaded, prompts, folder, seed=seed, num_steps=steps, guidance=guidance, progress=tell)
    facts = {"folder": str(made.folder), "source": made.source, "pictures": len(made), "dtype": made.dtype}
    if as_json:
        _print_json(facts | {"noise_floor": made.noise_floor})
        return
    floor = made.noise_floor
    print(f"{len(made)} pictures in {made.folder}" + (f"; noise floor {_decibels(floor['psnr_db'])}" if floor else ""))


def _decibels(value: float | None) -> str:
    return "identical" if value is None or value == float("inf") else f"{value:.1f} dB"


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="A reference set.")],
    plans: PlansOption = ["exact"],  # noqa: B006  Typer wants a list
    lora: Annotated[list[str] | None, typer.Option(help="Not in this version.", hidden=True)] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="The PSNR in dB that every picture has to reach; default: each tier's own.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write report.html and report.json into this folder.")] = None,
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a reference set's pictures again under each plan: time, drift, blame; exit 1 where one leaves the budget.

    Example: imagegen compare my-reference --plan exact --plan fast --min-psnr 30 --report report

    --json: {"reference", "environment", "notes", "holds", "budget_psnr_db", "plans": [{"plan", "verdict", "n", "median_s",
    "fidelity": {metric: {"worst", "mean"}} (PSNR null: identical), "levers", "blame"}]}
    """
    if lora:
        raise RequestError("--lora is not in this version yet")
    with _warnings_as_lines(), _progress() as tell:
        loaded = _load(model, device, dtype, "exact")
        from imagegen.comparison import compare as compare_plans

        found = compare_plans(folder, loaded, plans, min_psnr_db=min_psnr, progress=tell)
        page = found.save(report) if report is not None else None
    if as_json:
        _print_json(found.to_json())
    else:
        for note in found.notes:
            print(f"note: {note}")
        exact_s = None
        for trial in found.trials:
            exact_s = exact_s or trial.median_s
            print(f"{trial.plan}: {trial.median_s:.3f} s a picture; {trial.verdict}")
            for lever in trial.levers:
                print(f"  {lever['lever']}: {lever['did'] if lever['engaged'] else lever.get('why_not', 'it did not engage')}")
            for part in trial.blame:
                share, after = part["share_of_drift"], _decibels(part["worst_psnr_db_after"])
                print(f"  + {part['lever']}: {part['factor']:.2f} x, {share:.0%} of the drift, worst {after} after it")
        if page:
            print(page)
    if not found.holds:
        raise CheckFailed


@app.command()
def tune(
    min_psnr: Annotated[float | None, typer.Option(help="The least PSNR in dB of every picture.")] = None,
    min_ssim: Annotated[float | None, typer.Option(help="Or the least SSIM.")] = None,
    max_flip: Annotated[float | None, typer.Option(help="Or the greatest FLIP.")] = None,
    max_memory_gib: Annotated[float | None, typer.Option(help="The most memory while a picture is made.")] = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    any_steps: Annotated[bool, typer.Option("--any-steps", help="Allow plans with fewer steps.")] = False,
    num: Annotated[int, typer.Option(help="Pictures of a call: 1 for latency, more for throughput.")] = 1,
    minutes: Annotated[float, typer.Option(help="The time limit.")] = 8.0,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts: 6 to search on, the others to confirm.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write the profile.")] = Path("profile.json"),
    report: Annotated[Path | None, typer.Option(help="Write report.html into this folder.")] = None,
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the fastest plan inside a fidelity budget, measured on this machine; use it with --plan profile.json.

    Example: imagegen tune --min-psnr 30 --minutes 8 --out profile.json

    --json: the profile: {"plan": [lever], "evidence": {"n", "worst", "mean", "failure_rate_below"}, "speed": {"median_s",
    "stock_median_s", "ratio"}, "budget", "frontier", "model", "machine", "environment", "request"}
    """
    _check_writable(out.resolve().parent)
    with _warnings_as_lines(), _progress() as tell:
        loaded = _load(model, device, dtype, "exact")
        from imagegen.prompts import read_prompts
        from imagegen.tuner import tune as find_plan

        profile = find_plan(
            loaded, min_psnr_db=min_psnr, min_ssim=min_ssim, max_flip=max_flip, max_memory_gib=max_memory_gib,
            num_steps=steps, guidance=guidance, num_images=num, any_steps=any_steps, minutes=minutes,
            prompts=read_prompts(prompts) if prompts else None, progress=tell,
        )  # fmt: skip
        profile.save(out)
        page = profile.save_report(report) if report is not None else None
    if as_json:
        _print_json({name: getattr(profile, name) for name in ("version", "model", "machine", "environment", "budget", "request",
                                                               "plan", "evidence", "speed", "frontier")})  # fmt: skip
        return
    evidence, speed = profile.evidence, profile.speed
    worst = "identical" if evidence["worst"] is None else f"worst {profile.budget['metric']} {evidence['worst']:.4g}"
    rate = f"failure rate below {evidence['failure_rate_below']:.0%} (95 % confidence)"
    stock = f"stock diffusers {speed['stock_median_s']:.3f} s in turn: {speed['ratio']:.2f} x"
    print(" + ".join(profile.plan) or "exact")
    print(f"  {speed['median_s']:.3f} s a picture, {stock}")
    print(f"  {evidence['n']} unseen pictures, {worst}; {rate}")
    for note in profile.notes:
        print(f"  note: {note}")
    print(out if page is None else f"{out}\n{page}")


@app.command()
def bench(
    plans: PlansOption = ["exact", "balanced", "fast"],  # noqa: B006  Typer wants a list
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes, to see that it runs; nothing worth reading.")] = False,
    denoiser: Annotated[bool, typer.Option("--denoiser", help="Also a Stable-Diffusion-size denoiser; half an hour.")] = False,
    budget_min: Annotated[float | None, typer.Option(help="Begin no further stage after these minutes.")] = None,
    out: Annotated[Path, typer.Option(help="Where the log and the report go; what is there is not measured again.")] = Path(
        "bench"
    ),
    model: ModelOption = EMBEDDED,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: every plan in turn with stock diffusers, with fidelity beside each time; one report.

    Example: imagegen bench --out bench

    --json: {"report", "stages": [{"stage", ...what it measured, or "failed"}]}
    """
    _check_writable(out)
    with _progress() as tell, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from imagegen.bench import read_log, run

        page = run(out, source=model, plans=plans, tiny=tiny, with_denoiser=denoiser, budget_min=budget_min, tell=tell)
    rows = read_log(out)
    if as_json:
        _print_json({"report": str(page), "stages": rows})
        return
    for row in rows:
        if "trial" in row:
            print(f"{row['trial']['plan']}: {row['trial']['median_s']:.3f} s; {row['trial']['verdict']}")
        elif "failed" in row:
            print(f"{row['stage']['stage']} failed: {row['failed']}")
    print(page)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 7860,
    out: Annotated[Path, typer.Option(help="Where the demo writes its pictures.")] = Path("imagegen-pictures"),
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = "exact",
) -> None:
    """Start the web demo.

    Example: imagegen serve --port 7860
    """
    _check_writable(out)
    from imagegen.studio import launch

    launch(_load(model, device, dtype, plan), host=host, port=port, output_dir=out)
