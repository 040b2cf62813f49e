"""Measure the model as it is shipped: plain diffusers, fp32, on the CPU; nothing of the recipe makes the pictures.

What is measured, each by its own function:

- concepts: does the judge (`judge.py`) recognise `a NAME`, one picture of each of 200 fixed concepts;
- backgrounds: is the border of `a NAME on a COLOUR background` nearest to COLOUR;
- autoencoder: PSNR of real pictures that it never saw, and whether the judge still recognises them;
- nearest: how far the pictures are from the nearest training picture, with real unseen pictures as the yardstick.

Writes `evaluation.json`, labelled contact sheets (a red label: the judge said something else) and a sheet
of numbered pictures for people to name, `blind.png`, whose answers lie in `blind_key.json`. Needs the
work folder with the drawn pictures and the trained judge.
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import torch
from build_data import default_work
from captions import with_article
from diffusers import DiffusionPipeline
from judge import Judge, accuracy, judge_pictures, load_judge, unseen_pictures
from pictures import BACKGROUNDS, CANVAS_PX, Pictures, psnr_db
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

NUM_CONCEPTS = 200
NUM_BACKGROUND_CONCEPTS = 5
NUM_BLIND = 30
NUM_STEPS = 20
GUIDANCE = 4.0
BATCH = 10
BORDER_PX = 3  # inside the margin that every training picture leaves free
SMALL_PX = 32  # where distances to training pictures are taken
SHIFT_PX = 5  # training pictures were drawn so far off the centre: a copy may be, too
LABEL_PX = 16
PAGE = 50  # pictures on one contact sheet


def sample_concepts(names: list[str], num_concepts: int) -> list[str]:
    """Return the first `num_concepts` of the fixed sample of 200 concepts."""
    return random.Random(0).sample(sorted(names), NUM_CONCEPTS)[:num_concepts]


@torch.no_grad()
def generate(pipeline: DiffusionPipeline, prompts: list[str], description: str) -> torch.Tensor:
    """Make one picture of every prompt; the seed is the prompt's index.

    Returns:
        (B, 3, 128, 128) uint8, what a PNG would hold.
    """
    found = []
    for start in track(range(0, len(prompts), BATCH), description=description):
        batch = prompts[start : start + BATCH]
        seeds = [torch.Generator("cpu").manual_seed(start + index) for index in range(len(batch))]
        made = pipeline(batch, guidance_scale=GUIDANCE, num_inference_steps=NUM_STEPS, generator=seeds, output_type="pt").images
        found.append((made.float() * 255).round().to(torch.uint8))
    return torch.cat(found)


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pictures into what the judge and the autoencoder take: float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def cielab(colours: torch.Tensor) -> torch.Tensor:
    """Convert sRGB colours to CIELAB (D65): (..., 3) in [0, 1] -> (..., 3), L in [0, 100].

    Source: IEC 61966-2-1 (1999) for sRGB; CIE 15 (2004), section 8.2.1, for CIELAB.
    """
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = linear @ to_xyz.T / to_xyz.sum(1)  # white is (1, 1, 1)
    root = torch.where(relative > (6 / 29) ** 3, relative ** (1 / 3), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def name_backgrounds(pictures: torch.Tensor) -> list[str]:
    """Return the palette colour nearest to the median of each picture's border, white among them.

    Args:
        pictures: (B, 3, 128, 128) uint8.
    """
    inner = torch.ones(pictures.shape[-2:], dtype=torch.bool)
    inner[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    border = pictures[:, :, inner].float().median(-1).values / 255  # (B, 3)
    palette = torch.tensor(list(BACKGROUNDS.values())).float() / 255
    distance = torch.cdist(cielab(border), cielab(palette))
    return [list(BACKGROUNDS)[index] for index in distance.argmin(1).tolist()]


def measure_concepts(judge: Judge, names: list[str], wanted: list[str], pictures: torch.Tensor) -> dict:
    """Judge the pictures, (B, 3, 128, 128) uint8, of the concepts asked for.

    Returns:
        `top1`, `top5` in [0, 1], and `judged`: the judge's first word on each picture.
    """
    scores = judge_pictures(judge, to_unit(pictures))
    labels = torch.tensor([names.index(name) for name in wanted])
    return accuracy(scores, labels) | {"judged": [names[index] for index in scores.argmax(1).tolist()]}


def measure_backgrounds(wanted: list[str], pictures: torch.Tensor) -> dict:
    """Compare the colours asked for with the borders of the pictures, (B, 3, 128, 128) uint8."""
    judged = name_backgrounds(pictures)
    right = {colour: [seen == colour for seen, asked in zip(judged, wanted, strict=True) if asked == colour] for colour in wanted}
    by_colour = {colour: round(sum(found) / len(found), 4) for colour, found in right.items()}
    total = sum(sum(found) for found in right.values()) / len(wanted)
    return {"accuracy": round(total, 4), "by_colour": by_colour, "judged": judged}


@torch.no_grad()
def through_autoencoder(vae: torch.nn.Module, canvases: torch.Tensor, description: str) -> torch.Tensor:
    """Encode to the mean and decode again: (B, 3, 128, 128) in [-1, 1] both ways."""
    parts = track(canvases.split(16), description=description)
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in parts])


def measure_autoencoder(vae: torch.nn.Module, judge: Judge, names: list[str], work: Path, limit: int | None) -> dict:
    """Return the mean PSNR in dB per split, and the judge's accuracy on Twemoji after the autoencoder."""
    figures = {}
    for split in ("heldout", "unseen"):
        pictures = Pictures(work, (split,))
        canvases = torch.stack([pictures.canvas(index) for index in range(len(pictures))][:limit])
        found = psnr_db(through_autoencoder(vae, canvases, f"autoencoder, {split}"), canvases)
        figures[f"{split}_db"] = round(found.mean().item(), 2)
        figures[f"{split}_num"] = len(found)
    canvases, labels = unseen_pictures(work, names)
    decoded = through_autoencoder(vae, canvases[:limit], "autoencoder, for the judge")
    return figures | {"judge_on_decoded_twemoji": accuracy(judge_pictures(judge, decoded), labels[:limit])}


