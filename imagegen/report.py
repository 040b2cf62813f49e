"""One page that stands alone: plans by time and drift, picture pairs, and what each lever cost and gave.

Knows how to draw figures that others measured, nothing else.
"""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.request import PlanError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PAIRS = 6
TOP_DB = 70.0  # what is closer than this is drawn here
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 56, 44


def write_report(
    path: Path,
    title: str,
    about: dict[str, str],
    notes: Sequence[str],
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[str],
    references: Sequence["Image"],
    images: Mapping[str, Sequence["Image"]],
    budget_db: float | None = None,
    figures: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write the page beside its place and move it in; return its path.

    Args:
        path: of the page.
        title: its heading.
        about: facts by name: machine, versions, reference.
        notes: what should be known when reading it.
        rows: a `Trial.summary` for each plan.
        prompts: of the pictures.
        references: the reference pictures.
        images: each plan's pictures, in the same order.
        budget_db: the PSNR asked for, drawn as a line.
        figures: of a bench: `stage`, `what`, `value`, `unit`, `kind` and `note` each.

    Raises:
        PlanError: it cannot be written there.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "report.html"
    )
    pairs = [
        {
            "prompt": prompts[index],
            "reference": embed(references[index]),
            "others": [{"plan": plan, "source": embed(made[index])} for plan, made in images.items() if index < len(made)],
        }
        for index in range(min(MAX_PAIRS, len(references)))
    ]
    page = template.render(
        title=title,
        about=about,
        notes=notes,
        rows=rows,
        pairs=pairs,
        chart=chart(rows, budget_db),
        db=in_words,
        figures=figures,
    )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PlanError(f"cannot write {str(path)!r}: {error.strerror}; choose another directory") from None
    return path


def embed(picture: "Image") -> str:
    """Return a picture as a lossless data URL."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def in_words(value: float | None) -> str:
    """Return a PSNR for people; infinite, or null where it comes from JSON, is identical."""
    return "identical" if value is None or math.isinf(value) else f"{value:.1f} dB"


def chart(rows: Sequence[dict[str, Any]], budget_db: float | None) -> dict[str, Any] | None:
    """Return the Pareto chart's points in pixels: seconds to the right, worst PSNR upwards."""
    timed = [row for row in rows if row.get("median_s") and "psnr_db" in row.get("fidelity", {})]
    if not timed:
        return None
    worst = [_worst(row) for row in timed]
    low = 10 * math.floor(min([*worst, budget_db or TOP_DB]) / 10)
    slowest = max(row["median_s"] for row in timed) * 1.1

    def x(seconds: float) -> float:
        return LEFT + seconds / slowest * (WIDTH - LEFT - 10)

    def y(decibels: float) -> float:
        return 10 + (TOP_DB - decibels) / max(TOP_DB - low, 10) * (HEIGHT - BOTTOM - 10)

    points = []
    for row, decibels in zip(timed, worst, strict=True):
        rivals = zip(timed, worst, strict=True)
        beaten = any(other["median_s"] < row["median_s"] and better >= decibels for other, better in rivals if other is not row)
        points.append({"x": x(row["median_s"]), "y": y(decibels), "plan": row["plan"], "frontier": not beaten})
    ticks_y = [{"y": y(value), "label": f"{value:g}"} for value in range(int(low), int(TOP_DB) + 1, 10)]
    ticks_x = [{"x": x(slowest * part / 4), "label": f"{slowest * part / 4:.2g} s"} for part in range(5)]
    line = y(budget_db) if budget_db is not None else None
    return {"width": WIDTH, "height": HEIGHT, "left": LEFT, "bottom": HEIGHT - BOTTOM, "points": points, "ticks_x": ticks_x,
            "ticks_y": ticks_y, "budget": line}  # fmt: skip


def _worst(row: dict[str, Any]) -> float:
    value = row["fidelity"]["psnr_db"]["worst"]
    return TOP_DB if value is None else min(value, TOP_DB)
