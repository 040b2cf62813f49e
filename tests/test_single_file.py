"""A model in one file, in the layouts of other tools, is the model in diffusers' layout bit for bit."""

import shutil

import gguf
import layouts
import numpy as np
import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file
from test_sources import assert_same, assert_same_weights, draw

import imagegen
from imagegen.families.components import classes_of
from imagegen.families.denoisers import made_in
from imagegen.families.single_file import clip_tokenizer
from imagegen.fidelity import max_difference
from imagegen.sources import BUILT_IN, bases_folder, find_source, read_index


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made = {}

    def write(name):
        if name not in made:
            made[name] = layouts.write(name, tmp_path_factory.mktemp(name))
        return made[name]

    return write


def aligned(model):
    """Copy the weights out of the mapped file: products of matrices round by where in memory their rows begin."""
    for part in model.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for weight in part.parameters():
                weight.data = weight.data.clone()
    return model


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_one_file_is_the_folder(written, name):
    folder, file = written(name)
    model, other = imagegen.load(file, base=folder), imagegen.load(folder)
    assert_same_weights(model.pipeline, other.pipeline)
    result = draw(aligned(model))
    assert_same(result, draw(aligned(other)))
    recorded = result.pictures[0].receipt.model
    assert recorded["source"] == str(file) and recorded["base"] == str(folder)
    assert list(recorded["sha256"]) == [file.name]


def test_a_file_without_text_encoders_takes_its_bases(written, tmp_path):
    folder, file = written("sd3")
    kept = {name: value for name, value in load_file(file).items() if not name.startswith("text_encoders.t5xxl")}
    save_file(kept, tmp_path / "part.safetensors")
    model = imagegen.load(tmp_path / "part.safetensors", base=folder)
    assert_same_weights(model.pipeline, imagegen.load(folder).pipeline)
    assert sorted(model.hashes) == ["part.safetensors", "text_encoder_3/model.safetensors"]


@pytest.mark.parametrize("name", ["sd1", "sd3"])
@pytest.mark.parametrize("layout", ["original", "bare", "diffusers"])
def test_a_denoiser_alone(written, tmp_path, name, layout):
    folder, file = written(name)
    path = tmp_path / "denoiser.safetensors"
    if layout == "diffusers":
        part = "unet" if name == "sd1" else "transformer"
        shutil.copy(folder / part / "diffusion_pytorch_model.safetensors", path)
    else:
        prefix = "model.diffusion_model."
        own = {key: value for key, value in load_file(file).items() if key.startswith(prefix)}
        save_file({key.removeprefix(prefix if layout == "bare" else ""): value for key, value in own.items()}, path)
    model, other = imagegen.load(path, base=folder), imagegen.load(folder)
    assert_same_weights(model.pipeline, other.pipeline)
    assert_same(draw(aligned(model)), draw(aligned(other)))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_decoder_in_the_original_layout(written, tmp_path, name):
    folder, file = written(name)
    tensors = load_file(file)
    prefix = "first_stage_model."
    save_file({key: value for key, value in tensors.items() if key.startswith(prefix)}, tmp_path / "vae.safetensors")
    rest = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    save_file(rest, tmp_path / "rest.safetensors")
    for source in ({"source": folder}, {"source": tmp_path / "rest.safetensors", "base": folder}):
        model = imagegen.load(**source, vae=tmp_path / "vae.safetensors")
        assert_same_weights(model.pipeline, imagegen.load(folder).pipeline)


def test_a_file_of_another_size_than_its_base(written):
    with pytest.raises(imagegen.ModelError, match=r"sd1\.safetensors' cannot be loaded"):
        imagegen.load(written("sd1")[1])  # the base that ships with the package is Stable Diffusion 1's
    with pytest.raises(imagegen.ModelError, match="is a StableDiffusionXLPipeline: give"):
        imagegen.load(written("sd1")[1], base=written("sdxl")[0])


def test_a_base_of_another_kind(written, folder_of, model_of, tmp_path):
    for name, base in (("sd1", "sd3"), ("sd3", "sd1.5"), ("sd1", "sdxl")):
        with pytest.raises(
            imagegen.ModelError, match=r"is a Stable Diffusion . model, and base=.* is a StableDiffusion.*: give the model"
        ):
            imagegen.load(written(name)[1], base=folder_of(base))
    for name, base, says in (
        ("flux", "flux-schnell", "is guided by an input, as"),
        ("flux-schnell", "flux", "is not guided, as"),
    ):
        save_file(layouts.flux_transformer(model_of(name).pipeline.transformer), tmp_path / "flux.safetensors")
        with pytest.raises(imagegen.ModelError, match=rf"{says} FLUX.*, and base="):
            imagegen.load(tmp_path / "flux.safetensors", base=folder_of(base))


