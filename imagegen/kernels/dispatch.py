"""Whether a kernel may run on a device, decided once and remembered; torch computes where it may not.

The check's verdict is kept in `kernels.json` in the cache folder, under the device's name and capability, the
versions of triton and torch, and a hash of the kernel's source: when one of them changes, the check runs again.
"""

import threading
from importlib.util import find_spec
from typing import Any

import torch

from imagegen.kernels.check import check_kernel
from imagegen.kernels.kernel import SHARED_LIMITS, Kernel, Tensors, capability_of
from imagegen.weights import read_remembered, remember

Verdict = tuple[bool, str]
_verdicts: dict[tuple[str, torch.device], Verdict] = {}
_lock = threading.Lock()


def compute(kernel: Kernel, device: torch.device, *arguments: Any) -> Tensors:
    """Return an op's outputs: by the kernel where it may run on the device, else by the torch reference."""
    if not may_run(kernel, device)[0]:
        return kernel.reference(*arguments)
    outputs = kernel.allocate(*arguments)
    with torch.cuda.device(device):  # Triton launches on the current device
        kernel.launch(outputs, *arguments)
    return outputs


def may_run(kernel: Kernel, device: torch.device) -> Verdict:
    """Return whether a kernel may run on a device, and why, or why not with the way out; never raises.

    The first call for a device compiles the kernel in its variants and runs its check there, or finds the verdict of
    an earlier process. It must not fall into the capture of a CUDA graph, so whoever engages a kernel asks before.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    verdict = _verdicts.get((kernel.name, device))
    if verdict is None:
        with _lock:
            verdict = _verdicts.get((kernel.name, device)) or _decide(kernel, device)
            _verdicts[kernel.name, device] = verdict
    return verdict


def _decide(kernel: Kernel, device: torch.device) -> Verdict:
    try:
        reason = _why_not_here(device)
        return (False, reason) if reason else _remembered_check(kernel, device)
    except Exception as error:  # a compiler, a driver or a full memory: whatever it is, torch computes
        lines = str(error).strip().splitlines()
        return False, f"the check of {kernel.name} stopped with {type(error).__name__}: {lines[0] if lines else 'no message'}"


def _why_not_here(device: torch.device) -> str:
    """Return why no kernel can run on a device; empty where they can."""
    if device.type != "cuda" or torch.version.hip:
        return f"Triton kernels need a CUDA device, and the model is on {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if capability_of(device) not in SHARED_LIMITS:
        known = ", ".join(f"{major}.{minor}" for major, minor in SHARED_LIMITS)
        major, minor = capability_of(device)
        return f"the kernels are assembled for compute capabilities {known}, and this device has {major}.{minor}"
    return ""


def describe_device(device: torch.device) -> str:
    """Return what a verdict depends on besides the kernel: the device's name, its capability and the versions."""
    import triton

    major, minor = capability_of(device)
    return f"{torch.cuda.get_device_name(device)}|{major}.{minor}|triton {triton.__version__}|torch {torch.__version__}"


def _remembered_check(kernel: Kernel, device: torch.device) -> Verdict:
    """Return the verdict of the check, which runs if none is remembered; one that raises is not remembered."""
    key = f"{describe_device(device)}|{kernel.name}|{kernel.hash_source()}"
    wrong = read_remembered("kernels").get(key)
    if wrong is None:
        with torch.cuda.device(device):
            wrong = check_kernel(kernel, device)
        remember("kernels", read_remembered("kernels") | {key: wrong})  # read again: another process may have added its own
    if wrong:
        return False, f"{kernel.name} computes wrongly on this device ({wrong}): please report it"
    return True, f"{kernel.name} passed its check on this device"
