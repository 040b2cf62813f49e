"""What a user asks for, and what is wrong with it: plain data, checked before any model runs.

Knows nothing of torch or diffusers; what a model can make arrives as a `catalog.Family`.
"""

import difflib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.canvas import other_side, size_in_shape, to_grey, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

    from imagegen.catalog import Family

MAX_SEED = 2**53  # seeds pass through JSON, where integers are exact up to here
MAX_PICTURES = 64
MAX_STEPS = 1000
MAX_EDITED_SHAPE = 8  # times longer than wide: what the pipelines that edit take


class Error(ValueError):
    """Everything that a user can get wrong: says what, which value, and what to do."""


class RequestError(Error):
    """The request cannot be made: a bad prompt, size, seed, picture or keyword."""


class ModelError(Error):
    """The model cannot be loaded or is not what its files say."""


class PlanError(Error):
    """The speed plan is unknown or cannot engage."""


class DataError(Error):
    """Training or reference data is missing or broken."""


class ReceiptError(Error):
    """The picture carries no receipt, or one that cannot be read."""


@dataclass(frozen=True)
class Request:
    """One call: a prompt and everything that decides its pictures.

    Attributes:
        prompt: what to draw; not empty.
        negative_prompt: what to steer away from; needs `guidance` above 1.
        seed: seed of the first picture; picture *i* has `seed + i`.
        num_images: pictures to make, 1 to 64.
        num_steps: denoising steps, 1 to 1000.
        guidance: classifier-free guidance; 1 is off and then not computed.
        width: pixels, a multiple of the family's `multiple_px`.
        height: pixels, likewise.
        scheduler: a name from `sampling.SCHEDULERS`, or None for the model's own.
        image: the picture to start from (RGB), or None.
        strength: how much of `image` is repainted, above 0 up to 1; None without `image`.
        mask: where to repaint (white, L), or None.
        margins: pixels by which `image` grows to the left, right, top and bottom, or None.
        control: the picture whose structure a ControlNet follows (RGB), or None.
        control_weight: how closely, above 0 to 2; None without `control`.
        style_image: the picture whose style an IP-Adapter follows (RGB), or None.
        style_weight: how closely, above 0 to 2; None without `style_image`.
        long_prompt: read a prompt longer than the text encoder takes to its end, in pieces.
        true_guidance: guidance in two passes, on top of a `guidance` that is an input of the denoiser, or None.
        temperature: of models that draw one token after the other, 0 taking the most likely; else None.
    """

    prompt: str
    negative_prompt: str
    seed: int
    num_images: int
    num_steps: int
    guidance: float
    width: int
    height: int
    scheduler: str | None = None
    image: "Image | None" = None
    strength: float | None = None
    mask: "Image | None" = None
    margins: tuple[int, int, int, int] | None = None
    true_guidance: float | None = None
    control: "Image | None" = None
    control_weight: float | None = None
    style_image: "Image | None" = None
    style_weight: float | None = None
    long_prompt: bool = False
    temperature: float | None = None

    @property
    def mode(self) -> str:
        """`text-to-image`, `image-to-image`, `inpainting`, `outpainting` or `editing`."""
        return _mode(self.image, self.margins, self.mask, self.strength)

    def of_picture(self, index: int) -> "Request":
        """Return the request that makes picture `index` alone: its own seed, one image."""
        return replace(self, seed=self.seed + index, num_images=1)

    def settings(self) -> dict[str, Any]:
        """Return the request as JSON-ready data, pictures left out (receipts name them by hash)."""
        return {name: value for name, value in vars(self).items() if name not in PICTURES}


PICTURES = ("image", "mask", "control", "style_image")
SETTINGS = tuple(field.name for field in fields(Request) if field.name not in ("prompt", *PICTURES))  # what a receipt holds
KEYWORDS = (*SETTINGS, *PICTURES, "noise")
SIDES = ("width", "height")
# What other libraries call these.
FOREIGN_NAMES = {
    "num_inference_steps": "num_steps",
    "steps": "num_steps",
    "sampling_steps": "num_steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "cfg": "guidance",
    "true_cfg_scale": "guidance (true_guidance where guidance is an input of the model)",
    "num_images_per_prompt": "num_images",
    "batch_size": "num_images",
    "n": "num_images",
    "generator": "seed",
    "latents": "noise",
    "negative": "negative_prompt",
    "init_image": "image",
    "mask_image": "mask",
    "denoising_strength": "strength",
    "sampler": "scheduler",
    "size": "width and height",
}


