"""ControlNets and IP-Adapters: as the stock pipelines follow them, from local files, and gone without a trace."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from test_families import assert_identical, seeded
from tiny_families import SIDE

import imagegen
from imagegen.fidelity import max_difference


@pytest.fixture(scope="module")
def edges():
    picture = Image.new("RGB", (64, 64))
    ImageDraw.Draw(picture).ellipse((15, 15, 49, 49), outline="white")
    return picture


def make_control(name, pipeline):
    """Make a ControlNet whose last layers are not zero, as an untrained one's are."""
    torch.manual_seed(3)
    if name == "flux":
        heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True}
        layers = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": SIDE, "pooled_projection_dim": SIDE}
        control = diffusers.FluxControlNetModel(patch_size=1, in_channels=64, **heads, **layers)
    elif name == "sd3":
        control = diffusers.SD3ControlNetModel.from_transformer(
            pipeline.transformer, num_layers=1, num_extra_conditioning_channels=0
        )
    else:
        config = pipeline.unet.config
        control = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 16, 16, 16))
        assert control.config.cross_attention_dim == config.cross_attention_dim
    for weight in control.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.2)
    return control.eval()


CONTROLS = {
    "sd1.5": diffusers.StableDiffusionControlNetPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
    "sd3": diffusers.StableDiffusion3ControlNetPipeline,
    "flux": diffusers.FluxControlNetPipeline,
}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_is_stock_and_gone_when_removed(name, folder_of, stock_of, edges, tmp_path):
    model, stock = imagegen.load(folder_of(name)), stock_of(name)
    make_control(name, stock).save_pretrained(tmp_path / "edges")
    settings = {"seed": 1, "num_images": 2, "num_steps": 2, "guidance": 2, "width": 64, "height": 64}
    before = model("a sun", **settings).images
    model.add_control(tmp_path / "edges")
    result = model("a sun", control=edges, control_weight=0.7, **settings)
    control = type(model.control).from_pretrained(tmp_path / "edges")
    words = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "controlnet_conditioning_scale": 0.7}
    words["image" if name in ("sd1.5", "sdxl") else "control_image"] = edges
    pipeline = CONTROLS[name].from_pipe(stock, controlnet=control)
    drawn = torch.random.get_rng_state()
    alone = [model("a sun", control=edges, control_weight=0.7, **settings | {"seed": seed, "num_images": 1}) for seed in (1, 2)]
    assert torch.equal(drawn, torch.random.get_rng_state())
    for seed, one, picture, free in zip((1, 2), alone, result.images, before, strict=True):
        torch.manual_seed(seed)  # SD3 encodes its control from there
        assert_identical(one.images[0], pipeline("a sun", generator=seeded(seed), **words).images[0])
        assert max_difference(one.images[0], picture) <= 1  # whatever its batch
        assert not np.array_equal(np.asarray(picture), np.asarray(free))
    receipt = result.pictures[0].receipt
    assert receipt.model["control"]["name"] == "edges"
    assert receipt.request["control_weight"] == 0.7
    assert len(receipt.request["control_sha256"]) == 64
    model.remove_control()
    assert_identical(model("a sun", **settings).images[0], before[0])


def test_control_with_a_picture_to_start_from(folder_of, stock_of, edges, tmp_path):
    model, stock = imagegen.load(folder_of("sd1.5")), stock_of("sd1.5")
    make_control("sd1.5", stock).save_pretrained(tmp_path / "edges")
    model.add_control(tmp_path / "edges")
    start = Image.new("RGB", (64, 64), "blue")
    result = model("a sun", image=start, strength=0.5, control=edges, seed=1, num_steps=4, guidance=2)
    pipeline = diffusers.StableDiffusionControlNetImg2ImgPipeline.from_pipe(stock, controlnet=model.control)
    words = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 2.0, "controlnet_conditioning_scale": 1.0}
    theirs = pipeline("a sun", image=start, control_image=edges, generator=seeded(1), **words).images[0]
    assert_identical(result.images[0], theirs)
    path = result.save(tmp_path)[0]
    assert imagegen.replay(path, image=start, control=edges, model=model).same
    with pytest.raises(imagegen.ReceiptError, match="was made with control=: give that picture again"):
        imagegen.replay(path, image=start, model=model)
    model.remove_control()
    with pytest.raises(imagegen.RequestError, match=r"load one with model\.add_control"):
        imagegen.replay(path, image=start, control=edges, model=model)


