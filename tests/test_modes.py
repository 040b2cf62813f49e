"""Pictures from pictures, in every family that has the mode: as the stock pipeline of that mode makes them."""

import diffusers
import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_families import assert_identical, seeded

import imagegen
from imagegen.canvas import grow, put_back

PAINTERS = ["sd1.5", "sdxl", "sd3", "flux", "qwen-image", "z-image"]
EVERY = ("text-to-image", "image-to-image", "inpainting", "outpainting")
CLASS = {
    "sd1.5": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux",
    "qwen-image": "QwenImage", "z-image": "ZImage",
}  # fmt: skip
SCALE = {"qwen-image": {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]}}


@pytest.fixture(scope="module")
def start():
    """A picture to start from: a yellow disk on blue."""
    picture = Image.new("RGB", (64, 64), (60, 120, 220))
    ImageDraw.Draw(picture).ellipse((15, 15, 49, 49), fill=(250, 210, 60))
    return picture


@pytest.fixture(scope="module")
def mask():
    picture = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(picture).rectangle((32, 0, 63, 63), fill=255)
    return picture


def stock_pipeline(stock, name, suffix):
    """Diffusers' own pipeline of a mode, over the same components."""
    return getattr(diffusers, CLASS[name] + suffix).from_pipe(stock)


@pytest.mark.parametrize("name", PAINTERS)
def test_image_to_image_is_stock(name, model_of, stock_of, start):
    mine = model_of(name)("a sun", image=start, strength=0.6, seed=5, num_images=2, num_steps=4, guidance=2).images
    words = {"num_inference_steps": 4, "generator": seeded(5, 6), "strength": 0.6, "image": [start] * 2}
    words |= {} if name in ("sd1.5", "sdxl") else {"width": 64, "height": 64}
    words |= SCALE.get(name, {"guidance_scale": 2.0})
    theirs = stock_pipeline(stock_of(name), name, "Img2ImgPipeline")(prompt=["a sun"] * 2, **words).images
    for picture, other in zip(mine, theirs, strict=True):
        assert_identical(picture, other)


@pytest.mark.parametrize("name", PAINTERS)
def test_inpainting_is_stock(name, model_of, stock_of, start, mask):
    mine = model_of(name)("a worm", image=start, mask=mask, seed=5, num_images=2, num_steps=2, guidance=2).images
    words = {"num_inference_steps": 2, "generator": seeded(5, 6), "strength": 1.0, "image": [start] * 2}
    words |= {"width": 64, "height": 64, "mask_image": [mask] * 2} | SCALE.get(name, {"guidance_scale": 2.0})
    theirs = stock_pipeline(stock_of(name), name, "InpaintPipeline")(prompt=["a worm"] * 2, **words).images
    for picture, other in zip(mine, theirs, strict=True):
        assert_identical(picture, other)


@pytest.mark.parametrize("name", PAINTERS)
def test_outpainting_keeps_every_pixel(name, model_of, start):
    result = model_of(name).outpaint(start, left=16, right=32, top=16, prompt="a field", seed=1, num_steps=2, guidance=1)
    made = result.images[0]
    assert made.size == (112, 80)
    assert_identical(made.crop((16, 16, 80, 80)), start)
    beside = np.asarray(made).astype(int)[16:, 80:]
    assert np.abs(np.diff(beside, axis=0)).max() > 0  # what was made there, and not the edge continued alone
    assert result.pictures[0].receipt.request["margins"] == (16, 32, 16, 0)


@pytest.mark.parametrize("name", PAINTERS)
def test_steps_of_a_mode_carry_unpacked_latents(name, model_of, start):
    seen = list(model_of(name).stream("a sun", image=start, strength=0.5, seed=5, num_steps=4, guidance=1))
    assert [step.num_steps for step in seen] == [2, 2]
    assert seen[0].latents.shape[-2:] == (8, 8)
    assert seen[0].preview(0).size == (64, 64)


def test_the_seam_fades_in_outside_of_the_picture(start):
    canvas, mask = grow(start, (20, 0, 0, 0))
    assert (canvas.size, mask.size) == ((84, 64), (84, 64))
    assert np.asarray(mask)[:, :20].min() == 255
    assert np.asarray(mask)[:, 20:].max() == 0
    black = put_back(Image.new("RGB", (84, 64)), start, (20, 0, 0, 0))
    row = np.asarray(black)[0, :20, 2].astype(int)
    assert row[:5].max() == 0
    assert row[19] == round(220 * 15 / 16)
    assert (np.diff(row[4:]) > 0).all()


def test_variations_differ_by_their_strength(model_of, start):
    model, settings = model_of("sd1.5"), {"seed": 3, "num_steps": 20, "guidance": 1}
    subtle, strong = (model.vary(start, strength=strength, **settings).pictures[0] for strength in ("subtle", "strong"))
    assert subtle.receipt.request["strength"] < strong.receipt.request["strength"]
    distances = [np.abs(np.asarray(made.image).astype(int) - np.asarray(start)).mean() for made in (subtle, strong)]
    assert distances[0] != distances[1]
    assert_identical(subtle.image, model("", image=start, strength=0.4, **settings).images[0])


def test_a_variation_remembers_the_prompt(model_of, tmp_path):
    model = model_of("sd1.5")
    result = model("a red apple", seed=1, num_steps=1, guidance=1)
    again = {"num_steps": 4, "guidance": 1, "seed": 2}
    for picture in (result.pictures[0], result.save(tmp_path)[0]):
        assert model.vary(picture, **again).pictures[0].receipt.request["prompt"] == "a red apple"
    assert model.vary(result.images[0], prompt="a pear", **again).pictures[0].receipt.request["prompt"] == "a pear"


