"""Of a repository, the files that make the model are taken, and no others; what is no hub id is not asked for."""

import pytest

from imagegen import ModelError
from imagegen.hub import choose_files, parse_id

INDEX = {
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "X"],
    "safety_checker": [None, None],
}  # fmt: skip
PLAIN = ["model_index.json", "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json"]
FILES = [
    *PLAIN, "README.md", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/custom.py", "unet/model.onnx",
    "safety_checker/model.safetensors", "safety_checker/config.json", "flax/unet.msgpack", "unet/diffusion_flax_model.msgpack",
]  # fmt: skip


def test_one_set_of_weights_and_no_code():
    assert choose_files("a/b", FILES, INDEX, None) == [*PLAIN, "unet/diffusion_pytorch_model.safetensors"]
    assert choose_files("a/b", FILES, INDEX, "fp16") == [*PLAIN, "unet/diffusion_pytorch_model.fp16.safetensors"]


def test_shards_come_with_their_index():
    shards = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    half = [f"unet/diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    indices = ["unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.safetensors.index.fp16.json"]
    files = [*PLAIN, *shards, *half, *indices]
    assert choose_files("a/b", files, INDEX, None) == sorted([*PLAIN, *shards, indices[0]])
    assert choose_files("a/b", files, INDEX, "fp16") == sorted([*PLAIN, *half, indices[1]])


def test_a_repository_without_components():
    files = ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "vae/config.json", "figures/a.png"]
    files += ["vae/diffusion_pytorch_model.safetensors"]
    wanted = {"config.json", "tokenizer.json", "model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert set(choose_files("a/b", files, None, None)) == wanted
    assert "pytorch_model.bin" in choose_files("a/b", ["config.json", "pytorch_model.bin"], None, None)


def test_one_component_of_a_model():
    index = INDEX | {"vae": ["diffusers", "AutoencoderKL"]}
    vae = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert choose_files("a/b", [*FILES, *vae], index, "fp16", only="vae") == ["model_index.json", *vae]
    with pytest.raises(ModelError, match="has no vae"):
        choose_files("a/b", FILES, INDEX, None, only="vae")
    alone = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert choose_files("a/b", [*alone, "sdxl_vae.safetensors"], None, "fp16", only="vae") == alone


def test_what_is_no_model_is_refused_before_it_is_fetched():
    loras = [f"lightning_{n}step_lora.safetensors" for n in range(1, 8)]
    with pytest.raises(ModelError, match=r"lightning_1step_lora\.safetensors, .* and 2 more: download the one you want"):
        choose_files("a/b", [*loras, "README.md"], None, None)
    with pytest.raises(ModelError, match=r"It holds pytorch_lora_weights\.safetensors"):
        choose_files("a/b", ["config.json", "pytorch_lora_weights.safetensors"], None, None)


@pytest.mark.parametrize(
    ("files", "index", "variant", "says"),
    [
        (["model_index.json", "unet/diffusion_pytorch_model.bin"], INDEX, None, "no plain safetensors for unet: pickles"),
        (["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors"], INDEX, None, "there is variant=fp16"),
        (FILES, INDEX, "bf16", "has no variant 'bf16'"),
        (["README.md"], None, None, "holds no safetensors that make a model"),
    ],
)
def test_what_is_missing(files, index, variant, says):
    with pytest.raises(ModelError, match=says):
        choose_files("a/b", files, index, variant)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("org/name", ("org/name", None)),
        ("org/name-1.5_x@refs/pr/3", ("org/name-1.5_x", "refs/pr/3")),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("name", None),
        ("a/b/c", None),
        ("../up", None),
        ("org/..", None),
        ("folder/model.safetensors", None),
        ("/absolute/path", None),
        ("org/na me", None),
    ],
)
def test_what_is_a_hub_id(name, found):
    assert parse_id(name) == found
