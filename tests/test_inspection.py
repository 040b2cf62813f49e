"""Every fault of a model's files is found and named without building the model; a whole one has none."""

import json
import shutil
from pathlib import Path

import layouts
import pytest
import torch
from hub_cache import fill_cache
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_single_file import quantised

import imagegen
from imagegen.inspection import inspect
from imagegen.loader import find_model
from imagegen.sources import find_source
from imagegen.weights import hash_weights

FIXTURES = Path(__file__).parent / "fixtures"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(folder_of, tmp_path):
    return shutil.copytree(folder_of("sd1.5"), tmp_path / "model")


def faults(source, **settings):
    found = inspect(find_source(source, **settings))
    assert found.ok == (not any(found.files.values()))
    return {name: wrong for name, wrong in found.files.items() if wrong}


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["sd1.5", "sdxl", "sd3", "flux", "sana", "qwen-image"])
def test_whole_models_have_no_faults(folder_of, name):
    found = inspect(find_source(folder_of(name)))
    assert found.ok and len(found.files) >= 3
    assert found.notes == ["no hashes are recorded: neither by the hub's cache nor in SHA256SUMS"]


def test_every_tensor_is_compared(folder):
    def edit(tensors):
        del tensors["conv_out.bias"]
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:8].clone()
        tensors["time_embedding.linear_1.weight"] = tensors["time_embedding.linear_1.weight"].to(torch.int8)

    def edit_text(tensors):
        del tensors["final_layer_norm.bias"]
        tensors["final_layer_norm.weight"] = torch.zeros(3)

    change(folder / UNET, edit)
    change(folder / TEXT, edit_text)
    assert faults(folder) == {
        UNET: [
            "lacks 'conv_out.bias'",
            "'conv_in.weight' is [8, 4, 3, 3], and its config.json says [16, 4, 3, 3]",
            "is quantised (weights of dtype I8), which its config.json does not name",
        ],
        TEXT: ["lacks 'final_layer_norm.bias'", "'final_layer_norm.weight' is [3], and its config.json says [32]"],
    }


def test_tensors_too_many_are_a_note_where_they_load(folder):
    change(folder / TEXT, lambda tensors: tensors.update(extra=torch.zeros(2)))
    found = inspect(find_source(folder))
    assert found.ok and "text_encoder holds 1 tensors that a CLIPTextModel does not use, 'extra' first" in found.notes
    change(folder / UNET, lambda tensors: tensors.update(extra=torch.zeros(2)))
    assert faults(folder) == {UNET: ["holds 1 tensors that a UNet2DConditionModel does not use, 'extra' first"]}


def test_faults_are_counted_where_there_are_many(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"block_out_channels": [32, 64]}))
    (wrong,) = faults(folder).values()
    assert len(wrong) == 9 and wrong[-1].endswith("faults more")


def test_several_files_each_have_their_own(folder):
    (folder / UNET).write_text("<html>")
    (folder / TEXT).unlink()
    found = faults(folder)
    assert found.keys() == {UNET, "text_encoder"}
    assert "a web page" in found[UNET][0] and "lacks its weights" in found["text_encoder"][0]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["own", "Y"]}))
    assert "code of its own" in faults(folder)["model_index.json"][0]


def test_hashes_that_sha256sum_wrote(folder):
    lines = [f"{digest}  {name}" for name, digest in hash_weights(folder).items()]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    found = inspect(find_source(folder))
    assert found.ok and found.notes == []
    flip_a_bit(folder / UNET)
    (wrong,) = faults(folder)[UNET]
    assert wrong.startswith("its hash is ") and "is recorded: damaged or changed" in wrong


