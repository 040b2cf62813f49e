"""Metrics against answers worked out by hand."""

import math
import sys

import numpy as np
import pytest
from PIL import Image

from imagegen.fidelity import (
    METRICS,
    difference_map,
    flip,
    flip_map,
    foreground_psnr_db,
    max_difference,
    measure_all,
    psnr_db,
    ssim,
)
from imagegen.request import RequestError

BLACK = np.zeros((4, 4, 3), np.uint8)
SSIM_C1 = (0.01 * 255) ** 2


def plain(value, height=16, width=20):
    return np.full((height, width, 3), value, np.uint8)


def scene():
    """Return smooth colours that stay far enough from 0 and 255 for noise not to clip."""
    across, down = np.meshgrid(np.linspace(0, 3, 32), np.linspace(0, 2, 24))
    return np.stack([128 + 40 * np.sin(across), 128 + 40 * np.cos(down), 128 + 30 * np.sin(across + down)], -1).astype(np.uint8)


def noisy(picture, amplitude):
    noise = np.random.default_rng(0).integers(-1, 2, picture.shape)
    return (picture + amplitude * noise).astype(np.uint8)


def subject_on(background, subject):
    """Return a 20x20 picture with a 6x5 subject: 30 of 400 pixels."""
    picture = plain(background, 20, 20)
    picture[7:13, 8:13] = subject
    return picture


def test_equal_pictures():
    assert psnr_db(BLACK, BLACK) == math.inf
    assert max_difference(BLACK, BLACK) == 0
    assert not difference_map(BLACK, BLACK).any()


def test_black_against_white_is_zero_db():
    assert psnr_db(BLACK, BLACK + 255) == 0.0
    assert max_difference(BLACK, BLACK + 255) == 255


def test_one_channel_off_by_one():
    other = BLACK.copy()
    other[1, 2, 0] = 1
    # mean square error 1/48: 10 log10(255^2 * 48) = 64.943 dB
    assert psnr_db(BLACK, other) == pytest.approx(10 * math.log10(255**2 * 48))
    assert max_difference(other, BLACK) == 1
    assert difference_map(BLACK, other, gain=8)[1, 2].tolist() == [8, 0, 0]


def test_sizes_must_agree():
    for metric in METRICS.values():
        with pytest.raises(RequestError, match="4x4 and 5x4"):
            metric.function(BLACK, np.zeros((4, 5, 3), np.uint8))


def test_takes_pil_pictures_of_any_mode():
    grey = Image.new("L", (4, 4), 10)
    assert max_difference(grey, BLACK) == 10


def test_ssim_of_plain_pictures_is_its_luminance_term():
    # no variance: Wang et al. (2004), equation 6, is all that is left
    for a, b in ((0, 255), (100, 120), (7, 200)):
        assert ssim(plain(a), plain(b)) == pytest.approx((2 * a * b + SSIM_C1) / (a * a + b * b + SSIM_C1), abs=1e-6)


def test_ssim_is_the_mean_over_channels():
    red = plain(0)
    red[..., 0] = 255
    one_channel = SSIM_C1 / (255**2 + SSIM_C1)
    assert ssim(plain(0), red) == pytest.approx((2 + one_channel) / 3)


def test_ssim_of_a_negative_is_below_zero():
    checks = plain(0, 32, 32)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    assert ssim(checks, 255 - checks) < -0.9


