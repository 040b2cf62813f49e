"""Reference sets: recorded, imported, opened; nothing is lost or believed that is not so."""

import json
import shutil

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import imagegen
from imagegen import DataError
from imagegen.reference_set import open_reference, read_parameters

PROMPTS = ["a red apple", "a rocket"]


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("references") / "set"
    return imagegen.record_reference(model, PROMPTS, folder, seed=5, num_steps=2)


def test_a_recorded_set_is_the_exact_plan_s_pictures(recorded, stock):
    opened = open_reference(recorded.folder)
    assert [request["prompt"] for request, _ in opened] == PROMPTS
    for seed, (request, picture) in enumerate(opened, 5):
        generator = torch.Generator("cpu").manual_seed(seed)
        made = stock(request["prompt"], num_inference_steps=2, guidance_scale=4.0, generator=generator).images[0]
        assert made.tobytes() == picture.tobytes()
    assert opened.dtype == "float32" and opened.source == "imagegen" and opened.model["source"] == "emoji"


def test_the_floor_is_that_of_equal_runs(recorded):
    assert recorded.noise_floor["psnr_db"] > 60 and recorded.noise_floor["max_difference"] <= 2
    assert recorded.noise_floor["pictures"] == 4  # two in a batch, two with another number of threads


def test_recording_gives_the_plan_back(model, tmp_path):
    model.set_plan("step-cache")
    try:
        made = imagegen.record_reference(model, PROMPTS[:1], tmp_path / "set", seed=5, num_steps=4)
        assert model.plan.name == "step-cache"
    finally:
        model.set_plan("exact")
    assert next(iter(made))[1].tobytes() == model(PROMPTS[0], seed=5, num_steps=4).images[0].tobytes()


def test_what_cannot_be_recorded(model, recorded, tmp_path):
    before = sorted(path.name for path in recorded.folder.iterdir())
    with pytest.raises(DataError, match="no reference is lost"):
        imagegen.record_reference(model, PROMPTS, recorded.folder)
    assert sorted(path.name for path in recorded.folder.iterdir()) == before
    with pytest.raises(DataError, match="at least one"):
        imagegen.record_reference(model, [], tmp_path / "none")
    (tmp_path / "prompts.txt").write_text("# none\n\n")
    with pytest.raises(DataError, match="holds no prompts"):
        imagegen.record_reference(model, tmp_path / "prompts.txt", tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "cannot be read"), ("[]", "no reference set"), ('{"version": 99, "pictures": []}', "newer"),
     ('{"version": 1, "pictures": [{}]}', "damaged"),
     ('{"version": 1, "pictures": [{"file": "../x.png", "request": {"prompt": "a"}}]}', "outside its folder")],
)  # fmt: skip
def test_a_damaged_set_is_refused(tmp_path, content, says):
    (tmp_path / "reference.json").write_text(content)
    with pytest.raises(DataError, match=says):
        open_reference(tmp_path)


def test_a_changed_picture_is_noticed(recorded, tmp_path):
    shutil.copytree(recorded.folder, tmp_path / "set")
    name = json.loads((tmp_path / "set/reference.json").read_text())["pictures"][0]["file"]
    Image.new("RGB", (128, 128)).save(tmp_path / "set" / name)
    with pytest.raises(DataError, match="not the picture that was recorded"):
        list(open_reference(tmp_path / "set"))


def test_pictures_of_other_tools_are_imported(tmp_path, model):
    picture, chunks = Image.new("RGB", (128, 128), "red"), PngInfo()
    chunks.add_text(
        "parameters",
        "a red, round apple\nNegative prompt: blue\nSteps: 7, Sampler: Euler, CFG scale: 3.5, Seed: 11, Size: 128x128",
    )
    picture.save(tmp_path / "a.png", pnginfo=chunks)
    picture.save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("a rocket\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "seed": 3, "num_steps": 2}\n')
    model("a frog", seed=9, num_steps=2).save(tmp_path)
    found = imagegen.import_reference(tmp_path, tmp_path / "out")
    requests = {request["prompt"]: request for request, _ in open_reference(tmp_path / "out")}
    assert requests["a red, round apple"] == {
        "prompt": "a red, round apple", "negative_prompt": "blue", "seed": 11, "num_steps": 7, "guidance": 3.5, "width": 128,
        "height": 128,
    }  # fmt: skip
    assert requests["a rocket"]["seed"] == 3 and requests["a rocket"]["num_steps"] == 2
    assert requests["a frog"]["seed"] == 9 and found.source == "import"


@pytest.mark.parametrize(
    ("files", "says"),
    [({}, "holds no pictures"), ({"a.png": None}, "has no prompt"), ({"a.png": None, "a.txt": "x"}, "has no seed"),
     ({"a.png": None, "metadata.jsonl": "{"}, "line 1")],
)  # fmt: skip
def test_imports_without_what_is_needed(tmp_path, files, says):
    for name, text in files.items():
        if text is None:
            Image.new("RGB", (64, 64)).save(tmp_path / name)
        else:
            (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        imagegen.import_reference(tmp_path)
    assert not (tmp_path / "reference.json").exists()


def test_parameters_without_settings_are_a_prompt():
    assert read_parameters("a red apple") == {"prompt": "a red apple"}
    assert read_parameters(" ") == {}
