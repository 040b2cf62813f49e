"""A picture that grows: its canvas, the mask of what is new, and the seam. Plain pictures, no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

FEATHER_PX = 16  # over which what was made fades in, outside of the picture that is kept


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
