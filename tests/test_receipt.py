"""A receipt survives the file, damaged ones say so, and nothing is overwritten or half-written."""

import json

import jsonschema
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagegen import receipt as receipts
from imagegen.receipt import Receipt, open_picture, parse_receipt, read_receipt, slug, write_new
from imagegen.request import ReceiptError, RequestError
from imagegen.result import Picture

REQUEST = {"prompt": "a réd apple, ☃", "negative_prompt": "blue", "seed": 7, "num_images": 1, "num_steps": 20, "guidance": 4.0}
REQUEST |= {"width": 8, "height": 8, "scheduler": None, "strength": None, "mode": "text-to-image", "noise": False}


def make(**changed):
    fields = {
        "version": 1,
        "request": REQUEST,
        "pixels_sha256": receipts.pixels_sha256(Image.new("RGB", (8, 8))),
        "model": {
            "source": "emoji",
            "revision": None,
            "family": "emoji",
            "sha256": {"unet/a.safetensors": "f" * 64},
            "licence": "x",
        },
        "loras": [],
        "plan": {"name": "exact", "levers": []},
        "environment": {"imagegen": "0.1.0", "torch": "2", "diffusers": "1", "device": "cpu", "scheduler": "Euler"},
    }
    return Receipt(**(fields | changed))


@pytest.fixture
def saved(tmp_path):
    return Picture(Image.new("RGB", (8, 8)), make()).save(tmp_path)


def test_comes_back_from_the_file(saved):
    picture, receipt = open_picture(saved)
    assert receipt == make()
    assert receipts.pixels_sha256(picture) == receipt.pixels_sha256
    assert saved.name == "7-a-r-d-apple.png"


def test_one_itxt_chunk_and_one_parameters_chunk(saved):
    content = saved.read_bytes()
    assert content.count(b"iTXtimagegen\0") == 1
    assert content.count(b"iTXtparameters\0") == 1
    parameters = Image.open(saved).text["parameters"]
    lines = parameters.splitlines()
    assert lines[0] == "a réd apple, ☃"
    assert lines[1] == "Negative prompt: blue"
    assert lines[2].startswith(
        "Steps: 20, Sampler: Euler, CFG scale: 4, Seed: 7, Size: 8x8, Model hash: ffffffffff, Model: emoji"
    )


def test_follows_the_published_schema():
    schema = json.loads((receipts.Path(receipts.__file__).parent / "receipt.schema.json").read_text())
    jsonschema.validate(json.loads(make().to_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(make(request={}).to_json()), schema)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "no version"),
        ('{"version": 99}', "newer than 1"),
        ('{"version": 1}', "'request' is missing"),
        (make(request=REQUEST | {"seed": "7"}).to_json(), "'seed'"),
        (make(model={"source": 3, "sha256": {}}).to_json(), "no source or weight hashes"),
        (make(model={"source": "a", "sha256": {"unet/a": 3}}).to_json(), "weight hash that is no text"),
        (make(model={"source": "a", "sha256": {}, "control": []}).to_json(), "a control or a style"),
        (make(request=REQUEST | {"guidance": 10**400}).to_json(), "'guidance'"),
        (make(request=REQUEST | {"strength": "1"}).to_json(), "'strength'"),
        (make(loras=[{"weight": "1"}]).to_json(), "no LoRA with a weight"),
    ],
)
def test_damaged_receipts_say_so(text, says):
    with pytest.raises(ReceiptError, match=says):
        parse_receipt(text)


def test_picture_without_receipt(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ReceiptError, match="carries no imagegen receipt"):
        read_receipt(tmp_path / "plain.png")
    with pytest.raises(ReceiptError, match="no file"):
        read_receipt(tmp_path / "none.png")


def test_truncated_picture(saved):
    saved.write_bytes(saved.read_bytes()[:60])
    with pytest.raises(ReceiptError):
        read_receipt(saved)


def test_compressed_bomb_in_a_chunk_is_refused(tmp_path):
    chunks = PngInfo()
    chunks.add_itxt("imagegen", "x" * 200_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=chunks)
    with pytest.raises(ReceiptError, match="cannot be read"):
        read_receipt(tmp_path / "bomb.png")


def test_nothing_is_overwritten(tmp_path):
    picture = Picture(Image.new("RGB", (8, 8)), make())
    names = [picture.save(tmp_path).name for _ in range(3)]
    assert names == ["7-a-r-d-apple.png", "7-a-r-d-apple-2.png", "7-a-r-d-apple-3.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A Red Apple!", "a-red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("☃", "picture"),
        ("x" * 300, "x" * 48),
        ("a\0b/c\\d", "a-b-c-d"),
    ],
)
def test_names_are_safe(prompt, name):
    assert slug(prompt) == name


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="choose another directory"):
        write_new(tmp_path / "file" / "below", "name", b"content")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(receipts.Path, "write_bytes", full)
    with pytest.raises(RequestError, match="No space left on device"):
        write_new(tmp_path, "name", b"content")
    assert list(tmp_path.iterdir()) == []
