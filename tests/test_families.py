"""Every family draws what its stock pipeline draws, bit for bit, under one set of words; eight of them in depth.

Checkpoints are tiny, with random weights made here: what is tested is the way through each pipeline, not what
a published model draws.
"""

import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tiny_families import DEEP

import imagegen
from imagegen.families import latents
from imagegen.families.diffusion import denoiser_of
from imagegen.fidelity import max_difference
from imagegen.loader import describe, find_model

# What a family's settings are called by its own pipeline.
NEGATIVE = ({"guidance": 5.0, "negative_prompt": "blue"}, {"guidance_scale": 5.0, "negative_prompt": ["blue", "blue"]})
WORDS = {
    "flux": ({"guidance": 2.5}, {"guidance_scale": 2.5}),
    "qwen-image": (NEGATIVE[0], {"true_cfg_scale": 5.0, "negative_prompt": ["blue", "blue"]}),
}
OFF = {"flux": {"guidance_scale": 1.0}, "qwen-image": {"true_cfg_scale": 1.0}, "z-image": {"guidance_scale": 0.0}}
# Both resize to the nearest of a list of sizes, whose smallest are these.
SIZES = {"pixart-sigma": 256, "sana": 512}
LATENTS = {"sd1.5": (4, 8), "sdxl": (4, 8), "sd3": (16, 8), "flux": (16, 8), "pixart-sigma": (4, 32), "sana": (4, 16)}


def seeded(*seeds):
    found = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return found if len(found) > 1 else found[0]


def assert_identical(picture, other):
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(other))


def side(name):
    return {"width": SIZES.get(name, 64), "height": SIZES.get(name, 64)}


@pytest.fixture(params=DEEP)
def name(request):
    return request.param


def test_a_batch_is_stock_with_a_generator_for_each_picture(name, model_of, stock_of):
    ours, theirs = WORDS.get(name, NEGATIVE)
    mine = model_of(name)("a red apple", seed=3, num_images=2, num_steps=2, **ours, **side(name)).images
    prompts = {"prompt": ["a red apple"] * 2, "num_inference_steps": 2, "generator": seeded(3, 4)}
    for picture, other in zip(mine, stock_of(name)(**prompts, **theirs, **side(name)).images, strict=True):
        assert_identical(picture, other)
    assert np.asarray(mine[0]).std() > 2
    assert max_difference(*mine) > 8


def test_the_prompt_alone_is_stock(name, model_of, stock_of):
    """Nothing said: no negative prompt, which is not the same as an empty one everywhere."""
    scale = {"qwen-image": {"true_cfg_scale": 2.0, "negative_prompt": ""}}.get(name, {"guidance_scale": 2.0})
    mine = model_of(name)("a cat", seed=1, num_steps=2, guidance=2.0, **side(name)).images[0]
    theirs = stock_of(name)("a cat", num_inference_steps=2, generator=seeded(1), **scale, **side(name)).images[0]
    assert_identical(mine, theirs)


def count_calls(model, monkeypatch):
    """Count the pictures that the denoiser is asked for: guidance asks twice for each."""
    rows, denoiser = [], denoiser_of(model.pipeline)
    forward = denoiser.forward

    def counted(*args, **kwargs):
        rows.append(len(args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))))
        return forward(*args, **kwargs)

    monkeypatch.setattr(denoiser, "forward", counted)
    return rows


def test_guidance_one_is_off_and_not_computed(name, model_of, stock_of, monkeypatch):
    rows = count_calls(model_of(name), monkeypatch)
    mine = model_of(name)("a cat", seed=1, num_steps=2, guidance=1, **side(name)).images[0]
    assert sum(rows) == 2
    off = OFF.get(name, {"guidance_scale": 1.0})
    assert_identical(mine, stock_of(name)("a cat", num_inference_steps=2, generator=seeded(1), **off, **side(name)).images[0])
    rows.clear()
    model_of(name)("a cat", seed=1, num_steps=2, guidance=2, **side(name))
    assert sum(rows) == (2 if name == "flux" else 4)  # there, guidance is an input