def write_style(unet, folder):
    """Write an IP-Adapter and its image encoder for a UNet; return the file and the encoder's folder."""
    torch.manual_seed(4)
    size = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**size, image_size=32, patch_size=16, projection_dim=16)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder / "encoder")
    wide, tensors = unet.config.cross_attention_dim, {}
    tensors |= {"image_proj.proj.weight": torch.randn(4 * wide, 16), "image_proj.proj.bias": torch.randn(4 * wide)}
    tensors |= {"image_proj.norm.weight": torch.ones(wide), "image_proj.norm.bias": torch.zeros(wide)}
    crossed = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    assert len(names) == len(crossed)
    hidden = {name: unet.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in names}
    for number, name in enumerate(names):
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{part}.weight"] = torch.randn(hidden[name], wide)
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors", folder / "encoder"


@pytest.mark.parametrize("name", ["sd1.5", "sdxl"])
def test_style_is_stock_and_gone_when_removed(name, folder_of, edges, tmp_path):
    model = imagegen.load(folder_of(name))
    file, encoder = write_style(model.pipeline.unet, tmp_path)
    settings = {"seed": 1, "num_steps": 2, "guidance": 2, "width": 64, "height": 64}
    before = model("a sun", **settings).images[0]
    model.add_style(file, image_encoder=encoder)
    result = model("a sun", style_image=edges, style_weight=0.6, **settings)
    stock = diffusers.DiffusionPipeline.from_pretrained(folder_of(name), local_files_only=True)
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(encoder)
    stock.register_modules(
        image_encoder=vision, feature_extractor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    )
    stock.load_ip_adapter(str(tmp_path), subfolder="", weight_name="style.safetensors")
    stock.set_ip_adapter_scale(0.6)
    words = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64, "generator": seeded(1)}
    assert_identical(result.images[0], stock("a sun", ip_adapter_image=edges, **words).images[0])
    assert not np.array_equal(np.asarray(result.images[0]), np.asarray(before))
    assert result.pictures[0].receipt.model["style"]["name"] == "style.safetensors"
    first, other = (model.stream("a sun", style_image=edges, style_weight=weight, **settings) for weight in (0.6, 1.5))
    assert_identical(list(first)[-1].result.images[0], result.images[0])  # the second was begun later, and is run later
    assert not np.array_equal(np.asarray(list(other)[-1].result.images[0]), np.asarray(result.images[0]))
    with pytest.raises(imagegen.RequestError, match="has a style loaded: pass style_image="):
        model("a sun", **settings)
    model.remove_style()
    assert_identical(model("a sun", **settings).images[0], before)


@pytest.mark.parametrize(
    ("name", "call", "error", "says"),
    [
        ("sd1.5", lambda m, p: m("a sun", control=p), imagegen.RequestError, "load one with model.add_control() first"),
        ("sd1.5", lambda m, p: m("a sun", style_image=p), imagegen.RequestError, "load one with model.add_style() first"),
        ("sd1.5", lambda m, p: m("a sun", control_weight=1), imagegen.RequestError, "control_weight needs control"),
        ("sd1.5", lambda m, p: m.add_control("nowhere"), imagegen.ModelError, "no ControlNet 'nowhere'"),
        ("sd1.5", lambda m, p: m.add_style("nowhere.bin"), imagegen.ModelError, "no IP-Adapter 'nowhere.bin'"),
        ("pixart-sigma", lambda m, p: m.add_control("nowhere"), imagegen.ModelError, "diffusers has no ControlNet for a PixArt"),
        ("pixart-sigma", lambda m, p: m.add_style("nowhere"), imagegen.ModelError, "takes no IP-Adapter"),
    ],
)
def test_what_cannot_be_is_an_error_with_a_way_out(model_of, edges, name, call, error, says):
    with pytest.raises(error) as caught:
        call(model_of(name), edges)
    assert says in str(caught.value)


def test_a_control_of_another_family(folder_of, stock_of, tmp_path):
    model = imagegen.load(folder_of("sd1.5"))
    stock_of("sdxl").unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(imagegen.ModelError, match="it is a UNet2DConditionModel"):
        model.add_control(tmp_path / "unet")
    assert model.control is None


@pytest.mark.parametrize(("name", "other"), [("sd1.5", "sdxl"), ("sdxl", "sd1.5"), ("sd3", "flux"), ("flux", "sd1.5")])
def test_a_control_that_does_not_fit_is_refused_when_it_is_added(name, other, folder_of, stock_of, tmp_path):
    model = imagegen.load(folder_of(name))
    make_control(other, stock_of(other)).save_pretrained(tmp_path / "edges")
    with pytest.raises(imagegen.ModelError, match=r"a ControlNet for another (kind of )?model"):
        model.add_control(tmp_path / "edges")
    assert model.control is None


