"""JanusFlow against what the reference computes with the same tiny weights, which are random in every parameter.

The fixture's README says where the expected values come from; tolerances are its own.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagegen.bench.janusflow import recompute
from imagegen.families import janus
from imagegen.families.convnext import GlobalResponseNorm

FOLDER = Path(__file__).parent / "fixtures" / "janusflow-tiny"
EXPECTED = json.loads((FOLDER / "expected" / "expected.json").read_text())
TENSORS = load_file(FOLDER / "expected" / "expected.safetensors")
PROMPTS = [entry["prompt"] for entry in EXPECTED["prompts"]]
STEPS = EXPECTED["num_steps"]


def load_flow(dtype=torch.float32, folder=FOLDER):
    return janus.load(janus.find(folder), None, torch.device("cpu"), dtype)[0]


@pytest.fixture(scope="module")
def flow():
    return load_flow()


def largest(found, expected):
    assert found.shape == expected.shape
    return (found.float() - expected).abs().max().item()


def spy_on(module, monkeypatch):
    """Return a list that every call of a module adds its arguments and its output to."""
    calls, forward = [], module.forward

    def spied(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append((args, kwargs, output))
        return output

    monkeypatch.setattr(module, "forward", spied)
    return calls


@pytest.mark.parametrize("case", EXPECTED["prompts"] + EXPECTED["tokenization_cases"], ids=lambda case: case["prompt"][:12])
def test_ids_are_the_references(flow, case):
    prompts = flow.encode_prompt([case["prompt"]])
    assert prompts.ids.tolist() == [case["input_ids"]]
    assert prompts.real.all() and prompts.positions.tolist() == [list(range(len(case["input_ids"])))]


@pytest.mark.parametrize("guidance", EXPECTED["guidance"])
@pytest.mark.parametrize("index", [0, 1])
def test_velocities_states_latents_and_pixels_are_the_references(flow, monkeypatch, index, guidance):
    name = f"p{index}.g{guidance:g}"
    calls = spy_on(flow.transformer, monkeypatch)
    inner = spy_on(flow.transformer.language_model, monkeypatch)
    settings = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent"}
    latents = flow(PROMPTS[index], latents=TENSORS["z0"][index : index + 1], **settings).images
    for step in (0, 3):
        velocity = calls[step][2][0]
        states = inner[step + 1][2].last_hidden_state[:, 1:]  # the first call reads the prompt
        if guidance > 1:
            without, given = velocity.chunk(2)
            assert largest(given, TENSORS[f"{name}.v_cond_step{step}"]) < 5e-5
            assert largest(without, TENSORS[f"{name}.v_uncond_step{step}"]) < 5e-5
            assert largest(states[1:], TENSORS[f"{name}.hidden_cond_step{step}"]) < 1e-4
            assert largest(states[:1], TENSORS[f"{name}.hidden_uncond_step{step}"]) < 1e-4
            velocity = guidance * given + (1 - guidance) * without
        assert largest(velocity, TENSORS[f"{name}.v_step{step}"]) < 5e-5
    assert largest(latents, TENSORS[f"{name}.latents"]) < 2e-5
    assert largest(flow.decode(latents), TENSORS[f"{name}.image_raw"]) < 2e-5
    pixels = flow.image_processor.postprocess(flow.decode(latents), output_type="pt")
    assert largest(2 * pixels - 1, TENSORS[f"{name}.image"]) < 2e-5


@pytest.mark.parametrize("guidance", EXPECTED["guidance"])
def test_both_prompts_in_one_padded_batch_are_the_same(flow, guidance):
    settings = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent"}
    latents = flow(PROMPTS, latents=TENSORS["z0"], **settings).images
    expected = torch.cat([TENSORS[f"p{index}.g{guidance:g}.latents"] for index in (0, 1)])
    assert largest(latents, expected) < 2e-5


def test_a_longer_neighbour_changes_no_picture(flow):
    """Three lengths in one batch, in another order, each with its own noise."""
    prompts = ["x", PROMPTS[1], PROMPTS[0]]
    noise = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    together = flow(prompts, latents=noise, **settings).images
    for index, prompt in enumerate(prompts):
        assert largest(flow(prompt, latents=noise[index : index + 1], **settings).images, together[index : index + 1]) < 5e-6


@torch.no_grad()
def test_the_cache_changes_nothing(flow):
    latents = noise = TENSORS["z0"][:1]
    prompts = flow.encode_prompt(PROMPTS[:1])
    for step in range(4):
        without, given = recompute(flow.transformer, prompts, latents, torch.tensor(250.0 * step)).chunk(2)
        latents = latents + (2.5 * given - 1.5 * without) / 4
    found = flow(PROMPTS[0], latents=noise, num_inference_steps=4, guidance_scale=2.5, output_type="latent").images
    assert largest(found, latents) < 1e-5


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (2.0, 4)])
def test_no_prompt_token_is_read_twice_and_latents_are_encoded_once_a_step(flow, monkeypatch, guidance, rows):
    read = spy_on(flow.transformer.language_model.layers[0], monkeypatch)
    encoded = spy_on(flow.transformer.vision_gen_enc_model, monkeypatch)
    flow(PROMPTS, latents=TENSORS["z0"], num_inference_steps=3, guidance_scale=guidance, output_type="latent")
    prompts = (2, max(entry["length"] for entry in EXPECTED["prompts"]))
    image = (rows, EXPECTED["image_tokens"] + 1)
    assert [call[0][0].shape[:2] for call in read] == [prompts, image, image, image]
    assert [len(call[0][0]) for call in encoded] == [2, 2, 2]


def test_times_are_those_of_the_reference(flow):
    flow._set_times(30, torch.device("cpu"))
    assert flow.scheduler.timesteps.tolist() == torch.tensor([1000 * step / 30 for step in range(30)]).tolist()
    assert flow.scheduler.sigmas.tolist() == torch.tensor([step / 30 for step in range(31)]).tolist()


def test_global_response_norm_by_hand():
    """Two channels of energies 5 and 0: shares 2 and 0 of their mean."""
    norm = GlobalResponseNorm(2)
    norm.weight.data[:] = torch.tensor([0.5, 0.25])
    norm.bias.data[:] = torch.tensor([1.0, -1.0])
    states = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
    expected = torch.tensor([[1 + 2 * 3.0, -1.0], [1 + 2 * 4.0, -1.0]]).reshape(1, 2, 1, 2)
    torch.testing.assert_close(norm(states), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_keeps_latents_in_float32(flow):
    rounded = load_flow(torch.bfloat16)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    latents = rounded(PROMPTS[0], latents=TENSORS["z0"][:1], **settings).images
    assert latents.dtype == torch.float32
    expected = TENSORS["p0.g1.latents"]
    assert 0.001 < (latents - expected).norm() / expected.norm() < 0.2
    assert rounded.decode(latents).dtype == torch.bfloat16


def test_noise_is_drawn_from_each_pictures_generator(flow):
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    drawn = flow(PROMPTS[0], num_images_per_prompt=2, generator=seeds, **settings).images
    noise = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    assert torch.equal(drawn, flow([PROMPTS[0]] * 2, latents=noise, **settings).images)


def test_the_callback_sees_and_may_change_every_step(flow):
    seen = []

    def callback(pipeline, index, time, tensors):
        seen.append((index, round(float(time)), tensors["latents"].clone()))
        pipeline._interrupt = index == 1
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 1 else {}

    settings = {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": callback}
    stopped = flow(PROMPTS[0], latents=TENSORS["z0"][:1], **settings).images
    assert [entry[:2] for entry in seen] == [(0, 0), (1, 250)]
    assert torch.equal(stopped, torch.zeros_like(stopped))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width": 512}, "64x64 only"),
        ({"height": 32}, "64x64 only"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callbacks can be given"),
        ({"prompt": "a ball " * 300}, "this model reads 495: shorten it"),
    ],
)
def test_what_it_cannot_do(flow, settings, says):
    with pytest.raises(ValueError, match=says):
        flow(**({"prompt": "a ball"} | settings))