def check_keywords(given: Mapping[str, object]) -> None:
    """Refuse keywords that do not exist, naming the right one.

    Raises:
        RequestError: a keyword is unknown.
    """
    for name in given:
        if name in KEYWORDS:
            continue
        if name in FOREIGN_NAMES:
            raise RequestError(f"unknown setting {name!r}: it is {FOREIGN_NAMES[name]} here")
        near = difflib.get_close_matches(name, KEYWORDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(KEYWORDS)}"
        raise RequestError(f"unknown setting {name!r}: {hint}")


def build_request(prompt: str, family: "Family", given: Mapping[str, Any]) -> Request:
    """Fill in the family's defaults, check every value and return the request.

    Args:
        prompt: what to draw.
        family: what the model can make and what it does by default.
        given: what the user set; None stands for the default. `noise` is not looked at here.

    Raises:
        RequestError: a value is wrong; the message says which and what to do.
    """
    check_keywords(given)
    _check_fixed(family, given)
    values = {name: value for name, value in given.items() if value is not None and name != "noise"}
    image, mask, control, style = (open_picture(name, values.pop(name, None)) for name in PICTURES)
    if mask is not None and image is None:
        raise RequestError("mask needs image: pass the picture to repaint as image=")
    margins = _margins(values.get("margins"), image, mask)
    num_images = _whole("num_images", values.get("num_images", 1), 1, MAX_PICTURES)
    seed = values.get("seed")
    if seed is None:
        seed = secrets.randbelow(2**32)
    strength = _strength(values.get("strength"), image, mask or margins, family)
    _check_mode(_mode(image, margins, mask, strength), image, family)
    width, height = _size((values.get("width"), values.get("height")), image, margins, family, strength is None)
    request = Request(
        prompt=_prompt(prompt, image),
        negative_prompt=_text("negative_prompt", values.get("negative_prompt", "")),
        seed=_whole("seed", seed, 0, MAX_SEED - num_images),
        num_images=num_images,
        num_steps=_whole("num_steps", values.get("num_steps", family.num_steps), 1, MAX_STEPS),
        guidance=_guidance("guidance", values.get("guidance", family.guidance)),
        width=width,
        height=height,
        scheduler=_text("scheduler", values["scheduler"]) if "scheduler" in values else None,
        strength=strength,
        margins=margins,
        temperature=_temperature(values.get("temperature", family.temperature), family),
        true_guidance=_guidance("true_guidance", values["true_guidance"]) if "true_guidance" in values else None,
        control_weight=_weight("control", values.get("control_weight"), control, family),
        long_prompt=_truth("long_prompt", values.get("long_prompt", False)),
        style_weight=_weight("style", values.get("style_weight"), style, family),
    )
    size = (width, height)
    if image is not None:  # one that is grown or edited keeps its size
        request = replace(request, image=_fit("image", image, None if margins or strength is None else size))
    if mask is not None:
        request = replace(request, mask=_fit("mask", mask, size))
    if control is not None:
        request = replace(request, control=_fit("control", control, size))
    if style is not None:
        request = replace(request, style_image=_fit("style_image", style, None))
    _check_family(request, family)
    if request.num_steps * (request.strength or 1.0) < 1:
        raise RequestError(f"strength {request.strength} of {request.num_steps} steps leaves none to run: raise either")
    return request


def _check_fixed(family: "Family", given: Mapping[str, Any]) -> None:
    """Refuse settings that nobody can change; to give what the family does anyway is no error."""
    for name, reason in family.fixed.items():
        if given.get(name) not in (None, getattr(family, name)):
            raise RequestError(f"{family.name} takes no {name}, got {given[name]!r}: {reason}; leave {name} out")


def _mode(image: object, margins: object, mask: object, strength: object) -> str:
    if image is None:
        return "text-to-image"
    if margins is not None:
        return "outpainting"
    if mask is not None:
        return "inpainting"
    return "editing" if strength is None else "image-to-image"


def _check_mode(mode: str, image: object, family: "Family") -> None:
    """Refuse a mode that a family has not, with those that it has."""
    if mode in family.modes:
        return
    needs = "" if "text-to-image" in family.modes or image is not None else "; pass the picture as image="
    if mode == "image-to-image" and "editing" in family.modes:
        needs = "; leave strength out to edit the picture"
    raise RequestError(f"{family.name} does {', '.join(family.modes)}: it has no {mode}{needs}")


