"""A subject from 5 pictures: a creature that nobody has seen, under a word that nobody uses, and all else stays.

    python -m imagegen.finetune.examples.subject --out zorp

Writes the LoRA, `sheet.png` (the five pictures; ten that the tuned model makes of the creature; other prompts by
the base model and by the tuned one) and `figures.json`. The creature is drawn by this file.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

import imagegen
from imagegen.finetune.examples.features import Classifier, describe, lines, main, psnr_db, save_sheet
from imagegen.model import Model

WORD = "zorp"
SIZE_PX, SCALE = 128, 4
BACKGROUNDS = {"white": "#ffffff", "yellow": "#ffd84d", "blue": "#4d9fff", "pink": "#ffa6c9", "green": "#7ed957"}
SETTINGS = {"num_steps": 500, "batch_size": 8, "rank": 16, "learning_rate": 1e-3, "ema": 0.98, "layers": "all"}
PRIOR = (
    "a cat face", "a red apple", "a blue car", "a tree", "a fish on a blue background", "a robot", "a green frog",
    "an octopus", "a mushroom", "a flower on a pink background", "a balloon", "an alien", "a purple heart", "a bird",
    "a house", "a cup", "a snowman on a yellow background", "a rocket", "a pumpkin", "a star",
)  # fmt: skip
OTHERS = (
    "a penguin", "a lemon", "a guitar", "a red bus", "a turtle", "a key", "a pizza", "a yellow umbrella",
    "a whale on a white background", "an owl", "a bicycle", "a cactus on a green background", "a clock", "a bee",
    "a strawberry", "a blue hat", "a bell", "a camera", "a butterfly", "a sunflower",
)  # fmt: skip
NUM_RENDERED = 120  # of the creature in other poses, to train and to test the classifier


def draw_creature(chance: random.Random, background: str) -> Image.Image:
    """Draw the creature in a pose of its own: a striped body, three eyes on stalks, two feet; (128, 128) RGB."""
    side = SIZE_PX * SCALE
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[background])
    body = Image.new("RGBA", (side, side))
    pen, middle = ImageDraw.Draw(body), side // 2
    width, height = (round(side * chance.uniform(low, high)) for low, high in ((0.46, 0.56), (0.40, 0.48)))
    top = round(side * 0.42)
    for foot in (-0.25, 0.25):
        across = middle + round(width * foot)
        pen.ellipse((across - 36, top + height - 40, across + 36, top + height + 24), fill="#e0671b")
    pen.ellipse((middle - width // 2, top, middle + width // 2, top + height), fill="#7b3fe4")
    mask = body.getchannel("A").copy()
    stripes = Image.new("RGBA", (side, side))
    for number in range(-3, 4):
        across = middle + round(number * width * 0.24)
        ImageDraw.Draw(stripes).rectangle((across - 14, top + 8, across + 14, top + height - 20), fill="#27e0c0")
    body.paste(stripes, (0, 0), Image.composite(stripes.getchannel("A"), Image.new("L", (side, side)), mask))
    for number in (-1, 0, 1):
        lean = chance.uniform(-20, 20)
        tip, up = middle + number * width * 0.3 + lean, top - side * (0.16 - 0.03 * abs(number))
        pen.line((middle + number * width * 0.2, top + 30, tip, up), fill="#7b3fe4", width=22)
        pen.ellipse((tip - 38, up - 38, tip + 38, up + 38), fill="white", outline="#7b3fe4", width=8)
        look = chance.uniform(0, 2 * math.pi)
        at = (tip + 12 * math.cos(look), up + 12 * math.sin(look))
        pen.ellipse((at[0] - 14, at[1] - 14, at[0] + 14, at[1] + 14), fill="#1b1b1b")
    pen.arc((middle - 60, top + height * 0.45, middle + 60, top + height * 0.75), 20, 160, fill="white", width=14)
    turned = body.rotate(chance.uniform(-14, 14), Image.Resampling.BICUBIC)
    scale = chance.uniform(0.85, 1.0)
    small = turned.resize((round(side * scale),) * 2, Image.Resampling.LANCZOS)
    canvas.paste(small, ((side - small.width) // 2, (side - small.height) // 2), small)
    return canvas.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)


def prompt_of(background: str) -> str:
    """Return the caption of the creature before a background."""
    return f"a {WORD}" if background == "white" else f"a {WORD} on a {background} background"


def write_data(folder: Path) -> list[Image.Image]:
    """Write the five pictures that are all there is to learn from, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, background in enumerate(BACKGROUNDS):
        pictures.append(draw_creature(random.Random(number), background))
        pictures[-1].save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(prompt_of(background))
    return pictures


def train_classifier(model: Model, others: Sequence[Image.Image]) -> tuple[Classifier, float]:
    """Return what tells the creature from other pictures, and its accuracy on pictures that it did not learn from."""
    backgrounds = list(BACKGROUNDS)
    rendered = [draw_creature(random.Random(100 + n), backgrounds[n % len(backgrounds)]) for n in range(NUM_RENDERED)]
    positive, negative = describe(model, rendered), describe(model, others)
    classifier = Classifier(positive[::2], negative[::2])
    right = int((classifier.scores(positive[1::2]) > 0).sum()) + int((classifier.scores(negative[1::2]) < 0).sum())
    return classifier, right / (len(positive[1::2]) + len(negative[1::2]))


def run(model: Model, out: Path, **settings: Any) -> dict[str, Any]:
    """Train, make ten pictures of the creature and twenty of other things, and return the figures."""
    pictures = write_data(out / "data")
    made = imagegen.finetune(
        model, out / "data", out / "lora", resume=True, progress=lines, prior_prompts=PRIOR, prior_pictures=60,
        **{**SETTINGS, **settings},
    )  # fmt: skip
    asked = [(prompt_of(background), seed) for seed in (1, 2) for background in BACKGROUNDS]
    before = [model(prompt, seed=7).images[0] for prompt in OTHERS]
    negatives = [picture for prompt in (*PRIOR, *OTHERS) for picture in model(prompt, seed=20, num_images=3).images]
    model.add_lora(made.weights)
    try:
        creatures = [model(prompt, seed=seed).images[0] for prompt, seed in asked]
        after = [model(prompt, seed=7).images[0] for prompt in OTHERS]
    finally:
        model.remove_loras()
    classifier, accuracy = train_classifier(model, negatives)
    found = int((classifier.scores(describe(model, creatures)) > 0).sum())
    kept = sorted(psnr_db(*pair) for pair in zip(before, after, strict=True))
    save_sheet([[*pictures, *pictures], creatures, before[:10], after[:10]], out / "sheet.png")
    return {
        "training_pictures": len(pictures),
        "subject_in": found,
        "of": len(asked),
        "classifier_accuracy": accuracy,
        "other_prompts": len(kept),
        "other_psnr_median_db": kept[len(kept) // 2],
        "other_psnr_worst_db": kept[0],
    }


if __name__ == "__main__":
    main(run, __doc__)
