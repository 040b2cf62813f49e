"""Facts about this machine and its libraries, as receipts and reports state them."""

import contextlib
import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GIB = 2**30
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors")


@cache
def versions() -> dict[str, str]:
    """Return the versions of imagegen, Python and the libraries that decide a picture."""
    from imagegen import __version__

    found = {"imagegen": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: "torch.device", dtype: "torch.dtype") -> dict[str, Any]:
    """Return what a receipt says of the machine: versions, device by name, dtype."""
    return versions() | {"device": f"{device.type} ({device_name(device)})", "dtype": str(dtype).removeprefix("torch.")}


def device_name(device: "torch.device") -> str:
    """Return a device's name: the GPU's or the processor's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name()


def machine_of(device: "torch.device") -> dict[str, Any]:
    """Return the fingerprint of the machine that a measurement holds for: device, cores, system's kind."""
    return {"device": f"{device.type} ({device_name(device)})", "cores": machine()["cores"], "kind": platform.machine()}


def machine() -> dict[str, Any]:
    """Return this machine: processor, usable cores, memory in GiB, system, Python."""
    memory_gib = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory_gib = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "memory_gib": memory_gib,
        "system": platform.platform(),
        "python": sys.version.split()[0],
    }


def synchronise(device: "torch.device") -> None:
    """Wait until the device has done what it was told: a clock says nothing before."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def reset_peak_memory(device: "torch.device") -> None:
    """Begin to measure the peak anew, where the system can: CUDA, and Linux for the process."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: "torch.device") -> float | None:
    """Return the peak since then in GiB: of torch on CUDA, of the process elsewhere; None where it is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        return None
