"""Commands about models and this machine: list, show, verify, doctor."""

import warnings
from typing import Annotated, Any

import typer

from imagegen.catalog import CARDS, EMBEDDED, FAMILIES, card_of, embedded_folder
from imagegen.cli.shell import CheckFailed, JsonOption, app, print_json, print_section, takes_source
from imagegen.licences import licence_named
from imagegen.request import ModelError
from imagegen.startup import stopped_at_once

SHOWN = (  # of a family
    "name", "pipeline", "size_px", "multiple_px", "min_px", "max_px", "num_steps", "guidance", "guided_by", "negative",
    "true_guidance", "temperature", "reference_dtype", "modes",
)  # fmt: skip
models_app = typer.Typer(help="List the known models, show one, verify its files.", no_args_is_help=True)
app.add_typer(models_app, name="models")

ModelArgument = Annotated[str, typer.Argument(help="emoji, a folder, a .safetensors or .gguf file, or a hub id (org/name).")]


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
    print(f"and any folder, file or hub id of a model of class {', '.join(sorted({f.pipeline for f in FAMILIES.values()}))}")


@models_app.command("show")
@takes_source
def models_show(model: ModelArgument = EMBEDDED, as_json: JsonOption = False, *, where: dict[str, Any]) -> None:
    """Show a model's family, licence, defaults, files and hashes; a hub id is looked for in the hub's cache alone.

    Example: imagegen models show emoji

    --json: {"name", "folder", "revision", "card", "defaults", "files": [{"file", "bytes", "sha256"}]}
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from imagegen.loader import describe, find_model

        source, of_janus = find_model(model, where | {"local_files_only": True})
        family = describe(source, of_janus)
    from imagegen.sources import files_of, read_index
    from imagegen.weights import hash_files

    card = card_of(source.name)
    defaults = {name: getattr(family, name) for name in SHOWN} | {"fixed": dict(family.fixed)}
    if of_janus is None:
        own = read_index(source.diffusers_folder).get("scheduler")
        defaults["scheduler"] = own[1] if isinstance(own, list) else ""
    paths = files_of(source) if of_janus is None else {path.name: path for path in of_janus.weights()}
    files: list[dict[str, Any]] = [
        {"file": name, "bytes": paths[name].stat().st_size, "sha256": digest} for name, digest in hash_files(paths).items()
    ]
    if as_json:
        shown = {"folder": str(source.folder), "revision": source.revision, "card": vars(card) if card else None}
        print_json({"name": source.name} | shown | {"defaults": defaults, "files": files})
        return
    print(f"{source.label()}: {source.path}" + (f", {source.contents.what}" if source.contents else ""))
    about = vars(card) | {"training on its outputs": licence_named(card.licence).kind} if card else {}
    if about:
        print_section("card", about)
    print_section("defaults", defaults)
    for file in files:
        print(f"  {file['sha256']}  {file['bytes'] / 1e6:7.1f} MB  {file['file']}")


@models_app.command("verify")
@takes_source
def models_verify(model: ModelArgument = EMBEDDED, as_json: JsonOption = False, *, where: dict[str, Any]) -> None:
    """Check a model's files: whole, as their hashes are recorded, and of the shapes that their configuration says.

    Nothing is built in memory. Hashes are recorded by the hub's cache and in a folder's SHA256SUMS. A hub id is looked
    for in the hub's cache alone. Exit 1 where anything is wrong.

    Example: imagegen models verify emoji

    --json: {"ok", "files": {file or component: [what is wrong with it]}, "notes": [...]}
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from imagegen.inspection import inspect
        from imagegen.loader import find_model

        found = inspect(*find_model(model, where | {"local_files_only": True}))
    if as_json:
        print_json({"ok": found.ok, "files": found.files, "notes": found.notes})
    else:
        for name, wrong in found.files.items():
            print(f"{name}: {'; '.join(wrong) or 'whole'}")
        for note in found.notes:
            print(f"note: {note}")
    if not found.ok:
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

    with stopped_at_once(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        from imagegen.inspection import inspect
        from imagegen.sources import find_source

        inspected = inspect(find_source(EMBEDDED))
    extras = {"demo": "gradio", "train": "peft", "ray": "ray", "fast": "torchao", "gguf": "gguf"}
    found = {
        "machine": machine(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu (this torch sees no CUDA device)",
        "extras": {extra: find_spec(module) is not None for extra, module in extras.items()},
        "embedded_model": {"ok": inspected.ok, "files": inspected.files},
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
        print(f"embedded model\n  {'whole' if inspected.ok else inspected.files}")
    if not inspected.ok:
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
