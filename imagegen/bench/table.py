"""The bench's log and what becomes of it: one HTML page, one JSON file with a schema, one Markdown table to paste."""

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imagegen.profile import write_json
from imagegen.report import write_report

LOG = "bench.jsonl"
VERSION = 1


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the log's whole lines."""
    rows = []
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut short
            continue
        if isinstance(row, dict) and isinstance(row.get("stage"), dict) and "key" in row:
            rows.append(row)
    return rows


def label_of(stage: dict[str, Any]) -> str:
    """Return a stage in a few words, as in `denoiser sd1.5, 256 px, threads 2`."""
    words = [stage["stage"], *(str(stage[name]) for name in ("plan", "architecture") if name in stage)]
    more = ([f"{stage['size_px']} px"] if "size_px" in stage else []) + (
        [f"threads {stage['threads']}"] if "threads" in stage else []
    )
    return ", ".join([" ".join(words), *more])


def figures(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every figure of the log: what it is, its value, how it came about.

    Each has `stage`, `what`, `value`, `unit`, `kind` (`measured`, `estimated` or `skipped`) and `note`.
    """
    for row in rows:
        stage = row["stage"]
        name = label_of(stage)
        if "failed" in row:
            yield _figure(name, "failed", None, "", "skipped", row["failed"])
            continue
        yield from FIGURES[stage["stage"]](name, row)


def _figure(stage: str, what: str, value: float | None, unit: str, kind: str = "measured", note: str = "") -> dict[str, Any]:
    return {"stage": stage, "what": what, "value": value, "unit": unit, "kind": kind, "note": note}


def _of_machine(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for dtype, rate in row["gflops"].items():
        yield _figure(name, f"matrix product, {dtype}", rate, "Gflop/s")


def _of_parts(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part, spent in row["seconds"].items():
        yield _figure(name, f"one picture, exact: {part}", spent, "s")


def _of_pictures(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    trial = row["trial"]
    yield _figure(name, trial["plan"], trial["median_s"], "s", note=f"{row['ratio']:.2f} x stock diffusers; {trial['verdict']}")
    yield _figure(name, "stock diffusers in turn", row["stock_median_s"], "s")


def _of_training(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for loop, found in row["loops"].items():
        memory = "memory not known" if found["peak_gib"] is None else f"peak {found['peak_gib']:.2f} GiB"
        note = f"{memory}; batch {row['batch']}" + (f", {row['ratio']:.2f} x plain in turn" if loop == "imagegen" else "")
        yield _figure(name, f"a LoRA's step, {loop}", found["median_s"], "s", note=note)


def _of_kernels(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kernel, found in row["kernels"].items():
        if "skipped" in found:
            yield _figure(name, kernel, None, "", "skipped", found["skipped"])
        for case in found.get("cases", []):
            note = f"{case['ratio']:.2f} x torch in turn, {case['p10_s']:.2e} to {case['p90_s']:.2e} s"
            if case["share_of_peak"] is not None:
                note += f", {case['share_of_peak']:.0%} of what the data sheet allows"
            yield _figure(name, f"{kernel}, {case['shape']}", case["median_s"], "s", note=note)


def _of_denoiser(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for plan, found in row["rows"].items():
        note = f"{found['ratio']:.2f} x eager in turn, relative error {found['error']:.1e}"
        yield _figure(name, plan, found["median_s"], "s", note=note)
    if row.get("estimated_s") is not None:
        yield _figure(name, f"least time by the data sheet of {row['estimated_for']}", row["estimated_s"], "s", "estimated")
    for plan, reason in row["refused"].items():
        yield _figure(name, plan, None, "", "skipped", reason)


def _of_janusflow(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for tokens, found in row["rows"].items():
        for way, spent in found["seconds"].items():
            note = f"{row['layers']} layers, {row['dtype']}, two rows"
            if way == "prompt kept":
                note += f"; {found['ratio']:.2f} x all read anew in turn, relative difference {found['error']:.1e}"
            yield _figure(name, f"{tokens} prompt tokens, {way}", spent, "s", note=note)


def _of_crowd(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for way in ("batched", "single"):
        found = row[way]
        counts = f"{found.get('left', 0)} left, {found.get('busy', 0)} told busy, {len(found['errors'])} errors"
        note = f"{row['clients']} clients, {counts}"
        if way == "batched":
            worst = row["worst_psnr_db"]  # None where all were equal
            drift = "all pictures identical to" if worst is None else f"worst picture {worst:.1f} dB from"
            note += f"; {row['ratio']:.2f} x one at a time; {drift} those made alone"
        yield _figure(name, f"pictures a minute, {way}", found["per_minute"], "1/min", note=note)
    for half, gib in zip(("first", "second"), row["memory_gib"], strict=True):
        yield _figure(name, f"peak memory, {half} half", gib, "GiB")


def _of_workers(name: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for way, note in (("one", "one worker on one core"), ("two", "two workers of Ray's, a core each")):
        low, high = min(row[way]), max(row[way])
        more = f"; {row['ratio']:.2f} x one" if way == "two" else ""
        said = f"{note}, {len(row[way])} runs of {row['pictures']} pictures, {low:.1f} to {high:.1f}{more}"
        yield _figure(name, f"pictures a minute, {way}", statistics.median(row[way]), "1/min", note=said)


FIGURES = {
    "machine": _of_machine,
    "parts": _of_parts,
    "pictures": _of_pictures,
    "training": _of_training,
    "kernels": _of_kernels,
    "denoiser": _of_denoiser,
    "janusflow": _of_janusflow,
    "crowd": _of_crowd,
    "workers": _of_workers,
}


def write(folder: Path, wanted: Sequence[dict[str, Any]], budget_min: float | None) -> Path:
    """Write `bench.json`, `bench.md` and `report.html` from the log; return the page's path.

    Args:
        folder: of the log.
        wanted: the stages that were asked for; those without a row were skipped.
        budget_min: why.

    Raises:
        PlanError: they cannot be written.
    """
    rows = read_log(folder)
    done = [row["stage"] for row in rows]
    found = list(figures(rows))
    for stage in wanted:
        if stage not in done:
            found.append(
                _figure(
                    label_of(stage), "the whole stage", None, "", "skipped", f"the budget of {budget_min:g} minutes was spent"
                )
            )
    facts = next((row for row in rows if row["stage"]["stage"] == "machine" and "failed" not in row), {})
    about = {name: str(value) for name, value in (facts.get("machine", {}) | facts.get("environment", {})).items()}
    about |= {f"GPU {name}": value for name, value in facts.get("gpu", {}).items()}
    tiny = any(stage["tiny"] for stage in done)
    notes = ["tiny shapes: nothing here is worth reading"] if tiny else []
    write_json(folder / "bench.json", {"version": VERSION, "about": about, "tiny": tiny, "figures": found})
    _write_text(folder / "bench.md", to_markdown(about, notes, found))
    trials = []
    for row in rows:
        if "trial" in row:
            stock = f"{row['ratio']:.2f} × stock diffusers ({row['stock_median_s']:.3f} s in turn)"
            trials.append(row["trial"] | {"verdict": f"{stock}; {row['trial']['verdict']}"})
    return write_report(folder / "report.html", "imagegen bench", about, notes, trials, [], [], {}, figures=found)


def to_markdown(about: dict[str, str], notes: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    """Return the report as one Markdown table, to paste."""
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), *notes, ""]
    lines += ["| Stage | What | Value | How | Note |", "| --- | --- | --- | --- | --- |"]
    for figure in found:
        value = "" if figure["value"] is None else f"{figure['value']:.4g} {figure['unit']}"
        note = figure["note"].replace("|", "\\|")
        lines.append(f"| {figure['stage']} | {figure['what']} | {value} | {figure['kind']} | {note} |")
    return "\n".join(lines) + "\n"


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
