"""What some tests need and not every machine has."""

import importlib.util
import os
import shutil

import pytest


def need(*packages, program=None):
    """Skip the test, or the module at whose top this stands, where something is missing; in CI that is a failure."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if program is not None and not any(map(shutil.which, program)):
        missing.append(program[0])
    if missing and os.environ.get("CI"):
        pytest.fail(f"{missing[0]} is not installed")
    if missing:
        pytest.skip(f"{missing[0]} is not installed", allow_module_level=True)
