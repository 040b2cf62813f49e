"""Recorded steps: the table read off every scheduler gives the stock scheduler's steps, and the stock pipeline's pictures.

A CUDA graph cannot be recorded here; a stand-in computes the same function on the same static tensors at every
replay, so that everything but the recording itself is at work.
"""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny import ModelBench, make_unet

from imagegen.fidelity import psnr_db
from imagegen.levers import graphs
from imagegen.levers.lever import map_tensors, tensors_of
from imagegen.request import PlanError

SCHEDULERS = {
    "euler": EulerDiscreteScheduler(),
    "euler, karras": EulerDiscreteScheduler(use_karras_sigmas=True),
    "euler, v": EulerDiscreteScheduler(prediction_type="v_prediction"),
    "euler a": EulerAncestralDiscreteScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "flow, shifted": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm++ 2m": DPMSolverMultistepScheduler(),
    "dpm++ 2m karras": DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm++ 2m, flow": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "dpm++ 1": DPMSolverMultistepScheduler(solver_order=1),
}


def fake_record(compute):
    """Stand in for a CUDA graph: the same outputs, computed anew in place at every replay."""
    for _ in range(graphs.WARM_UPS):
        compute()
    output = map_tensors(torch.clone, compute())

    def replay():
        for kept, new in zip(tensors_of(output), tensors_of(compute()), strict=True):
            kept.copy_(new)

    return output, replay


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(graphs, "record", fake_record)
    monkeypatch.setattr(graphs._Graph, "requires", lambda self, target: None)


@pytest.fixture(scope="module")
def unet(model):
    return make_unet(model)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [4, 20])
def test_a_table_takes_the_stock_schedulers_steps(name, num_steps):
    own = SCHEDULERS[name]
    scheduler = type(own).from_config(own.config)
    scheduler.set_timesteps(num_steps)
    table = graphs.read_table(scheduler)
    assert table is not None and table.rows.shape == (len(scheduler.timesteps), 6)
    assert table.noisy == (name == "euler a")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * getattr(scheduler, "init_noise_sigma", 1.0)
    loop = graphs.StepLoop(latents, False, len(table.rows) if table.noisy else 0)
    chance = torch.Generator().manual_seed(2)
    noise = torch.stack([torch.randn(latents.shape, generator=chance) for _ in table.rows]) if table.noisy else None
    loop.begin(table, 1.0, noise)
    loop.latents.copy_(latents)
    stock, chance = latents, torch.Generator().manual_seed(2)
    for index, time in enumerate(scheduler.timesteps):
        output = torch.randn(latents.shape, generator=torch.Generator().manual_seed(10 + index))
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(stock, time)
        options = {"generator": chance} if table.noisy else {}
        stock = scheduler.step(output, time, stock, return_dict=False, **options)[0]
        loop.index.fill_(index)
        loop.step(output)
        assert (loop.latents - stock).abs().max() <= 2e-5 * stock.abs().max()


def test_steps_that_are_not_linear_are_found_out():
    clipped = DPMSolverMultistepScheduler(thresholding=True, sample_max_value=0.1)
    clipped.set_timesteps(4)
    assert graphs.read_table(clipped) is None
    for other in (UniPCMultistepScheduler(), DDIMScheduler()):
        other.set_timesteps(4)
        assert graphs.read_table(other) is None


def test_reading_a_table_leaves_the_scheduler_as_it_was():
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(6)
    before = copy.deepcopy(vars(scheduler))
    graphs.read_table(scheduler)
    assert str(vars(scheduler)) == str(before)


def assert_same(pictures, stock):
    for mine, others in zip(pictures, stock, strict=True):
        same = psnr_db(Image.fromarray(mine.astype(np.uint8)), Image.fromarray(others.astype(np.uint8)))
        assert same > 60


@pytest.mark.parametrize("plan", ["cuda-graph", "step-graph"])
def test_the_pictures_are_the_stock_pipelines(recording, model, plan):
    bench = ModelBench(model)
    runs = [{}, {"seed": 3}, {"num_images": 2}, {"num_steps": 5}, {"guidance": 1.0}, {"prompt": "a frog"}, {"scheduler": "euler"}]
    stock = [bench.draw(**settings) for settings in runs]
    bench.set_plan(plan)
    try:
        for settings, expected in zip(runs, stock, strict=True):
            assert_same(bench.draw(**settings), expected)
        done = bench.report()[0]["did"]
        assert ("whole steps replayed" in done) == (plan == "step-graph") and "outside" not in done
    finally:
        bench.set_plan("exact")
    assert (bench.draw() == stock[0]).all()


@pytest.mark.parametrize("scheduler", ["euler", "euler a", "dpm++ 2m karras", "ddim"])
def test_other_schedulers_and_their_noise(recording, model, scheduler):
    bench = make_unet(model)
    bench.pipeline.scheduler = SCHEDULERS[scheduler] if scheduler in SCHEDULERS else DDIMScheduler()
    stock = bench.draw(num_images=2)
    bench.set_plan("step-graph")
    assert_same(bench.draw(num_images=2), stock)
    outside = "the scheduler outside" in bench.report()[0]["did"]
    assert outside == (scheduler == "ddim")


def test_image_to_image_and_inpainting(recording, model):
    start = model("a red apple", seed=1, num_steps=4).images[0]
    mask = Image.new("L", start.size)
    mask.paste(255, (0, 0, 64, 128))
    for more in ({"strength": 0.5}, {"mask": mask}):
        settings = {"image": start, "seed": 2, "num_steps": 6} | more
        stock = model("a frog", **settings).images[0]
        with model.plan_for_a_while("step-graph"):
            assert psnr_db(model("a frog", **settings).images[0], stock) > 60


def test_a_stop_leaves_nothing_for_the_next_picture(recording, unet):
    unet.set_plan("step-graph")
    try:
        whole = unet.draw()
        unet.stop_in(3)
        unet.raise_in(2)
        assert (unet.draw() == whole).all()
    finally:
        unet.set_plan("exact")


def test_a_lora_is_recorded_anew(recording, model):
    bench = make_unet(model)
    bench.set_plan("step-graph")
    without = bench.draw()
    bench.add_lora()
    mine = bench.draw()
    bench.set_plan("exact")
    assert_same(mine, bench.draw())
    assert (mine != without).any()


def test_a_graph_that_records_the_wrong_thing_is_found_out(monkeypatch, recording, unet):
    stock = unet.draw()
    monkeypatch.setattr(graphs.StepLoop, "step", lambda self, output: None)
    unet.set_plan("step-graph")
    try:
        assert (unet.draw() != stock).any()
    finally:
        unet.set_plan("exact")


def test_graphs_need_cuda_and_exclude_what_changes_between_steps(model):
    for plan in ("cuda-graph", "step-graph"):
        with pytest.raises(PlanError, match="CUDA"):
            model.set_plan(plan)
    for other in ("compile", "step-cache", "guidance-cache", "deep-cache", "first-block-cache"):
        with pytest.raises(PlanError, match="cannot be combined"):
            model.set_plan(f"step-graph + {other}")
