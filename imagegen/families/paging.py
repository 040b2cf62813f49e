"""Weights that are converted while they are loaded take their memory once.

Libraries map a weight file into memory and convert one tensor after the other. The pages of the file that were read stay
in memory until its last tensor is done: a float16 file loaded in float32 takes half as much again. Here each tensor's
pages are given back as soon as it is converted. The file stays in the system's cache, and nothing is computed otherwise.
"""

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DONT_NEED = 4  # MADV_DONTNEED: of a file's clean pages, dropped; they are read again if they are asked for again
LEAST = 2**20  # bytes of a tensor whose pages are worth a call
ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers: convert in the thread that loads


class _GivesBack(TorchDispatchMode):
    """Gives back the pages of some mapped files as their tensors are converted."""

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__()
        self._inodes = {str(file.stat().st_ino) for file in files}
        self._advise = ctypes.CDLL(None).madvise

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and args[0].nbytes >= LEAST:
            begin, size = args[0].data_ptr(), args[0].nbytes
            if self._is_mapped(begin, begin + size):
                self._give_back(begin, size)
        return made

    def _is_mapped(self, begin: int, end: int) -> bool:
        """Return whether a stretch of memory is one of the files: of any other, giving back would lose what is in it.

        Asked anew each time, for where a file was, other memory may be by now.
        """
        with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as maps:
            for line in maps:
                low, _, high = line.split(" ", 1)[0].partition("-")
                if int(low, 16) <= begin < int(high, 16):
                    return line.split(None, 5)[4] in self._inodes and end <= int(high, 16)
        return False

    def _give_back(self, begin: int, size: int) -> None:
        """Give back the whole pages inside a tensor, which share nothing with its neighbours."""
        end = (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if end > begin:
            self._advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), DONT_NEED)


@contextlib.contextmanager
def pages_given_back(files: Iterable[Path]) -> Iterator[None]:
    """Give back the pages of weight files as their tensors are converted; does nothing where the system has no such call."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = os.environ.get(ONE_THREAD)
    os.environ[ONE_THREAD] = "1"
    try:
        with _GivesBack(files):
            yield
    finally:
        if before is None:
            del os.environ[ONE_THREAD]
        else:
            os.environ[ONE_THREAD] = before
