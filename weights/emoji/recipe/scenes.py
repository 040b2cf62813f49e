"""What the denoiser learns from: things on a plain canvas, and captions that say exactly what is there.

A scene is one thing, the same thing two to four times, or two (groups of) things beside or above each
other, some of them in another colour than their own, all from the drawn pictures. Knows nothing of
models. Every choice comes from the `random.Random` that is handed in.

One pair of concepts in ten is left to the evaluation: `is_reserved` says which, and no scene shows them.
"""

import colorsys
import hashlib
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from captions import caption, dress, on_background, with_article
from pictures import BACKGROUNDS, CANVAS_PX, Pictures
from torch.nn import functional as F

# name -> hue in degrees, mean saturation and mean value of a thing that is called so.
COLOURS = {
    "red": (357, 0.80, 0.86),
    "orange": (28, 0.85, 0.95),
    "yellow": (50, 0.78, 0.97),
    "green": (125, 0.65, 0.68),
    "blue": (212, 0.72, 0.86),
    "purple": (275, 0.60, 0.72),
    "pink": (332, 0.45, 0.96),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = {  # relation -> (down, right): where the first thing stands
    "left of": (0, -1),
    "to the left of": (0, -1),
    "right of": (0, 1),
    "to the right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
    "and": None,  # as one reads: the first on the left, above where there are several
    "next to": None,
}
KINDS = {"single": 0.5, "coloured": 0.1, "count": 0.06, "pair": 0.31, "group": 0.03}  # shares of the scenes
DEFAULT_STYLE = "fluent"  # what is drawn where a caption says nothing of style: one way to draw a thing, not five
STYLES = {"fluent": 0.6, "flat": 0.12, "noto": 0.13, "blob": 0.11, "fx": 0.04}  # shares of the single things
OTHER_STYLE_SHARE = 0.15  # of all other scenes
MAX_SHIFT_PX = 3
SAID_SHARE = 0.15  # of the scenes in the default style say so
RESERVED_SHARE = 10  # one pair of concepts in so many
MIN_DOMINANCE = 0.6  # of a picture's opaque area that must have nearly one hue for it to be recoloured
HUE_REACH = 0.09  # of the circle: what counts as that hue, both ways


@dataclass(frozen=True)
class Thing:
    """One picture, how often it is there, and the colour it was given, if any."""

    picture: int
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """Things on a background; with two things `down`, `right` say where the first one stands.

    Attributes:
        things: one or two.
        relation: a key of `RELATIONS`; None with one thing.
        place: (down, right) of the first thing: -1, 0 or 1.
        background: a key of `pictures.BACKGROUNDS`.
        shift: pixels (down, right) that the whole is off its place.
        style: the word that a caption has to say; None: the default, unsaid.
    """

    things: tuple[Thing, ...]
    background: str
    shift: tuple[int, int]
    relation: str | None = None
    place: tuple[int, int] = (0, 0)
    style: str | None = None


def is_reserved(one: str, other: str) -> bool:
    """Say whether a pair of concepts belongs to the evaluation, in whichever order."""
    pair = "|".join(sorted((one, other)))
    return int(hashlib.sha256(pair.encode()).hexdigest(), 16) % RESERVED_SHARE == 0


def plain_name(name: str) -> str:
    """Return a name without a colour in front: `red apple` -> `apple`."""
    first, _, rest = name.partition(" ")
    return rest if rest and first in COLOURS else name


def is_countable(name: str) -> bool:
    """Say whether a name can stand in the plural by changing its last word, and is short enough for two."""
    words = name.split()
    return len(words) <= 2 and not {"of", "with", "and", "in", "on"} & set(words) and with_article(name) != name


def plural(name: str) -> str:
    """Return the plural of a countable name."""
    irregular = {"mouse": "mice", "tooth": "teeth", "foot": "feet", "goose": "geese", "ox": "oxen", "octopus": "octopuses"}
    irregular |= dict.fromkeys(("fish", "sheep", "deer", "squid", "shrimp", "jeans"))
    *before, last = name.split(" ")
    if last in irregular:
        last = irregular[last] or last
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    elif last.endswith(("leaf", "wolf", "knife", "loaf")):
        last = last.rstrip("e")[:-1] + "ves"
    else:
        last += "s"
    return " ".join([*before, last])


class Colours:
    """Which pictures have one dominant hue, and how they look in another colour."""

    def __init__(self, pictures: Pictures):
        """Measure every picture once: dominant hue, its share, mean saturation and value."""
        self.pictures = pictures
        facts = [self._measure(rgba.numpy()) for rgba in pictures.rgba]
        self.hue, share, self.saturation, self.value = (np.array(column) for column in zip(*facts, strict=True))
        self.can_change = [index for index, amount in enumerate(share) if amount >= MIN_DOMINANCE]

    @staticmethod
    def _measure(rgba: np.ndarray) -> tuple[float, float, float, float]:
        hue, saturation, value = _to_hsv(rgba[::2, ::2, :3])
        opaque = rgba[::2, ::2, 3] > 128
        vivid = opaque & (saturation > 0.3) & (value > 0.2)
        if not vivid.any():
            return 0.0, 0.0, 0.0, 0.0
        counts, edges = np.histogram(hue[vivid], bins=36, range=(0, 1))
        around = counts + np.roll(counts, 1) + np.roll(counts, -1)
        dominant = edges[around.argmax()] + 1 / 72
        near = vivid & (_turn(hue, dominant) < HUE_REACH)
        return float(dominant), near.sum() / opaque.sum(), float(saturation[near].mean()), float(value[near].mean())

    def own(self, picture: int) -> str | None:
        """Return the colour word of a picture with one hue, where one of the words is near."""
        if picture not in self.can_change:
            return None
        h, s, v = colorsys.hsv_to_rgb(self.hue[picture], self.saturation[picture], self.value[picture])
        distance = {
            name: sum((a - b) ** 2 for a, b in zip(colorsys.hsv_to_rgb(hue / 360, sat, val), (h, s, v), strict=True))
            for name, (hue, sat, val) in COLOURS.items()
        }
        nearest = min(distance, key=distance.__getitem__)
        return nearest if distance[nearest] < 0.08 else None

    def change(self, picture: int, colour: str) -> torch.Tensor:
        """Return a picture with its dominant hue turned into a colour: (112, 112, 4) uint8."""
        rgba = self.pictures.rgba[picture].numpy()
        hue, saturation, value = _to_hsv(rgba[..., :3])
        near = (saturation > 0.15) & (_turn(hue, self.hue[picture]) < HUE_REACH * 1.5)
        wanted_hue, wanted_saturation, wanted_value = COLOURS[colour]
        offset = (hue - self.hue[picture] + 0.5) % 1 - 0.5
        turned = (wanted_hue / 360 + 0.5 * offset) % 1
        scaled = np.clip(saturation * wanted_saturation / self.saturation[picture], 0, 1)
        lit = np.clip(value * wanted_value / self.value[picture], 0, 1)
        changed = _from_hsv(turned, scaled, lit)
        rgb = np.where(near[..., None], changed, rgba[..., :3])
        return torch.from_numpy(np.concatenate([rgb, rgba[..., 3:]], -1))


def _turn(hue: np.ndarray, other: float) -> np.ndarray:
    """Return how far hues are apart on the circle, 0 to 0.5."""
    apart = np.abs(hue - other)
    return np.minimum(apart, 1 - apart)


def _to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Convert (..., 3) uint8 to hue, saturation and value in [0, 1].

    Source: Smith (1978), https://doi.org/10.1145/965139.807361.
    """
    colour = rgb.astype(np.float32) / 255
    value, least = colour.max(-1), colour.min(-1)
    spread = np.maximum(value - least, 1e-6)
    r, g, b = (colour[..., channel] for channel in range(3))
    sextant = np.where(value == r, (g - b) / spread % 6, np.where(value == g, (b - r) / spread + 2, (r - g) / spread + 4))
    hue = np.where(value - least < 1e-6, 0, sextant / 6)
    return hue, (value - least) / np.maximum(value, 1e-6), value


def _from_hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Convert back: (...) in [0, 1] to (..., 3) uint8."""
    channels = []
    for number in (5, 3, 1):
        k = (number + hue * 6) % 6
        channels.append(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return (np.stack(channels, -1) * 255).round().astype(np.uint8)


class Scenes:
    """Draws scenes at random, and what they look like and are called."""

    def __init__(
        self, pictures: Pictures, colours: Colours, telling: dict[str, list[str]], described: dict[str, list[str]] | None = None
    ):
        """Take the pictures of the concepts, their colours, `captions.telling_tags`, and the descriptions to say."""
        self.pictures, self.colours, self.telling, self.described = pictures, colours, telling, described or {}
        self.of_style = {style: [index for index, row in enumerate(pictures.rows) if row["set"] == style] for style in STYLES}
        self.countable = [index for index, row in enumerate(pictures.rows) if is_countable(row["name"])]
        changeable = set(colours.can_change)
        self.coloured = [index for index in self.countable if index in changeable]
        self.coloured_of = {style: self._changeable_of(style) for style in STYLES}

    def _changeable_of(self, style: str) -> list[int]:
        """Return one picture to recolour of every name that has one, in the style where it can be had."""
        best: dict[str, int] = {}
        for index in self.coloured:
            row = self.pictures.rows[index]
            if row["name"] not in best or row["set"] == style:
                best[row["name"]] = index
        return list(best.values())

    def draw(self, chance: random.Random) -> Scene:
        """Return a scene."""
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        style = DEFAULT_STYLE
        if kind == "single" or chance.random() < OTHER_STYLE_SHARE:
            style = chance.choices(list(STYLES), list(STYLES.values()))[0]
        background = "white" if chance.random() < 0.6 else chance.choice([name for name in BACKGROUNDS if name != "white"])
        scene = Scene((), background, (chance.randint(-MAX_SHIFT_PX, MAX_SHIFT_PX), chance.randint(-MAX_SHIFT_PX, MAX_SHIFT_PX)))
        if style != DEFAULT_STYLE or chance.random() < SAID_SHARE:
            scene = replace(scene, style=style)
        if kind == "single":
            return replace(scene, things=(Thing(chance.choice(self.of_style[style])),))
        if kind == "coloured":
            return replace(scene, things=(self._coloured(style, background, chance),))
        if kind == "count":
            return replace(scene, things=(replace(self._any(style, background, chance), count=chance.choice((2, 3, 4))),))
        while True:
            one, other = self._any(style, background, chance), self._any(style, background, chance)
            names = [self.pictures.rows[thing.picture]["name"] for thing in (one, other)]
            if names[0] != names[1] and not is_reserved(*names):
                break
        if kind == "group":
            one = replace(one, count=chance.choice((2, 3)))
        relation = chance.choice([name for name in RELATIONS if kind == "pair" or RELATIONS[name] in ((-1, 0), (1, 0), None)])
        default = (0, -1) if kind == "pair" else (-1, 0)
        return replace(scene, things=(one, other), relation=relation, place=RELATIONS[relation] or default)

    def _coloured(self, style: str, background: str, chance: random.Random) -> Thing:
        things = self.coloured_of[style]
        return Thing(chance.choice(things), colour=chance.choice([name for name in COLOURS if name != background]))

    def _any(self, style: str, background: str, chance: random.Random) -> Thing:
        if chance.random() < 0.6:
            return self._coloured(style, background, chance)
        while True:
            thing = chance.choice(self.of_style[style])
            if is_countable(self.pictures.rows[thing]["name"]):
                return Thing(thing)

    def paint(self, scene: Scene) -> torch.Tensor:
        """Return what a scene looks like: (3, 128, 128) float32 in [-1, 1]."""
        colour = torch.tensor(BACKGROUNDS[scene.background]).float()[:, None, None] / 255
        canvas = colour.expand(3, CANVAS_PX, CANVAS_PX).clone()
        middle = CANVAS_PX // 2
        for number, thing in enumerate(scene.things):
            sign = 1 if number == 0 else -1
            down, right = (sign * 31 * step for step in scene.place)
            for top, left, size in _places(thing.count, len(scene.things) == 2):
                self._paste(canvas, thing, middle + down + top + scene.shift[0], middle + right + left + scene.shift[1], size)
        return canvas * 2 - 1

    def _paste(self, canvas: torch.Tensor, thing: Thing, centre_y: int, centre_x: int, size: int) -> None:
        rgba = self.colours.change(thing.picture, thing.colour) if thing.colour else self.pictures.rgba[thing.picture]
        icon = rgba.permute(2, 0, 1).float() / 255
        icon = torch.cat([icon[:3] * icon[3:], icon[3:]])  # premultiplied, so that nothing bleeds from where it is clear
        if icon.shape[-1] != size:
            icon = F.interpolate(icon[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0]
        top, left = centre_y - size // 2, centre_x - size // 2
        place = canvas[:, max(top, 0) : top + size, max(left, 0) : left + size]
        icon = icon[:, max(-top, 0) :, max(-left, 0) :][:, : place.shape[1], : place.shape[2]]
        place.mul_(1 - icon[3:]).add_(icon[:3])

    def describe(self, scene: Scene, chance: random.Random) -> str:
        """Return a caption: what is there, and nothing else."""
        return self.describe_parts(scene, chance)[0]

    def describe_parts(self, scene: Scene, chance: random.Random) -> tuple[str, list[str]]:
        """Return a caption and the part of it that speaks of each thing; of a single thing the whole does."""
        if len(scene.things) == 1 and scene.things[0] == Thing(scene.things[0].picture):
            picture = scene.things[0].picture
            own = self.colours.own(picture)
            row = self.pictures.rows[picture]
            if own and is_countable(row["name"]) and chance.random() < 0.15:
                row = row | {"name": f"{own} {plain_name(row['name'])}", "tags": []}
                text = caption(row, scene.background, {row["name"]: []}, self.described, scene.style, chance)
            else:
                text = caption(row, scene.background, self.telling, self.described, scene.style, chance)
            return text, [text]
        said = [self._say(thing, chance) for thing in scene.things]
        text = said[0] if scene.relation is None else f"{said[0]} {scene.relation} {said[1]}"
        text = dress(text, chance)
        text = on_background(f"{text}, {scene.style} style" if scene.style else text, scene.background, chance)
        return text, said if len(said) > 1 else [text]

    def _say(self, thing: Thing, chance: random.Random) -> str:
        name = self.pictures.rows[thing.picture]["name"]
        colour = thing.colour
        if colour is None and chance.random() < 0.4:
            colour = self.colours.own(thing.picture)
        if colour:
            name = f"{colour} {plain_name(name)}"
        return with_article(name) if thing.count == 1 else f"{NUMBERS[thing.count]} {plural(name)}"


def _places(count: int, crowded: bool) -> list[tuple[int, int, int]]:
    """Return (down, right, size) of every copy, relative to the middle of its place, in pixels."""
    if count == 1:
        return [(0, 0, 58 if crowded else 112)]
    if crowded:
        size = {2: 52, 3: 40}[count]
        return [(0, round((number - (count - 1) / 2) * (size + 2)), size) for number in range(count)]
    if count == 2:
        return [(0, -31, 58), (0, 31, 58)]
    corners = [(-30, -30, 56), (-30, 30, 56), (30, -30, 56), (30, 30, 56)]
    return corners if count == 4 else [(-30, 0, 56), (30, -30, 56), (30, 30, 56)]
