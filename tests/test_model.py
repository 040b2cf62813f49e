"""The exact plan is the stock pipeline bit for bit, a picture does not depend on its batch, a stop stops."""

import shutil
import threading
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image, ImageDraw

import imagegen
from imagegen.catalog import embedded_folder
from imagegen.fidelity import max_difference, psnr_db


def seeded(seed):
    return torch.Generator("cpu").manual_seed(seed)


def assert_identical(picture, other):
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(other))


@pytest.fixture(scope="module")
def start():
    """A picture to start from: a yellow disk on blue."""
    picture = Image.new("RGB", (128, 128), (60, 120, 220))
    ImageDraw.Draw(picture).ellipse((30, 30, 98, 98), fill=(250, 210, 60))
    return picture


@pytest.fixture(scope="module")
def mask():
    picture = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(picture).rectangle((64, 0, 127, 127), fill=255)
    return picture


@pytest.mark.parametrize(
    ("prompt", "seed", "steps", "guidance"),
    [
        ("a red apple", 0, 20, 4.0),
        ("a blue heart on a yellow background", 7, 6, 7.5),
        ("a cat", 2**53 - 1, 3, 1.0),
        ("dog", 11, 1, 2.0),
    ],
)
def test_text_to_image_is_stock(model, stock, prompt, seed, steps, guidance):
    ours = model(prompt, seed=seed, num_steps=steps, guidance=guidance)
    theirs = stock(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=seeded(seed)).images[0]
    assert_identical(ours.images[0], theirs)


def test_size_negative_prompt_and_batch_are_stock(model, stock):
    ours = model("a tree", seed=3, num_images=2, num_steps=4, negative_prompt="green", width=96, height=160)
    theirs = stock(
        ["a tree"] * 2,
        negative_prompt=["green"] * 2,
        num_inference_steps=4,
        guidance_scale=4.0,
        width=96,
        height=160,
        generator=[seeded(3), seeded(4)],
    ).images
    assert ours.images[0].size == (96, 160)
    for mine, stocks in zip(ours.images, theirs, strict=True):
        assert_identical(mine, stocks)


@pytest.mark.parametrize(("prompt", "seed", "steps", "strength"), [("a green apple", 5, 10, 0.6), ("a sun", 9, 6, 1.0)])
def test_image_to_image_is_stock(model, stock, start, prompt, seed, steps, strength):
    ours = model(prompt, image=start, strength=strength, seed=seed, num_steps=steps)
    theirs = AutoPipelineForImage2Image.from_pipe(stock)(
        prompt, image=start, strength=strength, num_inference_steps=steps, guidance_scale=4.0, generator=seeded(seed)
    ).images[0]
    assert_identical(ours.images[0], theirs)


@pytest.mark.parametrize(("prompt", "seed", "steps", "strength"), [("a worm", 5, 8, 1.0), ("a face", 1, 10, 0.7)])
def test_inpainting_is_stock(model, stock, start, mask, prompt, seed, steps, strength):
    ours = model(prompt, image=start, mask=mask, strength=strength, seed=seed, num_steps=steps)
    theirs = AutoPipelineForInpainting.from_pipe(stock)(
        prompt,
        image=start,
        mask_image=mask,
        strength=strength,
        width=128,
        height=128,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=seeded(seed),
    ).images[0]
    assert_identical(ours.images[0], theirs)


def test_other_scheduler_is_stock(model, stock):
    from diffusers import UniPCMultistepScheduler

    ours = model("a fish", seed=2, num_steps=5, scheduler="unipc").images[0]
    own = stock.scheduler
    stock.scheduler = UniPCMultistepScheduler.from_config(own.config)
    try:
        theirs = stock("a fish", num_inference_steps=5, guidance_scale=4.0, generator=seeded(2)).images[0]
    finally:
        stock.scheduler = own
    assert_identical(ours, theirs)
    assert psnr_db(ours, model("a fish", seed=2, num_steps=5).images[0]) < 60


def test_unknown_scheduler_names_the_known(model):
    with pytest.raises(imagegen.RequestError, match=r"dpm\+\+ 2m, euler, unipc"):
        model("a fish", scheduler="magic")


