"""What torch.compile and a GPU would do to the loop, counted without a GPU: graphs, compilations, waits."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from imagegen.families.denoisers import ARCHITECTURES, make_denoiser, make_inputs


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(name):
    own = ARCHITECTURES[name]
    counter = CompileCounterWithBackend("eager")
    denoiser = torch.compile(make_denoiser(own, "cpu", tiny=True), fullgraph=True, backend=counter)
    return own, denoiser, counter


def counts_of(denoiser, counter, calls):
    """Return how many graphs were compiled after each call."""
    after = []
    with torch.no_grad():
        for inputs in calls:
            denoiser(**inputs)
            after.append(counter.frame_count)
    return after


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_denoiser_is_one_graph_and_steps_never_compile_again(name):
    own, denoiser, counter = compiled(name)
    calls = [make_inputs(own, "cpu", tiny=True) for _ in range(3)]
    for number, inputs in enumerate(calls):
        inputs["timestep"] = torch.full_like(inputs["timestep"], 0.5 if name == "flux.1" else 900 - 100 * number)
    assert counts_of(denoiser, counter, calls) == [1, 1, 1]


# What changes between calls, and how many graphs there are after each.
TABLE = {
    "a tensor as time step": ([{"timestep": torch.tensor(900 - index)} for index in range(4)], [1, 1, 1, 1]),
    "a Python number as time step": ([{"timestep": 900 - index} for index in range(4)], [1, 2, 2, 2]),
    "sizes": ([{"sample": torch.zeros(2, 4, side, side)} for side in (8, 8, 12, 16)], [1, 1, 2, 2]),
    "prompt lengths": ([{"encoder_hidden_states": torch.zeros(2, length, 32)} for length in (77, 154, 231)], [1, 2, 2]),
    "rows": (
        [
            {"sample": torch.zeros(rows, 4, 8, 8), "encoder_hidden_states": torch.zeros(rows, 77, 32)}
            for rows in (2, 1, 4)
        ],
        [1, 2, 3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TABLE)
def test_what_compiles_a_unet_again(what):
    changes, expected = TABLE[what]
    own, denoiser, counter = compiled("sd1.5")
    inputs = make_inputs(own, "cpu", tiny=True)
    assert counts_of(denoiser, counter, [inputs | change for change in changes]) == expected


def test_another_grad_mode_compiles_again():
    own, denoiser, counter = compiled("sd1.5")
    inputs = make_inputs(own, "cpu", tiny=True)
    assert counts_of(denoiser, counter, [inputs]) == [1]
    with torch.inference_mode():
        denoiser(**inputs)
    assert counter.frame_count == 2


def test_a_break_in_the_graph_is_found_out():
    class Broken(torch.nn.Module):
        def forward(self, sample):
            torch._dynamo.graph_break()
            return sample * 2

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Broken(), fullgraph=True, backend=CompileCounterWithBackend("eager"))(torch.ones(2))


@pytest.mark.skipif(shutil.which("g++") is None or platform.system() != "Linux", reason="needs g++ on Linux")
def test_what_would_make_the_host_wait(tmp_path):
    script = Path(__file__).parent / "fake_cuda.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("euler", "euler a", "flow", "dpm++ 2m", "our step", "codes, drawn", "codes, most likely", "janusflow"):
        assert found[name] == {}, name
    assert found["unipc"].get("copy cpu to cuda", 0) > 0
    assert found["ddim"].get("read", 0) > 0 and found["lcm"].get("read", 0) > 0
    assert found["euler, no begin index"].get("search", 0) > 0
