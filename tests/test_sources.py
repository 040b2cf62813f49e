"""Every way to name a model leads to the same weights; nothing but a hub id touches the network, and the receipt says which."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from hub_cache import COMMIT, fill_cache, serve
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import imagegen
from imagegen.sources import find_source

REPO = "someone/tiny-model"


def draw(model, **settings):
    return model("a", seed=1, num_steps=2, width=64, height=64, **settings)


def assert_same(one, other):
    np.testing.assert_array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))


def assert_same_weights(one, other):
    """Both pipelines hold the same tensors, bit for bit."""
    for name, part in other.components.items():
        if isinstance(part, torch.nn.Module):
            mine, theirs = getattr(one, name).state_dict(), part.state_dict()
            assert mine.keys() == theirs.keys()
            for tensor, value in theirs.items():
                assert mine[tensor].dtype == value.dtype and torch.equal(mine[tensor], value), f"{name}: {tensor}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache."""
    place = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    return place


@pytest.fixture
def online(cache, monkeypatch, folder_of, tmp_path):
    """A hub with one repository, `REPO`, on this machine; the addresses that were asked for."""
    folder = shutil.copytree(folder_of("sd1.5"), tmp_path / "repository")
    for name in ("README.md", "whole.ckpt", "whole.safetensors", "unet/diffusion_pytorch_model.bin", "unet/code.py"):
        (folder / name).write_text("not wanted")
    with serve(REPO, folder) as (address, asked):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        yield asked


def test_from_the_cache_of_the_hub(cache, folder_of, model_of):
    fill_cache(cache, REPO, folder_of("sd1.5"))
    model = imagegen.load(REPO)
    result = draw(model)
    assert_same(result, draw(model_of("sd1.5")))
    recorded = result.pictures[0].receipt.model
    assert (recorded["source"], recorded["revision"]) == (REPO, COMMIT)
    assert recorded["sha256"] == model_of("sd1.5").hashes


def test_revisions_are_told_apart(cache, folder_of):
    other = "f" * 40
    fill_cache(cache, REPO, folder_of("sd1.5"))
    fill_cache(cache, REPO, folder_of("sdxl"), other, "next")
    assert find_source(REPO).revision == COMMIT
    assert find_source(REPO, revision="next").revision == find_source(f"{REPO}@next").revision == other
    assert find_source(REPO, revision=COMMIT, local_files_only=True).path.name == COMMIT
    with pytest.raises(imagegen.ModelError, match=r"at revision 'gone'.*HF_HUB_OFFLINE"):
        find_source(REPO, revision="gone")
    with pytest.raises(imagegen.ModelError, match="names another revision than revision='next': give one"):
        find_source(f"{REPO}@main", revision="next")
    with pytest.raises(imagegen.ModelError, match="must be a branch"):
        find_source(REPO, revision="../../etc")


def test_download_takes_what_the_model_needs(online, cache, folder_of, tmp_path):
    found = find_source(REPO)
    assert found.revision == COMMIT and found.path.is_relative_to(cache)
    assert_same_weights(
        imagegen.load(REPO, dtype="float32").pipeline, imagegen.load(folder_of("sd1.5"), dtype="float32").pipeline
    )
    asked = len(online)
    assert imagegen.load(REPO, local_files_only=True).origin.path == found.path
    assert len(online) == asked
    assert not {"README.md", "whole.ckpt", "whole.safetensors", "diffusion_pytorch_model.bin", "code.py"} & {
        path.name for path in found.path.rglob("*")
    }


def test_a_base_on_the_hub_comes_without_its_denoiser(online, folder_of, model_of):
    file = folder_of("sd1.5") / "unet/diffusion_pytorch_model.safetensors"
    model = imagegen.load(file, base=REPO)
    assert_same_weights(model.pipeline, model_of("sd1.5").pipeline)
    assert draw(model).pictures[0].receipt.model["base"] == f"{REPO}@{COMMIT}"
    fetched = {path for path in online if path.endswith(".safetensors")}
    assert {path.split("/")[-2] for path in fetched} == {"vae", "text_encoder"}


def test_of_a_decoder_nothing_else_is_fetched(online, folder_of):
    imagegen.load(folder_of("sd1.5"), vae=REPO)
    assert {path.split("/")[-2] for path in online if path.endswith(".safetensors")} == {"vae"}


