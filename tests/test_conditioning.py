"""Training calls a denoiser as its stock pipeline does, and trains every family that it says it knows."""

import numpy as np
import pytest
import torch
from PIL import Image

import imagegen
from imagegen import DataError
from imagegen.families import latents
from imagegen.families.conditioning import KINDS, encode_captions, predict
from imagegen.families.diffusion import denoiser_of
from imagegen.sampling import levels_of, make_deterministic

FAMILIES = {"sd1.5": 64, "sdxl": 64, "sd3": 64, "flux": 64}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def test_one_call_is_the_pipelines_own(name, model_of, monkeypatch):
    """What the stock pipeline asked its denoiser in a step without guidance, and what it got, seen from outside."""
    model, seen = model_of(name), []
    denoiser = denoiser_of(model.pipeline)
    compute = denoiser.forward

    def watched(*args, **kwargs):
        output = compute(*args, **kwargs)
        seen.append((args[0] if args else kwargs.get("hidden_states", kwargs.get("sample")), args, kwargs, output[0]))
        return output

    monkeypatch.setattr(denoiser, "forward", watched)
    size = (FAMILIES[name],) * 2
    model("a red apple", seed=3, num_steps=1, guidance=1, width=size[0], height=size[1])
    monkeypatch.undo()
    given, args, kwargs, output = seen[0]
    time = args[1] if len(args) > 1 else kwargs["timestep"]
    time = torch.as_tensor(time).reshape(-1)[:1] * (1000 if name == "flux" else 1)
    with torch.no_grad():
        told = encode_captions(model.pipeline, ["a red apple"])
        mine = predict(model.pipeline, denoiser, latents.unpack(model.pipeline, given, size), time, told)
    theirs = latents.unpack(model.pipeline, output, size)
    assert mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        other = predict(model.pipeline, denoiser, mine, time, encode_captions(model.pipeline, ["a blue car"]))
    assert not torch.allclose(mine, other, atol=1e-3)


def test_a_lora_is_trained_and_changes_the_picture(name, model_of, tmp_path):
    model = model_of(name)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        Image.fromarray(np.full((64, 64, 3), 80 * number, dtype=np.uint8)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"grey {number}")
    settings = {"num_steps": 2, "batch_size": 2, "rank": 2, "learning_rate": 0.05, "warmup": 1}
    asked = {"seed": 1, "num_steps": 2, "width": FAMILIES[name], "height": FAMILIES[name]}
    before = model("grey", **asked).images[0]
    made = imagegen.finetune(model, data, tmp_path / "out", **settings)
    assert model("grey", **asked).images[0] == before
    model.add_lora(made.weights)
    try:
        assert model("grey", **asked).images[0] != before
    finally:
        model.remove_loras()
    assert model("grey", **asked).images[0] == before


def test_a_student_of_every_family(name, model_of, tmp_path):
    model = model_of(name)
    settings = {"student_steps": 1, "teacher_steps": 2, "guidance": 2.0, "num_trajectories": 2, "prompts": ("a", "b")}
    made = imagegen.distill(model, tmp_path, **settings, num_steps=2, batch_size=2, rank=2, learning_rate=0.01)
    size = (FAMILIES[name],) * 2
    noise = torch.randn(latents.noise_shape(model.pipeline, 1, *size), generator=torch.Generator().manual_seed(1))
    asked = {"noise": noise, "width": size[0], "height": size[1]}
    levels = make_deterministic(model.pipeline.scheduler)
    levels.set_timesteps(2)
    model.set_plan(f"student(file={made.folder})")
    try:
        *_, last = model.stream("a", **asked)
        told = encode_captions(model.pipeline, ["a"])
        with torch.no_grad():
            says = predict(model.pipeline, denoiser_of(model.pipeline), noise, levels.timesteps[:1], told)
    finally:
        model.set_plan("exact")
    first, second = levels_of(levels).jump(torch.tensor([0]), -1)
    assert torch.allclose(last.latents, first * noise + second * says, atol=1e-3, rtol=1e-3), "the teacher's levels, in one step"
    drawn = last.result.pictures[0]
    assert drawn.receipt.request["num_steps"] == 1 and drawn.receipt.plan["levers"][0]["engaged"]
    assert drawn.image != model("a", num_steps=1, guidance=1, **asked).images[0]


def test_other_kinds_are_refused_with_those_it_knows(model_of, tmp_path):
    with pytest.raises(DataError, match=f"training knows the pipelines {', '.join(KINDS)}; this model is a SanaPipeline"):
        imagegen.distill(model_of("sana"), tmp_path)