def test_ssim_of_one_window_is_the_paper_written_out():
    # Wang et al. (2004), equations 13 to 16: Gaussian weights of sigma 1.5 over 11x11 pixels, sum 1
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line)[..., None] / line.sum() ** 2
    x, y = (picture[:11, :11].astype(float) for picture in (scene(), noisy(scene(), 8)))
    mean_x, mean_y = ((weights * a).sum((0, 1)) for a in (x, y))
    off_x, off_y = x - mean_x, y - mean_y
    var_x, var_y, cov = ((weights * a * b).sum((0, 1)) for a, b in ((off_x, off_x), (off_y, off_y), (off_x, off_y)))
    c2 = (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    assert ssim(x.astype(np.uint8), y.astype(np.uint8)) == pytest.approx((luminance * structure).mean(), abs=1e-9)


def test_ssim_needs_one_whole_window():
    assert ssim(plain(9, 11, 11), plain(9, 11, 11)) == 1
    with pytest.raises(RequestError, match=r"11x11 pixels, the pictures are 20x10"):
        ssim(plain(9, 10, 20), plain(9, 10, 20))


def test_flip_of_black_against_white_is_its_closed_form():
    # Plain pictures have no edges, so the colour term is all: distances in Hunt-adjusted L*a*b* to the power 0.7, of which
    # those up to 0.4 of green's from blue map to 0 to 0.95, the rest to 0.95 to 1 (Andersson et al. 2020, section 4.1).
    green, blue = (87.7347, -86.1827, 83.1793), (32.2970, 79.1875, -107.8602)  # L*a*b* under D65
    chroma = [(0.01 * lightness * a, 0.01 * lightness * b) for lightness, a, b in (green, blue)]
    largest = (green[0] - blue[0] + math.dist(*chroma)) ** 0.7
    expected = 0.95 + 0.05 * (100**0.7 - 0.4 * largest) / (0.6 * largest)
    errors = flip_map(plain(0), plain(255))
    assert errors.shape == (16, 20) and errors.dtype == np.float32
    assert errors == pytest.approx(expected, abs=1e-4)
    assert flip(plain(0), plain(255)) == pytest.approx(expected, abs=1e-4)


def test_flip_is_the_mean_of_its_map():
    picture, other = scene(), noisy(scene(), 9)
    assert flip(picture, other) == pytest.approx(flip_map(picture, other).mean())


def test_flip_is_taken_where_the_pictures_differ():
    other = plain(128, 64, 64)
    other[:8, :8] = 255
    errors = flip_map(plain(128, 64, 64), other)
    assert errors[:8, :8].min() > 0.3
    assert not errors[32:, 32:].any()


def test_foreground_psnr_counts_the_subject_only():
    reference, other = subject_on(250, 40), subject_on(250, 50)
    assert foreground_psnr_db(reference, other) == pytest.approx(10 * math.log10(255**2 / 10**2))
    # the plain one is better by what the background thins out: 30 of 400 pixels
    assert psnr_db(reference, other) - foreground_psnr_db(reference, other) == pytest.approx(10 * math.log10(400 / 30))


def test_foreground_is_the_references():
    reference = subject_on(250, 40)
    other = reference.copy()
    other[0, 0] = 0
    assert foreground_psnr_db(reference, other) == math.inf
    assert foreground_psnr_db(other, reference) == pytest.approx(10 * math.log10(255**2 * 31 / 250**2))


def test_foreground_is_more_than_24_away_in_one_channel():
    for away, counted in ((24, 400), (25, 30)):
        reference = subject_on(200, (200 - away, 200, 200))
        other = reference.copy()
        other[7:13, 8:13] += 10
        mean_square = 10**2 * 30 / counted
        assert foreground_psnr_db(reference, other) == pytest.approx(10 * math.log10(255**2 / mean_square))


@pytest.mark.parametrize("background", [0, 128, 255])
def test_a_background_may_be_noisy_and_the_subject_may_touch_the_border(background):
    noise = np.random.default_rng(0).integers(-8, 9, (20, 20, 3))
    reference = np.clip(plain(background, 20, 20) + noise, 0, 255).astype(np.uint8)
    reference[:, :5] = (200, 60, 60)
    other = reference.copy()
    other[:, :5] += 10
    assert foreground_psnr_db(reference, other) == pytest.approx(10 * math.log10(255**2 / 10**2))


def test_without_a_foreground_all_pixels_count():
    assert foreground_psnr_db(plain(100), plain(110)) == psnr_db(plain(100), plain(110))
    speck = plain(100, 20, 20)
    speck[10, 10:13] = 0  # 3 of 400 pixels is under one percent
    assert foreground_psnr_db(speck, plain(100, 20, 20)) == psnr_db(speck, plain(100, 20, 20))
    speck[10, 13] = 0
    assert foreground_psnr_db(speck, plain(100, 20, 20)) == pytest.approx(10 * math.log10(255**2 / 100**2))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_has_its_best_value_at_equal_and_falls_with_noise(metric):
    values = [metric.function(scene(), noisy(scene(), amplitude)) for amplitude in (0, 2, 8, 32)]
    assert values[0] == {"dB": math.inf, "": 1.0 if metric.higher_is_better else 0.0}[metric.unit]
    assert values == sorted(values, reverse=metric.higher_is_better)
    assert len(set(values)) == 4


@pytest.mark.parametrize("function", [psnr_db, ssim, flip])
def test_the_order_of_the_pictures_does_not_matter(function):
    assert function(scene(), noisy(scene(), 8)) == pytest.approx(function(noisy(scene(), 8), scene()))


def test_metrics_are_known_by_their_names():
    assert list(METRICS) == ["psnr", "foreground_psnr", "ssim", "flip"]
    assert all(name == metric.name for name, metric in METRICS.items())


def test_measure_all_is_what_each_metric_says():
    picture, other = scene(), noisy(scene(), 8)
    assert measure_all(picture, other) == {
        "psnr_db": psnr_db(picture, other),
        "foreground_psnr_db": foreground_psnr_db(picture, other),
        "ssim": ssim(picture, other),
        "flip": flip(picture, other),
        "max_difference": 8,
    }


@pytest.mark.parametrize(
    ("module", "function"), [("skimage.metrics", ssim), ("flip_evaluator", flip), ("flip_evaluator", flip_map)]
)
def test_a_missing_package_names_the_extra(monkeypatch, module, function):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=r"pip install 'imagegen-diffusion\[measure\]'"):
        function(scene(), scene())


def test_measure_all_leaves_out_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    measured = measure_all(scene(), noisy(scene(), 8))
    assert measured["ssim"] is None and measured["flip"] is None
    assert measured["psnr_db"] > 0 and measured["foreground_psnr_db"] > 0 and measured["max_difference"] == 8


def test_measure_all_does_not_hide_other_errors():
    with pytest.raises(RequestError, match="11x11"):
        measure_all(BLACK, BLACK)
