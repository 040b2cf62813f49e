"""What is no model, or a broken one, is told by name before it is loaded, with the way out; and none of it runs code."""

import json
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import imagegen
from imagegen.sources import find_source

UNET = "unet/diffusion_pytorch_model.safetensors"


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture
def broken(folder_of, tmp_path):
    """A copy of a tiny model, to be broken."""
    return shutil.copytree(folder_of("sd1.5"), tmp_path / "broken")


def refuse(source, says, **settings):
    with pytest.raises(imagegen.ModelError, match=says):
        imagegen.load(source, **settings)


def edit(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


def raw(path, header, data=b""):
    """Write a safetensors file with any header."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(begin, end, shape=(1,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def index_of(folder, shards):
    """Replace a UNet's file by an index that names these shards."""
    (folder / UNET).rename(folder / "unet/kept.safetensors")
    weight_map = {f"tensor{n}": shard for n, shard in enumerate(shards)}
    (folder / f"{UNET}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FILES = {
    "a truncated file": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "truncated"),
    "an empty file": (lambda p: p.write_bytes(b""), "it is empty"),
    "a web page": (lambda p: p.write_text("<!DOCTYPE html><html>404</html>"), "it is a web page, not weights"),
    "a server's answer": (lambda p: p.write_text('{"error":"Repository not found"}'), "a server's answer"),
    "a git-lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
        "a pointer of git-lfs.*git lfs pull",
    ),
    "a pickle by another name": (lambda p: torch.save({"a": torch.zeros(1)}, p), "a pickle or a zip.*not opened"),
    "an absurd header": (lambda p: p.write_bytes(struct.pack("<Q", 2**60) + b"{}"), "header takes 1152921504606846976 bytes"),
    "a header that is no JSON": (lambda p: raw(p, b"{{{{"), "cannot be read"),
    "overlapping tensors": (lambda p: raw(p, {"a": tensor(0, 4), "b": tensor(2, 6)}, b"\0" * 6), "cannot be read"),
    "tensors beyond the end": (lambda p: raw(p, {"a": tensor(0, 4000, (1000,))}, b"\0" * 4), "cannot be read"),
    "a shape that its bytes do not fill": (lambda p: raw(p, {"a": tensor(0, 4, (7,))}, b"\0" * 4), "cannot be read"),
    "no tensors": (lambda p: raw(p, {"__metadata__": {"format": "pt"}}), "holds no tensors"),
    "random bytes": (lambda p: p.write_bytes(bytes(range(255, 0, -1)) * 9), "no safetensors file"),
}


@pytest.mark.parametrize("fault", FILES)
def test_damaged_files(broken, fault):
    damage, says = FILES[fault]
    damage(broken / UNET)
    refuse(broken, rf"diffusion_pytorch_model\.safetensors.*{says}")
    if fault != "a truncated file":  # a whole one is a UNet alone, which is another fault
        damage(broken / "one.safetensors")
        refuse(broken / "one.safetensors", rf"one\.safetensors.*{says}")


def loop(folder):
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("diffusion_pytorch_model.safetensors")


def mix_dtypes(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].astype(np.int8)
    save_file(tensors, folder / UNET)


def scale_to_float8(folder):
    tensors = load_file(folder / UNET)
    save_file(tensors | {"conv_in.scale_weight": np.ones(1, np.float32)}, folder / UNET)


def add_tensor(folder):
    save_file(load_file(folder / UNET) | {"guidance_embedder.weight": np.ones((2, 2), np.float32)}, folder / UNET)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def drop_tensor(folder):
    tensors = load_file(folder / UNET)
    del tensors["conv_out.bias"]
    save_file(tensors, folder / UNET)


