"""A small GenEval for the embedded model: two objects, counts, positions, colours, colours on two objects.

After Ghosh et al. (2023), https://arxiv.org/abs/2310.11513. The detector is the judge (`judge.py`, trained on real
pictures only) on the places where the training's scenes have their things; the same questions are put to real scenes
of the same prompts first, drawn by `scenes.py`, so that every figure stands beside the best one that the detector allows.
Pairs are those that `scenes.is_reserved` keeps from the training.
"""

import colorsys
import random
from dataclasses import dataclass

import numpy as np
import torch
from captions import with_article
from judge import JUDGE_PX, Judge
from pictures import CANVAS_PX
from scenes import COLOURS, NUMBERS, Colours, Scene, Scenes, Thing, is_reserved, plain_name, plural
from torch.nn import functional as F

NUM_EACH = 50  # prompts of every task
TOP = 3  # a thing is found where it is among the judge's first so many words of several hundred
CROP_PX = 66  # a place in a scene of two things holds 58 pixels
LAYOUTS = {  # how many things -> centres (down, right) of their places, relative to the middle
    2: ((0, -31), (0, 31)),
    3: ((-30, 0), (30, -30), (30, 30)),
    4: ((-30, -30), (-30, 30), (30, -30), (30, 30)),
}
PAIRS = (((0, -31), (0, 31)), ((0, 31), (0, -31)), ((-31, 0), (31, 0)), ((31, 0), (-31, 0)))  # the first thing's place first
DISTANCE = 0.09  # squared, in RGB: how near a colour word has to be


@dataclass(frozen=True)
class Question:
    """One prompt, and what has to be seen.

    Attributes:
        task: one of `TASKS`.
        prompt: what the model is told.
        names: the things, in the order of the prompt.
        colours: one for each, or None.
        count: of the first thing.
        pairs: the places that are right, for two things.
        scene: a real one of the same description.
    """

    task: str
    prompt: str
    names: tuple[str, ...]
    colours: tuple[str | None, ...]
    count: int
    pairs: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    scene: Scene


TASKS = ("two objects", "counting", "position", "colours", "colour attribution")


def ask(scenes: Scenes, num_each: int = NUM_EACH) -> list[Question]:
    """Return the questions, the same ones for the same pictures."""
    chance, found = random.Random(2310), []
    for task in TASKS:
        for _ in range(num_each):
            found.append(_question(task, scenes, chance))
    return found


def _question(task: str, scenes: Scenes, chance: random.Random) -> Question:
    rows = scenes.pictures.rows
    if task in ("counting", "colours"):
        thing = chance.choice(scenes.coloured if task == "colours" else scenes.countable)
        name = rows[thing]["name"]
        colour = chance.choice(list(COLOURS)) if task == "colours" else None
        count = 1 if colour else chance.choice((2, 3, 4))
        said = with_article(f"{colour} {plain_name(name)}") if colour else f"{NUMBERS[count]} {plural(name)}"
        scene = Scene((Thing(thing, count, colour),), "white", (0, 0))
        return Question(task, said, (name,), (colour,), count, (), scene)
    pool = scenes.coloured if task == "colour attribution" else scenes.countable
    while True:
        things = chance.sample(pool, 2)
        names = tuple(rows[thing]["name"] for thing in things)
        if names[0] != names[1] and is_reserved(*names):
            break
    colours = tuple(chance.sample(list(COLOURS), 2)) if task == "colour attribution" else (None, None)
    said = [with_article(f"{colour} {plain_name(name)}" if colour else name) for name, colour in zip(names, colours, strict=True)]
    relation, place = ("and", chance.choice(((0, -1), (-1, 0))))
    if task == "position":
        relation, place = chance.choice((("left of", (0, -1)), ("right of", (0, 1)), ("above", (-1, 0)), ("below", (1, 0))))
    right = PAIRS if relation == "and" else ((tuple(31 * step for step in place), tuple(-31 * step for step in place)),)
    shown = tuple(Thing(thing, 1, colour) for thing, colour in zip(things, colours, strict=True))
    return Question(
        task, f"{said[0]} {relation} {said[1]}", names, colours, 1, right, Scene(shown, "white", (0, 0), relation, place)
    )