def test_steps_carry_unpacked_latents_that_decode_to_the_picture(name, model_of):
    model, seen = model_of(name), []
    channels, wide = LATENTS.get(name, (16, 8))
    result = model.run("a tree", seen.append, seed=5, num_images=2, num_steps=2, **side(name))
    assert [(step.index, step.num_steps) for step in seen] == [(0, 2), (1, 2)]
    assert {tuple(step.latents.shape) for step in seen} == {(2, channels, wide, wide)}
    assert seen[0].preview(1).size == result.images[1].size
    for index, picture in enumerate(result.images):
        assert max_difference(latents.decode(model.pipeline, seen[1].latents[index]), picture) <= 1


def test_given_noise_is_what_the_seed_draws(name, model_of):
    channels, wide = LATENTS.get(name, (16, 8))
    noise = torch.randn((1, channels, wide, wide), generator=seeded(7))
    given = model_of(name)("a star", noise=noise, seed=123, num_steps=2, **side(name)).images[0]
    assert_identical(given, model_of(name)("a star", seed=7, num_steps=2, **side(name)).images[0])
    with pytest.raises(imagegen.RequestError, match=rf"noise must have the shape \(1, {channels}, {wide}, {wide}\)"):
        model_of(name)("a star", noise=noise[..., 1:], num_steps=2, **side(name))


def test_a_stop_leaves_the_model_as_it_was(name, model_of, monkeypatch):
    model = model_of(name)
    expected = model("a red apple", seed=7, num_steps=2, **side(name)).images[0]
    rows = count_calls(model, monkeypatch)
    for step in model.stream("a red apple", seed=7, num_steps=6, guidance=1, **side(name)):
        if step.index == 1:
            break
    assert sum(rows) <= 4
    monkeypatch.undo()
    assert_identical(model("a red apple", seed=7, num_steps=2, **side(name)).images[0], expected)


READ = {"sd1.5": 77, "sdxl": 77, "sd3": 256, "flux": 512, "pixart-sigma": 300, "sana": 300, "qwen-image": 512, "z-image": 506}


def test_an_overlong_prompt_warns_and_a_short_one_does_not(name, model_of):
    model = model_of(name)
    assert model.notice_about("apple " * 10) is None
    cut = model.notice_about("apple " * 200 + "zebra")
    assert f"longer than the {READ[name]} tokens" in cut
    assert cut.endswith("zebra'")


def test_what_is_said_to_be_cut_changes_nothing(name, model_of):
    model, settings = model_of(name), {"seed": 1, "num_steps": 2, "guidance": 1, **side(name)}
    prompt = "apple " * 120
    read = prompt[: -len(model.notice_about(prompt).split("left out: '")[1][:-1])].rstrip()
    with pytest.warns(UserWarning, match="left out"):
        assert_identical(model(read + " apple" * 50, **settings).images[0], model(read + " zebra" * 50, **settings).images[0])


def test_a_picture_does_not_depend_on_its_batch(name, model_of):
    pair = model_of(name)("a dog", seed=20, num_images=2, num_steps=2, **side(name)).images
    assert max_difference(model_of(name)("a dog", seed=21, num_steps=2, **side(name)).images[0], pair[1]) <= 2


def test_receipts_name_the_family_and_the_weights(name, model_of):
    receipt = model_of(name)("a cat", seed=1, num_steps=2, **side(name)).pictures[0].receipt
    assert receipt.model["family"] == model_of(name).family.name
    assert any(file.startswith(("unet/", "transformer/")) for file in receipt.model["sha256"])


def test_flux_computes_true_guidance_on_top(model_of, stock_of):
    settings = {"num_steps": 2, "seed": 1, "width": 64, "height": 64}
    mine = model_of("flux")("a cat", true_guidance=3.0, negative_prompt="blue", guidance=2.0, **settings).images[0]
    words = {"true_cfg_scale": 3.0, "guidance_scale": 2.0, "negative_prompt": "blue", "width": 64, "height": 64}
    assert_identical(mine, stock_of("flux")("a cat", num_inference_steps=2, generator=seeded(1), **words).images[0])