def _check_family(request: Request, family: "Family") -> None:
    """Refuse guidance and negative prompts that a family has not, with what it has."""
    if family.guided_by == "nothing" and request.guidance > 1:
        raise RequestError(f"{family.name} was distilled and takes no guidance, got {request.guidance:g}: leave it out")
    if request.true_guidance is not None and not family.true_guidance:
        raise RequestError(f"{family.name} takes no true_guidance: its guidance is {family.guided_by}, use that alone")
    if not request.negative_prompt or (request.true_guidance or 1) > 1:
        return
    if family.true_guidance:
        raise RequestError(f"{family.name} takes negative_prompt in two passes only: pass true_guidance=4 too, or leave it out")
    if not family.negative or family.guided_by != "two passes":
        raise RequestError(f"{family.name} takes no negative_prompt, got {request.negative_prompt!r}: say it in the prompt")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text, got {type(value).__name__}")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise RequestError(f"{name} holds half a surrogate pair, which no encoding can write: {value!a}")
    return value


def _prompt(value: object, image: object) -> str:
    text = _text("prompt", value)
    if not text.strip() and image is None:  # a picture may go on without words
        raise RequestError("the prompt is empty: say what to draw, as in 'a red apple'")
    return text


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be True or False, got {value!r}")
    return value


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RequestError(f"{name} must be a whole number, got {value!r}")
    number = value.__index__()
    if not low <= number <= high:
        raise RequestError(f"{name} must be from {low} to {high}, got {number}")
    return number


