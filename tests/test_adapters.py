"""LoRA files: trained on every kind of layer, written in two layouts, read in three; stock diffusers draws our picture."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import imagegen
from imagegen import DataError, ModelError
from imagegen.families import adapters

SETTINGS = {"num_steps": 3, "batch_size": 2, "rank": 2, "alpha": 4, "learning_rate": 0.02, "warmup": 1, "save_every": 3}


@pytest.fixture(scope="module")
def clip(folder_of):
    return imagegen.load(folder_of("sd1.5"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.fromarray(np.full((64, 64, 3), 60 * number, dtype=np.uint8)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"grey {'abcd'[number]}")
    return place


def draw(model):
    return model("a b", seed=3, num_steps=2, guidance=2.0, width=64, height=64).images[0]


def draw_stock(model, file, **more):
    pipeline = StableDiffusionPipeline.from_pretrained(model.folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, **more)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64}
    return pipeline("a b", generator=torch.Generator().manual_seed(3), **settings).images[0]


def draw_with(model, file):
    model.add_lora(file)
    try:
        return draw(model)
    finally:
        model.remove_loras()


def difference(first, second):
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second)).max())


KINDS = {
    "attention": {},
    "text encoder": {"text_encoder": True},
    "convolutions": {"layers": "convolutions"},
    "DoRA": {"dora": True},
    "everything": {"layers": "all"},
    "what reads the prompt": {"layers": "text"},
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, clip, folder, tmp_path_factory):
    before = draw(clip)
    made = imagegen.finetune(clip, folder, tmp_path_factory.mktemp("out"), **SETTINGS, **KINDS[request.param])
    assert draw(clip) == before, "the model stays as it was"
    return request.param, made


def test_stock_diffusers_draws_our_picture(clip, trained):
    kind, made = trained
    mine = draw_with(clip, made.weights)
    assert mine == draw_stock(clip, made.weights)
    assert difference(mine, draw(clip)) > 0, "it does something"
    names = set(load_file(made.weights))
    assert any(name.startswith("text_encoder.") for name in names) == (kind == "text encoder")
    assert any(".conv1." in name for name in names) == (kind in ("convolutions", "everything"))
    assert any("magnitude" in name for name in names) == (kind == "DoRA")
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in names) == (kind == "what reads the prompt")


def test_the_same_lora_in_kohyas_layout(clip, trained, tmp_path):
    kind, made = trained
    if kind == "DoRA":  # no two programs agree on where its magnitudes go
        with pytest.raises(ModelError, match="plain LoRAs"):
            adapters.export_kohya(made.weights, tmp_path / "kohya.safetensors")
        return
    file = adapters.export_kohya(made.weights, tmp_path / "kohya.safetensors")
    tensors = load_file(file)
    unet = [name for name in tensors if name.startswith("lora_unet_")]
    layer = "attn2_to_k" if kind == "what reads the prompt" else "attn1_to_q"
    assert f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{layer}.lora_down.weight" in unet
    assert {float(value) for name, value in tensors.items() if name.endswith(".alpha")} == {4.0}
    assert all(name.startswith(("lora_unet_", "lora_te_")) and name.count(".") <= 2 for name in tensors)
    assert difference(draw_with(clip, file), draw_with(clip, made.weights)) <= 1
    with safe_open(file, "pt") as opened:
        assert "imagegen" in opened.metadata()


def test_a_lora_that_peft_itself_wrote(clip, tmp_path):
    unet = imagegen.load(clip.folder).pipeline.unet
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(adapters.ATTENTION), init_lora_weights=False)
    wrapped = get_peft_model(unet, config)
    wrapped.save_pretrained(tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(clip.folder, unet=wrapped.merge_and_unload(), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64}
    expected = theirs("a b", generator=torch.Generator().manual_seed(3), **settings).images[0]
    assert difference(draw_with(clip, tmp_path), expected) <= 1 < difference(expected, draw(clip))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"peft's layout, and its adapter_config\.json"):
        clip.add_lora(tmp_path)


def test_a_part_that_refuses_leaves_the_others_as_they_were(clip, folder, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("please use a version >= 99")

    before, names = draw(clip), sorted(clip.pipeline.unet.state_dict())
    monkeypatch.setattr(clip.pipeline.text_encoder, "add_adapter", refuse)
    with pytest.raises(DataError, match="CLIPTextModel takes no LoRA here: please use a version >= 99"):
        imagegen.finetune(clip, folder, tmp_path, **SETTINGS, text_encoder=True)
    assert sorted(clip.pipeline.unet.state_dict()) == names and draw(clip) == before


def test_what_diffusers_would_leave_out_silently_is_refused(clip, tmp_path):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2), "dora_scale": torch.ones(32, 1)}
    save_file({f"{layer}.{name}": value for name, value in tensors.items()}, tmp_path / "dora.safetensors")
    with pytest.raises(ModelError, match="DoRA in kohya's layout"):
        clip.add_lora(tmp_path / "dora.safetensors")


def test_what_is_left_out_is_said(clip, trained, tmp_path):
    _, made = trained
    extra = {"unet.nowhere.lora_A.weight": torch.ones(2, 32), "unet.nowhere.lora_B.weight": torch.ones(32, 2)}
    save_file(load_file(made.weights) | extra, tmp_path / "more.safetensors", adapters.read_metadata(made.weights))
    count = sum(name.endswith(("lora_A.weight", ".down.weight")) for name in load_file(made.weights))
    with pytest.warns(UserWarning, match=f"{count} of the {count + 1} layers of the LoRA"):
        clip.add_lora(tmp_path / "more.safetensors")
    clip.remove_loras()


def test_several_add_up_and_leave_nothing(clip, folder, trained, tmp_path):
    _, made = trained
    before, once = draw(clip), draw_with(clip, made.weights)
    clip.add_lora(made.weights, weight=0.25)
    clip.add_lora(made.weights, weight=0.75)
    try:
        assert [lora["weight"] for lora in clip.loras] == [0.25, 0.75]
        if "magnitude" not in str(sorted(load_file(made.weights))):  # DoRA's do not add up
            assert difference(draw(clip), once) <= 1
        with pytest.raises(DataError, match="remove_loras"):
            imagegen.finetune(clip, folder, tmp_path)
    finally:
        clip.remove_loras()
    assert draw(clip) == before


def test_a_text_encoder_that_is_not_clips_is_refused(model, folder, tmp_path):
    with pytest.raises(DataError, match="BertModel has no attention layers"):
        imagegen.finetune(model, folder, tmp_path, **SETTINGS | {"text_encoder": True})
