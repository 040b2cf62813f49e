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
    monkeypatch.setattr(paging, "LEAST", 0)
    before = paging._GivesBack._give_back
    monkeypatch.setattr(paging._GivesBack, "_give_back", lambda self, *place: (given.append(place), before(self, *place)))
    return given


@pytest.mark.parametrize(("name", "dtype"), [("sd1.5", "float32"), ("sd3", "bfloat16"), ("qwen-image", "float32")])
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


def test_memory_of_no_file_is_never_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(paging, "LEAST", 0)
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2**20, dtype=torch.float16)}, file)
    with paging.pages_given_back([file]):
        for _ in range(2):
            mapped = load_file(file)["a"]
            assert torch.equal(mapped.float(), torch.ones(2**20))
            assert torch.equal(mapped.float(), torch.ones(2**20))  # read again
            del mapped  # its place may be taken by what follows
            mine = torch.arange(2**20, dtype=torch.float64).half()
            kept = mine.clone()
            mine.float()
            assert torch.equal(mine, kept)


def test_where_a_file_was_is_no_file_any_more(tmp_path):
    """The question is asked of the system each time: a place that was a file's is not taken for one later."""
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2**20, dtype=torch.float16)}, file)
    watcher = paging._GivesBack([file])
    mapped = load_file(file)["a"]
    begin, end = mapped.data_ptr(), mapped.data_ptr() + mapped.nbytes
    assert watcher._is_mapped(begin, end)
    assert not watcher._is_mapped(begin, end + 2**30)
    del mapped
    assert not watcher._is_mapped(begin, end)
