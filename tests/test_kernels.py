"""Every kernel interpreted, assembled for six architectures, and replaced by torch where it may not run.

Nothing here runs on a GPU. Machine code is read for what can be told from it; the numbers come from Triton's interpreter.
"""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from assembly import record_launches
from interpreted import MUTANTS

import imagegen.kernels.device
from imagegen.kernels import KERNELS, Kernel, group_norm_silu, guided_step, int8_linear, row_quantisation
from imagegen.kernels.check import check_kernel
from imagegen.kernels.kernel import SHARED_LIMITS

CPU = torch.device("cpu")
DEVICE_FILES = [file for file in Path(imagegen.kernels.device.__file__).parent.glob("*.py") if file.name != "__init__.py"]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: it has wheels for Linux x86-64")


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Start the interpreter's process; it works while other tests do."""
    if find_spec("triton") is None:
        yield None
        return
    script = Path(__file__).parent / "interpreted.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=script.parent.parent, text=True) as process:  # fmt: skip
        yield process
        process.kill()


@pytest.fixture(scope="module")
def interpreted(interpreter):
    output, errors = interpreter.communicate()
    assert interpreter.returncode == 0, errors[-3000:]
    return json.loads(output)


# What the machine code says.

BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8


def empty(*shape, dtype=BF16):
    """Return a tensor without data, of SDXL's sizes below."""
    return torch.empty(*shape, device="meta", dtype=dtype)


def arguments_of(name):
    """Return the arguments of a launch by its name: a kernel's, or `int8_linear` with rows and epilogue."""
    name, _, rest = name.partition(" ")
    if name == "guided_step":
        return empty(2, 4, 128, 128, dtype=FP32), empty(2, 4, 128, 128), empty(2, 4, 128, 128), 7.5, 0.9, -0.3
    if name == "group_norm_silu":
        x = empty(2, 320, 128, 128).to(memory_format=torch.channels_last)
        return x, 32, empty(320), empty(320), 1e-5, True
    if name == "row_quantisation":
        return (empty(8192, 1280),)
    rows, epilogue = rest.split()
    m, n, k = int(rows), 5120, 1280
    scales = empty(m, dtype=FP32), empty(n, dtype=FP32)
    x, w = empty(m, k, dtype=INT8), empty(n, k, dtype=INT8)
    return x, scales[0], w, scales[1], empty(n), epilogue, empty(2, n), empty(m, n), BF16


def record(monkeypatch, name, capability, **options):
    """Return the launches of a kernel on an architecture by the names of their functions."""
    kernel = KERNELS[name.split()[0]]
    code = __import__(f"imagegen.kernels.device.{kernel.name}", fromlist=["code"])
    monkeypatch.setattr(int8_linear, "capability_of", lambda device: capability)
    launches = record_launches(monkeypatch, kernel, code, *arguments_of(name), **options)
    return {launch.function.fn.__name__: launch for launch in launches}


# The most registers a thread may take: 1.1 times what triton 3.7.1 with its ptxas took for the worst of the six
# architectures, recorded by running this file with -s. More means that fewer threads fit, or that something grew.
REGISTERS = {
    "guided_step": {"guided_step": 38},
    "group_norm_silu": {"chunk_statistics": 70, "group_scales": 44, "scale_shift": 44},
    "row_quantisation": {"quantise_rows": 41},
    "int8_linear 8192 none": {"int8_linear": 192},
    "int8_linear 8192 gelu-tanh": {"int8_linear": 192},
    "int8_linear 8192 gelu-erf": {"int8_linear": 192},
    "int8_linear 8192 geglu": {"int8_linear": 248},
    "int8_linear 8192 gate-residual": {"int8_linear": 210},
    "int8_linear 32 none": {"int8_linear": 149},
}
# Opcodes that must be there, by the function. Hopper multiplies by warp groups; Triton gives Blackwell the older
# instruction for whole numbers.
VECTOR_LOADS = {
    "guided_step": "LDG.E.128",
    "chunk_statistics": "LDG.E.128",
    "scale_shift": "LDG.E.128",
    "quantise_rows": "LDG.E.128",
    "int8_linear": "LDGSTS.E.BYPASS.128",
}


def matrix_opcode(capability):
    return "IGMMA" if capability == (9, 0) else "IMMA"


