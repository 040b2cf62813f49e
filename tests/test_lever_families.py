"""Levers on every family's own pipelines: what guides a picture reaches it, and what cannot be is said before the run."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_graphs import fake_record
from test_guides import CONTROLS, make_control, write_style

import imagegen
from imagegen.levers import graphs

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