def test_a_base_without_what_the_file_lacks_is_named(written, folder_of, tmp_path):
    own = {name: value for name, value in load_file(written("sd1")[1]).items() if not name.startswith("cond_stage_model.")}
    save_file(own, tmp_path / "part.safetensors")
    base = shutil.copytree(folder_of("sd1.5"), tmp_path / "base")
    (base / "text_encoder/model.safetensors").unlink()
    with pytest.raises(imagegen.ModelError, match=r"holds no text_encoder, and neither does base='.*base': give another base="):
        imagegen.load(tmp_path / "part.safetensors", base=base)


def test_a_file_that_lacks_what_no_base_has(written, tmp_path):
    tensors = load_file(written("sd1")[1])
    save_file({key: value for key, value in tensors.items() if "first_stage" not in key}, tmp_path / "part.safetensors")
    with pytest.raises(imagegen.ModelError, match="holds no vae: give vae=, or base="):
        imagegen.load(tmp_path / "part.safetensors")
    with pytest.raises(imagegen.ModelError, match="holds a T5 text encoder, whose tokenizer does not ship"):
        imagegen.load(written("sd3")[1])


def test_flux_in_diffusers_layout(folder_of, model_of):
    file = folder_of("flux") / "transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(imagegen.ModelError, match=r"a FLUX transformer in diffusers' layout alone.*give base="):
        imagegen.load(file)
    assert_same_weights(imagegen.load(file, base=folder_of("flux")).pipeline, model_of("flux").pipeline)


@pytest.mark.slow  # the official width: diffusers reads no other of this layout
def test_flux_in_the_original_layout(folder_of, tmp_path):
    folder = shutil.copytree(folder_of("flux"), tmp_path / "base")
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    with made_in("cpu", torch.bfloat16):
        wide = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
        transformer = tiny_families.flux_transformer(**wide)
    transformer.save_config(folder / "transformer")
    save_file(layouts.flux_transformer(transformer), tmp_path / "flux.safetensors")
    model = imagegen.load(tmp_path / "flux.safetensors", base=folder, dtype="bfloat16")
    expected = transformer.state_dict()
    assert model.pipeline.transformer.state_dict().keys() == expected.keys()
    for name, value in model.pipeline.transformer.state_dict().items():
        assert torch.equal(value, expected[name]), name


# Numbers of parameters as published, of the denoiser, the decoder and the text encoders.
PUBLISHED = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd3": {"vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("layout", BUILT_IN)
def test_the_configurations_that_ship_are_the_published_models(layout):
    folder = bases_folder() / layout
    kinds = classes_of(folder, read_index(folder))
    for name, published in PUBLISHED[layout].items():
        with torch.device("meta"):
            if hasattr(kinds[name], "load_config"):
                made = kinds[name].from_config(kinds[name].load_config(folder / name))
            else:
                made = kinds[name](kinds[name].config_class.from_pretrained(folder / name))
        assert sum(weight.numel() for weight in made.parameters()) == published, name


def test_clips_tokenizer_reads_as_published():
    tokenizer = clip_tokenizer(bases_folder() / "sdxl/tokenizer")
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    # Source: the example of https://huggingface.co/openai/clip-vit-large-patch14, "a photo of a cat".
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = clip_tokenizer(bases_folder() / "sdxl/tokenizer_2")("A PHOTO", padding="max_length").input_ids
    assert padded[:5] == [49406, 320, 1125, 49407, 0] and len(padded) == 77


def quantised(tensors, path):
    """Write a GGUF file: matrices in 8 bits, everything else in float32; return what it stands for."""
    writer, values = gguf.GGUFWriter(str(path), "sd3"), {}
    for name, value in tensors.items():
        array = value.numpy()
        if array.ndim == 2 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            values[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind).astype(np.float32))
        else:
            writer.add_tensor(name, array)
            values[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_gguf_draws_what_its_numbers_draw(written, tmp_path):
    folder, file = written("sd3")
    prefix = "model.diffusion_model."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}
    values = quantised(tensors, tmp_path / "model-Q8_0.gguf")
    save_file({key: value.contiguous() for key, value in values.items()}, tmp_path / "values.safetensors")
    model = imagegen.load(tmp_path / "model-Q8_0.gguf", base=folder, dtype="float32")
    result = draw(model)
    other = draw(imagegen.load(tmp_path / "values.safetensors", base=folder, dtype="float32"))
    assert max_difference(result.images[0], other.images[0]) <= 1  # diffusers rounds each number once more, to float16
    assert "model-Q8_0.gguf" in result.pictures[0].receipt.model["sha256"]
    with pytest.raises(imagegen.ModelError, match=r"a Stable Diffusion 3 transformer alone.*give base="):
        imagegen.load(tmp_path / "model-Q8_0.gguf")


def test_gguf_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(imagegen.ModelError, match=r"imagegen-diffusion\[gguf\]"):
        find_source(tmp_path / "m.gguf")
