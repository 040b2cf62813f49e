"""Weight files are hashed once, told apart by their names, and read by their headers alone."""

import hashlib
import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from imagegen import weights
from imagegen.request import ModelError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model" / "unet").mkdir(parents=True)
    save_file({"a": np.zeros(1000, np.float32)}, tmp_path / "model" / "unet" / "w.safetensors")
    return tmp_path / "model"


def test_hash_is_the_files(folder):
    expected = hashlib.sha256((folder / "unet/w.safetensors").read_bytes()).hexdigest()
    assert weights.hash_weights(folder) == {"unet/w.safetensors": expected}


def test_second_time_reads_no_weights(folder, monkeypatch):
    first = weights.hash_weights(folder)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert weights.hash_weights(folder) == first


def test_a_changed_file_is_hashed_again(folder):
    before = weights.hash_weights(folder)
    file = folder / "unet/w.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert weights.hash_weights(folder) != before


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}', ""])
def test_a_damaged_cache_is_ignored(folder, content):
    expected = weights.hash_weights(folder)
    (weights.cache_folder() / "hashes.json").write_text(content)
    assert weights.hash_weights(folder) == expected


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path, length):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert weights.read_header(tmp_path / "w.safetensors")["a"].shape == (1,)


def test_the_dtype_of_most_bytes_counts(tmp_path):
    tensors = {f"scale{n}": np.zeros(1, np.float32) for n in range(9)} | {"matrix": np.zeros((64, 64), np.float16)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert weights.stored_dtype([tmp_path / "w.safetensors"]) == "F16"


def test_of_both_a_file_and_shards_the_one_that_is_loaded_counts(tmp_path):
    """transformers takes the file, diffusers the shards."""
    for stem in ("model", "diffusion_pytorch_model"):
        folder = tmp_path / stem
        folder.mkdir()
        shard = f"{stem}-00001-of-00001.safetensors"
        for name in (shard, f"{stem}.safetensors"):
            save_file({"a": np.zeros(4, np.float32)}, folder / name)
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    (one,) = weights.component_weights(tmp_path / "model")
    assert one.name == "model.safetensors"
    (one,) = weights.component_weights(tmp_path / "diffusion_pytorch_model")
    assert one.name == "diffusion_pytorch_model-00001-of-00001.safetensors"


@pytest.mark.parametrize("content", ["[" * 10**5, "{"])
def test_an_index_of_shards_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="no index of shards that can be read"):
        weights.component_weights(tmp_path)