def _number(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise RequestError(f"{name} must be a number, got {value!r}") from None
    if isinstance(value, (bool, str)) or not math.isfinite(number):
        raise RequestError(f"{name} must be a finite number, got {value!r}")
    return number


def _guidance(name: str, value: object) -> float:
    number = _number(name, value)
    if not 1 <= number <= 100:
        raise RequestError(f"{name} must be from 1 (off) to 100, got {number:g}")
    return number


def _margins(value: Any, image: object, mask: object) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 4:
        raise RequestError(f"margins must be four numbers of pixels (left, right, top, bottom), got {value!r}")
    if image is None or mask is not None:
        raise RequestError("margins needs image, the picture that grows, and no mask")
    left, right, top, bottom = (_whole("margins", side, 0, 10_000) for side in value)
    if not left + right + top + bottom:
        raise RequestError("margins are all 0: say on which side the picture grows, as in left=64")
    return left, right, top, bottom


def _strength(value: object, image: object, repainted: object, family: "Family") -> float | None:
    if image is None:
        if value is not None:
            raise RequestError("strength needs image: it says how much of that picture is repainted")
        return None
    if value is None and repainted is None and "editing" in family.modes:
        return None
    number = _number("strength", (1.0 if repainted is not None else 0.6) if value is None else value)
    if not 0 < number <= 1:
        raise RequestError(f"strength must be above 0 and at most 1, got {number:g}")
    return number


def _weight(what: str, value: object, picture: object, family: "Family") -> float | None:
    """Return the weight of a control or a style; None where there is none."""
    setting = {"control": "control", "style": "style_image"}[what]
    if picture is None and what in family.takes and what == "style":
        raise RequestError("this model has a style loaded: pass style_image=, or take it out with model.remove_style()")
    if picture is None:
        if value is not None:
            raise RequestError(f"{what}_weight needs {setting}: it says how closely that picture is followed")
        return None
    if what not in family.takes:
        raise RequestError(f"{setting} needs a model that follows it: load one with model.add_{what}() first")
    number = _number(f"{what}_weight", 1.0 if value is None else value)
    if not 0 < number <= 2:
        raise RequestError(f"{what}_weight must be above 0 and at most 2, got {number:g}")
    return number


def _temperature(value: object, family: "Family") -> float | None:
    if family.temperature is None:
        if value is not None:
            raise RequestError(f"temperature is for models that draw one token after the other, which {family.name} does not")
        return None
    number = _number("temperature", value)
    if not 0 <= number <= 100:
        raise RequestError(f"temperature must be from 0 (the most likely) to 100, got {number:g}")
    return number


def _size(
    given: tuple[Any, Any], image: "Image | None", margins: tuple[int, int, int, int] | None, family: "Family", editing: bool
) -> tuple[int, int]:
    """Return width and height: those given, else the picture's own shape, else the family's size."""
    if image is not None and margins is not None:
        return _grown("width", given[0], image, margins[:2], family), _grown("height", given[1], image, margins[2:], family)
    width, height = (None if side is None else _side(name, side, family) for name, side in zip(SIDES, given, strict=True))
    if image is None:
        return width or family.size_px, height or family.size_px
    low, high, step = family.min_px, family.max_px, family.multiple_px
    shape = f"a picture of {image.width}x{image.height}"
    if editing and (min(image.size) < low or max(image.size) > MAX_EDITED_SHAPE * min(image.size)):
        limits = f"sides of at least {low} pixels, one at most {MAX_EDITED_SHAPE} times the other"
        raise RequestError(f"{family.name} edits pictures with {limits}, got {shape}: crop it or make it larger")
    if width is not None and height is not None:
        return width, height
    if width is not None:
        width, height = width, other_side(width, image.width, image.height, step)
    elif height is not None:
        width, height = other_side(height, image.height, image.width, step), height
    else:
        width, height = size_in_shape(image.size, low, high, step, family.size_px**2 if editing else None)
    if not low <= min(width, height) <= max(width, height) <= high:
        sides = f"{width}x{height}, and sides are from {low} to {high} here"
        raise RequestError(f"{shape} would become {sides}: crop it, or pass width and height")
    return width, height


def _side(name: str, value: object, family: "Family") -> int:
    if family.min_px == family.max_px and value != family.size_px:
        only = family.size_px
        raise RequestError(f"{family.name} makes pictures of {only}x{only} only, got {name}={value!r}: leave {name} out")
    side = _whole(name, value, family.min_px, family.max_px)
    if side % family.multiple_px:
        below = side // family.multiple_px * family.multiple_px
        near = f"{below} or {below + family.multiple_px}"
        raise RequestError(f"{name} must be a multiple of {family.multiple_px} for {family.name}, got {side}: try {near}")
    return side


def _grown(name: str, value: object, image: "Image", margins: tuple[int, ...], family: "Family") -> int:
    """Return the width or the height of a picture and its margins."""
    own, added, step = getattr(image, name), sum(margins), family.multiple_px
    side = own + added
    if value not in (None, side):
        raise RequestError(f"{name} follows from the picture and its margins, {side}, got {value}: leave it out")
    where = "left and right" if name == "width" else "top and bottom"
    sum_of = f"{own} pixels and margins of {added} make a {name} of {side}"
    if not family.min_px <= side <= family.max_px:
        raise RequestError(f"{sum_of}: {family.name} takes from {family.min_px} to {family.max_px}")
    if side % step:
        near = [total - own for total in (side // step * step, (side // step + 1) * step) if own <= total <= family.max_px]
        fit = f"give {where} {' or '.join(map(str, near))} together" if near else "crop the picture"
        raise RequestError(f"{sum_of}, no multiple of {step} as {family.name} needs it: {fit}")
    return side


def open_picture(name: str, value: Any) -> "Image | None":
    """Take a PIL picture, or open a path, the camera's rotation applied; None stays None.

    Raises:
        RequestError: it is no picture.
    """
    if value is None:
        return None
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, (str, Path)):
        try:
            with Image.open(value) as opened:
                value = ImageOps.exif_transpose(opened)
                value.load()
        except FileNotFoundError:
            raise RequestError(f"{name}: no file {str(value)!r}") from None
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            raise RequestError(f"{name}: {str(value)!r} cannot be read as a picture ({error})") from None
    if not isinstance(value, Image.Image):
        raise RequestError(f"{name} must be a PIL picture or a path, got {type(value).__name__}")
    if not value.width or not value.height:
        raise RequestError(f"{name} is empty: a picture of {value.width}x{value.height} pixels")
    return value


def _fit(name: str, picture: "Image", size: tuple[int, int] | None) -> "Image":
    """Bring a picture to its colours and, unless that is None, to a size."""
    from PIL import Image

    try:
        picture = to_grey(picture) if name == "mask" else to_rgb(picture)
    except ValueError:
        raise RequestError(f"{name} has colours that cannot be read ({picture.mode}): convert it to RGB first") from None
    return picture if size in (None, picture.size) else picture.resize(size, Image.Resampling.LANCZOS)
