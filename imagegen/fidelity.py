"""How far two pictures are apart: pure functions of two pictures, nothing else.

Pictures are PIL images or (H, W, 3) uint8 arrays of one size, in sRGB. `ssim` and `flip` need the extra `measure`.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from imagegen.request import RequestError

BACKGROUND_TOLERANCE = 24  # largest difference of any channel, of 255, at which a pixel still counts as background
MIN_FOREGROUND = 0.01  # of the pixels; the mean over fewer says more about noise than about the picture
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5


class MissingPackageError(RequestError):
    """The metric needs a package of the extra `measure` that is not installed."""


def _package(module: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(f"{metric} needs a package ({error}): pip install 'imagegen-diffusion[measure]'") from error


def _pair(picture: Any, other: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(p.convert("RGB") if hasattr(p, "convert") else p) for p in (picture, other))
    if first.shape != second.shape:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (first, second)]
        raise RequestError(f"pictures of two sizes cannot be compared: {sizes[0]} and {sizes[1]}")
    return first.astype(np.int16), second.astype(np.int16)


def _psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    mean_square = float(np.square(first - second, dtype=np.int64).mean())
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def psnr_db(picture: Any, other: Any) -> float:
    """Return the peak signal-to-noise ratio in dB over all pixels and channels; equal is infinite.

    Raises:
        RequestError: the pictures differ in size.
    """
    return _psnr_db(*_pair(picture, other))


def _foreground(picture: np.ndarray) -> np.ndarray:
    """Return where an (H, W, 3) int16 picture is not its plain background: (H, W) bool."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    # Bins centred on multiples of 32: noise around black, grey or white, the usual backgrounds, falls into one bin.
    _, member_of, counts = np.unique((border + 16) // 32, axis=0, return_inverse=True, return_counts=True)
    # numpy 2.0 gives the inverse a second axis, the versions around it do not.
    background = np.median(border[member_of.reshape(-1) == counts.argmax()], axis=0)
    return np.abs(picture - background).max(axis=2) > BACKGROUND_TOLERANCE


def foreground_psnr_db(reference: Any, other: Any) -> float:
    """Return the PSNR in dB over the pixels of `reference` that are not its plain background; equal is infinite.

    A plain background flatters the plain PSNR: it is easy to get right, and its many equal pixels thin out the error of
    the few that matter. A subject on a tenth of the picture looks 10 dB better than it is.

    The background is the most common colour of the border; the foreground differs from it by more than
    `BACKGROUND_TOLERANCE` in any channel. Where that is less than `MIN_FOREGROUND` of the picture, all pixels count, as
    they do where there is no plain background. Only `reference` decides, so what `other` adds outside is not seen, and
    the arguments do not commute.

    Raises:
        RequestError: the pictures differ in size.
    """
    first, second = _pair(reference, other)
    foreground = _foreground(first)
    if foreground.mean() < MIN_FOREGROUND:
        return _psnr_db(first, second)
    return _psnr_db(first[foreground], second[foreground])


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


def ssim(picture: Any, other: Any) -> float:
    """Return the structural similarity, at most 1 (equal); below 0 where structures are inverted.

    Computed per channel with a Gaussian window of 11 pixels and sigma 1.5, averaged over the channels and over the
    pixels whose window lies inside the picture.

    Raises:
        RequestError: the pictures differ in size or are smaller than the window, or scikit-image is not installed.

    Source:
        Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity"
        (2004), https://doi.org/10.1109/TIP.2003.819861, equation 13, with K1 = 0.01 and K2 = 0.03.
    """
    metrics = _package("skimage.metrics", "ssim")
    first, second = (array.astype(np.float64) for array in _pair(picture, other))
    height, width = first.shape[:2]
    if min(height, width) < SSIM_WINDOW_PX:
        raise RequestError(
            f"ssim looks through a window of {SSIM_WINDOW_PX}x{SSIM_WINDOW_PX} pixels, the pictures are {width}x{height}: "
            "use psnr_db, or larger pictures"
        )
    similarity = metrics.structural_similarity(
        first,
        second,
        win_size=SSIM_WINDOW_PX,
        gaussian_weights=True,
        sigma=SSIM_SIGMA_PX,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
    )
    return float(similarity)


def flip_map(picture: Any, other: Any) -> np.ndarray:
    """Return the difference seen when flipping between two pictures: (H, W) float32, 0 (none) to 1.

    LDR-FLIP at its default viewing distance, 67 pixels per degree of visual angle: 0.7 m from a 0.7 m wide 4K display.

    Raises:
        RequestError: the pictures differ in size, or flip-evaluator is not installed.

    Source:
        Andersson, Nilsson, Akenine-Möller, Oskarsson, Åström, Fairchild, "FLIP: A Difference Evaluator for Alternating
        Images" (2020), https://doi.org/10.1145/3406183.
    """
    evaluator = _package("flip_evaluator", "flip")
    first, second = (array.astype(np.float32) / 255 for array in _pair(picture, other))
    errors, _, _ = evaluator.evaluate(first, second, "LDR", applyMagma=False, computeMeanError=False)
    return errors[..., 0]


def flip(picture: Any, other: Any) -> float:
    """Return the mean of `flip_map`, 0 (equal) to 1.

    Raises:
        RequestError: the pictures differ in size, or flip-evaluator is not installed.
    """
    # The evaluator's own mean adds up in float32, which is off by 0.01 at a million pixels.
    return float(flip_map(picture, other).mean(dtype=np.float64))


@dataclass(frozen=True)
class Metric:
    """One way to say how far a picture is from its reference.

    Attributes:
        name: its key in `METRICS`.
        function: takes the reference and the other picture.
        unit: of the value; empty for a pure number.
        higher_is_better: whether a larger value is closer to the reference.
    """

    name: str
    function: Callable[[Any, Any], float]
    unit: str
    higher_is_better: bool

    @property
    def key(self) -> str:
        """Return the name with the unit, as reports and `measure_all` have it: `psnr_db`, `ssim`."""
        return f"{self.name}_{self.unit.lower()}" if self.unit else self.name


METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", psnr_db, unit="dB", higher_is_better=True),
        Metric("foreground_psnr", foreground_psnr_db, unit="dB", higher_is_better=True),
        Metric("ssim", ssim, unit="", higher_is_better=True),
        Metric("flip", flip, unit="", higher_is_better=False),
    )
}


def measure_all(reference: Any, other: Any) -> dict[str, float | None]:
    """Return every metric of `METRICS` by its key, and `max_difference`; None where its package is not installed.

    Raises:
        RequestError: the pictures differ in size or are too small for `ssim`.
    """
    measured: dict[str, float | None] = {}
    for metric in METRICS.values():
        try:
            measured[metric.key] = metric.function(reference, other)
        except MissingPackageError:
            measured[metric.key] = None
    return measured | {"max_difference": max_difference(reference, other)}
