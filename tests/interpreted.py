"""Runs every kernel's check in Triton's interpreter, then mutants of the kernels; prints what is wrong with each as JSON.

A script of its own, because TRITON_INTERPRET is read when a kernel is decorated. One launch of each case is enough:
the interpreter runs one program after the other, so no two launches can differ.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch

import imagegen.kernels.device as device_code
from imagegen.kernels import KERNELS
from imagegen.kernels.check import check_kernel

# kernel, what is wrong, the piece of its code, and what stands there instead
MUTANTS = [
    ("guided_step", "store without a mask", ".to(out.dtype.element_ty), mask=inside)", ".to(out.dtype.element_ty))"),
    ("guided_step", "wrong formula", "guidance * (c - u)", "guidance * c"),
    ("group_norm_silu", "store without a mask", "y.to(out.dtype.element_ty), mask=inside)", "y.to(out.dtype.element_ty))"),
    ("group_norm_silu", "load without a mask", "channel[None, :], mask=inside, other=0.0).to(tl.float32)\n        before",
     "channel[None, :]).to(tl.float32)\n        before"),
    ("group_norm_silu", "mean of a tile's mask", "tile_mean = tl.sum(tile, 0) / here", "tile_mean = tl.sum(tile, 0) / ROWS"),
    ("group_norm_silu", "chunks not apart", "within + apart * apart * count[:, None]", "within"),
    ("group_norm_silu", "no SiLU", "y = y * tl.sigmoid(y)", "pass"),
    ("row_quantisation", "store without a mask", ".to(tl.int8), mask=at < K)", ".to(tl.int8))"),
    ("row_quantisation", "load without a mask", "at, mask=at < K, other=0.0).to(tl.float32)))", "at).to(tl.float32)))"),
    ("row_quantisation", "cut, not rounded", "((value + ROUNDER) - ROUNDER)", "value"),
    ("int8_linear", "store without a mask", "y.to(out.dtype.element_ty), mask=inside)", "y.to(out.dtype.element_ty))"),
    ("int8_linear", "loads behind the row", "has_k = k < K - block * BLOCK_K", "has_k = k < K"),
    ("int8_linear", "no bias", "if bias is not None:", "if False:"),
    ("int8_linear", "gate of another row", "// rows_per_gate", "* 0"),
    ("int8_linear", "GELU of another kind", "y = gelu_tanh(y)", "y = gelu_erf(y)"),
    ("int8_linear", "sums of half as many columns", "tl.cdiv(K, BLOCK_K)", "tl.cdiv(K // 2, BLOCK_K)"),
]  # fmt: skip


def check(name):
    try:
        return check_kernel(KERNELS[name], torch.device("cpu"), repeats=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def load(name, source):
    """Put code in the place of a kernel's module in `device/`."""
    file = Path(tempfile.mkdtemp()) / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"imagegen.kernels.device.{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    setattr(device_code, name, module)
    spec.loader.exec_module(module)


def main():
    torch.set_num_threads(1)
    found = {name: check(name) for name in KERNELS}
    for name, label, piece, instead in MUTANTS:
        source = (Path(device_code.__file__).parent / f"{name}.py").read_text()
        assert source.count(piece) == 1, f"{name} has {source.count(piece)} of {piece!r}"
        load(name, source.replace(piece, instead))
        found[f"{name}: {label}"] = check(name)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
