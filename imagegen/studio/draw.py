"""What the page shows that is no component: HTML and SVG, as text, of figures that others measured.

Every text that comes from outside is escaped here. Colours are the page's own, so that they follow light and dark.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.report import chart, in_words

if TYPE_CHECKING:
    from PIL.Image import Image

CURVE_PX = (640, 200)
MARGIN_PX = 44
STAGES = {"prompt_s": "reading the prompt", "steps_s": "steps", "decoding_s": "decoding"}


@dataclass(frozen=True)
class Frame:
    """What there is to show after a step.

    Attributes:
        message: the step and the time left, or how it ended.
        fraction: of the work that is done, 0 to 1.
        previews: every picture as far as it is known; empty before the first step.
        paths: the files of the finished pictures; empty until then, and after a stop.
        count: how many pictures there will be.
    """

    message: str
    fraction: float
    previews: Sequence["Image"] = ()
    paths: Sequence[Path] = ()
    count: int = 1


def inline(picture: "Image") -> str:
    """Return a picture as a lossless data URL."""
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def inline_file(path: str | Path) -> str:
    """Return a PNG file as a data URL: its very bytes."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def stage_html(frame: Frame) -> str:
    """Return the pictures so far in a frame of one size, whatever is in it, so that nothing jumps when they arrive."""
    count = max(frame.count, len(frame.previews))
    cells = [f"<img src='{inline(picture)}' alt='Preview of picture {n}'>" for n, picture in enumerate(frame.previews, 1)]
    cells += ["<div class='cell'></div>"] * (count - len(cells))
    return f"<div class='stage{' one' if count < 2 else ''}'>{''.join(cells)}</div>{progress_html(frame.message, frame.fraction)}"


def progress_html(message: str, fraction: float | None) -> str:
    """Return a line that says where the work stands, over its bar; the line is read out when it changes."""
    width = f"{100 * (fraction or 0):.1f}%"
    bar = f"<div class='bar'><div style='width: {width}'></div></div>"
    return f"<div class='progress'>{bar}<p role='status' aria-live='polite'>{html.escape(message)}</p></div>"


def table_html(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """Return a table; its cells are text, the first of a row names it."""
    names = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in others)
        lines.append(f"<tr><th scope='row'>{html.escape(str(first))}</th>{cells}</tr>")
    inner = f"<caption>{html.escape(caption)}</caption><thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody>"
    label = html.escape(caption, quote=True)
    return f"<div class='scroll' tabindex='0' role='group' aria-label='{label}'><table>{inner}</table></div>"


def figures_html(figures: Mapping[str, tuple[str, str]], verdict: str) -> str:
    """Return measurements as boxes, each a value over what it is held against, and a verdict in words below."""
    boxes = "".join(
        f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b><small>{html.escape(note)}</small></div>"
        for name, (value, note) in figures.items()
    )
    return f"<div class='figures'>{boxes}</div><p class='verdict' role='status' aria-live='polite'>{html.escape(verdict)}</p>"


def pair_html(first: str | Path, second: str | Path, names: tuple[str, str], flicker: bool) -> str:
    """Return two pictures side by side, or in one place in turn, as the very files."""
    kind = "flicker" if flicker else "pair"
    inner = "".join(
        f"<figure><img src='{inline_file(path)}' alt='{html.escape(name, quote=True)}'>"
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for path, name in ((first, names[0]), (second, names[1]))
    )
    return f"<div class='{kind}'>{inner}</div>"


