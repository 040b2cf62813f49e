"""Assembles launches of Triton kernels for NVIDIA architectures, on a machine without a GPU, and reads the machine code.

What is assembled is recorded from a real launch on tensors without data, so that tests and package cannot drift apart.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class Launch:
    """One launch: a jitted function, its arguments by name, and the compiler's options."""

    function: object
    arguments: dict
    options: dict

    def assemble(self, capability, aligned=True, **changed):
        """Return the code for a compute capability; `changed` replaces options or constants."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.function.params):
            name = parameter.name
            value = changed.get(name, self.arguments[name])
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):  # as the launcher does
                signature[name], constants[name] = "constexpr", value
                continue
            pointer = isinstance(value, torch.Tensor)
            signature[name] = POINTERS[value.dtype] if pointer else "fp32" if isinstance(value, float) else "i32"
            if aligned and (pointer or (isinstance(value, int) and value % 16 == 0)):
                attributes[index,] = [["tt.divisibility", 16]]
        options = {name: changed.get(name, value) for name, value in self.options.items()}
        source = ASTSource(fn=self.function, signature=signature, constexprs=constants, attrs=attributes)
        major, minor = capability
        return Assembled(triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options))


class Recorder:
    """Stands in for a jitted function and keeps its launches."""

    def __init__(self, function, launches):
        self.function, self.launches = function, launches

    def __getitem__(self, _grid):
        def launch(*args, **kwargs):
            names = [parameter.name for parameter in self.function.params]
            arguments = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
            options = {name: value for name, value in kwargs.items() if name not in names}
            self.launches.append(Launch(self.function, arguments, options))

        return launch


def record_launches(monkeypatch, kernel, code, *arguments, **options):
    """Return the launches of a kernel on these arguments, which may lie on the meta device."""
    launches = []
    with monkeypatch.context() as patch:
        for name, function in vars(code).items():
            if type(function).__name__ == "JITFunction":
                patch.setattr(code, name, Recorder(function, launches))
        kernel.launch(kernel.allocate(*arguments), *arguments, **options)
    return launches


class Assembled:
    """Machine code, and what it needs of a device.

    Attributes:
        ptx: the code in NVIDIA's assembly language, before registers are allotted.
        shared: bytes of shared memory a block.
        registers: registers a thread.
        spilled: bytes of stack and local memory a thread, which hold what found no register.
    """

    def __init__(self, compiled):
        self.ptx, self.shared = compiled.asm["ptx"], compiled.metadata.shared
        self._cubin = compiled.asm["cubin"]
        listing = read_with("cuobjdump", "--dump-resource-usage", self._cubin)
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
        self.registers, self.spilled = found["REG"], found["STACK"] + found["LOCAL"]

    def count(self, opcode):
        """Return how many machine instructions begin with an opcode."""
        return len(re.findall(rf"\s{re.escape(opcode)}(?![A-Z0-9_])", read_with("nvdisasm", "-c", self._cubin)))


@cache
def read_with(tool, option, cubin):
    """Return what one of the tools that triton carries prints about machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
