"""Measure the model as it is shipped: plain diffusers, fp32, on the CPU; nothing of the recipe makes the pictures.

What is measured, each by its own function:

- concepts: does the judge (`judge.py`) recognise `a NAME`, one picture of each of 400 fixed concepts;
- backgrounds: is the border of `a NAME on a COLOUR background` nearest to COLOUR;
- autoencoder: PSNR of real pictures that it never saw, and whether the judge still recognises them;
- paraphrases: does the judge recognise what `paraphrases.txt` describes in words that no caption of it holds;
- styles: is the real drawing of the concept that the picture is nearest to the one in the style asked for;
- compositions: two objects, counts, positions, colours, by `geneval.py`;
- fréchet: distance of the made pictures' features from those of Twemoji's, with other real pictures as the yardstick;
- nearest: how far the pictures are from the nearest training picture, with real unseen pictures as the yardstick.

Writes `evaluation.json`, labelled contact sheets (a red label: the judge said something else) and a sheet
of numbered pictures for people to name, `blind.png`, whose answers lie in `blind_key.json`. Needs the
work folder with the drawn pictures and the trained judge.
"""

import argparse
import itertools
import json
import random
import re
import time
from pathlib import Path

import torch
from build_data import default_work
from captions import descriptions, telling_tags, with_article
from diffusers import DiffusionPipeline
from geneval import ask, score
from judge import Judge, accuracy, judge_pictures, load_judge, unseen_pictures
from pictures import BACKGROUNDS, CANVAS_PX, Pictures, psnr_db
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scenes import Colours, Scenes
from sheets import contact_sheet, write_sheets
from torch.nn import functional as F

NUM_CONCEPTS = 400
NUM_STYLE_CONCEPTS = 25
FUNCTION_WORDS = re.compile(r"an?|the|of|for|in|on|to|with|and|that|by|it|its|at|up|from|into|like|one|when|what|off|out")
NUM_BACKGROUND_CONCEPTS = 5
NUM_STEPS = 20
GUIDANCE = 4.0
BATCH = 10
BORDER_PX = 3  # inside the margin that every training picture leaves free
SMALL_PX = 32  # where distances to training pictures are taken
STYLES = ("fluent", "flat", "noto", "blob")
MIN_STYLE_RMS = 0.08  # between the drawings of a concept whose style is asked for: some sets draw some things alike
SHIFT_PX = 3  # training pictures were drawn so far off the centre: a copy may be, too


def sample_concepts(names: list[str], num_concepts: int) -> list[str]:
    """Return the first `num_concepts` of the fixed sample of 400 concepts."""
    return random.Random(0).sample(sorted(names), min(NUM_CONCEPTS, len(names)))[:num_concepts]


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


def distances_rms(canvases: torch.Tensor, gallery: torch.Tensor, shift_px: int, description: str) -> torch.Tensor:
    """Return each canvas's distance to every picture of the gallery, the best over all shifts of the canvas.

    Args:
        canvases: (B, 3, 128, 128) float32 in [-1, 1].
        gallery: (N, 3072), what `small` returned.
        shift_px: how far to shift both ways, pixel by pixel; 0 compares in place.
        description: what the progress says.

    Returns:
        (B, N) root mean square over pixels at 32x32, in [0, 1].
    """
    best = torch.full((len(canvases), len(gallery)), torch.inf)
    padded = F.pad(canvases, (shift_px,) * 4, "replicate")
    for top, left in track(list(itertools.product(range(2 * shift_px + 1), repeat=2)), description=description):
        queries = small(padded[:, :, top : top + CANVAS_PX, left : left + CANVAS_PX])
        best = best.minimum(torch.cdist(queries, gallery))
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
        nearest = distances_rms(queries, gallery, shift_px, f"nearest, {shift_px} px").min(1).values
        made, twemoji = nearest.split([len(pictures), int(asked.sum())])
        for source, found in (("made", made), ("twemoji", twemoji)):
            figures[f"{source}_{place}"] = {"median": round(found.median().item(), 4), "minimum": round(found.min().item(), 4)}
    return figures


def read_paraphrases(rows: list[dict]) -> list[tuple[str, str]]:
    """Return the prompts of `paraphrases.txt` with their concepts.

    Args:
        rows: of the training's pictures.

    Raises:
        SystemExit: a prompt holds a word that captions of its concept hold.
    """
    lines = (Path(__file__).parent / "paraphrases.txt").read_text().splitlines()
    pairs = [tuple(part.strip() for part in line.split("=")) for line in lines if line and not line.startswith("#")]
    words = {row["name"]: set() for row in rows}
    for row in rows:
        words[row["name"]] |= words_of(" ".join([row["name"], row["label"], *row["tags"], *descriptions().get(row["name"], ())]))
    for prompt, name in pairs:
        common = words_of(prompt) & words.get(name, set())
        if common:
            raise SystemExit(f"paraphrases.txt: {prompt!r} says {', '.join(sorted(common))}, as captions of {name!r} do")
    return [(prompt, name) for prompt, name in pairs if name in words]


def words_of(text: str) -> set[str]:
    """Return the words of a text in small letters, those left out that only hold it together."""
    return {word for word in re.findall(r"[a-z]+", text.lower()) if not FUNCTION_WORDS.fullmatch(word)}


def measure_paraphrases(work: Path, judge: Judge, names: list[str], pipeline: DiffusionPipeline, limit: int | None) -> dict:
    """Judge one picture of every paraphrase."""
    pairs = read_paraphrases(Pictures(work, ("concept",)).rows)[:limit]
    made = generate(pipeline, [prompt for prompt, _ in pairs], "paraphrases")
    return {"num": len(pairs)} | measure_concepts(judge, names, [name for _, name in pairs], made)