def assert_fits(code, capability, function, budget):
    """Assert what must hold for a function on an architecture."""
    wanted = {
        f"{code.spilled} bytes spilled": code.spilled == 0,
        f"{code.shared} bytes of shared memory": code.shared <= SHARED_LIMITS[capability],
        f"{code.registers} registers": code.registers <= budget,
    }
    if function in VECTOR_LOADS:
        wanted[f"no {VECTOR_LOADS[function]}"] = code.count(VECTOR_LOADS[function]) > 0
    if function == "int8_linear":
        wanted[f"no {matrix_opcode(capability)}"] = code.count(matrix_opcode(capability)) > 0
    assert all(wanted.values()), [complaint for complaint, holds in wanted.items() if not holds]


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler_cache(tmp_path_factory):
    """Compile anew, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def capabilities():
    return pytest.mark.parametrize("capability", SHARED_LIMITS, ids=lambda value: f"sm_{value[0]}{value[1]}")


SLOW = ("gelu-tanh", "gelu-erf", "gate-residual")  # geglu needs more than any of them


@needs_triton
@capabilities()
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.endswith(SLOW) else ()) for name in REGISTERS]
)
def test_assembles(monkeypatch, name, capability):
    launches = record(monkeypatch, name, capability)
    assert set(launches) == set(REGISTERS[name])
    for function, launch in launches.items():
        code = launch.assemble(capability)
        print(f"{name} {function} {capability}: {code.registers} registers, {code.shared} bytes shared")
        assert_fits(code, capability, function, REGISTERS[name][function])


@needs_triton
@capabilities()
def test_both_branches_of_the_guided_step_assemble(monkeypatch, capability):
    counts = {}
    for inline_ptx in (False, True):
        code = record(monkeypatch, "guided_step", capability, inline_ptx=inline_ptx)["guided_step"].assemble(capability)
        assert_fits(code, capability, "guided_step", REGISTERS["guided_step"]["guided_step"])
        counts[inline_ptx] = ("fma.rn.ftz.f32" in code.ptx, code.count("FFMA.FTZ"))
    assert counts == {False: (False, 0), True: (True, 8)}


@needs_triton
@pytest.mark.parametrize(
    ("name", "capability", "changed", "complaint"),
    [
        ("int8_linear 32 none", (8, 0), {"num_warps": 1}, "bytes spilled"),
        ("int8_linear 8192 none", (8, 6), {"BLOCK_N": 256, "BLOCK_K": 128, "num_stages": 5}, "bytes of shared memory"),
        ("int8_linear 8192 none", (9, 0), {"num_warps": 4}, "registers"),
        ("int8_linear 8192 none", (8, 9), {"aligned": False}, "no LDGSTS.E.BYPASS.128"),
        ("group_norm_silu", (9, 0), {"aligned": False}, "no LDG.E.128"),
        ("guided_step", (12, 0), {"aligned": False}, "no LDG.E.128"),
        ("row_quantisation", (8, 0), {"aligned": False}, "no LDG.E.128"),
    ],
)
def test_the_assembled_gates_find_mutants(monkeypatch, name, capability, changed, complaint):
    function, launch = list(record(monkeypatch, name, capability).items())[-1]
    with pytest.raises(AssertionError, match=complaint):
        assert_fits(launch.assemble(capability, **changed), capability, function, REGISTERS[name][function])


@needs_triton
def test_a_product_by_other_than_matrix_instructions_is_found_out(monkeypatch):
    code = record(monkeypatch, "group_norm_silu", (8, 0))["scale_shift"].assemble((8, 0))
    with pytest.raises(AssertionError, match="no LDGSTS"):
        assert_fits(code, (8, 0), "int8_linear", 255)
    assert code.count("IMMA") == 0 and code.count("LDG.E.128") > 0


@pytest.mark.parametrize("file", DEVICE_FILES, ids=lambda file: file.stem)
def test_every_load_says_what_it_reads_outside(file):
    """Stores of one number, of a whole program, need no mask."""
    for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
        given = {keyword.arg for keyword in call.keywords}
        if ast.unparse(call.func) == "tl.load":
            assert given == {"mask", "other"}, f"{file.name}:{call.lineno}"
        if ast.unparse(call.func) == "tl.store" and ast.unparse(call.args[0]) != "scale + row":
            assert given == {"mask"}, f"{file.name}:{call.lineno}"


# Ops: the schema, the fake implementation, and torch in the kernel's place.


def inputs_of(name, seed=0):
    """Return small arguments of the ops, real ones."""
    draw = torch.Generator().manual_seed(seed)

    def make(*shape, dtype=FP32):
        return torch.randn(shape, generator=draw).to(dtype)

    if name == "guided_step":
        return make(1, 4, 5, 3), make(1, 4, 5, 3, dtype=BF16), make(1, 4, 5, 3, dtype=BF16), 7.5, 0.9, -0.3
    if name == "group_norm_silu":
        return make(2, 12, 5, 3), 4, make(12), make(12), 1e-5, True
    if name == "row_quantisation":
        return (make(6, 33),)
    x, x_scale = row_quantisation.quantise_rows(make(6, 32))
    w, w_scale = row_quantisation.quantise_rows(make(10, 32))
    return x, x_scale, w, w_scale, make(10), "gate-residual", make(2, 10), make(6, 10), BF16


OPS = {
    "guided_step": guided_step.guided_step,
    "group_norm_silu": group_norm_silu.group_norm_silu,
    "row_quantisation": row_quantisation.quantise_rows,
    "int8_linear": int8_linear.int8_linear,
}


def test_every_kernel_has_its_tests():
    names = {file.stem for file in DEVICE_FILES}
    assert set(OPS) == set(KERNELS) == names == {name.split()[0] for name in REGISTERS} == {name for name, *_ in MUTANTS}
    assert {name.split()[-1] for name in REGISTERS if name.startswith("int8_linear 8192")} == set(int8_linear.EPILOGUES)


@pytest.mark.parametrize("name", OPS)
def test_ops_keep_their_contract(name):
    torch.library.opcheck(OPS[name], inputs_of(name))


@pytest.mark.parametrize("name", OPS)
def test_a_reference_is_within_its_own_check(name):
    """The reference stands in for the kernel under the kernel's gate: what torch computes elsewhere is the same."""

    def launch(outputs, *arguments, **options):
        for output, value in zip(outputs, KERNELS[name].reference(*arguments), strict=True):
            assert output.stride() == value.stride()
            output.copy_(value)

    kernel = KERNELS[name]
    assert check_kernel(Kernel(name, kernel.allocate, launch, kernel.reference, kernel.exact, kernel.cases), CPU, 1) == ""


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_is_torchs(silu, layout):
    x, groups, weight, bias, eps, _ = inputs_of("group_norm_silu")
    wanted = F.group_norm(x, groups, weight, bias, eps)
    found = group_norm_silu.group_norm_silu(x.to(memory_format=layout), groups, weight, bias, eps, silu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, F.silu(wanted) if silu else wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_an_int8_layer_is_close_to_the_layer(approximate):
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw) for shape in ((50, 256), (64, 256), (64,)))
    wanted = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    epilogue = "gelu-tanh" if approximate == "tanh" else "gelu-erf"
    rows, columns = row_quantisation.quantise_rows(x), row_quantisation.quantise_rows(weight)
    found = int8_linear.int8_linear(*rows, *columns, bias, epilogue, None, None, FP32)
    assert (found - wanted).norm() / wanted.norm() < 0.02