def test_a_style_that_does_not_fit_leaves_the_one_before(folder_of, edges, tmp_path):
    model = imagegen.load(folder_of("sd1.5"))
    file, encoder = write_style(model.pipeline.unet, tmp_path)
    settings = {"style_image": edges, "seed": 1, "num_steps": 2, "guidance": 2, "width": 64, "height": 64}
    model.add_style(file, image_encoder=encoder)
    before = model("a sun", **settings).images[0]
    config = transformers.CLIPVisionModelWithProjection.from_pretrained(encoder).config
    config.projection_dim = 24
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "wide")
    tensors = {name: value[..., :3].contiguous() if "to_k_ip" in name else value for name, value in load_file(file).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    save_file({"a.lora_A.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    for path, more, says in (
        (file, {"image_encoder": tmp_path / "wide"}, "reads 16 numbers of a picture, and this image encoder gives 24"),
        (file, {"image_encoder": tmp_path / "nowhere"}, "no image encoder"),
        (tmp_path / "lora.safetensors", {}, "is a LoRA, no IP-Adapter"),
        (tmp_path / "other.safetensors", {}, "does not fit this model"),
    ):
        with pytest.raises(imagegen.ModelError, match=says):
            model.add_style(path, **more)
        assert_identical(model("a sun", **settings).images[0], before)
    model.add_style(file)  # through the same encoder
    assert_identical(model("a sun", **settings).images[0], before)


def test_a_model_keeps_its_own_image_encoder(folder_of, edges, tmp_path):
    model = imagegen.load(folder_of("sd1.5"))
    file, encoder = write_style(model.pipeline.unet, tmp_path)
    own = transformers.CLIPVisionModelWithProjection.from_pretrained(encoder)
    model.pipeline.register_modules(image_encoder=own, feature_extractor=transformers.CLIPImageProcessor(crop_size=32))
    for _ in range(2):
        model.add_style(file)
        model.remove_style()
        assert model.pipeline.image_encoder is own


def test_a_styled_picture_replays_by_what_the_files_hold(folder_of, edges, tmp_path):
    model = imagegen.load(folder_of("sd1.5"))
    file, encoder = write_style(model.pipeline.unet, tmp_path)
    model.add_style(file, image_encoder=encoder)
    picture = model("a sun", style_image=edges, seed=1, num_steps=2, width=64, height=64).save(tmp_path)[0]
    model.add_style(file.rename(tmp_path / "renamed.safetensors"))
    assert imagegen.replay(picture, style_image=edges, model=model).same
    other = transformers.CLIPVisionModelWithProjection(model.pipeline.image_encoder.config)
    other.save_pretrained(tmp_path / "other")
    model.add_style(tmp_path / "renamed.safetensors", image_encoder=tmp_path / "other")
    verdict = imagegen.replay(picture, style_image=edges, model=model)
    assert not verdict.same and "another style model than recorded is loaded" in verdict.reasons


def test_nothing_is_added_or_removed_while_a_stream_runs(folder_of, edges, tmp_path):
    model = imagegen.load(folder_of("sd1.5"))
    file, encoder = write_style(model.pipeline.unet, tmp_path)
    stream = model.stream("a sun", seed=1, num_steps=3, width=64, height=64)
    next(stream)
    for change, what in (
        (lambda: model.add_style(file, image_encoder=encoder), "the IP-Adapter"),
        (lambda: model.add_control(tmp_path), "the ControlNet"),
        (lambda: model.add_lora(file), "the LoRAs"),
    ):
        with pytest.raises(imagegen.RequestError, match=f"finish or close its stream before changing {what}"):
            change()
    stream.close()
    model.add_style(file, image_encoder=encoder)


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("sd3", {"mask": Image.new("L", (64, 64), 255)}, "diffusers has no inpainting with a ControlNet for this model"),
        ("flux", {"strength": 0.5, "true_guidance": 3.0}, "takes no true_guidance"),
    ],
)
def test_a_mode_that_diffusers_has_in_another_shape_is_refused(name, more, says, folder_of, stock_of, edges, tmp_path):
    model = imagegen.load(folder_of(name))
    make_control(name, stock_of(name)).save_pretrained(tmp_path / "edges")
    model.add_control(tmp_path / "edges")
    with pytest.raises(imagegen.RequestError, match=says):
        model("a sun", image=edges, control=edges, num_steps=2, **more)