def measure_styles(work: Path, pipeline: DiffusionPipeline, wanted: list[str], limit: int | None) -> dict:
    """Say how often a picture is nearest to the real drawing, among a concept's, in the style asked for.

    Only concepts that every set draws in a way of its own are asked for. `real` is the same for the drawings
    themselves, off their place and through the autoencoder.
    """
    pictures = Pictures(work, ("concept",))
    index_of = {(row["name"], row["set"]): index for index, row in enumerate(pictures.rows)}
    drawn = {
        name: torch.stack([pictures.canvas(index_of[name, style]) for style in STYLES])
        for name in wanted
        if all((name, style) in index_of for style in STYLES)
    }
    asked = [name for name, canvases in drawn.items() if are_apart(canvases)][:NUM_STYLE_CONCEPTS][:limit]
    prompts = [f"{with_article(name)}, {style} style" for name in asked for style in STYLES]
    made = to_unit(generate(pipeline, prompts, "styles"))
    moved = [pictures.canvas(index_of[name, style], shift=(2, -1)) for name in asked for style in STYLES]
    real = through_autoencoder(pipeline.vae, torch.stack(moved), "styles, real drawings")
    gallery = small(torch.cat([drawn[name] for name in asked]))
    own = torch.arange(len(asked)).repeat_interleave(len(STYLES))  # whose drawings are looked at: the picture's own concept's
    figures: dict[str, float] = {}
    for source, canvases in (("accuracy", made), ("real", real)):
        apart = distances_rms(canvases, gallery, SHIFT_PX, f"styles, {source}")
        apart[own[:, None] != own[None]] = torch.inf
        figures[source] = round((apart.argmin(1) == torch.arange(len(canvases))).float().mean().item(), 4)
    return {"num": len(prompts)} | figures


def are_apart(canvases: torch.Tensor) -> bool:
    """Say whether drawings, (B, 3, 128, 128) in [-1, 1], all differ by more than `MIN_STYLE_RMS`."""
    shown = small(canvases)
    return bool(F.pdist(shown).min() / shown.shape[1] ** 0.5 > MIN_STYLE_RMS)


def measure_compositions(work: Path, judge: Judge, names: list[str], pipeline: DiffusionPipeline, limit: int | None) -> dict:
    """Return the share of right pictures of every task, of the model's and of real scenes of the same prompts."""
    pictures = Pictures(work, ("concept",))
    scenes = Scenes(pictures, Colours(pictures), telling_tags(pictures.rows))
    questions = ask(scenes)[:: 1 if limit is None else 25]
    made = to_unit(generate(pipeline, [question.prompt for question in questions], "compositions"))
    real = [scenes.paint(question.scene) for question in questions]
    found = {"made": score(questions, list(made), judge, names), "real": score(questions, real, judge, names)}
    return found | {"num": len(questions)}


@torch.no_grad()
def frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the Fréchet distance of two sets of features, (N, D), as Gaussians.

    Source: Heusel et al. (2017), https://arxiv.org/abs/1706.08500, equation 6; the trace of the root of a product of
    covariances is the sum of the roots of its eigenvalues.
    """
    first, second = first.double(), second.double()
    roots = torch.linalg.eigvals(first.T.cov() @ second.T.cov()).real.clamp(min=0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return float(means + first.T.cov().trace() + second.T.cov().trace() - 2 * roots)


def measure_frechet(work: Path, judge: Judge, names: list[str], made: torch.Tensor) -> dict:
    """Compare the judge's features of made pictures, (B, 3, 128, 128) uint8, with those of Twemoji's of the same concepts."""
    unseen, _ = unseen_pictures(work, names)
    training = Pictures(work, ("concept",))
    ours = [index for index, row in enumerate(training.rows) if row["set"] == "fluent"]
    sets = {"made": to_unit(made), "fluent": torch.stack([training.canvas(index) for index in ours])}
    target = features_of(judge, unseen)
    return {name: round(frechet(features_of(judge, pictures), target), 3) for name, pictures in sets.items()}


@torch.no_grad()
def features_of(judge: Judge, canvases: torch.Tensor) -> torch.Tensor:
    """Return what the judge's last layer sees of canvases (B, 3, 128, 128) in [-1, 1]: (B, 256)."""
    return torch.cat([judge.features(F.avg_pool2d(part, 2)) for part in canvases.split(64)])


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
    table.add_row(f"paraphrases, {report['paraphrases']['num']}", f"top-5 {report['paraphrases']['top5']:.1%}")
    styles = report["styles"]
    table.add_row(f"style obeyed, {styles['num']}", f"{styles['accuracy']:.1%} (real drawings {styles['real']:.1%})")
    for task, share in report["compositions"]["made"].items():
        table.add_row(task, f"{share:.1%} (real scenes {report['compositions']['real'][task]:.1%})")
    frechet = report["frechet"]
    table.add_row("Fréchet distance from Twemoji", f"{frechet['made']:.2f} (Fluent's {frechet['fluent']:.2f})")
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
        "paraphrases": measure_paraphrases(work, judge, names, pipeline, limit),
        "styles": measure_styles(work, pipeline, wanted, limit),
        "compositions": measure_compositions(work, judge, names, pipeline, limit),
        "frechet": measure_frechet(work, judge, names, made),
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
    parser.add_argument("--concepts", type=int, default=NUM_CONCEPTS, help="fewer than 400: a smoke run")
    arguments = parser.parse_args()
    evaluate(arguments.model, arguments.work, arguments.out or arguments.work / "evaluation", arguments.concepts)
