"""Giving pages back changes no number: what is converted is what the stock loader converts."""

import os

import layouts
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from test_sources import assert_same_weights

import imagegen
from imagegen.families import components, paging, single_file


@pytest.fixture
def always(monkeypatch):
    """Give pages back of small weights too; count how often."""
    given = []
    for module in (components, single_file):
        monkeypatch.setattr(module, "WORTH_IT", 0)
    before = paging._GivesBack._give_back
    monkeypatch.setattr(paging._GivesBack, "_give_back", lambda self, *place: (given.append(place), before(self, *place)))
    return given


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sd1.5", "sd3", "qwen-image"])
def test_converted_weights_are_the_stock_ones(always, folder_of, tmp_path, name, dtype):
    stock = DiffusionPipeline.from_pretrained(folder_of(name), local_files_only=True).to(torch.float16)
    stock.save_pretrained(tmp_path / "half")
    wanted = DiffusionPipeline.from_pretrained(tmp_path / "half", dtype=getattr(torch, dtype), local_files_only=True)
    assert_same_weights(imagegen.load(tmp_path / "half", dtype=dtype).pipeline, wanted)
    assert always
    assert paging.ONE_THREAD not in os.environ


def test_converted_from_one_file(always, tmp_path):
    folder, file = layouts.write("sd1", tmp_path)
    save_file({name: value.half() for name, value in load_file(file).items()}, tmp_path / "half.safetensors")
    model = imagegen.load(tmp_path / "half.safetensors", base=folder, dtype="float32")
    exact = imagegen.load(folder)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(exact.pipeline, part).state_dict()
        for name, value in getattr(model.pipeline, part).state_dict().items():
            assert torch.equal(value, expected[name].half().float() if value.is_floating_point() else expected[name]), name
    assert always


def test_memory_of_no_file_is_never_given_back(tmp_path):
    save_file({"a": torch.ones(2**16, dtype=torch.float16)}, tmp_path / "a.safetensors")
    mine = torch.arange(2**16, dtype=torch.float16)
    mapped = load_file(tmp_path / "a.safetensors")["a"]
    with paging.pages_given_back([tmp_path / "a.safetensors"]):
        for _ in range(2):
            assert torch.equal(mine.float(), torch.arange(2**16, dtype=torch.float16).float())
            assert torch.equal(mapped.float(), torch.ones(2**16))
