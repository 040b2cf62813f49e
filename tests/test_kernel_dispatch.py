"""Torch computes wherever a kernel may not run, verdicts are remembered rightly, and the check finds what is wrong.

The device is pretended, and the kernels are plain functions: nothing here needs triton.
"""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from test_kernels import BF16, CPU, FP32, OPS, inputs_of

from imagegen.kernels import KERNELS, Kernel, dispatch
from imagegen.kernels.check import check_kernel, unit_in_last_place
from imagegen.kernels.kernel import Case

GPU = torch.device("cuda", 0)


def make_kernel(launch=None, name="guided_step"):
    """Return a kernel that doubles, or does what `launch` says, and the list of its launches."""
    launches = []

    def counted(outputs, x):
        launches.append(x.device)
        (launch or (lambda outputs, x: outputs[0].copy_(2 * x)))(outputs, x)

    def cases(_device):
        yield Case("one", (torch.arange(5.0),))

    return Kernel(
        name, lambda x: (torch.empty_like(x),), counted, lambda x: (x + x,), lambda x: (2 * x.double(),), cases
    ), launches


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Pretend that there is a CUDA device, with an empty cache; tensors stay on the CPU."""
    monkeypatch.setenv("IMAGEGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "describe_device", lambda device: "a device|9.0|triton 3|torch 2")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return tmp_path / "kernels.json"


def restart(monkeypatch):
    """Forget what this process knows."""
    monkeypatch.setattr(dispatch, "_verdicts", {})


X = torch.arange(4.0)


def test_a_kernel_that_passes_computes_and_is_checked_once(gpu, monkeypatch):
    kernel, launches = make_kernel()
    assert dispatch.may_run(kernel, GPU) == (True, "guided_step passed its check on this device")
    checked = len(launches)
    assert checked == 2 * 5  # aligned and not, five times each
    for _ in range(3):
        assert torch.equal(dispatch.compute(kernel, GPU, X)[0], 2 * X)
    assert len(launches) == checked + 3
    restart(monkeypatch)
    assert dispatch.may_run(kernel, GPU)[0] and len(launches) == checked + 3


def test_another_source_is_checked_anew(gpu, monkeypatch):
    kernel, launches = make_kernel()
    dispatch.may_run(kernel, GPU)
    before = len(launches)
    monkeypatch.setattr(Kernel, "hash_source", lambda self: "another")
    restart(monkeypatch)
    assert dispatch.may_run(kernel, GPU)[0] and len(launches) == 2 * before
    assert len(json.loads(gpu.read_text())) == 2


def test_the_hash_is_of_both_files(monkeypatch):
    own = {name: kernel.hash_source() for name, kernel in KERNELS.items()}
    assert len(set(own.values())) == len(KERNELS)
    read = Path.read_bytes
    for folder in ("kernels", "device"):
        monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"#" * (self.parent.name == folder))  # noqa: B023
        assert all(kernel.hash_source() != own[name] for name, kernel in KERNELS.items())


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"a device": 3}', "\0"])
def test_a_damaged_cache_is_ignored(gpu, damage):
    gpu.write_text(damage)
    kernel, launches = make_kernel()
    assert dispatch.may_run(kernel, GPU)[0] and launches
    assert "" in json.loads(gpu.read_text()).values()
    assert [file.name for file in gpu.parent.iterdir()] == ["kernels.json"]


def test_a_cache_that_cannot_be_written_costs_nothing_else(gpu, monkeypatch):
    monkeypatch.setenv("IMAGEGEN_CACHE", "/proc/nowhere")
    assert dispatch.may_run(make_kernel()[0], GPU)[0]


def test_a_verdict_against_a_kernel_is_remembered(gpu, monkeypatch):
    kernel, launches = make_kernel(lambda outputs, x: outputs[0].copy_(3 * x))
    passed, reason = dispatch.may_run(kernel, GPU)
    assert not passed and "computes wrongly on this device (one, aligned: the largest error is 4" in reason
    assert torch.equal(dispatch.compute(kernel, GPU, X)[0], 2 * X)
    before = len(launches)
    restart(monkeypatch)
    assert dispatch.may_run(kernel, GPU) == (passed, reason) and len(launches) == before


def test_a_check_that_stops_says_so_and_is_tried_again(gpu, monkeypatch):
    def full(outputs, x):
        raise torch.OutOfMemoryError("the memory is full\nand more")

    kernel, launches = make_kernel(full)
    passed, reason = dispatch.may_run(kernel, GPU)
    assert (passed, reason) == (False, "the check of guided_step stopped with OutOfMemoryError: the memory is full")
    assert torch.equal(dispatch.compute(kernel, GPU, X)[0], 2 * X) and len(launches) == 1
    restart(monkeypatch)
    dispatch.may_run(kernel, GPU)
    assert len(launches) == 2 and not gpu.exists()


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("find_spec", lambda name: None, "triton is not installed: pip install triton"),
        ("capability_of", lambda device: (7, 5), "this device has 7.5"),
        ("describe_device", lambda device: 1 / 0, "stopped with ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize("name", OPS)
def test_without_its_conditions_torch_computes(gpu, monkeypatch, name, attribute, value, message):
    monkeypatch.setattr(dispatch, attribute, value)
    passed, reason = dispatch.may_run(KERNELS[name], GPU)
    assert not passed and message in reason
    arguments = inputs_of(name)
    for found, wanted in zip(dispatch.compute(KERNELS[name], GPU, *arguments), KERNELS[name].reference(*arguments), strict=True):
        assert torch.equal(found, wanted)


def test_on_the_cpu_torch_computes():
    kernel, launches = make_kernel()
    assert dispatch.may_run(kernel, CPU) == (False, "Triton kernels need a CUDA device, and the model is on cpu")
    assert torch.equal(dispatch.compute(kernel, CPU, X)[0], 2 * X) and not launches


# The check finds what is wrong.


def write_behind(outputs, x):
    outputs[0].copy_(2 * x)
    outputs[0].as_strided((1,), (1,), outputs[0].storage_offset() + x.numel()).fill_(0)


def write_before(outputs, x):
    outputs[0].copy_(2 * x)
    outputs[0].as_strided((1,), (1,), outputs[0].storage_offset() - 3).fill_(0)


def read_behind(outputs, x):
    outputs[0].copy_(2 * x)
    outputs[0][-1] += 0 * x.as_strided((1,), (1,), x.storage_offset() + x.numel())[0]


def race(outputs, x):
    outputs[0].copy_(2 * x)
    outputs[0][-1] += torch.randint(2, ()) * 2.0**-20  # one unit in the last place of 8, or none


@pytest.mark.parametrize(
    ("launch", "complaint"),
    [
        (write_behind, "it writes outside its output"),
        (write_before, "it writes outside its output"),
        (read_behind, "the largest error is nan"),
        (race, "two launches differ"),
        (lambda outputs, x: None, "the largest error is 77"),
        (lambda outputs, x: outputs[0].copy_(2 * x + 1e-4), "the largest error is 0.0001"),
    ],
    ids=["behind", "before", "poison", "race", "nothing", "inexact"],
)
def test_the_check_finds_what_is_wrong(launch, complaint):
    torch.manual_seed(0)
    assert complaint in check_kernel(make_kernel(launch)[0], CPU)


def test_units_in_the_last_place():
    values = torch.tensor([1.0, 1.5, 2.0, -3.0, 0.75], dtype=torch.float64)
    expected = torch.tensor([1, 1, 2, 2, 0.5], dtype=torch.float64) * 2**-7
    assert torch.equal(unit_in_last_place(values, BF16), expected)
    assert torch.equal(unit_in_last_place(values, FP32), expected * 2**-16)
