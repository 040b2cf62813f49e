"""Pictures as a model takes them: colours, size, and the canvas of one that grows. Plain pictures, no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

FEATHER_PX = 16  # over which what was made fades in, outside of the picture that is kept


def to_rgb(picture: "Image") -> "Image":
    """Return a picture of any mode as RGB: transparency on white, more than 8 bits scaled down.

    Raises:
        ValueError: its mode has no way to RGB.
    """
    return _opaque(picture).convert("RGB")


def to_grey(picture: "Image") -> "Image":
    """Return a picture of any mode as L, likewise.

    Raises:
        ValueError: its mode has no way to L.
    """
    return to_rgb(picture).convert("L")


def _opaque(picture: "Image") -> "Image":
    """Return a picture with 8 bits a channel and no transparency."""
    from PIL import Image

    if picture.mode[0] in "IF":  # PIL would clip these at 255
        return _eight_bits(picture)
    if not picture.has_transparency_data:
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))


def _eight_bits(picture: "Image") -> "Image":
    """Return a picture of one channel of 16 bits, 32 bits or floats as L.

    The modes I and F say nothing of their range: it is told by the largest value, 1 (of floats), 255 or 65535.
    """
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(picture).astype(np.float64))
    largest = values.max()
    if picture.mode == "F" and largest <= 1:
        values = values * 255
    elif picture.mode.startswith("I;16") or largest > 255:
        values = values / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def size_in_shape(own: tuple[int, int], low: int, high: int, step: int, pixels: int | None = None) -> tuple[int, int]:
    """Return the size of a picture whose sides may be from `low` to `high` only, both scaled by one factor.

    Args:
        own: its width and height.
        low: smallest side.
        high: largest side; what is too long for it gets a short side below `low`.
        step: sides are multiples of this; what is over is left out, as stock pipelines do.
        pixels: how many it is to have, or None to keep its size where it may.
    """
    scale = 1.0 if pixels is None else (pixels / (own[0] * own[1])) ** 0.5
    scale = min(max(scale, low / min(own)), high / max(own))
    width, height = (int(side * scale + 1e-6) // step * step for side in own)
    return width, height


def other_side(given: int, own: int, other: int, step: int) -> int:
    """Return the side that keeps a picture's shape where the one of `own` pixels becomes `given`: the nearest multiple."""
    return round(other * given / own / step) * step


def grow(picture: "Image", margins: tuple[int, int, int, int]) -> tuple["Image", "Image"]:
    """Return a larger canvas and the mask of what is new there.

    Args:
        picture: RGB.
        margins: pixels to the left, right, top and bottom.

    Returns:
        The canvas (RGB), the picture's edges continued into the margins; and the mask (L), white in them.
    """
    import numpy as np
    from PIL import Image

    left, right, top, bottom = margins
    around = ((top, bottom), (left, right))
    canvas = np.pad(np.asarray(picture), (*around, (0, 0)), mode="edge")
    mask = np.pad(np.zeros((picture.height, picture.width), np.uint8), around, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)


def put_back(made: "Image", picture: "Image", margins: tuple[int, int, int, int]) -> "Image":
    """Return what was made on a canvas, with the picture put back in its place, every pixel as it was.

    Outside of it, what was made fades in over `FEATHER_PX` from the picture's continued edges.
    """
    import numpy as np
    from PIL import Image

    left, right, top, bottom = margins
    across = np.concatenate([np.arange(left, 0, -1), np.zeros(picture.width, int), np.arange(1, right + 1)])
    down = np.concatenate([np.arange(top, 0, -1), np.zeros(picture.height, int), np.arange(1, bottom + 1)])
    distance = np.maximum(across[None, :], down[:, None])
    mask = Image.fromarray((np.minimum(distance / FEATHER_PX, 1) * 255).round().astype(np.uint8))
    return Image.composite(made, grow(picture, margins)[0], mask)