def test_a_guided_step_is_the_schedulers():
    x, uncond, cond = (torch.randn(1, 4, 5, 3) for _ in range(3))
    torch.testing.assert_close(guided_step.guided_step(x, uncond, cond, 1.0, 1.0, -0.25), x - 0.25 * cond)
    guided = uncond + 7.5 * (cond - uncond)
    torch.testing.assert_close(guided_step.guided_step(x, uncond, cond, 7.5, 1.0, -0.25), x - 0.25 * guided)


def test_rows_come_back_from_whole_numbers():
    x = torch.randn(5, 100)
    x[2] = 0
    rows, scale = row_quantisation.quantise_rows(x)
    assert int(rows.abs().max()) == 127 and scale.min() > 0
    assert ((rows * scale[:, None] - x).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize(("epilogue", "message"), [("relu", "there are none, gelu-tanh"), ("geglu", "operand"),
                                                   ("gate-residual", "gate as well")])  # fmt: skip
def test_int8_linear_refuses_what_it_does_not_know(epilogue, message):
    with pytest.raises(ValueError, match=message):
        int8_linear.int8_linear(*inputs_of("int8_linear")[:5], epilogue, None, None, FP32)


def test_works_where_triton_is_absent():
    code = """
import sys, torch, imagegen.kernels
from imagegen.kernels.row_quantisation import quantise_rows
assert not [name for name in sys.modules if name.startswith("triton")], "importing the kernels imports triton"
sys.modules["triton"] = None  # torch itself looks for it at the first call of any op
assert int(quantise_rows(torch.ones(2, 3))[0].sum()) == 6 * 127
assert not [name for name in sys.modules if name.startswith("imagegen.kernels.device.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# What the interpreter says, last: its process has been working since the first test.


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_interpreted_kernels_pass_their_check(interpreted, name):
    assert interpreted[name] == ""


@needs_triton
@pytest.mark.parametrize("mutant", [f"{name}: {label}" for name, label, *_ in MUTANTS])
def test_interpreted_mutants_are_found_out(interpreted, mutant):
    assert interpreted[mutant]
    assert "writes outside" in interpreted[mutant] or "store" not in mutant
    assert "Error" not in interpreted[mutant], "it did not even run"
