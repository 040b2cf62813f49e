"""Every wrong value is refused with its name, its value and the way out; good ones are filled in."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

import imagegen
from imagegen.catalog import FAMILIES
from imagegen.request import MAX_SEED, build_request

EMOJI = FAMILIES["emoji"]
SQUARE = Image.new("RGB", (64, 64))


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
        ({"zzz": 4}, "the settings are negative_prompt, seed"),
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


@pytest.mark.parametrize(
    ("family", "size", "given", "made"),
    [
        ("stable-diffusion", (4032, 3024), {}, (2048, 1536)),
        ("stable-diffusion-xl", (3000, 1000), {}, (2048, 680)),
        ("emoji", (1024, 512), {}, (512, 256)),
        ("emoji", (128, 30), {}, (272, 64)),
        ("stable-diffusion", (1024, 512), {"width": 512}, (512, 256)),
        ("stable-diffusion", (1024, 512), {"height": 512}, (1024, 512)),
        ("stable-diffusion", (1000, 700), {"width": 512}, (512, 360)),
        ("stable-diffusion", (1024, 512), {"width": 512, "height": 512}, (512, 512)),
        ("flux.1-kontext", (4000, 500), {}, (2048, 256)),
        ("flux.1-kontext", (200, 100), {"width": 512}, (512, 256)),
    ],
)
def test_a_picture_keeps_its_shape(family, size, given, made):
    strength = {} if "kontext" in family else {"strength": 0.5}
    request = build_request("x", FAMILIES[family], {"image": Image.new("RGB", size), **given, **strength})
    assert (request.width, request.height) == made
    assert request.image.size == (made if strength else size)


@pytest.mark.parametrize(
    ("family", "given", "says"),
    [
        ("stable-diffusion", {"image": Image.new("RGB", (400, 2)), "strength": 0.5}, "400x2 would become 2048x8, and sides"),
        ("stable-diffusion", {"image": Image.new("RGB", (400, 50)), "width": 64}, "400x50 would become 64x8"),
        ("flux.1-kontext", {"image": Image.new("RGB", (400, 2))}, "sides of at least 64 pixels, one at most 8 times"),
        ("flux.2-klein", {"image": Image.new("RGB", (1000, 100))}, "a picture of 1000x100: crop it"),
        ("emoji", {"image": Image.new("RGB", (0, 0))}, "image is empty: a picture of 0x0 pixels"),
        ("emoji", {"image": SQUARE, "mask": Image.new("L", (0, 9))}, "mask is empty"),
        ("emoji", {"image": Image.new("La", (64, 64))}, "image has colours that cannot be read (La): convert it to RGB first"),
        ("emoji", {"image": SQUARE, "mask": Image.new("La", (64, 64))}, "mask has colours that cannot"),
        ("emoji", {"image": SQUARE, "margins": (5, 0, 0, 0)},
         "margins of 5 make a width of 69, no multiple of 8 as emoji needs it: give left and right 0 or 8 together"),
        ("emoji", {"image": Image.new("RGB", (512, 64)), "margins": (8, 0, 0, 0)}, "a width of 520: emoji takes from 64 to 512"),
        ("janus-pro", {"image": SQUARE, "margins": (8, 0, 0, 0)}, "it has no outpainting"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_taken(family, given, says):
    with pytest.raises(imagegen.RequestError) as caught:
        build_request("x", FAMILIES[family], given)
    assert says in str(caught.value)


def levels(kind, top):
    """A picture whose left half is 0 and whose right half is the largest value."""
    values = np.zeros((64, 64), kind)
    values[:, 32:] = top
    return Image.fromarray(values)


def clear(mode):
    """A picture whose right half is transparent, over black."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    return picture.quantize() if mode == "P" else picture.convert(mode)


def keyed(mode):
    """A picture whose right half has the colour that its file calls transparent."""
    colour, other = {"RGB": ((9, 9, 9), (255, 0, 0)), "L": (9, 0)}[mode]
    picture = Image.new(mode, (64, 64), colour)
    picture.paste(other, (0, 0, 32, 64))
    picture.info["transparency"] = colour
    return picture


@pytest.mark.parametrize("name", ["image", "mask", "control", "style_image"])
@pytest.mark.parametrize(
    "picture",
    [
        levels(np.uint16, 65535), levels(np.int32, 65535), levels(np.int32, 255), levels(np.float32, 1), levels(np.float32, 255),
        clear("RGBA"), clear("LA"), clear("P"), keyed("RGB"), keyed("L"),
        Image.merge("LAB", [levels(np.uint8, 255), *[Image.new("L", (64, 64), 128)] * 2]),
    ],
    ids=["I;16", "I", "I of 8 bits", "F", "F of 8 bits", "RGBA", "LA", "P", "RGB tRNS", "L tRNS", "LAB"],
)  # fmt: skip
def test_pictures_of_any_mode_are_seen_as_they_look(name, picture):
    family = dataclasses.replace(EMOJI, takes=("control", "style"))
    given = {"image": SQUARE, "style_image": Image.new("RGB", (9, 9)), "width": 64, "height": 64}
    seen = getattr(build_request("x", family, given | {name: picture}), name)
    values = np.asarray(seen.convert("L")).astype(int)
    assert seen.mode == ("L" if name == "mask" else "RGB")
    assert (values[:, 32:] == 255).all()
    assert values[:, :32].max() <= 76  # black, or red


def test_sixteen_bits_keep_their_steps():
    depth = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    grey = np.asarray(build(image=depth).image)[..., 0].astype(int)
    assert len(np.unique(grey)) == 256
    assert np.abs(grey - np.asarray(depth) / 257).max() <= 0.5


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
