"""How far two pictures are apart: pure functions of two pictures, nothing else.

Pictures are PIL images or (H, W, 3) uint8 arrays of one size.
"""

import math
from typing import Any

import numpy as np

from imagegen.request import RequestError


def _pair(picture: Any, other: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(p.convert("RGB") if hasattr(p, "convert") else p) for p in (picture, other))
    if first.shape != second.shape:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (first, second)]
        raise RequestError(f"pictures of two sizes cannot be compared: {sizes[0]} and {sizes[1]}")
    return first.astype(np.int16), second.astype(np.int16)


def psnr_db(picture: Any, other: Any) -> float:
    """Return the peak signal-to-noise ratio in dB over all pixels and channels; equal is infinite.

    Raises:
        RequestError: the pictures differ in size.
    """
    first, second = _pair(picture, other)
    mean_square = float(np.square(first - second, dtype=np.int64).mean())
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def max_difference(picture: Any, other: Any) -> int:
    """Return the largest difference of any channel of any pixel, 0 to 255.

    Raises:
        RequestError: the pictures differ in size.
    """
    first, second = _pair(picture, other)
    return int(np.abs(first - second).max())


def difference_map(picture: Any, other: Any, gain: float = 8.0) -> np.ndarray:
    """Return where two pictures differ: (H, W, 3) uint8, black where equal, `gain` times amplified.

    Raises:
        RequestError: the pictures differ in size.
    """
    first, second = _pair(picture, other)
    return np.clip(np.abs(first - second) * gain, 0, 255).astype(np.uint8)
