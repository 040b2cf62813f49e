"""Levers on every family's own pipelines: what guides a picture reaches it, and what cannot be is said before the run."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_graphs import fake_record
from test_guides import CONTROLS, make_control, write_style
from tiny_families import DEEP

import imagegen
from imagegen.levers import LEVERS, compute, graphs, steps
from imagegen.levers.blocks import TaylorSeerCache

SETTINGS = {"seed": 1, "num_steps": 2, "guidance": 2, "width": 64, "height": 64}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def edges():
    picture = Image.new("RGB", (64, 64))
    ImageDraw.Draw(picture).ellipse((15, 15, 49, 49), outline="white")
    return picture


@pytest.fixture(scope="module")
def other():
    return Image.new("RGB", (64, 64), "blue")


def draw(model, **settings):
    return np.asarray(model("a sun", **(SETTINGS | settings)).images[0]).astype(int)


def assert_plan_follows(model, plan, requests, bound):
    """Assert that a plan's pictures are the exact ones, request by request, and not each other's."""
    wanted = [draw(model, **request) for request in requests]
    model.set_plan(plan)
    found = [draw(model, **request) for request in requests]
    assert all(lever["engaged"] for lever in model.applied if not lever["lever"].startswith("prompt-cache"))
    model.set_plan("exact")
    apart = min(abs(one - two).mean() for index, one in enumerate(wanted) for two in wanted[:index])
    for picture, exact in zip(found, wanted, strict=True):
        assert abs(picture - exact).mean() < min(bound, apart / 2)


@pytest.mark.parametrize("name", CONTROLS)
def test_openvino_follows_a_control(name, folder_of, stock_of, edges, other, tmp_path):
    model = imagegen.load(folder_of(name))
    control = make_control(name, stock_of(name))
    for weight in getattr(control, "controlnet_cond_embedding", torch.nn.Identity()).parameters():
        weight.data *= 2  # else random weights hardly see the picture
    control.save_pretrained(tmp_path / "edges")
    model.add_control(tmp_path / "edges")
    requests = [{"control": edges}, {"control": other}, {"control": edges, "control_weight": 0.3}, {}]
    assert_plan_follows(model, "openvino", requests, 0.1)


@pytest.mark.parametrize(("plan", "bound"), [("balanced", 0.1), ("int8-weight-only", 8)])
def test_levers_follow_a_style_and_its_weight(plan, bound, folder_of, edges, other, tmp_path):
    model = imagegen.load(folder_of("sd1.5"))
    file, encoder = write_style(model.pipeline.unet, tmp_path)
    model.add_style(file, image_encoder=encoder)
    requests = [{"style_image": edges, "style_weight": 0.3}, {"style_image": edges, "style_weight": 1.5}, {"style_image": other}]
    assert_plan_follows(model, plan, requests, bound)


@pytest.mark.parametrize("plan", ["cuda-graph", "step-graph"])
def test_graphs_follow_the_weight_of_a_style(plan, folder_of, edges, tmp_path, monkeypatch):
    """A recording keeps the weight that it was made with, unlike the stand-in for one."""
    model = imagegen.load(folder_of("sdxl"))
    file, encoder = write_style(model.pipeline.unet, tmp_path)
    model.add_style(file, image_encoder=encoder)
    styled = [processor for processor in model.pipeline.unet.attn_processors.values() if hasattr(processor, "scale")]

    def record(compute):
        (output, replay), recorded = fake_record(compute), copy.deepcopy([processor.scale for processor in styled])

        def frozen():
            own = [processor.scale for processor in styled]
            for processor, scale in zip(styled, recorded, strict=True):
                processor.scale = scale
            replay()
            for processor, scale in zip(styled, own, strict=True):
                processor.scale = scale

        return output, frozen

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs._Graph, "requires", lambda self, target: None)
    assert_plan_follows(model, plan, [{"style_image": edges, "style_weight": weight} for weight in (0.3, 1.5)], 0.1)


# Every lever on every family. Each has to act within a few steps; those in CLOSE compute the same picture.

ACTING = {
    "threads": "threads(count=2)",
    "fewer-steps": "fewer-steps(num_steps=3)",
    "int8-dynamic": "int8-dynamic(min_features=8)",
    "int8-weight-only": "int8-weight-only(min_features=8)",
    "attention": "attention(backend=_native_math)",
    "decode-tiling": "decode-tiling(tile_px=32)",
    "first-block-cache": "first-block-cache(threshold=1e9)",
    "taylorseer-cache": "taylorseer-cache(warmup=1)",
    "mag-cache": "mag-cache(ratios=(1.0, 1.0))",
    "deep-cache": "deep-cache(warmup=1)",
    "guidance-cache": "guidance-cache(warmup=1)",
    "guidance-interval": "guidance-interval(stop=0.3)",
    "step-cache": "step-cache(warmup=1)",
}
CLOSE = {"threads", "attention", "prompt-cache", "decode-slicing", "openvino", "compile", "channels-last", "int8-weight-only"}
NOT_HERE = {"student", "fp16", "fp8", "int8-fused", "fused-norm", "context-parallel", "cuda-graph", "step-graph", "tiny-decoder"}
NOT_HERE |= {"text-offload", "model-offload", "group-offload", "layerwise-casting", "sea-cache"}
TRANSFORMERS = {*DEEP} - {"sd1.5", "sdxl"}
REFUSING = {
    "openvino": {"qwen-image", "z-image"},
    "channels-last": {"flux", "sana", "qwen-image", "z-image"},
    "attention": {*DEEP} - {"flux", "qwen-image", "z-image"},
    "decode-tiling": {"sana", "qwen-image"},
    "first-block-cache": {*DEEP} - {"flux"},  # the tiny Qwen-Image has one block
    "taylorseer-cache": {*DEEP} - {"flux", "qwen-image"},
    "mag-cache": {*DEEP} - {"flux", "qwen-image"},
    "deep-cache": TRANSFORMERS,
    "guidance-cache": TRANSFORMERS,
    "guidance-interval": TRANSFORMERS,
    **{lever: {*DEEP} for lever in NOT_HERE},
    "bf16": {*DEEP} if not compute.has_fast_bf16(torch.device("cpu")) else set(),
}
SLOW = {"compile"}


@pytest.fixture(scope="module")
def asked_of(model_of, other):
    """Return what is asked of a family in each of its modes, and the exact pictures of it."""
    made = {}

    def asked(name):
        if name not in made:
            requests = {"text-to-image": {"num_steps": 3}}
            if "image-to-image" in model_of(name).family.modes:
                requests["image-to-image"] = {"num_steps": 4, "image": other, "strength": 0.75}
            made[name] = [(mode, request, draw_two(model_of(name), request)) for mode, request in requests.items()]
        return made[name]

    return asked


def draw_two(model, request):
    images = model("a sun", **(SETTINGS | {"num_images": 2} | request)).images
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize(
    ("name", "lever"),
    [pytest.param(name, lever, marks=[pytest.mark.slow] * (lever in SLOW)) for name in DEEP for lever in LEVERS],
)
def test_a_lever_is_refused_in_words_or_engages_in_every_mode(model_of, asked_of, name, lever):
    model, asked = model_of(name), asked_of(name)
    if name in REFUSING.get(lever, ()):
        with pytest.raises(imagegen.PlanError, match=r"(\w+\W+){5}"):
            model.set_plan(ACTING.get(lever, lever))
        return
    model.set_plan(ACTING.get(lever, lever))
    try:
        did = ""
        for mode, request, exact in asked:
            request = request | ({"num_steps": None} if lever == "fewer-steps" else {})
            found = [draw_two(model, request) for _ in range(2 if lever == "prompt-cache" else 1)][-1]
            assert found.std() > 0
            assert lever not in CLOSE or abs(found - exact).mean() < 3
            report = model.applied[0]
            assert report["engaged"] and report["did"] != did, f"it did nothing in {mode}"
            did = report["did"]
    finally:
        model.set_plan("exact")


def test_a_network_that_openvino_cannot_read_is_told_in_words(model_of, monkeypatch):
    """One that nobody has tried."""
    model = model_of("qwen-image")
    before = draw(model)
    monkeypatch.setattr(compute, "NOT_FOR_OPENVINO", frozenset())
    model.set_plan("openvino")
    with pytest.raises(imagegen.PlanError, match=r"OpenVINO cannot read this model's network, a QwenImage.*: use compile"):
        draw(model)
    model.set_plan("exact")
    np.testing.assert_array_equal(draw(model), before)


@pytest.mark.parametrize(
    ("name", "plan", "says"),
    [
        ("kandinsky3", "openvino", "use compile"),
        ("kandinsky22", "openvino", "use compile"),
        ("kandinsky3", "deep-cache", "use step-cache"),
        ("flux.2-klein", "first-block-cache", "use taylorseer-cache"),
        ("chroma", "first-block-cache", "use step-cache"),
    ],
)
def test_what_fails_deep_inside_is_refused_before(model_of, name, plan, says):
    with pytest.raises(imagegen.PlanError, match=says):
        model_of(name).set_plan(plan)


def test_layers_whose_weights_are_read_directly_stay_as_they_are(model_of):
    model = model_of("hunyuan-dit")
    model.set_plan("int8-weight-only(min_features=8)")
    try:
        assert draw(model).std() > 0 and model.applied[0]["engaged"]
    finally:
        model.set_plan("exact")


# How many steps there are is the pipeline's to say.


@pytest.mark.parametrize(
    ("name", "more", "wanted"),
    [
        ("flux", {"num_steps": 4, "strength": 0.6}, 3),
        ("sd3", {"num_steps": 4, "strength": 0.6}, 3),
        ("sdxl", {"num_steps": 4, "strength": 0.6}, 2),
        ("sdxl", {"num_steps": 4, "strength": 0.6, "scheduler": "heun"}, 3),
        ("sdxl", {"num_steps": 4, "scheduler": "dpm2"}, 7),
    ],
)
def test_levers_can_count_the_steps_at_the_first_call(model_of, other, monkeypatch, name, more, wanted):
    told = []

    class Counting(steps.StepCache):
        def begin(self, run):
            super().begin(run)
            self.run = run

        def apply(self, target):
            def around(compute):
                return lambda *args, **kwargs: told.append(self.run.count_steps()) or compute(*args, **kwargs)

            self.patches.wrap(target.denoiser, "forward", around)

        def advance(self, index, num_steps):
            assert told[-1] == num_steps

    monkeypatch.setitem(LEVERS, "step-cache", Counting)
    model = model_of(name)
    model.set_plan("step-cache")
    try:
        draw(model, **({"image": other} if "strength" in more else {}), **more)
    finally:
        model.set_plan("exact")
    assert told == [wanted] * wanted


def test_the_last_step_of_a_run_from_a_picture_is_computed(model_of, other, monkeypatch):
    """Four steps at a strength of 0.6 are three of FLUX."""
    asked, own = [], TaylorSeerCache.config
    monkeypatch.setattr(TaylorSeerCache, "config", lambda self, num_steps: asked.append(num_steps) or own(self, num_steps))
    model = model_of("flux")
    model.set_plan("taylorseer-cache(warmup=1)")
    try:
        draw(model, image=other, strength=0.6, num_steps=4)
        assert asked[-1] == 3 and model.applied[0]["did"] == "2 of 6 attentions skipped"
    finally:
        model.set_plan("exact")


def test_fewer_steps_engage_in_a_run_from_a_picture(model_of, other):
    model = model_of("sdxl")
    model.set_plan("fewer-steps(num_steps=4)")
    try:
        draw(model, image=other, strength=0.5, num_steps=None)
        assert model.applied[0]["engaged"]
    finally:
        model.set_plan("exact")


@pytest.mark.parametrize("plan", ["first-block-cache(threshold=1e9)", "taylorseer-cache(warmup=1)"])
def test_a_cache_keeps_both_halves_of_guidance_apart(model_of, other, plan):
    """Where the pipeline does not name them: a cache with nothing to skip must give the exact picture."""
    model = model_of("flux")
    request = {"image": other, "strength": 1.0, "num_steps": 2, "true_guidance": 3.0, "negative_prompt": "a frog"}
    exact = draw(model, **request)
    model.set_plan(plan.replace("1e9", "1e-9").replace("warmup=1", "warmup=2"))
    try:
        np.testing.assert_array_equal(draw(model, **request), exact)
        model.set_plan(plan)
        draw(model, **(request | {"num_steps": 4}))
        assert model.applied[0]["engaged"]
    finally:
        model.set_plan("exact")