def crop(picture: torch.Tensor, centre: tuple[int, int]) -> torch.Tensor:
    """Cut out a place: (3, 128, 128) to (3, 64, 64), white beyond the edge."""
    reach, middle = CROP_PX // 2, CANVAS_PX // 2
    padded = F.pad(picture, (reach,) * 4, value=1.0)
    top, left = middle + centre[0], middle + centre[1]
    part = padded[:, top : top + CROP_PX, left : left + CROP_PX]
    return F.interpolate(part[None], size=(JUDGE_PX, JUDGE_PX), mode="area")[0]


@torch.no_grad()
def sees(judge: Judge, names: list[str], pictures: list[torch.Tensor], wanted: list[str]) -> list[bool]:
    """Say of each (3, 64, 64) in [-1, 1] whether the wanted name is among the judge's first words."""
    top = judge(torch.stack(pictures)).topk(TOP).indices
    return [names.index(name) in row for name, row in zip(wanted, top.tolist(), strict=True)]


def colour_of(picture: torch.Tensor) -> str | None:
    """Return the colour word of what stands on white in (3, H, W) in [-1, 1]: of its most frequent vivid hue."""
    rgb = ((picture / 2 + 0.5).permute(1, 2, 0).clamp(0, 1).numpy() * 255).astype(np.uint8)
    opaque = (np.abs(rgb.astype(int) - 255).max(-1) > 40).astype(np.uint8) * 255
    dominant, share, saturation, value = Colours._measure(np.concatenate([rgb, opaque[..., None]], -1))
    if share == 0:
        return None
    seen = colorsys.hsv_to_rgb(dominant, saturation, value)
    distance = {
        word: sum((a - b) ** 2 for a, b in zip(colorsys.hsv_to_rgb(h / 360, s, v), seen, strict=True))
        for word, (h, s, v) in COLOURS.items()
    }
    nearest = min(distance, key=distance.__getitem__)
    return nearest if distance[nearest] < DISTANCE else None


def answer(question: Question, picture: torch.Tensor, judge: Judge, names: list[str]) -> bool:
    """Say whether a picture, (3, 128, 128) in [-1, 1], shows what was asked for."""
    whole = F.interpolate(picture[None], size=(JUDGE_PX, JUDGE_PX), mode="area")[0]
    if question.task == "colours":
        return sees(judge, names, [whole], [question.names[0]])[0] and colour_of(picture) == question.colours[0]
    if question.task == "counting":
        return _counts(question, picture, judge, names)
    for first, second in question.pairs:
        parts = [crop(picture, first), crop(picture, second)]
        right = all(sees(judge, names, parts, list(question.names)))
        coloured = all(colour is None or colour_of(part) == colour for part, colour in zip(parts, question.colours, strict=True))
        if right and coloured:
            return True
    return False


def _counts(question: Question, picture: torch.Tensor, judge: Judge, names: list[str]) -> bool:
    """Say whether every place of that many holds the thing, and no place of more does."""
    name = question.names[0]

    def full(count: int) -> bool:
        parts = [crop(picture, centre) for centre in LAYOUTS[count]]
        return all(sees(judge, names, parts, [name] * count))

    return full(question.count) and not any(full(more) for more in range(question.count + 1, 5))


def score(questions: list[Question], pictures: list[torch.Tensor], judge: Judge, names: list[str]) -> dict[str, float]:
    """Return the share of right pictures of each task."""
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    for question, picture in zip(questions, pictures, strict=True):
        right[question.task].append(answer(question, picture, judge, names))
    return {task: round(sum(found) / len(found), 4) for task, found in right.items()}
