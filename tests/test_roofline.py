"""What is counted on the meta device: published parameter counts, and work that was counted by other means."""

import pytest
import torch

from imagegen import ModelError
from imagegen.catalog import embedded_folder
from imagegen.families.denoisers import ARCHITECTURES, make_denoiser, make_inputs
from imagegen.roofline import GPUS, count, estimate

# name: parameters, Tflop of a call, attention's share, and GB of eager pointwise traffic, all at 1024² in bfloat16.
# Parameters are the published checkpoints'; the work was counted once, independently of this code.
GOLDEN = {
    "sdxl": (2.567e9, 13.52, 0.12, 21),
    "sd3.5-large": (8.06e9, 62.24, 0.23, 125),
    "flux.1": (11.90e9, 74.38, 0.20, 202),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_counts(name):
    parameters, tflop, attention, pointwise_gb = GOLDEN[name]
    own = ARCHITECTURES[name]
    denoiser = make_denoiser(own, "meta", torch.bfloat16)
    inputs = make_inputs(own, "meta", torch.bfloat16)
    work = count(denoiser, lambda: denoiser(**inputs))
    assert work.parameters == pytest.approx(parameters, rel=0.001)
    assert work.weight_bytes == 2 * work.parameters
    assert work.flop / 1e12 == pytest.approx(tflop, rel=0.01)
    assert work.attention_flop / work.flop == pytest.approx(attention, abs=0.01)
    assert work.pointwise_bytes / 1e9 == pytest.approx(pointwise_gb, rel=0.15)


def test_a_linear_layer_by_hand():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.ReLU()).to("meta")
    work = count(layer, lambda: layer(torch.empty(8, 64, device="meta")))
    assert (work.parameters, work.weight_bytes) == (64 * 32, 4 * 64 * 32)
    assert work.flop == 2 * 8 * 64 * 32 and work.attention_flop == 0
    assert work.product_bytes == 4 * (8 * 64 + 64 * 32 + 8 * 32)
    assert work.pointwise_bytes == 4 * 2 * 8 * 32
    assert work.activation_bytes >= 4 * (8 * 64 + 8 * 32)


def test_attention_by_hand():
    module = torch.nn.Identity()
    query, key = torch.empty(2, 4, 10, 16, device="meta"), torch.empty(2, 4, 30, 16, device="meta")
    work = count(module, lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value=key))
    assert work.flop == work.attention_flop == 2 * 2 * (2 * 4 * 10 * 30 * 16)


def test_activations_are_freed_as_they_go():
    chain = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(20))).to("meta")
    rows = torch.empty(1000, 256, device="meta")
    work = count(chain, lambda: chain(rows))
    assert work.activation_bytes <= 4 * rows.nbytes


@pytest.mark.parametrize("model", ["sd1.5", str(embedded_folder())])
def test_every_family_here_has_an_estimate(model):
    found = estimate(model, "h100").to_json()
    assert found["kind"] == "estimated" and found["picture_s"] > 0
    assert {part["part"].split()[0] for part in found["parts"]} == {"text", "denoiser", "decoder"}
    assert all(found["fits"].values())
    memory = found["memory_gib"]
    assert memory["group-offload"] < memory["exact"] > memory["model-offload"]


def test_a_large_model_does_not_fit_a_small_gpu():
    found = estimate("flux.1", "4090").to_json()
    assert not found["fits"]["exact"] and found["fits"]["group-offload"]


def test_flux_on_an_l20_is_near_what_was_published():
    found = estimate("flux.1", "l20").to_json()
    denoiser = next(part for part in found["parts"] if part["part"] == "denoiser")
    assert denoiser["estimated_s"] == pytest.approx(0.89, rel=0.1)  # a step, published for diffusers on that GPU


def test_unknown_names_are_said():
    with pytest.raises(ModelError, match="h100"):
        estimate("flux.1", "voodoo")
    with pytest.raises(ModelError, match=r"flux\.1"):
        estimate("no such model", "h100")
    assert all(gpu.source.startswith("https://") for gpu in GPUS.values())