def test_what_the_hub_says_no_to(online, folder_of):
    says = "the hub has no 'someone/else', or it is private, and no such folder is here"
    for given in ({"source": "someone/else"}, {"source": folder_of("sd1.5"), "vae": "someone/else"}):
        with pytest.raises(imagegen.ModelError, match=says):
            find_source(**given)
    with pytest.raises(imagegen.ModelError, match="has no revision 'gone'"):
        find_source(REPO, revision="gone")


def test_what_the_hub_no_longer_has_is_taken_from_the_cache(online, cache, folder_of):
    fill_cache(cache, "someone/gone", folder_of("sd1.5"))
    assert imagegen.load("someone/gone").origin.revision == COMMIT
    assert any("someone/gone" in path for path in online)
    fill_cache(cache, REPO, folder_of("sd1.5"), "e" * 40, "old")
    assert find_source(REPO, revision="old").revision == "e" * 40


def test_a_hub_that_does_not_answer(cache, folder_of, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(imagegen.ModelError, match=r"cannot be had from http://127\.0\.0\.1:9"):
        find_source(REPO)
    fill_cache(cache, REPO, folder_of("sd1.5"))
    assert find_source(REPO).revision == COMMIT


def test_not_in_the_cache_and_not_to_be_asked_for(cache, monkeypatch):
    with pytest.raises(imagegen.ModelError, match="no such folder is here, and HF_HUB_OFFLINE=1 forbids"):
        imagegen.load(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(imagegen.ModelError, match=r"nothing else was asked.*load\(\) without local_files_only=True, downloads"):
        imagegen.load(REPO, local_files_only=True)


NO_SOCKETS = """
import socket, sys
def refuse(*_, **__):
    raise OSError("the network was asked for")
socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refuse
import imagegen
for source, more in {sources!r}:
    model = imagegen.load(source, **more)
    model("a", seed=1, num_steps=1, width=64, height=64)
print("made")
"""


def test_local_sources_open_no_socket(folder_of, tmp_path):
    folder = str(folder_of("sd1.5"))
    hub = tmp_path / "hub"
    fill_cache(hub, REPO, folder_of("sd1.5"))
    sources = [
        ("emoji", {}),
        (folder, {"vae": f"{folder}/vae"}),
        (REPO, {"local_files_only": True}),
        (str(folder_of("flux")), {}),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"HF_HUB_CACHE": str(hub)}
    command = [sys.executable, "-c", NO_SOCKETS.format(sources=sources)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "made\n", done.stderr[-2000:]


def shard(folder, parts=2):
    """Split a component's weights into shards with an index, as large models come."""
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    names, index = sorted(tensors), {}
    for part in range(parts):
        name = f"diffusion_pytorch_model-{part + 1:05}-of-{parts:05}.safetensors"
        mine = names[part::parts]
        save_file({key: tensors[key] for key in mine}, folder / name, {"format": "pt"})
        index |= dict.fromkeys(mine, name)
    (folder / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    file.unlink()


def test_shards(folder_of, model_of, tmp_path):
    folder = shutil.copytree(folder_of("sd1.5"), tmp_path / "sharded")
    shard(folder / "unet")
    model = imagegen.load(folder)
    assert_same_weights(model.pipeline, model_of("sd1.5").pipeline)
    assert sorted(name for name in model.hashes if name.startswith("unet/")) == [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    ]


def test_variant(folder_of, model_of, tmp_path):
    folder = shutil.copytree(folder_of("sd1.5"), tmp_path / "variants")
    for component in ("unet", "vae", "text_encoder"):
        (plain,) = (folder / component).glob("*.safetensors")
        half = {name: value.half() if value.is_floating_point() else value for name, value in load_file(plain).items()}
        save_file(half, plain.with_suffix(".fp16.safetensors"), {"format": "pt"})
    model = imagegen.load(folder, variant="fp16", dtype="float32")
    assert {name.rpartition("/")[2].split(".")[1] for name in model.hashes} == {"fp16"}
    expected = model_of("sd1.5").pipeline.unet.state_dict()
    for name, value in model.pipeline.unet.state_dict().items():
        assert torch.equal(value, expected[name].half().float()), name
    assert_same_weights(imagegen.load(folder).pipeline, model_of("sd1.5").pipeline)
    assert draw(model).pictures[0].receipt.model["variant"] == "fp16"
    with pytest.raises(imagegen.ModelError, match=r"has no variant 'fp17': leave variant= out, or give one of its own: fp16"):
        imagegen.load(folder, variant="fp17")
    for file in folder.glob("*/*model.safetensors"):
        file.unlink()
    with pytest.raises(imagegen.ModelError, match=r"give variant= for those of a variant"):
        imagegen.load(folder)
    unet, plain = folder_of("sd1.5") / "unet/diffusion_pytorch_model.safetensors", folder_of("sd1.5")
    made = draw(imagegen.load(unet, base=folder, variant="fp16", dtype="float32"))
    assert "text_encoder/model.fp16.safetensors" in made.pictures[0].receipt.model["sha256"]
    assert imagegen.replay(made.save(tmp_path / "out")[0]).same
    with pytest.raises(imagegen.ModelError, match=r"has no variant 'fp16': leave variant= out"):
        imagegen.load(unet, base=plain, variant="fp16")
    with pytest.raises(imagegen.ModelError, match=r"variant='fp16' is for folders and hub ids"):
        imagegen.load(unet, variant="fp16")
    for source in (plain, unet):  # it is the decoder alone that has it
        decoded = imagegen.load(source, vae=folder / "vae", variant="fp16", base=plain if source == unet else None)
        assert "vae/diffusion_pytorch_model.fp16.safetensors" in decoded.hashes
    both = shutil.copytree(plain, tmp_path / "plain and a half")
    shutil.copy(folder / "unet/diffusion_pytorch_model.fp16.safetensors", both / "unet")
    decoded = imagegen.load(both, vae=folder / "vae", variant="fp16")
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in decoded.hashes
    assert "text_encoder/model.safetensors" in decoded.hashes  # which lacks the variant


def test_what_is_loaded_says_what_to_compute_in(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("flux"), tmp_path / "model")
    for file in list(folder.glob("*/*.safetensors")):
        coarse = {name: value.bfloat16() if value.is_floating_point() else value for name, value in load_file(file).items()}
        save_file(coarse, file.with_suffix(".bf16.safetensors"), {"format": "pt"})
    assert imagegen.load(folder, variant="bf16").dtype == torch.bfloat16
    assert imagegen.load(folder).dtype == torch.float32


def test_a_receipt_names_a_local_model_from_anywhere(folder_of, tmp_path, monkeypatch):
    shutil.copytree(folder_of("sd1.5"), tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    made = draw(imagegen.load("models/mine", vae="models/mine/vae"))
    recorded = made.pictures[0].receipt.model
    assert (recorded["source"], recorded["vae"]) == (f"{tmp_path}/models/mine", f"{tmp_path}/models/mine/vae")
    (path,) = made.save(tmp_path)
    monkeypatch.chdir("/")
    assert imagegen.replay(path).same


def test_defaults_do_not_depend_on_how_a_model_is_named(cache, folder_of, tmp_path, monkeypatch):
    snapshot = fill_cache(cache, "stabilityai/sdxl-turbo", folder_of("sdxl"))
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    for source in ("stabilityai/sdxl-turbo", snapshot, tmp_path / "link", "."):
        family = imagegen.load(source).family
        assert (family.num_steps, family.guidance, family.guided_by) == (1, 1.0, "nothing"), source
    file = shutil.copy(snapshot / "unet/diffusion_pytorch_model.safetensors", tmp_path / "sd_xl_turbo_1.0_fp16.safetensors")
    assert imagegen.load(file, base=folder_of("sdxl")).family.num_steps == 1


def test_a_home_folder(folder_of, tmp_path, monkeypatch):
    shutil.copytree(folder_of("sd1.5"), tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    unet = "~/mine/unet/diffusion_pytorch_model.safetensors"
    model = imagegen.load(unet, base="~/mine", vae="~/mine/vae")
    assert model.source == f"{tmp_path}/mine/unet/diffusion_pytorch_model.safetensors"
    assert find_source("~/mine").path == tmp_path / "mine"
    with pytest.raises(imagegen.ModelError, match="no folder '~nobody-of-that-name/x'"):
        find_source("~nobody-of-that-name/x")


def test_a_decoder_stands_in_for_one_that_is_missing(folder_of, tmp_path):
    whole = imagegen.load(folder_of("sd1.5"))
    folder = shutil.copytree(folder_of("sd1.5"), tmp_path / "model")
    vae = shutil.move(folder / "vae", tmp_path / "vae")
    assert_same_weights(imagegen.load(folder, vae=vae).pipeline, whole.pipeline)
    with pytest.raises(imagegen.ModelError, match=r"is one file, and .*vae' has no config\.json for it: give a decoder.s folder"):
        imagegen.load(folder, vae=vae / "diffusion_pytorch_model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    assert_same_weights(imagegen.load(folder, vae=vae).pipeline, whole.pipeline)


def test_a_component_that_was_saved_as_none_stays_none(folder_of, tmp_path):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder_of("sd3"), text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    model = imagegen.load(tmp_path, dtype="float32")
    assert model.pipeline.text_encoder_3 is None
    settings = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 2.0}
    theirs = pipeline("a cat", generator=torch.Generator().manual_seed(1), **settings).images[0]
    mine = model("a cat", seed=1, width=64, height=64, num_steps=2, guidance=2.0).images[0]
    assert mine.tobytes() == theirs.tobytes()


def test_a_decoder_of_its_own(folder_of, model_of, tmp_path):
    torch.manual_seed(7)
    own = model_of("sd1.5").pipeline.vae
    other = AutoencoderKL.from_config(own.config).eval()
    other.save_pretrained(tmp_path / "decoder")
    file = tmp_path / "decoder" / "diffusion_pytorch_model.safetensors"
    for vae in (tmp_path / "decoder", file):
        model = imagegen.load(folder_of("sd1.5"), vae=vae)
        for name, value in other.state_dict().items():
            assert torch.equal(model.pipeline.vae.state_dict()[name], value), name
        recorded = draw(model).pictures[0].receipt.model
        assert recorded["vae"] == str(vae) and "vae/diffusion_pytorch_model.safetensors" in recorded["sha256"]
    with pytest.raises(imagegen.ModelError, match="latents of 16 channels, and this model has 4"):
        imagegen.load(folder_of("sd1.5"), vae=folder_of("flux") / "vae")
    with pytest.raises(imagegen.ModelError, match="is a UNet2DConditionModel, no decoder"):
        imagegen.load(folder_of("sd1.5"), vae=folder_of("sd1.5") / "unet")


def test_a_receipt_finds_the_model_again(cache, folder_of, tmp_path):
    fill_cache(cache, REPO, folder_of("sd1.5"))
    result = draw(imagegen.load(REPO, vae=folder_of("sd1.5") / "vae"))
    (path,) = result.save(tmp_path)
    assert imagegen.replay(path).same


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"source": "emoji", "revision": "main"}, "revision='main' is for hub ids"),
        ({"source": "emoji", "base": "x"}, "base='x' is for one file"),
        ({"source": "https://example.com/m.safetensors"}, "is an address"),
        ({"source": "no/such/folder"}, "no folder"),
        ({"source": "emoji", "vae": "nowhere"}, "vae='nowhere' is not there"),
        ({"source": "a\0b"}, "no folder"),
        ({"source": ""}, "has an empty name"),
        ({"source": None}, "a model must be a name or a path, got None"),
        ({"source": 3}, "a model must be a name or a path, got 3"),
        ({"source": "emoji", "vae": 3}, "vae= must be a name or a path, got 3"),
        ({"source": "emoji", "variant": "fp16"}, "has no variant 'fp16'"),
        ({"source": "emoji", "device": "vulkan"}, r"device 'vulkan' is not here \(.*use cpu"),
        ({"source": "emoji", "device": "mps"}, r"device 'mps' is not here"),
        ({"source": "emoji", "device": "meta"}, "device 'meta' holds no values"),
        ({"source": "emoji", "dtype": "float8_e4m3fn"}, "unknown dtype 'float8_e4m3fn'"),
    ],
)
def test_wrong_ways_to_name_a_model(given, says):
    with pytest.raises(imagegen.ModelError, match=says):
        imagegen.load(**given)
