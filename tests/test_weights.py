"""Weight files are hashed once, and a broken one is found without building the model."""

import hashlib
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


def test_truncated_file_is_named(folder):
    file = folder / "unet/w.safetensors"
    assert weights.check_weights(folder) == {"unet/w.safetensors": []}
    file.write_bytes(file.read_bytes()[:-10])
    assert "truncated" in weights.check_weights(folder)["unet/w.safetensors"][0]


def test_a_web_page_is_no_weight_file(folder):
    (folder / "unet/w.safetensors").write_text("<!DOCTYPE html><html>404</html>" * 10)
    assert "cannot be read" in weights.check_weights(folder)["unet/w.safetensors"][0]


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path, length):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert weights.read_header(tmp_path / "w.safetensors")["a"].shape == (1,)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(ModelError, match=r"holds no \.safetensors"):
        weights.check_weights(tmp_path)