def test_noise_floor_over_batch_and_threads(model, threads):
    """Picture i of a batch of 4 against the same picture alone, on one thread and two."""
    worst_db, worst_difference = float("inf"), 0
    for prompt in ("a cat on a blue background",):
        threads(2)
        batch = model(prompt, seed=40, num_images=4).images
        for count in (1, 2):
            threads(count)
            for index in range(4):
                alone = model(prompt, seed=40 + index).images[0]
                worst_db = min(worst_db, psnr_db(alone, batch[index]))
                worst_difference = max(worst_difference, max_difference(alone, batch[index]))
    assert worst_difference <= 2
    assert worst_db > 50


def test_given_noise_is_what_the_seed_draws(model):
    noise = torch.randn((1, 4, 16, 16), generator=seeded(7))
    given = model("a star", noise=noise, seed=123, num_steps=4)
    assert_identical(given.images[0], model("a star", seed=7, num_steps=4).images[0])
    assert given.pictures[0].receipt.request["noise"] is True


@pytest.mark.parametrize("noise", [torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 16, 16), "noise"])
def test_noise_of_another_shape(model, noise):
    with pytest.raises(imagegen.RequestError, match="noise must"):
        model("a star", noise=noise)


def test_stream_yields_every_step_and_the_result_last(model):
    steps = list(model.stream("a red apple", seed=7, num_steps=5))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert {step.num_steps for step in steps} == {5}
    assert [step.result is not None for step in steps] == [False] * 4 + [True]
    assert all(step.latents.shape == (1, 4, 16, 16) for step in steps)
    assert_identical(steps[-1].result.images[0], model("a red apple", seed=7, num_steps=5).images[0])


def test_previews_approach_the_picture(model):
    *before, last = model.stream("a red apple", seed=7, num_steps=8)
    closeness = [psnr_db(step.preview(0), last.preview(0)) for step in before]
    assert closeness[-1] > closeness[0]
    assert before[0].preview(0).size == (128, 128)
    assert_identical(last.preview(0), last.result.images[0])


def test_strength_shortens_the_stream(model, start):
    assert [step.num_steps for step in model.stream("a sun", image=start, strength=0.5, num_steps=8)] == [4] * 4