def test_flux_without_guidance_is_told_by_its_configuration(model_of):
    schnell, dev = model_of("flux-schnell").family, model_of("flux").family
    assert (schnell.num_steps, schnell.guidance, schnell.distilled) == (4, 1.0, True)
    assert (dev.num_steps, dev.guidance, dev.distilled) == (28, 3.5, False)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("flux", {"negative_prompt": "blue"}, "pass true_guidance=4 too"),
        ("flux-schnell", {"guidance": 3.5}, "takes no guidance, got 3.5: leave it out"),
        ("sdxl", {"true_guidance": 3.5}, "its guidance is two passes, use that alone"),
        ("sana", {"width": 100}, "multiple of 32 for sana, got 100: try 96 or 128"),
        ("sana", {"image": "cat.png"}, "no file 'cat.png'"),
    ],
)
def test_what_a_family_cannot_take_is_an_error_with_a_way_out(model_of, name, given, says):
    with pytest.raises(imagegen.RequestError) as caught:
        model_of(name)("a cat", **given)
    assert says in str(caught.value)


def test_native_size_is_the_configurations_where_that_says_so(model_of):
    sizes = {name: model_of(name).family.size_px for name in DEEP}
    assert sizes == {
        "sd1.5": 64, "sdxl": 64, "sd3": 64, "flux": 1024, "pixart-sigma": 256, "sana": 512, "qwen-image": 1328, "z-image": 1024,
    }  # fmt: skip


def test_no_reference_is_coarser_than_the_weights(folder_of, model_of, tmp_path):
    assert model_of("flux").family.reference_dtype == "float32"
    diffusers.DiffusionPipeline.from_pretrained(folder_of("flux"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert imagegen.load(tmp_path).dtype == torch.bfloat16


def test_loading_warns_of_nothing(folder_of):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        imagegen.load(folder_of("sdxl"))


def lora_file(pipeline, path, seed):
    """Write a LoRA whose weights are not zero, in diffusers' layout."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    denoiser = denoiser_of(pipeline)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "made")
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    pipeline.save_lora_weights(path, **{f"{part}_lora_layers": get_peft_model_state_dict(denoiser, adapter_name="made")})
    denoiser.delete_adapters("made")
    return path / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3", "z-image"])
def test_loras_add_up_swap_and_leave_nothing(name, folder_of, tmp_path):
    model, stock = (imagegen.load(folder_of(name)), diffusers.DiffusionPipeline.from_pretrained(folder_of(name)))
    files = [lora_file(stock, tmp_path / str(seed), seed) for seed in (1, 2)]
    settings = {"seed": 1, "num_steps": 2, "guidance": 2, "width": 64, "height": 64}
    words = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64}
    free = model("a cat", **settings).images[0]
    for file, weight in zip(files, (0.8, -0.5), strict=True):
        model.add_lora(file, weight=weight)
    both = model("a cat", **settings).images[0]
    for number, file in enumerate(files):
        stock.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=str(number))
    stock.set_adapters(["0", "1"], [0.8, -0.5])
    assert_identical(both, stock("a cat", generator=seeded(1), **words).images[0])
    assert not np.array_equal(np.asarray(both), np.asarray(free))
    model.remove_loras()
    assert_identical(model("a cat", **settings).images[0], free)
    model.add_lora(files[1], weight=1.0)
    stock.set_adapters(["1"], [1.0])
    assert_identical(model("a cat", **settings).images[0], stock("a cat", generator=seeded(1), **words).images[0])


WITHOUT_LOADING = ["sd1.5", "sdxl", "sd3", "flux-schnell", "z-image", "flux.2-klein-distilled", "flux-fill", "kandinsky22"]


@pytest.mark.parametrize("name", [*WITHOUT_LOADING, "janusflow-tiny", "janus-pro-tiny", "janus-pro-tiny/safetensors"])
def test_what_a_model_makes_is_known_before_it_is_loaded(folder_of, name):
    folder = folder_of(name) if name in WITHOUT_LOADING else Path(__file__).parent / "fixtures" / name
    assert describe(*find_model(folder, {})) == imagegen.load(folder).family
