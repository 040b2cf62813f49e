"""Commands about speed and fidelity: reference, compare, tune, bench."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from imagegen.catalog import EMBEDDED
from imagegen.cli.shell import (
    CheckFailed,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    JsonOption,
    LoraOption,
    ModelOption,
    PlansOption,
    StepsOption,
    VaeOption,
    add_loras,
    app,
    check_writable,
    load_model,
    print_json,
    progress,
    warnings_as_lines,
)


@app.command()
def reference(
    folder: Annotated[Path, typer.Argument(help="A new folder for the pictures; with --import, the folder to import.")],
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line; default: thirty of ours.")] = None,
    import_folder: Annotated[Path | None, typer.Option("--import", help="Import this folder's pictures into DIR.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next has seed + 1.")] = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    model: ModelOption = EMBEDDED,
    vae: VaeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record the pictures that plans are held against, and the noise floor; or import another tool's.

    Example: imagegen reference my-reference --prompts prompts.txt

    --json: {"folder", "source", "pictures", "dtype", "noise_floor": {"psnr_db", "max_difference", "pictures"} or null}
    """
    with warnings_as_lines(), progress() as tell:
        if import_folder is not None:
            from imagegen.reference_set import import_reference

            made = import_reference(import_folder, folder if folder.resolve() != import_folder.resolve() else None)
        else:
            loaded = load_model(model, device, None, "exact", vae=vae)
            from imagegen.reference_set import record_reference

            made = record_reference(loaded, prompts, folder, seed=seed, num_steps=steps, guidance=guidance, progress=tell)
    facts = {"folder": str(made.folder), "source": made.source, "pictures": len(made), "dtype": made.dtype}
    if as_json:
        print_json(facts | {"noise_floor": made.noise_floor})
        return
    floor = made.noise_floor
    print(f"{len(made)} pictures in {made.folder}" + (f"; noise floor {_decibels(floor['psnr_db'])}" if floor else ""))


def _decibels(value: float | None) -> str:
    return "identical" if value is None or value == float("inf") else f"{value:.1f} dB"


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="A reference set.")],
    plans: PlansOption = ["exact"],  # noqa: B006  Typer wants a list
    lora: LoraOption = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="The PSNR in dB that every picture has to reach; default: each tier's own.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write report.html and report.json into this folder.")] = None,
    model: ModelOption = EMBEDDED,
    vae: VaeOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a reference set's pictures again under each plan: time, drift, blame; exit 1 where one leaves the budget.

    Example: imagegen compare my-reference --plan exact --plan fast --min-psnr 30 --report report

    --json: {"reference", "environment", "notes", "holds", "budget_psnr_db", "plans": [{"plan", "verdict", "n", "median_s",
    "fidelity": {metric: {"worst", "mean"}} (PSNR null: identical), "levers", "blame"}]}
    """
    with warnings_as_lines(), progress() as tell:
        loaded = load_model(model, device, dtype, "exact", vae=vae)
        add_loras(loaded, lora)
        from imagegen.comparison import compare as compare_plans

        found = compare_plans(folder, loaded, plans, min_psnr_db=min_psnr, progress=tell)
        page = found.save(report) if report is not None else None
    if as_json:
        print_json(found.to_json())
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
    check_writable(out.resolve().parent)
    with warnings_as_lines(), progress() as tell:
        loaded = load_model(model, device, dtype, "exact")
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
        print_json({name: getattr(profile, name) for name in ("version", "model", "machine", "environment", "budget", "request",
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
    denoiser: Annotated[bool, typer.Option("--denoiser", help="On a CPU also a Stable-Diffusion-size denoiser.")] = False,
    budget_min: Annotated[float | None, typer.Option(help="Begin no further stage after these minutes.")] = None,
    out: Annotated[Path, typer.Option(help="Where the log and the report go; what is there is not measured again.")] = Path(
        "bench"
    ),
    model: ModelOption = EMBEDDED,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: every plan in turn with stock diffusers, with fidelity beside each time; one report.

    With --device cuda also our kernels, and a step of SD1.5, SDXL, SD3.5 and FLUX with random weights. What was stopped
    goes on where it was.

    Example: imagegen bench --device cuda --budget-min 60 --out bench

    --json: {"report", "stages": [{"stage", ...what it measured, or "failed"}]}
    """
    check_writable(out)
    with progress() as tell, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from imagegen.bench import label_of, read_log, run

        page = run(
            out, source=model, plans=plans, tiny=tiny, device=device, with_denoiser=denoiser, budget_min=budget_min, tell=tell
        )
    rows = read_log(out)
    if as_json:
        print_json({"report": str(page), "stages": rows})
        return
    for row in rows:
        if "trial" in row:
            print(f"{row['trial']['plan']}: {row['trial']['median_s']:.3f} s; {row['trial']['verdict']}")
        elif "failed" in row:
            print(f"{label_of(row['stage'])} failed: {row['failed']}")
    print(page)
