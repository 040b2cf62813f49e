"""Memory: the budget picks the cheapest rung that fits and says so; an out-of-memory error goes one rung down."""

import numpy as np
import pytest
import torch
from tiny import make_unet

import imagegen
from imagegen import ModelError, PlanError
from imagegen.fit import LADDER, Needs, Rung, choose_rung, measure_needs, out_of_memory, rungs
from imagegen.levers import memory
from imagegen.measure import GIB

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# A model like FLUX in bfloat16: 9.8 GiB of text encoders, 22.2 of transformer.
LARGE = Needs(text=int(9.8 * GIB), denoiser=int(22.2 * GIB), others=GIB // 4, denoising=GIB, decoding=4 * GIB)


def test_needs_fall_down_the_ladder():
    whole = LARGE.of(LADDER[0]) / GIB
    assert whole == pytest.approx(9.8 + 22.2 + 0.25 + 4, abs=0.01)
    assert LARGE.of(Rung(("text-offload",))) / GIB == pytest.approx(22.2 + 0.25 + 9.8, abs=0.01)
    assert LARGE.of(Rung(("model-offload",))) / GIB == pytest.approx(22.2 + 1, abs=0.01)
    assert LARGE.of(Rung(("group-offload", "text-offload"))) / GIB < 12


@pytest.mark.parametrize(
    ("memory_gib", "levers"), [(80, ()), (33, ("text-offload",)), (24, ("model-offload",)), (12, ("group-offload",))]
)
def test_a_budget_picks_the_cheapest_rung(memory_gib, levers):
    number, said = choose_rung(LARGE, memory_gib, CUDA)
    assert set(levers) <= set(rungs(CUDA)[number].levers)
    assert f"memory_gib={memory_gib}" in said and "estimated" in said
    cheaper = [LARGE.of(rung) / GIB for rung in rungs(CUDA)[:number]]
    assert all(gib > memory_gib for gib in cheaper)


def test_a_budget_that_nothing_fits_says_the_least():
    with pytest.raises(PlanError, match="least that this model needs"):
        choose_rung(LARGE, 0.5, CUDA)


def test_rungs_that_change_pictures_come_last():
    same = [rung.same for rung in LADDER]
    assert same == sorted(same, reverse=True)


def test_what_the_embedded_model_needs(model):
    needs = measure_needs(model.pipeline, 128)
    weights = sum(p.nbytes for name in ("unet", "vae", "text_encoder") for p in getattr(model.pipeline, name).parameters())
    assert needs.text + needs.denoiser + needs.others == weights
    assert 0 < needs.denoising < weights and 0 < needs.decoding < 4 * weights


def test_load_takes_a_budget_and_says_what_it_chose():
    roomy = imagegen.load(memory_gib=8)
    assert "no memory lever" in roomy.memory and roomy.applied == []
    with pytest.raises(PlanError, match="too little"):
        imagegen.load(memory_gib=0.01)
    with pytest.raises(ModelError, match="above 0"):
        imagegen.load(memory_gib=-1)


def test_text_encoders_wait_in_host_memory(model, monkeypatch):
    bench = make_unet(model)
    with pytest.raises(PlanError, match="the model is on the CPU"):
        bench.set_plan("text-offload")
    monkeypatch.setattr(memory._NeedsGpu, "requires", lambda self, target: None)
    expected, before = bench.draw(num_steps=2), bench.snapshot()
    moves = []
    move = bench.pipeline.text_encoder.to
    monkeypatch.setattr(bench.pipeline.text_encoder, "to", lambda place: moves.append(str(place)) or move(place))
    bench.set_plan("text-offload")
    assert np.array_equal(bench.draw(num_steps=2), expected)
    calls = len(moves) // 2
    assert moves == ["cpu"] + ["cpu", "cpu"] * calls and calls >= 1, "here the device is the CPU as well"
    assert bench.report()[0] == {
        "lever": "text-offload",
        "engaged": True,
        "did": f"{calls} encodings with the encoder brought in",
    }
    bench.set_plan("exact")
    monkeypatch.undo()
    assert np.array_equal(bench.draw(num_steps=2), expected) and bench.snapshot() == before
    with pytest.raises(PlanError, match="cannot be combined"):
        bench.set_plan("text-offload + model-offload")


def test_a_lever_that_does_nothing_did_not_engage(model, monkeypatch):
    monkeypatch.setattr(memory._NeedsGpu, "requires", lambda self, target: None)
    monkeypatch.setattr(memory.TextOffload, "apply", lambda self, target: None)
    bench = make_unet(model)
    bench.set_plan("text-offload")
    bench.draw(num_steps=2)
    assert not bench.report()[0]["engaged"]
    bench.set_plan("exact")


def test_an_out_of_memory_error_goes_on_one_rung_lower(model, monkeypatch):
    bench = make_unet(model)
    expected = bench.draw(num_images=2)
    compute, calls = bench.denoiser.forward, []

    def full(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. And more")
        return compute(*args, **kwargs)

    monkeypatch.setattr(bench.denoiser, "forward", full)
    with pytest.warns(UserWarning, match="out of memory: from now on with decode-slicing"):
        made = bench.draw(num_images=2)
    assert abs(made - expected).max() <= 1, "the second try starts from the same noise"
    assert "decode-slicing" in bench.model.memory
    assert [lever["lever"] for lever in bench.report()] == ["decode-slicing"] and bench.report()[0]["engaged"]


def test_a_stream_goes_on_too(model, monkeypatch):
    bench = make_unet(model)
    expected = bench.draw(num_steps=4)[0]
    decode, calls = bench.pipeline.vae.decode, []

    def full(*args, **kwargs):
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return decode(*args, **kwargs)

    monkeypatch.setattr(bench.pipeline.vae, "decode", full)
    with pytest.warns(UserWarning, match="out of memory"):
        *_, last = bench.model.stream("a red heart", seed=1, num_steps=4, width=64, height=64)
    assert np.array_equal(np.asarray(last.result.images[0]).astype(int), expected)


def test_where_nothing_is_left_it_says_so_and_the_model_is_usable(model, monkeypatch):
    bench = make_unet(model)
    expected = bench.draw()
    before = bench.snapshot()
    with monkeypatch.context() as broken:
        broken.setattr(bench.denoiser, "forward", _always_full)
        with pytest.warns(UserWarning), pytest.raises(ModelError, match="smaller pictures"):
            bench.draw()
    assert bench.model.memory == "" and bench.report() == []
    assert np.array_equal(bench.draw(), expected) and bench.snapshot() == before


def _always_full(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_are_left_alone(model, monkeypatch):
    assert out_of_memory(RuntimeError("shapes differ")) is None
    bench = make_unet(model)
    monkeypatch.setattr(bench.denoiser, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.draw()
    assert bench.model.memory == ""
