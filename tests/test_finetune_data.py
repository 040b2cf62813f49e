"""Data of a training: every fault is its own error before anything is trained; what is no fault is noted."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from imagegen import DataError
from imagegen.finetune import data
from imagegen.finetune.data import find_bucket, make_buckets, open_rgb, read_dataset


def draw(path, size=(32, 32), colour="red", **options):
    Image.new("RGB", size, colour).save(path, **options)
    return path


def caption(path, text="a red square"):
    path.with_suffix(".txt").write_text(text)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        caption(draw(tmp_path / f"{name}.png", colour=colour), f"a {colour} square")
    return tmp_path


def test_captions_beside_the_pictures(folder):
    found = read_dataset(folder)
    assert [(item.path.name, item.text, item.size) for item in found.items] == [
        ("a.png", "a red square", (32, 32)),
        ("b.png", "a blue square", (32, 32)),
    ]
    assert found.notes == () and found.generated == {}


def test_captions_in_one_file_give_the_same_hash(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    rows = []
    for name, colour in (("x", "red"), ("y", "blue")):
        draw(other / f"{name}.png", colour=colour)
        rows.append(json.dumps({"file_name": f"{name}.png", "text": f"a {colour} square"}))
    (other / "metadata.jsonl").write_text("\n".join(rows))
    assert read_dataset(other).sha256 == read_dataset(folder).sha256
    (other / "metadata.jsonl").write_text("\n".join(rows).replace("blue", "green"))
    assert read_dataset(other).sha256 != read_dataset(folder).sha256


def huge_png(path):
    """A PNG of a kilobyte that says it has ten thousand million pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10_000)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    caption(path)


def truncate(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    caption(path)


def write_line(folder, line):
    (folder / "metadata.jsonl").write_text(line)


def animate(path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(path.with_suffix(".webp"), save_all=True, append_images=frames[1:])
    caption(path)


FAULTS = {
    "no caption": (lambda f: draw(f / "c.png"), "'c.png' .*c.txt"),
    "an empty caption": (lambda f: caption(f / "a.png", "  \n"), "caption of 'a.png' is empty"),
    "a caption too long": (lambda f: caption(f / "a.png", "x" * 3000), "3000 characters"),
    "a caption that is no text": (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\xfa"), "'a.txt' is not UTF-8"),
    "a line that is no JSON": (lambda f: write_line(f, "{oops"), "metadata.jsonl line 1 is no JSON"),
    "a line without text": (lambda f: write_line(f, '{"file_name": "a.png"}'), "line 1 needs the texts file_name and text"),
    "a line of a missing file": (lambda f: write_line(f, '{"file_name": "z.png", "text": "x"}'), "names 'z.png'"),
    "a line outside": (lambda f: write_line(f, '{"file_name": "../a.png", "text": "x"}'), "without a path"),
    "two captions": (lambda f: write_line(f, '{"file_name": "a.png", "text": "something else"}'), "another caption"),
    "a picture cut short": (lambda f: truncate(f / "a.png"), "'a.png' is damaged or cut short"),
    "no picture": (lambda f: (f / "a.png").write_text("<html>404</html>"), "'a.png' is no picture"),
    "a bomb": (lambda f: huge_png(f / "a.png"), "'a.png' has .*pixels, more than"),
    "a picture too small": (lambda f: draw(f / "a.png", size=(8, 32)), "8x32 pixels: 16 is the least"),
    "an animation": (lambda f: animate(f / "c.png"), "animation of 3 pictures"),
    "no pictures at all": (lambda f: [path.unlink() for path in f.glob("*.png")], "no pictures in"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_own_error(folder, fault):
    break_it, says = FAULTS[fault]
    break_it(folder)
    with pytest.raises(DataError, match=says):
        read_dataset(folder)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        read_dataset(tmp_path / "none")


def test_duplicates_are_noted(folder):
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes())
    caption(folder / "c.png")
    assert read_dataset(folder).notes == ("the same picture 2 times: a.png, c.png",)


def test_what_a_model_made_is_listed(folder, model):
    model("a red apple", seed=1, num_steps=1).save(folder)
    (folder / "1-a-red-apple.txt").write_text("a red apple")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler, Seed: 1, Model: dreamy-v7")
    Image.new("RGB", (32, 32)).save(folder / "d.png", pnginfo=info)
    caption(folder / "d.png")
    assert read_dataset(folder).generated == {"imagegen, emoji (emoji)": ["1-a-red-apple.png"], "dreamy-v7": ["d.png"]}


def test_the_cameras_rotation_and_colours_are_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (64, 32), "white")
    wide.paste("black", (0, 0, 32, 32))
    wide.save(folder / "a.jpg", exif=exif, quality=95)
    caption(folder / "a.jpg", "a red square")
    item = next(item for item in read_dataset(folder).items if item.path.name == "a.jpg")
    upright = open_rgb(item)
    assert item.size == upright.size == (32, 64)
    assert upright.getpixel((16, 8))[0] < 30 and upright.getpixel((16, 56))[0] > 225


def test_a_colour_profile_is_converted_to_srgb(folder):
    swapped = ImageCms.createProfile("LAB")
    lab = Image.new("LAB", (32, 32), (128, 196, 178))  # lightness 50, far to red: zero lies at 128
    lab.save(folder / "a.tif", icc_profile=ImageCms.ImageCmsProfile(swapped).tobytes())
    (folder / "a.png").unlink()
    made = open_rgb(next(item for item in read_dataset(folder).items if item.path.name == "a.tif"))
    red, green, blue = made.getpixel((16, 16))
    assert made.mode == "RGB" and red > 170 and green < 70 and blue < 70


def test_transparency_becomes_white(folder):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(folder / "a.png")
    item = read_dataset(folder).items[0]
    assert open_rgb(item).getpixel((5, 5)) == (255, 255, 255)


def test_buckets_keep_the_area_and_the_shape():
    buckets = make_buckets(128, 8)
    assert (128, 128) in buckets and all(w % 8 == 0 and h % 8 == 0 for w, h in buckets)
    assert all(0.7 * 128**2 <= w * h <= 1.1 * 128**2 and max(w, h) <= 2 * min(w, h) for w, h in buckets)
    assert find_bucket((500, 500), buckets) == (128, 128)
    wide, tall = find_bucket((1600, 900), buckets), find_bucket((900, 1600), buckets)
    assert wide == tall[::-1] and abs(wide[0] / wide[1] - 16 / 9) < 0.15


def test_c2pa_is_read_from_the_bytes():
    assert data.find_generator({}, b"..jumb..c2pa..trainedAlgorithmicMedia..") == "a generator that signs with C2PA"
    assert data.find_generator({}, b"nothing") is None