def test_upscaling_is_a_second_pass_at_low_strength(model_of, start):
    model, settings = model_of("sd1.5"), {"seed": 3, "num_steps": 4, "guidance": 1}
    larger = model.upscale(start, 2, prompt="a sun", **settings).images[0]
    assert larger.size == (128, 128)
    resized = start.resize((128, 128), Image.Resampling.LANCZOS)
    assert_identical(larger, model("a sun", image=resized, strength=0.3, **settings).images[0])


@pytest.mark.parametrize("mode", ["vary", "outpaint"])
def test_what_was_made_from_a_picture_replays(model_of, start, tmp_path, mode):
    model = model_of("sd1.5")
    settings = {"prompt": "a sun", "seed": 3, "num_steps": 4}
    more = {"vary": {}, "outpaint": {"bottom": 16}}[mode]
    path = getattr(model, mode)(start, **more, **settings).save(tmp_path)[0]
    assert imagegen.replay(path, image=start, model=model).same
    assert not imagegen.replay(path, image=start.rotate(90), model=model).same


@pytest.mark.parametrize(
    ("name", "call", "says"),
    [
        ("sana", lambda m, start: m("a sun", image=start), "sana does text-to-image: it has no image-to-image"),
        ("pixart-sigma", lambda m, start: m.outpaint(start, left=64), "pixart-sigma does text-to-image: it has no outpainting"),
        ("sd1.5", lambda m, start: m.outpaint(start), "margins are all 0"),
        ("sd1.5", lambda m, start: m.upscale(start, width=64), "leave out width: that follows from the picture"),
        ("sd1.5", lambda m, start: m.vary(start, image=start), "leave out image: that follows"),
        ("sd1.5", lambda m, start: m.outpaint(start, left=5), "give left and right 0 or 8 together"),
        ("sd1.5", lambda m, start: m.outpaint(start, left=-8), "margins must be from 0"),
        ("sd1.5", lambda m, start: m.outpaint(start, left=8, width=64), "follows from the picture and its margins, 72"),
        ("sd1.5", lambda m, start: m.vary(start, strength="wild"), "strength must be subtle or strong"),
        ("sd1.5", lambda m, start: m.upscale(start, 1), "factor must be above 1"),
        ("sd1.5", lambda m, start: m("", image=None), "the prompt is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error_with_a_way_out(model_of, start, name, call, says):
    with pytest.raises(imagegen.RequestError) as caught:
        call(model_of(name), start)
    assert says in str(caught.value)


def test_families_say_their_modes(model_of):
    assert {name: model_of(name).family.modes for name in PAINTERS} == dict.fromkeys(PAINTERS, EVERY)
    assert model_of("sana").family.modes == ("text-to-image",)


@pytest.mark.parametrize("name", ["flux.2-klein", "kontext"])
def test_editing_is_stock(name, model_of, stock_of, start):
    """A picture without a strength is edited as told, and may have any size of its own."""
    model = model_of(name)
    settings = {"num_steps": 2, "seed": 1, "guidance": 2, "width": 64, "height": 64}
    mine = model("make it red", image=start, num_images=2, **settings)
    more = {"max_area": 64 * 64} if name == "kontext" else {}
    words = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64, "num_images_per_prompt": 2} | more
    theirs = stock_of(name)(prompt="make it red", image=start, generator=seeded(1, 2), **words).images
    for picture, other in zip(mine.images, theirs, strict=True):
        assert_identical(picture, other)
    assert mine.pictures[0].receipt.request["mode"] == "editing"
    assert not np.array_equal(np.asarray(mine.images[0]), np.asarray(model("make it red", **settings).images[0]))
    with pytest.raises(imagegen.RequestError, match="leave strength out to edit the picture"):
        model("make it red", image=start, strength=0.5)


def test_an_edited_picture_has_the_models_own_number_of_pixels(model_of):
    request = imagegen.request.build_request("x", model_of("kontext").family, {"image": Image.new("RGB", (200, 100))})
    assert (request.width, request.height) == (1440, 720)
    assert request.image.size == (200, 100)


def test_filling_is_stock(model_of, stock_of, start, mask):
    mine = model_of("flux-fill")("a worm", image=start, mask=mask, seed=1, num_steps=2).images[0]
    words = {"num_inference_steps": 2, "guidance_scale": 30.0, "width": 64, "height": 64, "strength": 1.0}
    theirs = stock_of("flux-fill")("a worm", image=start, mask_image=mask, generator=seeded(1), **words).images[0]
    assert_identical(mine, theirs)
    with pytest.raises(imagegen.RequestError, match="it has no text-to-image; pass the picture as image="):
        model_of("flux-fill")("a worm")


def test_a_model_made_to_inpaint_does_that_and_nothing_else(model_of, start, mask, tmp_path):
    own = model_of("sd1.5").pipeline
    unet = diffusers.UNet2DConditionModel.from_config({**own.unet.config, "in_channels": 9})
    stock = diffusers.StableDiffusionInpaintPipeline(**own.components | {"unet": unet})
    stock.save_pretrained(tmp_path)
    model = imagegen.load(tmp_path)
    mine = model("a cat", image=start, mask=mask, seed=1, num_steps=2, guidance=2.0).images[0]
    words = {"num_inference_steps": 2, "guidance_scale": 2.0, "strength": 1.0, "width": 64, "height": 64}
    assert_identical(mine, stock("a cat", image=start, mask_image=mask, generator=seeded(1), **words).images[0])
    with pytest.raises(
        imagegen.RequestError, match="stable-diffusion-inpaint does inpainting, outpainting: it has no text-to-image"
    ):
        model("a cat")
