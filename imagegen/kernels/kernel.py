"""What a kernel is: the functions that make it an op, and the cases on which it is checked. Knows no kernel by name."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]

# The compute capabilities for which the tests assemble every kernel, each with the shared memory in bytes that one
# block may use there. Source: CUDA C++ Programming Guide 13.0, table "Technical specifications per compute capability".
SHARED_LIMITS = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (12, 0): 99 * 1024,
}
OLDEST = (8, 0)


@dataclass(frozen=True)
class Case:
    """One call on which a kernel is compared with exact arithmetic.

    Attributes:
        label: what is special about it.
        arguments: of the op; tensors on the device.
        tolerance: the absolute error that float32 arithmetic may add to the rounding of the result.
        options: what `launch` takes besides, such as another branch of the kernel.
    """

    label: str
    arguments: tuple[Any, ...]
    tolerance: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and its torch reference, which take the op's arguments, in its order.

    Attributes:
        name: of the op, of its module here, and of the module in `device/`.
        allocate: returns the outputs, uninitialised: their shapes, dtypes and strides are decided here alone.
        launch: computes by Triton into outputs like those of `allocate`, which come first.
        reference: computes by torch, in float32, and returns what `allocate` describes.
        exact: computes in float64; outputs of whole numbers are compared exactly.
        cases: yields the checks for a device.
    """

    name: str
    allocate: Callable[..., Tensors]
    launch: Callable[..., None]
    reference: Callable[..., Tensors]
    exact: Callable[..., Tensors]
    cases: Callable[[torch.device], Iterable[Case]]

    def hash_source(self) -> str:
        """Return the SHA-256 of what a verdict rests on: the kernel's module, its code for the device, and the check."""
        folder = Path(__file__).parent
        files = (folder / f"{self.name}.py", folder / "device" / f"{self.name}.py", folder / "check.py")
        return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return a CUDA device's compute capability; that of the oldest supported one for the interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST


def divide_up(size: int, block: int) -> int:
    """Return how many blocks cover a size."""
    return -(-size // block)


def next_power_of_two(size: int) -> int:
    """Return the smallest power of two that is no less than a size from 1."""
    return 1 << (size - 1).bit_length()
