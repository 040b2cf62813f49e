"""A quicker start for a command that makes a picture and ends: what it does not need is not imported.

diffusers and transformers import torch's compiler (`torch._dynamo`: with FSDP and sympy about a
second) to mark some classes and functions for it, torch's sharded tensors (half a second) in case a
model is spread over processes, and torchao and peft where they are installed. While a command loads
its model, the compiler is a stand-in that takes the marks and becomes the real module at any other
question, `torch.distributed` says that it is not there, as in a torch built without it, and whoever
asks whether those packages are installed hears no. Only the command line's own process does this, and
only in commands that compile, quantise and distribute nothing: a library user's modules are never touched.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

STOPPED = 130  # the exit code of a process that Ctrl-C or SIGTERM ended
COMPILER = "torch._dynamo"
NOT_FOR_ONE_PICTURE = ("torchao", "peft")
MARKERS = ("allow_in_graph", "assume_constant_result", "disable", "disallow_in_graph", "forbid_in_graph")


class _Deferred(ModuleType):
    """A module that is imported when something it cannot answer is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by whoever looks at all modules, such as inspect
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _leave_unmarked(marked: Any = None, *_: Any, **__: Any) -> Any:
    """Stand for a marker such as `torch.compiler.disable`, as a decorator with or without arguments."""
    return _leave_unmarked if marked is None else marked


@contextlib.contextmanager
def imports_for_one_picture() -> Iterator[None]:
    """Import torch; what is imported inside comes without the compiler, sharded tensors and quantisers.

    Afterwards `import torch._dynamo` finds the real compiler again.
    """
    gc.disable()  # nothing of what is imported and loaded is garbage
    import torch

    if COMPILER in sys.modules:
        yield
        return
    stand_in = _Deferred(COMPILER)
    stand_in.__path__ = [f"{torch.__path__[0]}/_dynamo"]  # `from ... import` looks for it
    vars(stand_in).update(dict.fromkeys(MARKERS, _leave_unmarked))
    vars(stand_in)["eval_frame"] = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))
    sys.modules[COMPILER] = torch._dynamo = stand_in
    there, find_spec = torch.distributed.is_available, importlib.util.find_spec
    torch.distributed.is_available = lambda: False
    importlib.util.find_spec = lambda name, package=None: None if name in NOT_FOR_ONE_PICTURE else find_spec(name, package)
    try:
        yield
    finally:
        torch.distributed.is_available, importlib.util.find_spec = there, find_spec
        if sys.modules.get(COMPILER) is stand_in:
            del sys.modules[COMPILER]


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process there and then: libraries catch the first in their imports, and go on half imported.

    For the command line's own process, while nothing is being written.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        if "--json" in sys.argv:
            os.write(1, b'{"error": "stopped"}\n')
        os.write(2, b"imagegen: stopped\n")
        os._exit(STOPPED)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # What is ignored stays so, as Ctrl-C in a shell's background job.
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_as_by_control_c() -> None:
    """Let SIGTERM stop a command as Ctrl-C does: it leaves nothing half done behind."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
