"""Flags at the end of a prompt, for those used to them: `a fox --ar 3:2 --seed 7 --no text`. Knows nothing of models."""

import difflib
import re
from collections.abc import Callable
from typing import Any

from imagegen.canvas import size_in_shape
from imagegen.catalog import Family
from imagegen.request import RequestError

FLAGS = {
    "ar": "width:height, as in --ar 3:2",
    "size": "pixels, as in --size 128x96",
    "seed": "a whole number, as in --seed 7",
    "num": "how many pictures, as in --num 4",
    "steps": "a whole number, as in --steps 20",
    "cfg": "the guidance, as in --cfg 4.5",
    "no": "what to steer away from, as in --no text",
}
START = re.compile(r"(?:^|(?<=\s))(?:--|—|–)(?=[A-Za-z])")
SHAPE = re.compile(r"(\d{1,4}(?:\.\d+)?)[:x/](\d{1,4}(?:\.\d+)?)")
MAX_SHAPE = 8  # times longer than wide


def read_flags(text: str, family: Family) -> tuple[str, dict[str, Any]]:
    """Take the flags off a prompt.

    Args:
        text: what was typed; a long dash counts as two short ones, since telephones write it so.
        family: whose sizes `--ar` chooses from.

    Returns:
        The prompt without them, and the settings they stand for, by the names of `Model.generate`.

    Raises:
        RequestError: a flag is unknown, given twice, or its value is of the wrong kind.
    """
    prompt, *rest = START.split(text)
    settings: dict[str, Any] = {}
    seen: set[str] = set()
    for piece in rest:
        name, _, value = piece.strip().partition(" ")
        name, value = name.lower(), value.strip()
        if name not in FLAGS:
            near = difflib.get_close_matches(name, FLAGS, n=1)
            hint = f"did you mean --{near[0]}?" if near else f"there are {', '.join(f'--{flag}' for flag in FLAGS)}"
            raise RequestError(f"unknown flag --{name}: {hint}")
        if name in seen:
            raise RequestError(f"--{name} is given twice: give it once")
        seen.add(name)
        if not value:
            raise RequestError(f"--{name} needs a value: {FLAGS[name]}")
        settings |= READERS[name](value, family)
    if {"ar", "size"} <= seen:
        raise RequestError("--ar and --size both say the size: give one of them")
    return prompt.strip(), settings


def flags_of(text: str) -> str:
    """Return the flags at the end of a prompt as they were typed, or nothing."""
    start = START.search(text)
    return text[start.start() :].strip() if start else ""


def without_flags(text: str) -> str:
    """Return a text in which nothing reads as a flag: what others wrote asks for nothing."""
    return START.sub("", text).strip()


def size_of_shape(shape: str, family: Family) -> tuple[int, int]:
    """Return the width and height, in a family's multiples and about its number of pixels, of a shape such as `3:2`.

    Raises:
        RequestError: it is no shape, or too long for the family.
    """
    found = SHAPE.fullmatch(shape.strip())
    across, down = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    if not across or not down or max(across, down) > MAX_SHAPE * min(across, down):
        limit = f"two numbers, one at most {MAX_SHAPE} times the other"
        raise RequestError(f"--ar must be {limit}, as in 3:2, got {shape!r}")
    if family.min_px == family.max_px and across != down:
        raise RequestError(f"{family.name} makes square pictures of {family.size_px} pixels only, got --ar {shape}: leave it out")
    side, step = family.size_px, family.multiple_px
    width, height = size_in_shape((round(across * 1000), round(down * 1000)), family.min_px, family.max_px, step, side**2)
    if min(width, height) < family.min_px:
        raise RequestError(
            f"{shape} would become {width}x{height}, and sides are from {family.min_px} here: take a squarer shape"
        )
    return width, height


def _of_shape(value: str, family: Family) -> dict[str, Any]:
    return dict(zip(("width", "height"), size_of_shape(value, family), strict=True))


def _of_size(value: str, _: Family) -> dict[str, Any]:
    found = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", value)
    if not found:
        raise RequestError(f"--size must be width x height in pixels, as in 128x96, got {value!r}")
    return {"width": int(found[1]), "height": int(found[2])}


def _whole(flag: str, setting: str) -> Callable[[str, Family], dict[str, Any]]:
    def read(value: str, _: Family) -> dict[str, Any]:
        if not re.fullmatch(r"\d{1,18}", value):
            raise RequestError(f"--{flag} must be a whole number, got {value!r}")
        return {setting: int(value)}

    return read


def _of_guidance(value: str, _: Family) -> dict[str, Any]:
    if not re.fullmatch(r"\d{1,4}(\.\d+)?", value):
        raise RequestError(f"--cfg must be a number from 1 (off), got {value!r}")
    return {"guidance": float(value)}


READERS: dict[str, Callable[[str, Family], dict[str, Any]]] = {
    "ar": _of_shape,
    "size": _of_size,
    "seed": _whole("seed", "seed"),
    "num": _whole("num", "num_images"),
    "steps": _whole("steps", "num_steps"),
    "cfg": _of_guidance,
    "no": lambda value, _: {"negative_prompt": value},
}