def count_calls(model, monkeypatch):
    calls = []
    forward = model.pipeline.unet.forward
    monkeypatch.setattr(model.pipeline.unet, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    return calls


def test_leaving_the_loop_stops_the_work_within_a_step(model, monkeypatch):
    expected = model("a red apple", seed=7, num_steps=4).images[0]
    calls = count_calls(model, monkeypatch)
    for step in model.stream("a red apple", seed=7, num_steps=50):
        if step.index == 2:
            break
    del step
    assert len(calls) <= 5
    assert not [thread for thread in threading.enumerate() if thread.name == "imagegen-stream"]
    assert_identical(model("a red apple", seed=7, num_steps=4).images[0], expected)


def test_run_tells_every_step_in_the_callers_thread(model, monkeypatch):
    expected = model("a red apple", seed=7, num_steps=4).images[0]
    calls, told = count_calls(model, monkeypatch), []

    def on_step(step):
        told.append((step.index, step.num_steps, threading.current_thread().name))
        if stop_at == step.index:
            raise KeyboardInterrupt

    stop_at = None
    assert_identical(model.run("a red apple", on_step, seed=7, num_steps=4).images[0], expected)
    assert told == [(index, 4, threading.current_thread().name) for index in range(4)]
    stop_at = 1
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        model.run("a red apple", on_step, seed=7, num_steps=4)
    assert len(calls) == 2
    stop_at = None
    assert_identical(model.run("a red apple", on_step, seed=7, num_steps=4).images[0], expected)


def test_an_exception_inside_reaches_the_caller_and_leaves_the_model_usable(model, monkeypatch):
    expected = model("a red apple", seed=7, num_steps=3).images[0]
    with monkeypatch.context() as broken:
        broken.setattr(model.pipeline.vae, "decode", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            model("a red apple", seed=7, num_steps=3)
    assert_identical(model("a red apple", seed=7, num_steps=3).images[0], expected)


def test_two_streams_of_one_model_never_meet(model):
    expected = [model(prompt, seed=1, num_steps=4).images[0] for prompt in ("a dog", "a cat")]
    first, second = model.stream("a dog", seed=1, num_steps=4), model.stream("a cat", seed=1, num_steps=4)
    *_, (one, other) = zip(first, second, strict=True)
    assert_identical(one.result.images[0], expected[0])
    assert_identical(other.result.images[0], expected[1])


def test_guidance_one_is_off_and_not_computed(model, monkeypatch):
    rows = []
    forward = model.pipeline.unet.forward
    monkeypatch.setattr(model.pipeline.unet, "forward", lambda x, *a, **k: (rows.append(len(x)), forward(x, *a, **k))[1])
    model("a cat", num_steps=2, guidance=1)
    model("a cat", num_steps=2, guidance=2)
    assert rows == [1, 1, 2, 2]


def test_overlong_prompt_warns_says_what_was_cut_and_goes_on(model):
    with pytest.warns(UserWarning, match=r"longer than the 32 tokens.*left out: 'zebra zebra'"):
        result = model("apple " * 30 + "zebra zebra", num_steps=1)
    assert len(result.images) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model("apple " * 30, num_steps=1)


def test_receipt_says_what_was_made(model):
    receipt = model("a red apple", num_images=2, seed=7, num_steps=2).pictures[1].receipt
    made = {"seed": 8, "num_images": 1, "prompt": "a red apple", "num_steps": 2, "guidance": 4.0}
    assert receipt.request | made == receipt.request
    assert receipt.model["source"] == "emoji"
    assert set(receipt.model["sha256"]) == {
        path.split("emoji/")[-1] for path in map(str, embedded_folder().rglob("*.safetensors"))
    }
    assert receipt.plan == {"name": "exact", "levers": []}
    assert receipt.environment["dtype"] == "float32"


def test_loads_from_a_folder_without_the_network(model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(embedded_folder(), folder, ignore=shutil.ignore_patterns("recipe", "samples"))
    copied = imagegen.load(folder)
    assert copied.family.size_px == 128
    assert_identical(copied("a cat", seed=1, num_steps=2, guidance=4.0).images[0], model("a cat", seed=1, num_steps=2).images[0])


@pytest.fixture
def broken(tmp_path):
    """A copy of the embedded model, to be broken."""
    folder = tmp_path / "broken"
    shutil.copytree(embedded_folder(), folder, ignore=shutil.ignore_patterns("recipe", "samples"))
    return folder


def test_truncated_weights(broken):
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(imagegen.ModelError, match=r"diffusion_pytorch_model.safetensors.*truncated"):
        imagegen.load(broken)


def test_missing_weights(broken):
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(imagegen.ModelError, match=r"vae.*lacks its weights, diffusion_pytorch_model"):
        imagegen.load(broken)


def test_weights_of_another_model(broken):
    shutil.copy(broken / "vae/diffusion_pytorch_model.safetensors", broken / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(imagegen.ModelError, match=r"unet.*lacks \d+ tensors of a UNet2DConditionModel"):
        imagegen.load(broken)


def test_pickled_weights_are_not_opened(broken):
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save({"x": torch.zeros(1)}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(imagegen.ModelError, match=r"pickle only.*not opened"):
        imagegen.load(broken)


def test_no_model_there(tmp_path):
    with pytest.raises(imagegen.ModelError, match="no folder"):
        imagegen.load(tmp_path / "none")
    with pytest.raises(imagegen.ModelError, match=r"no model_index\.json"):
        imagegen.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "MagicPipeline"}')
    with pytest.raises(imagegen.ModelError, match="is a MagicPipeline, which this version does not run"):
        imagegen.load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(imagegen.ModelError, match="cannot be read"):
        imagegen.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"plan": "warp"}, imagegen.PlanError, "unknown plan 'warp': use exact, balanced, fast"),
        ({"dtype": "int8"}, imagegen.ModelError, "unknown dtype 'int8'"),
        ({"dtype": "float16", "device": "cpu"}, imagegen.ModelError, "use dtype='bfloat16'"),
        ({"device": "toaster"}, imagegen.ModelError, "unknown device 'toaster'"),
    ],
)
def test_wrong_ways_to_load(given, error, says):
    with pytest.raises(error) as caught:
        imagegen.load(**given)
    assert says in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_cuda_where_there_is_none():
    with pytest.raises(imagegen.ModelError, match="sees no CUDA device"):
        imagegen.load(device="cuda")


def test_bfloat16_loads_and_stays_near():
    exact = imagegen.load()("a red apple", seed=1, num_steps=4).images[0]
    rounded = imagegen.load(dtype=torch.bfloat16)("a red apple", seed=1, num_steps=4)
    assert rounded.pictures[0].receipt.environment["dtype"] == "bfloat16"
    assert 15 < psnr_db(rounded.images[0], exact) < 60
