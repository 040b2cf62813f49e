"""Commands about models and this machine: list, show, verify, doctor."""

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from imagegen.catalog import CARDS, EMBEDDED, FAMILIES, card_of, embedded_folder, family_of
from imagegen.cli.shell import CheckFailed, JsonOption, app, print_json, print_section
from imagegen.licences import licence_named
from imagegen.request import ModelError

models_app = typer.Typer(help="List the known models, show one, verify its files.", no_args_is_help=True)
app.add_typer(models_app, name="models")


def _model_folder(name: str) -> Path:
    folder = embedded_folder() if name == EMBEDDED else Path(name)
    if not folder.is_dir():
        raise ModelError(f"no model {name!r}: give {', '.join(CARDS)} or the folder of a diffusers model")
    return folder


def _read_class(folder: Path) -> str:
    """Return the pipeline class that a model folder names; empty where it names none."""
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List the models known by name.

    Example: imagegen models list

    --json: {"models": [{"name", "family", "licence", "terms", "summary"}]}
    """
    if as_json:
        print_json({"models": [vars(card) for card in CARDS.values()]})
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
    card = card_of(model)
    files: list[dict[str, Any]] = [
        {"file": name, "bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in hash_weights(folder).items()
    ]
    family = FAMILIES[card.family] if card else family_of(model, _read_class(folder))
    defaults = vars(family) | (card.changes if card else {}) if family else {}
    if as_json:
        shown = vars(card) if card else None
        print_json({"name": model, "folder": str(folder), "card": shown, "defaults": defaults, "files": files})
        return
    print(f"{model}: {folder}")
    about = vars(card) | {"training on its outputs": licence_named(card.licence).kind} if card else {}
    for title, values in (("card", about), ("defaults", defaults)):
        if values:
            print_section(title, values)
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
        print_json({"ok": ok, "files": found})
    else:
        for name, wrong in found.items():
            print(f"{name}: {'; '.join(wrong) or 'whole'}")
    if not ok:
        raise CheckFailed


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option("--model", help="Estimate this model: sdxl, flux.1, emoji, a folder …")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="On this GPU: h100, a100, 4090 …")] = "h100",
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps of the estimate.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, whether the embedded model is whole, and which extras are installed.

    With --model: what a model needs on a GPU, before any download; an estimate from counted work, a lower bound.

    Example: imagegen doctor --model flux.1 --gpu 4090

    --json: {"machine", "versions", "device", "extras": {name: installed}, "embedded_model": {"ok", "files"}}, or with
    --model: {"kind": "estimated", "gpu", "parts": [{"part", "calls", "tflop", "estimated_s"}], "picture_s", "memory_gib", "fits"}
    """
    if model is not None:
        _estimate(model, gpu, steps, as_json)
        return
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
        print_json(found)
    else:
        for title in ("machine", "versions"):
            print_section(title, found[title])  # type: ignore[arg-type]
        print(f"device\n  {found['device']}")
        print("extras")
        for extra, module in extras.items():
            print(f"  {extra}: {'installed' if found['extras'][extra] else f'''{module} is not installed'''}")  # type: ignore[index]
        print(f"embedded model\n  {'whole' if ok else files}")
    if not ok:
        raise CheckFailed


def _estimate(model: str, gpu: str, steps: int, as_json: bool) -> None:
    """Print what a model needs on a GPU."""
    if steps < 1:
        raise ModelError(f"--steps must be at least 1, got {steps}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from imagegen.roofline import estimate

        found = estimate(embedded_folder() if model == EMBEDDED else model, gpu, num_steps=steps).to_json()
    if as_json:
        print_json(found)
        return
    print(f"{model} on {found['gpu']}, {found['dtype']}: an estimate from counted work and the data sheet, a lower bound")
    for part in found["parts"]:
        work = f"{part['tflop']:.2f} Tflop ({part['attention_share']:.0%} attention), {part['parameters'] / 1e9:.3f} B parameters"
        print(f"  {part['part']}: {part['calls']} x {part['estimated_s'] * 1000:.1f} ms; {work}, {part['weight_gib']:.2f} GiB")
    print(f"  one picture, {steps} steps: at least {found['picture_s']:.2f} s")
    for plan, gib in found["memory_gib"].items():
        print(f"  memory, {plan}: {gib:.1f} GiB, {'fits' if found['fits'][plan] else 'does not fit'}")