def small(canvases: torch.Tensor) -> torch.Tensor:
    """Shrink canvases (B, 3, 128, 128) in [-1, 1] to vectors (B, 3072) in [0, 1]."""
    return (F.avg_pool2d(canvases, CANVAS_PX // SMALL_PX) / 2 + 0.5).flatten(1)


def nearest_rms(canvases: torch.Tensor, gallery: torch.Tensor, shift_px: int) -> torch.Tensor:
    """Return each canvas's distance to the nearest picture of the gallery, the best over all shifts of the canvas.

    Args:
        canvases: (B, 3, 128, 128) float32 in [-1, 1].
        gallery: (N, 3072), what `small` returned.
        shift_px: how far to shift both ways, pixel by pixel; 0 compares in place.

    Returns:
        (B,) root mean square over pixels at 32x32, in [0, 1].
    """
    best = torch.full((len(canvases),), torch.inf)
    padded = F.pad(canvases, (shift_px,) * 4, "replicate")
    for top, left in track(list(itertools.product(range(2 * shift_px + 1), repeat=2)), description=f"nearest, {shift_px} px"):
        queries = small(padded[:, :, top : top + CANVAS_PX, left : left + CANVAS_PX])
        best = best.minimum(torch.cdist(queries, gallery).min(1).values)
    return best / gallery.shape[1] ** 0.5


def measure_nearest(work: Path, names: list[str], wanted: list[str], pictures: torch.Tensor) -> dict:
    """Compare made pictures, (B, 3, 128, 128) uint8, and real unseen ones of the same concepts with the training's."""
    training = Pictures(work, ("concept",))
    canvases, labels = unseen_pictures(work, names)
    asked = torch.tensor([names[label] in set(wanted) for label in labels.tolist()])
    queries = torch.cat([to_unit(pictures), canvases[asked]])
    gallery = small(torch.stack([training.canvas(index) for index in range(len(training))]))
    figures = {}
    for place, shift_px in (("centred", 0), ("shifted", SHIFT_PX)):
        made, twemoji = nearest_rms(queries, gallery, shift_px).split([len(pictures), int(asked.sum())])
        for source, found in (("made", made), ("twemoji", twemoji)):
            figures[f"{source}_{place}"] = {"median": round(found.median().item(), 4), "minimum": round(found.min().item(), 4)}
    return figures


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


def print_table(report: dict) -> None:
    """Print the figures of `evaluation.json` that people ask for."""
    table = Table("what", "measured")
    concepts, backgrounds, vae = report["concepts"], report["backgrounds"], report["autoencoder"]
    real, decoded = report["judge"]["accuracy_twemoji"], vae["judge_on_decoded_twemoji"]
    table.add_row(f"concepts, {concepts['num']} pictures", f"top-1 {concepts['top1']:.1%}, top-5 {concepts['top5']:.1%}")
    table.add_row("the judge itself, real Twemoji", f"top-1 {real['top1']:.1%}, top-5 {real['top5']:.1%}")
    table.add_row("the same after the autoencoder", f"top-1 {decoded['top1']:.1%}, top-5 {decoded['top5']:.1%}")
    table.add_row(f"background colour, {backgrounds['num']} pictures", f"{backgrounds['accuracy']:.1%}")
    table.add_row("the concept on that background", f"top-1 {backgrounds['concept_top1']:.1%}")
    table.add_row("autoencoder, held out", f"{vae['heldout_db']:.2f} dB ({vae['heldout_num']} pictures)")
    table.add_row("autoencoder, Twemoji", f"{vae['unseen_db']:.2f} dB ({vae['unseen_num']} pictures)")
    for place, found in report["nearest"].items():
        table.add_row(f"nearest training picture, {place}", f"median {found['median']:.4f}, minimum {found['minimum']:.4f}")
    table.add_row("one picture", f"{report['settings']['seconds_per_picture']:.2f} s")
    Console(width=90).print(table)


def evaluate(model: Path, work: Path, out: Path, num_concepts: int) -> dict:
    """Measure everything, write the files into `out` and return what `evaluation.json` holds."""
    judge, facts = load_judge(work)
    names = facts.pop("names")
    wanted = sample_concepts(names, num_concepts)
    limit = None if num_concepts >= NUM_CONCEPTS else 4 * num_concepts  # a smoke run measures less of everything
    colours = [colour for colour in BACKGROUNDS if colour != "white"]
    pairs = [(name, colour) for name in wanted[:NUM_BACKGROUND_CONCEPTS] for colour in colours]
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    started = time.monotonic()
    made = generate(pipeline, [with_article(name) for name in wanted], "concepts")
    on_colours = generate(pipeline, [f"{with_article(name)} on a {colour} background" for name, colour in pairs], "backgrounds")
    seconds_per_picture = (time.monotonic() - started) / (len(made) + len(on_colours))
    concepts = {"num": len(wanted)} | measure_concepts(judge, names, wanted, made)
    backgrounds = {"num": len(pairs)} | measure_backgrounds([colour for _, colour in pairs], on_colours)
    backgrounds["concept_top1"] = measure_concepts(judge, names, [name for name, _ in pairs], on_colours)["top1"]
    report = {
        "settings": {"num_steps": NUM_STEPS, "guidance": GUIDANCE, "seconds_per_picture": round(seconds_per_picture, 3)},
        "judge": facts,
        "concepts": concepts | {"wanted": wanted},
        "backgrounds": backgrounds | {"wanted": [list(pair) for pair in pairs]},
        "autoencoder": measure_autoencoder(pipeline.vae, judge, names, work, limit),
        "nearest": measure_nearest(work, names, wanted, made),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(report, indent=1))
    write_sheets(out, wanted, concepts, made)
    right = [seen == colour for seen, (_, colour) in zip(backgrounds["judged"], pairs, strict=True)]
    contact_sheet(on_colours, [f"{name}, {colour}" for name, colour in pairs], len(colours), right).save(out / "backgrounds.png")
    print_table(report)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--out", type=Path, help="default: evaluation/ in the work folder")
    parser.add_argument("--concepts", type=int, default=NUM_CONCEPTS, help="fewer than 200: a smoke run")
    arguments = parser.parse_args()
    evaluate(arguments.model, arguments.work, arguments.out or arguments.work / "evaluation", arguments.concepts)