def stages_html(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return bars of the time that each stage of a picture took, a line for each plan; all on one scale."""
    longest = max((sum(stages.values()) for stages in rows.values()), default=0) or 1.0
    lines = []
    for plan, stages in rows.items():
        parts = "".join(
            f"<i class='{name}' style='width: {100 * stages[name] / longest:.2f}%' title='{words}: {stages[name]:.3f} s'></i>"
            for name, words in STAGES.items()
        )
        said = ", ".join(f"{words} {stages[name]:.3f} s" for name, words in STAGES.items())
        lines.append(
            f"<dt>{html.escape(plan)}</dt><dd><span class='bars' aria-hidden='true'>{parts}</span><small>{said}</small></dd>"
        )
    return f"<dl class='stages'>{''.join(lines)}</dl>" if lines else ""


def pareto_svg(rows: Sequence[dict[str, Any]], budget_db: float | None = None) -> str:
    """Return the chart of time against the worst PSNR, a point for each plan; what nothing else beats is named.

    Args:
        rows: a `Trial.summary` for each plan.
        budget_db: the PSNR asked for, drawn as a line.
    """
    drawn = chart(rows, budget_db)
    if drawn is None:
        return ""
    left, bottom, width = drawn["left"], drawn["bottom"], drawn["width"]
    parts = [f"<line class='axis' x1='{left}' x2='{width}' y1='{bottom}' y2='{bottom}'/>"]
    parts += [
        f"<line class='grid' x1='{left}' x2='{width}' y1='{tick['y']:.1f}' y2='{tick['y']:.1f}'/>"
        f"<text x='{left - 8}' y='{tick['y'] + 4:.1f}' text-anchor='end'>{tick['label']}</text>"
        for tick in drawn["ticks_y"]
    ]
    parts += [
        f"<text x='{tick['x']:.1f}' y='{bottom + 16}' text-anchor='{'end' if tick is drawn['ticks_x'][-1] else 'middle'}'>"
        f"{tick['label']}</text>"
        for tick in drawn["ticks_x"]
    ]
    parts.append(f"<text x='{(left + width) / 2}' y='{drawn['height'] - 4}' text-anchor='middle'>seconds for a picture</text>")
    parts.append(f"<text transform='translate(12 {bottom / 2}) rotate(-90)' text-anchor='middle'>worst PSNR, dB</text>")
    if drawn["budget"] is not None:
        parts.append(f"<line class='budget' x1='{left}' x2='{width}' y1='{drawn['budget']:.1f}' y2='{drawn['budget']:.1f}'/>")
    points = sorted(drawn["points"], key=lambda point: point["x"])
    for point in points:
        x, y, name = point["x"], point["y"], html.escape(point["plan"])
        kind = "frontier" if point["frontier"] else "beaten"
        parts.append(f"<circle class='{kind}' cx='{x:.1f}' cy='{y:.1f}' r='6'><title>{name}</title></circle>")
        if point["frontier"] and len(point["plan"]) < 24:
            side = "end" if x > width * 0.7 else "start"
            parts.append(
                f"<text x='{x + (-10 if side == 'end' else 10):.1f}' y='{y + 14:.1f}' text-anchor='{side}'>{name}</text>"
            )
    said = "; ".join(
        f"{row['plan']}: {row['median_s']:.3g} s, worst {in_words(row['fidelity']['psnr_db']['worst'])}"
        for row in rows
        if "psnr_db" in row.get("fidelity", {})
    )
    label = html.escape(f"Seconds for a picture against its worst PSNR. {said}", quote=True)
    svg = f"<svg class='chart' viewBox='0 0 {width} {drawn['height']}' role='img' aria-label='{label}'>{''.join(parts)}</svg>"
    return f"<div class='scroll'>{svg}</div>"


def curve_svg(values: Sequence[tuple[int, float]], of: int) -> str:
    """Return a line through (step, loss); `of` is the last step. Losses jump, so a mean over the last ones is drawn too."""
    shown = [(step, value) for step, value in values if math.isfinite(value)]
    if not shown:
        return ""
    (width, height), top = CURVE_PX, max(value for _, value in shown) or 1.0

    def place(step: int, value: float) -> str:
        x = MARGIN_PX + (width - MARGIN_PX - 8) * step / max(of, 1)
        return f"{x:.1f},{8 + (height - 32) * (1 - value / top):.1f}"

    smooth, mean = [], shown[0][1]
    for step, value in shown:
        mean += 0.1 * (value - mean)
        smooth.append((step, mean))
    lines = "".join(
        f"<polyline class='{kind}' points='{' '.join(place(*point) for point in points)}'/>"
        for kind, points in (("each", shown), ("mean", smooth))
    )
    axis = f"<line class='axis' x1='{MARGIN_PX}' x2='{width}' y1='{height - 24}' y2='{height - 24}'/>"
    words = f"<text x='{MARGIN_PX - 6}' y='16' text-anchor='end'>{top:.3f}</text><text x='{MARGIN_PX - 6}' y='{height - 20}'"
    words += f" text-anchor='end'>0</text><text x='{width}' y='{height - 6}' text-anchor='end'>step {of}</text>"
    label = f"Loss over steps: {shown[-1][1]:.4f} at step {shown[-1][0]} of {of}, its mean {smooth[-1][1]:.4f}"
    svg = f"<svg class='chart' viewBox='0 0 {width} {height}' role='img' aria-label='{label}'>{axis}{lines}{words}</svg>"
    return f"<div class='scroll'>{svg}</div>"
