"""Contact sheets: made pictures above their labels, and numbered ones for people to name."""

import json
import random
from pathlib import Path

import torch
from pictures import CANVAS_PX
from PIL import Image, ImageDraw, ImageFont

NUM_BLIND = 30
LABEL_PX = 16
PAGE = 50  # pictures on one contact sheet


def contact_sheet(pictures: torch.Tensor, labels: list[str], columns: int, right: list[bool] | None = None) -> Image.Image:
    """Lay pictures, (B, 3, 128, 128) uint8, out in rows, each above its label; red where `right` is false."""
    rows, cell = -(-len(pictures) // columns), CANVAS_PX + 4
    sheet = Image.new("RGB", (columns * cell, rows * (cell + LABEL_PX)), (235, 235, 235))
    pen = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = index % columns * cell + 2, index // columns * (cell + LABEL_PX) + 2
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (left, top))
        size = 12
        while size > 6 and ImageFont.load_default(size).getlength(label) > CANVAS_PX:
            size -= 1
        colour = (0, 0, 0) if right is None or right[index] else (200, 0, 0)
        middle = (left + CANVAS_PX // 2, top + CANVAS_PX + LABEL_PX // 2)
        pen.text(middle, label, colour, ImageFont.load_default(size), anchor="mm")
    return sheet


def write_sheets(out: Path, wanted: list[str], concepts: dict, made: torch.Tensor) -> None:
    """Write the labelled pages `concepts-K.png` and, for people to name, `blind.png` with `blind_key.json`."""
    for page, start in enumerate(range(0, len(wanted), PAGE)):
        names, judged = wanted[start : start + PAGE], concepts["judged"][start : start + PAGE]
        labels = [name if name == seen else f"{name} ({seen}?)" for name, seen in zip(names, judged, strict=True)]
        right = [name == seen for name, seen in zip(names, judged, strict=True)]
        contact_sheet(made[start : start + PAGE], labels, 10, right).save(out / f"concepts-{page + 1}.png")
    order = random.Random(1).sample(range(len(wanted)), min(NUM_BLIND, len(wanted)))
    contact_sheet(made[order], [str(number + 1) for number in range(len(order))], 6).save(out / "blind.png")
    key = {str(number + 1): wanted[index] for number, index in enumerate(order)}
    (out / "blind_key.json").write_text(json.dumps(key, indent=1))
