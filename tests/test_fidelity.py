"""Metrics against answers worked out by hand."""

import math

import numpy as np
import pytest
from PIL import Image

from imagegen.fidelity import difference_map, max_difference, psnr_db
from imagegen.request import RequestError

BLACK = np.zeros((4, 4, 3), np.uint8)


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
    with pytest.raises(RequestError, match="4x4 and 5x4"):
        psnr_db(BLACK, np.zeros((4, 5, 3), np.uint8))


def test_takes_pil_pictures_of_any_mode():
    grey = Image.new("L", (4, 4), 10)
    assert max_difference(grey, BLACK) == 10