def wrong_shape(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"] = np.zeros((3, 3), np.float32)
    save_file(tensors, folder / UNET)


FOLDERS = {
    "a shard that is missing": (lambda f: index_of(f, ["gone-00001-of-00001.safetensors"]), "names 'gone-.*which is missing"),
    "a shard elsewhere": (lambda f: index_of(f, ["../vae/diffusion_pytorch_model.safetensors"]), "no file beside it.*not opened"),
    "a shard at an absolute path": (lambda f: index_of(f, ["/etc/passwd"]), "'/etc/passwd', which is no file beside it"),
    "an index that is no index": (lambda f: (f / f"{UNET}.index.json").write_text("[]"), "no index of shards"),
    "a component's folder missing": (lambda f: shutil.rmtree(f / "vae"), "lacks vae/, which its model_index.json names"),
    "a component's weights missing": (lambda f: (f / UNET).unlink(), "unet' lacks its weights"),
    "a component's configuration missing": (lambda f: (f / "unet/config.json").unlink(), "cannot be loaded"),
    "a configuration that is no JSON": (lambda f: (f / "unet/config.json").write_text("{"), "cannot be loaded"),
    "a file that links to itself": (loop, "a symbolic link that leads back to itself"),
    "shapes of another model": (lambda f: edit(f / "unet/config.json", cross_attention_dim=48), "cannot be loaded.*shape"),
    "the wrong shape": (wrong_shape, r"cannot be loaded.*conv_in\.weight"),
    "a tensor missing": (drop_tensor, r"unet' lacks 1 tensors of a UNet2DConditionModel, 'conv_out\.bias'"),
    "text of another architecture": (
        lambda f: edit(f / "text_encoder/config.json", num_hidden_layers=3),
        r"text_encoder' lacks \d+ tensors of a CLIPTextModel",
    ),
    "another component's weights": (lambda f: shutil.copy(f / "vae" / UNET[5:], f / UNET), r"unet' lacks \d+ tensors"),
    "whole numbers for weights": (mix_dtypes, r"unet' is quantised \(weights of dtype I8\)"),
    "float8 with scales": (scale_to_float8, r"unet' is quantised \(scaled float8\) by a tool that its config.json does not name"),
    "a tensor too many": (
        add_tensor,
        r"unet' holds 1 tensors that a UNet2DConditionModel .* has not, 'guidance_embedder\.weight'",
    ),
    "a tokenizer of no words": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer' holds no words"),
    "an empty tokenizer": (lambda f: empty(f / "tokenizer"), "tokenizer' holds no words"),
    "a tokenizer without settings": (
        lambda f: (f / "tokenizer/tokenizer_config.json").unlink(),
        r"tokenizer' lacks tokenizer_config\.json",
    ),
    "attention from the hub": (
        lambda f: edit(f / "text_encoder/config.json", _attn_implementation="org/kernel"),
        "asks for _attn_implementation='org/kernel', code from the hub",
    ),
    "a block that is not there": (lambda f: edit(f / "unet/config.json", down_block_types=["X"]), "unet' cannot be loaded"),
    "a class that is not there": (
        lambda f: edit(f / "model_index.json", unet=["diffusers", "UNet9DModel"]),
        r"names diffusers\.UNet9DModel for unet, a class that this diffusers has not",
    ),
    "a function for a class": (lambda f: edit(f / "model_index.json", unet=["transformers", "pipeline"]), "has not"),
    "a library of its own": (
        lambda f: edit(f / "model_index.json", unet=["my_module", "MyUNet"]),
        r"names code of its own for unet, my_module\.MyUNet: code that comes with weights is not run",
    ),
    "a library of Python's": (lambda f: edit(f / "model_index.json", unet=["os", "system"]), "code of its own for unet"),
    "a pipeline of its own": (
        lambda f: edit(f / "model_index.json", _class_name=["my_pipeline", "MyPipeline"]),
        "names a pipeline of its own",
    ),
    "a pipeline that is not there": (
        lambda f: edit(f / "model_index.json", _class_name="X"),
        "is a X, which this version does not",
    ),
    "a component above the folder": (
        lambda f: edit(f / "model_index.json", **{"../up": ["diffusers", "AutoencoderKL"]}),
        "not opened",
    ),
    "a part that is null": (
        lambda f: edit(f / "model_index.json", text_encoder=[None, None]),
        "it has no text_encoder, which a StableDiffusionPipeline needs",
    ),
    "an entry of three": (lambda f: edit(f / "model_index.json", unet=["diffusers", "A", "B"]), "no library and class"),
    "an index that is a list": (lambda f: (f / "model_index.json").write_text("[1]"), "cannot be read"),
    "a configuration too deep": (lambda f: (f / "unet/config.json").write_text("[" * 10**5), "cannot be loaded"),
    "a configuration beside it too deep": (
        lambda f: ((f / "config.json").write_text("[" * 10**5), (f / "model_index.json").unlink()),
        "it has no model_index.json",
    ),
    "an index too deep": (lambda f: (f / "model_index.json").write_text("[" * 10**5), "cannot be read"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_broken_folders(broken, fault):
    damage, says = FOLDERS[fault]
    damage(broken)
    refuse(broken, says)
    refuse(broken, says, dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32  # or every model after this one would draw other pictures


def test_no_code_that_comes_with_weights_is_run(broken, tmp_path, monkeypatch):
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')\nclass MyUNet: pass\nclass MyPipeline: pass\n"
    for place in (broken / "my_module.py", broken / "unet/my_module.py", broken / "pipeline.py", tmp_path / "my_module.py"):
        place.write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = (broken / "model_index.json").read_text()
    for change in ({"unet": ["my_module", "MyUNet"]}, {"_class_name": ["my_module", "MyPipeline"]}):
        edit(broken / "model_index.json", **change)
        refuse(broken, "is not run")
        (broken / "model_index.json").write_text(before)
    edit(broken / "model_index.json", custom_pipeline="my_module")
    imagegen.load(broken)  # an entry that means nothing
    edit(broken / "unet/config.json", auto_map={"AutoModel": "my_module.MyUNet"}, _class_name="MyUNet")
    imagegen.load(broken)  # the index names the class, and its own is taken
    assert not mark.exists()


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.bin", "m.safetensors", "folder"])
def test_no_pickle_is_opened(broken, tmp_path, name):
    mark = tmp_path / "executed"
    bomb = pickle.dumps({"state_dict": Bomb(mark)})
    if name == "folder":
        (broken / UNET).unlink()
        (broken / "unet/diffusion_pytorch_model.bin").write_bytes(bomb)
        refuse(broken, "pickle only.*not opened")
    else:
        (tmp_path / name).write_bytes(bomb)
        refuse(tmp_path / name, r"pickle.*not opened")
    assert not mark.exists()
    pickle.loads(bomb)["state_dict"].close()
    assert mark.exists()  # the bomb is one


def of(*names, shape=(4, 4)):
    return dict.fromkeys(names, shape)


ADDITIONS = {
    "a LoRA": of("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "unet.down_blocks.0.attentions.0.to_q.lora_B.weight"),
    "a LoRA ": of("lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight", "lora_te_text_model_encoder_0.alpha"),
    "a LoRA  ": of("lora_unet_double_blocks_0_img_attn.hada_w1_a"),
    "a LoRA   ": of("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"),
    "a LoRA    ": of("double_blocks.0.processor.proj_lora1.down.weight"),
    "an image encoder": of("vision_model.encoder.layers.0.self_attn.q_proj.weight", "visual_projection.weight"),
    "a decoder of latents without its encoder": of("decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
    "the weights of a Janus model": of(
        "vision_gen_enc_model.conv_in.weight", "language_model.model.layers.0.self_attn.q_proj.weight"
    ),
    "a text encoder  ": of("enc.blk.0.attn_q.weight", "token_embd.weight"),
    "a language model ": of("blk.0.attn_q.weight", "token_embd.weight"),
    "a VAE": of("first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight"),
    "a VAE ": of("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"),
    "a tiny VAE": of("encoder.layers.0.weight", "decoder.layers.1.weight"),
    "a ControlNet": of("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"),
    "a ControlNet ": of("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
    "a textual inversion embedding": of("emb_params", shape=(4, 768)),
    "a textual inversion embedding ": of("clip_l", "clip_g", shape=(2, 1280)),
    "an IP-Adapter": of("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
    "a text encoder": of("text_model.encoder.layers.0.self_attn.q_proj.weight"),
    "a text encoder ": of("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
    "a language model": of("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"),
    "an upscaler": of("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
    "a T2I-Adapter": of("adapter.body.0.resnets.0.block1.weight"),
    "a motion module": of("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
    "of no kind known here": of("something.weight"),
}
USES = {
    "a LoRA": r"model\.add_lora\(file\), or --lora",
    "an image encoder": "--style-encoder",
    "a decoder of latents without its encoder": "whole VAE",
    "the weights of a Janus model": r"config\.json and its tokenizer",
    "a VAE": "vae=",
    "a tiny VAE": "tiny-decoder",
    "a ControlNet": r"model\.add_control\(folder\)",
    "a textual inversion embedding": "load_textual_inversion",
    "an IP-Adapter": r"model\.add_style\(file",
    "a text encoder": "folder of the whole model",
    "a language model": "folder of the whole model",
    "an upscaler": r"model\.upscale",
    "a T2I-Adapter": "T2IAdapter",
    "a motion module": "films",
    "of no kind known here": "first tensor is 'something.weight'",
}
DENOISERS = {
    "a FLUX.1 transformer alone": of("double_blocks.0.img_attn.norm.key_norm.scale"),
    "a Stable Diffusion 3 transformer alone": of("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"),
    "a UNet in diffusers' layout alone": of("down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"),
    "a UNet alone": of("model.diffusion_model.input_blocks.0.0.weight"),
    "a transformer alone": of("transformer_blocks.0.attn.to_q.weight", "proj_out.weight"),
}


def write(path, shapes):
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("what", ADDITIONS)
def test_what_is_no_model_says_what_it_is(tmp_path, what):
    file = write(tmp_path / "file.safetensors", ADDITIONS[what])
    refuse(file, rf"is {what.strip()}.*{USES[what.strip()]}")


@pytest.mark.parametrize("what", DENOISERS)
def test_a_denoiser_alone_asks_for_its_base(tmp_path, what):
    refuse(write(tmp_path / "file.safetensors", DENOISERS[what]), rf"is {what}.*give base=")


WHOLE = {
    "a Stable Diffusion XL refiner": ["conditioner.embedders.0.model.ln_final.bias", "model.diffusion_model.input_blocks.1.0.x"],
    "a model with a Chroma transformer": [
        "model.diffusion_model.distilled_guidance_layer.in_proj.bias",
        "vae.encoder.conv_in.bias",
    ],
}


@pytest.mark.parametrize("what", WHOLE)
def test_a_whole_model_without_a_base_here(tmp_path, what):
    refuse(write(tmp_path / "file.safetensors", of(*WHOLE[what], "first_stage_model.x")), rf"is {what}.*give base=")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"double_blocks.0.img_attn.scale_weight": (1,), "scaled_fp8": (1,)}, "scaled float8"),
        ({"double_blocks.0.img_attn.proj.weight.absmax": (4,)}, "bitsandbytes"),
    ],
)
def test_a_quantised_file_is_not_read_as_values(tmp_path, more, says):
    file = write(tmp_path / "file.safetensors", DENOISERS["a FLUX.1 transformer alone"] | more)
    refuse(file, rf"is a FLUX\.1 transformer, quantised \({says}\) in a way that is not read: take a \.gguf")


def test_weights_of_whole_numbers_are_not_read_as_values(tmp_path):
    save_file({"double_blocks.0.img_attn.proj.weight": np.zeros((4, 4), np.int8)}, tmp_path / "file.safetensors")
    refuse(tmp_path / "file.safetensors", r"quantised \(weights of dtype I8\)")


def test_a_model_with_a_scheduler_of_its_own_asks_for_its_base(tmp_path):
    names = of("conditioner.embedders.1.model.x", "first_stage_model.x", "v_pred", "model.diffusion_model.input_blocks.1.0.x")
    refuse(write(tmp_path / "file.safetensors", names), r"a model with a scheduler of its own.*give base=")


def test_an_inpainting_file_asks_for_its_base(tmp_path):
    names = of("cond_stage_model.transformer.x", "first_stage_model.x")
    names["model.diffusion_model.input_blocks.0.0.weight"] = (4, 9, 3, 3)
    refuse(write(tmp_path / "file.safetensors", names), "a Stable Diffusion 1 model for inpainting.*give base=")


def test_other_files_and_folders(broken, tmp_path):
    refuse(broken / "model_index.json", "is no model: give a folder")
    refuse(broken / "unet", "it is one component, a UNet2DConditionModel: give the folder above it")
    refuse(broken / "vae", "give it as vae=")
    file = write(tmp_path / "m-00001-of-00002.safetensors", of("x"))
    refuse(file, "is one shard of several")
    refuse(write(tmp_path / "master-of-realism_v2.safetensors", of("something.weight")), "of no kind known here")
    refuse(write(tmp_path / "M.SAFETENSORS", of("x")), r"ends in \.SAFETENSORS.*rename it to end in \.safetensors")
    refuse(write(tmp_path / "unet.safetensors", DENOISERS["a UNet alone"]), "base= must be a name or a path, got 3", base=3)
    (tmp_path / "empty").mkdir()
    shutil.copy(file, tmp_path / "empty/model.safetensors")
    refuse(tmp_path / "empty", r"holds model\.safetensors: give the file itself")
    (tmp_path / "loop").symlink_to("loop")
    refuse(tmp_path / "loop", "leads back to itself")
    (tmp_path / "nowhere").symlink_to("gone")
    refuse(tmp_path / "nowhere", "leads nowhere")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\0\0\0\0")
    refuse(tmp_path / "m.gguf", "no GGUF file that can be read")
    refuse(broken, "is no decoder|holds no|a UNet in diffusers' layout alone", vae=broken / UNET)
    refuse(write(tmp_path / "f.safetensors", DENOISERS["a UNet alone"]), "base=.* is one file", base=broken / UNET)


def sd2_file(path):
    return write(path, of("cond_stage_model.model.x", "first_stage_model.x", "model.diffusion_model.input_blocks.1.0.x"))


@pytest.mark.parametrize("name", ["sd_turbo", "512-base-ema", "v2-1_512-nonema-pruned"])
def test_stable_diffusion_2_of_512_px_asks_for_its_base(tmp_path, name):
    refuse(sd2_file(tmp_path / f"{name}.safetensors"), "by its name no Stable Diffusion 2 model of 768 px.*give base=")


@pytest.mark.parametrize(("name", "warns"), [("768-v-ema", 0), ("v2-1_768-ema-pruned", 0), ("illuminati", 1)])
def test_stable_diffusion_2_of_an_unknown_size_is_not_guessed_silently(tmp_path, recwarn, name, warns):
    assert find_source(sd2_file(tmp_path / f"{name}.safetensors")).base.name == "sd2"
    assert [str(one.message) for one in recwarn if "768 px (v-prediction), as its name does not say" in str(one.message)] == [
        str(one.message) for one in recwarn
    ]
    assert len(recwarn) == warns
