"""Every wrong value is refused with its name, its value and the way out; good ones are filled in."""

import math

import pytest
from PIL import Image

import imagegen
from imagegen.catalog import FAMILIES
from imagegen.request import MAX_SEED, build_request

EMOJI = FAMILIES["emoji"]


def build(prompt="a red apple", **given):
    return build_request(prompt, EMOJI, given)


def test_defaults_are_the_familys():
    request = build(seed=7)
    assert (request.num_steps, request.guidance, request.width, request.height) == (20, 4.0, 128, 128)
    assert (request.seed, request.num_images, request.mode) == (7, 1, "text-to-image")


def test_without_a_seed_one_is_drawn_and_differs():
    assert len({build().seed for _ in range(20)}) > 15


def test_picture_i_has_seed_plus_i():
    alone = build(seed=7, num_images=4).of_picture(3)
    assert (alone.seed, alone.num_images) == (10, 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_steps": 0}, "num_steps must be from 1 to 1000, got 0"),
        ({"num_steps": -3}, "got -3"),
        ({"num_steps": 2.5}, "whole number, got 2.5"),
        ({"num_steps": True}, "whole number, got True"),
        ({"guidance": math.nan}, "finite number, got nan"),
        ({"guidance": math.inf}, "finite"),
        ({"guidance": 0.5}, "from 1 (off)"),
        ({"guidance": "4"}, "number"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": MAX_SEED}, "seed must be from 0"),
        ({"seed": MAX_SEED - 2, "num_images": 3}, "seed must be from 0"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 65}, "from 1 to 64"),
        ({"width": 100}, "multiple of 8 for emoji, got 100: try 96 or 104"),
        ({"height": 16}, "from 64 to 512"),
        ({"negative_prompt": 3}, "must be text, got int"),
        ({"strength": 0.5}, "strength needs image"),
        ({"mask": Image.new("L", (128, 128))}, "mask needs image"),
        ({"image": Image.new("RGB", (128, 128)), "strength": 0.0}, "above 0"),
        ({"image": Image.new("RGB", (128, 128)), "strength": 1.1}, "at most 1"),
        ({"image": Image.new("RGB", (128, 128)), "strength": 0.01}, "leaves none to run"),
        ({"image": 3}, "PIL picture or a path, got int"),
        ({"image": "no-such-file.png"}, "no file 'no-such-file.png'"),
        ({"num_inference_steps": 20}, "it is num_steps here"),
        ({"guidance_scale": 4}, "it is guidance here"),
        ({"sede": 4}, "did you mean seed?"),
        ({"zzz": 4}, "the settings are seed"),
    ],
)
def test_wrong_values_say_what_to_do(given, says):
    with pytest.raises(imagegen.RequestError) as caught:
        build(**given)
    assert says in str(caught.value)


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_empty_prompt(prompt):
    with pytest.raises(imagegen.RequestError, match="the prompt is empty"):
        build(prompt)


@pytest.mark.parametrize("prompt", [None, 7, b"apple", ["apple"]])
def test_prompt_must_be_text(prompt):
    with pytest.raises(imagegen.RequestError, match="prompt must be text"):
        build(prompt)


def test_lone_surrogate_is_refused():
    with pytest.raises(imagegen.RequestError, match="surrogate"):
        build("apple \ud800")


def test_errors_are_value_errors():
    assert issubclass(imagegen.RequestError, imagegen.Error)
    assert issubclass(imagegen.Error, ValueError)


def test_largest_seed_is_taken():
    assert build(seed=MAX_SEED - 1).seed == MAX_SEED - 1


def test_picture_brings_its_size_and_loses_its_transparency():
    clear = Image.new("RGBA", (100, 70), (255, 0, 0, 0))
    request = build(image=clear)
    assert (request.width, request.height) == (96, 64)
    assert request.image.mode == "RGB"
    assert request.image.getpixel((5, 5)) == (255, 255, 255)
    assert request.strength == 0.6


def test_mask_is_brought_to_size_and_repaints_all_by_default():
    request = build(image=Image.new("RGB", (128, 128)), mask=Image.new("RGB", (64, 64), "white"))
    assert request.mask.mode == "L"
    assert request.mask.size == (128, 128)
    assert (request.strength, request.mode) == (1.0, "inpainting")


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (128, 64))
    exif = picture.getexif()
    exif[0x0112] = 6  # rotated by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    request = build(image=tmp_path / "turned.jpg")
    assert (request.width, request.height) == (64, 128)


def test_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(imagegen.RequestError, match="cannot be read as a picture"):
        build(image=tmp_path / "page.png")
