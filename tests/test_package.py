"""The wheel carries the embedded model and works outside the checkout, with the network blocked."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import imagegen

ROOT = Path(__file__).parent.parent
NO_NETWORK = """
import socket, sys
def refuse(*_, **__):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from imagegen import __file__ as where
from imagegen.cli import run
assert where.startswith(sys.argv[1]), where
sys.exit(run(["generate", "a red apple", "--seed", "7", "--steps", "2"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_what_the_wheel_carries(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.removeprefix("imagegen/weights/emoji/") for name in names if name.startswith("imagegen/weights/emoji/")}
    for part in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "model_index.json"):
        assert part in inside
    assert {"LICENSE-MiniLM", "README.md", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= inside
    assert not [name for name in names if "emoji/recipe" in name or "samples" in name or name.startswith("tests")]
    assert "references/reference.json" in inside
    assert {"imagegen/receipt.schema.json", "imagegen/report.html", "imagegen/prompts.json"} <= set(names)
    bases = {name.removeprefix("imagegen/bases/") for name in names if name.startswith("imagegen/bases/")}
    assert {"sdxl/unet/config.json", "clip-merges.txt.gz", "LICENSE-CLIP"} <= bases
    assert wheel.name.startswith("imagegen_diffusion-")
    assert wheel.stat().st_size < 100e6


def test_works_in_an_empty_directory_without_the_network(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "IMAGEGEN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", NO_NETWORK, str(site)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in here.iterdir()] == ["7-a-red-apple.png"]
    assert imagegen.read_receipt(here / "7-a-red-apple.png").model["source"] == "emoji"