def test_hashes_that_the_hubs_cache_keeps(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = fill_cache(tmp_path, "someone/tiny", folder_of("sd1.5"))
    assert faults("someone/tiny") == {}
    flip_a_bit((place / UNET).resolve())
    assert "is recorded: damaged" in faults("someone/tiny")[UNET][0]


SMALL = ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("name", SMALL)
def test_every_file_that_the_hub_hashed_is_held_against_it(folder_of, tmp_path, monkeypatch, name):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = fill_cache(tmp_path, "someone/tiny", folder_of("sd1.5"))
    assert set(SMALL) < inspect(find_source("someone/tiny")).files.keys()
    file = (place / name).resolve()
    file.write_bytes(file.read_bytes() + b" ")
    assert "is recorded: damaged" in faults("someone/tiny")[name][0]


def test_an_empty_file_has_a_hash_too(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = shutil.copytree(folder_of("sd1.5"), tmp_path / "model")
    (folder / "tokenizer" / "added.txt").write_bytes(b"")
    fill_cache(tmp_path / "hub", "someone/tiny", folder)
    assert faults("someone/tiny") == {}


def test_a_download_that_was_cut_off_is_told_file_by_file(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = fill_cache(tmp_path, "someone/tiny", folder_of("sd1.5"))
    for name in (UNET, "scheduler/scheduler_config.json"):
        (place / name).resolve().unlink()
    found = faults("someone/tiny")
    assert found[UNET] == ["is a link to a file that is not here: a download that was cut off; download it again"]
    assert found.keys() == {UNET, "scheduler/scheduler_config.json", "scheduler"}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("scheduler/scheduler_config.json", None, "scheduler"),
        ("scheduler/scheduler_config.json", "{", "scheduler"),
        ("scheduler/scheduler_config.json", "[" * 10**5, "scheduler"),
        ("tokenizer/tokenizer.json", None, "tokenizer"),
        ("tokenizer/tokenizer_config.json", "{", "tokenizer"),
    ],
)
def test_what_has_no_weights_is_read(folder, name, content, part):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    assert faults(folder).keys() == {part}
    with pytest.raises(imagegen.ModelError):
        imagegen.load(folder)


@pytest.mark.parametrize(("part", "kind"), [("text_encoder", "AutoModel"), ("tokenizer", "AutoTokenizer")])
def test_no_code_that_comes_with_weights_is_run(folder, tmp_path, part, kind):
    mark = tmp_path / "executed"
    (folder / part / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    for file in (folder / part).glob("*config.json"):
        own = {"auto_map": {kind: "own.Own", "AutoConfig": "own.Own"}, "model_type": "own"}
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: ["transformers", kind]}))
    assert faults(folder) == {part: [f"{str(folder / part)!r} is named as a {kind}, which diffusers does not load"]}
    with pytest.raises(imagegen.ModelError):
        imagegen.load(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("part", "how"),
    [
        ("unet", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("unet", {"quant_method": "quanto"}),
        ("unet", {"a": 1}),
        ("unet", "x"),
        ("text_encoder", {"quant_method": "quanto"}),
        ("text_encoder", "x"),
    ],
)
def test_a_quantisation_that_cannot_be_read(folder, part, how):
    config = json.loads((folder / part / "config.json").read_text())
    (folder / part / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    ((wrong,),) = faults(folder).values()
    assert "cannot be loaded" in wrong
    with pytest.raises(imagegen.ModelError, match="cannot be loaded"):
        imagegen.load(folder)


def test_a_decoder_of_its_own_is_checked(folder, tmp_path):
    whole = shutil.copytree(folder / "vae", tmp_path / "vae")
    file = whole / "diffusion_pytorch_model.safetensors"
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()  # not needed
    assert faults(folder, vae=whole) == faults(folder, vae=file) == {}
    change(file, lambda tensors: tensors.pop("decoder.conv_in.bias"))
    for vae in (whole, file):
        assert "lacks" in faults(folder, vae=vae)["vae"][0]
    (tmp_path / "vae" / "SHA256SUMS").write_text(f"{'0' * 64}  {file.name}\n")
    for vae in (whole, file):
        assert "is recorded: damaged" in faults(folder, vae=vae)[f"vae/{file.name}"][0]


def test_a_gguf_file_is_compared_with_its_base(tmp_path):
    folder, file = layouts.write("sd3", tmp_path)
    prefix = "model.diffusion_model."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}
    quantised(tensors, tmp_path / "whole.gguf")
    assert faults(tmp_path / "whole.gguf", base=folder) == {}
    bias = "joint_blocks.0.x_block.mlp.fc1.bias"
    quantised({name: value for name, value in tensors.items() if name != bias}, tmp_path / "lacking.gguf")
    with pytest.raises(imagegen.ModelError):
        imagegen.load(tmp_path / "lacking.gguf", base=folder)
    found = faults(tmp_path / "lacking.gguf", base=folder)["lacking.gguf"]
    assert any("transformer_blocks.0.ff.net.0.proj.bias" in one or bias in one for one in found)
    quantised(tensors | {bias: torch.zeros(3)}, tmp_path / "shape.gguf")
    assert faults(tmp_path / "shape.gguf", base=folder)["shape.gguf"] == [
        "'transformer_blocks.0.ff.net.0.proj.bias' is [3], and its base says [128]"
    ]
    (folder / "scheduler/scheduler_config.json").write_text("{")
    assert faults(tmp_path / "whole.gguf", base=folder).keys() == {"base/scheduler"}


def test_a_base_is_held_against_its_hashes(tmp_path):
    folder, file = layouts.write("sd1", tmp_path)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  scheduler/scheduler_config.json\n")
    assert "is recorded: damaged" in faults(file, base=folder)["base/scheduler/scheduler_config.json"][0]


def test_hashes_of_a_download_into_a_folder(folder):
    note = folder / ".cache/huggingface/download" / f"{UNET}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{hash_weights(folder)[UNET]}\n1700000000.0\n")
    assert faults(folder) == {}
    flip_a_bit(folder / UNET)
    assert "is recorded: damaged" in faults(folder)[UNET][0]


def test_one_file(tmp_path):
    folder, file = layouts.write("sd1", tmp_path)
    assert faults(file, base=folder) == {}
    change(file, lambda tensors: tensors.pop("model.diffusion_model.out.2.bias"))
    (wrong,) = faults(file, base=folder)["sd1.safetensors"]
    assert "lacks tensors that its configuration, or its base's, names" in wrong


@pytest.mark.parametrize("name", ["janusflow-tiny", "janus-pro-tiny/safetensors"])
def test_janus(tmp_path, name):
    folder = shutil.copytree(FIXTURES / name, tmp_path / "model")
    file = folder / "model.safetensors"
    assert inspect(*find_model(folder, {})).ok
    (name,) = (name for name in load_file(file) if name.endswith("language_model.model.embed_tokens.weight"))
    change(file, lambda tensors: tensors.pop(name))
    assert list(inspect(*find_model(file, {})).files["config.json"])
    flip_a_bit(file)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    assert "is recorded: damaged" in inspect(*find_model(folder, {})).files["model.safetensors"][0]


def test_nothing_is_built_in_memory(folder, monkeypatch):
    """No tensor of a float type is made outside of the meta device."""
    made = []
    empty = torch.empty

    def watched(*shape, **settings):
        value = empty(*shape, **settings)
        if not value.is_meta and value.numel() > 256:
            made.append(tuple(value.shape))
        return value

    monkeypatch.setattr(torch, "empty", watched)
    assert faults(folder) == {}
    assert made == []
