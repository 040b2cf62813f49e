"""Checkpoints that are whole or not there: written beside their place, moved in, and only then the older ones removed."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from imagegen.request import DataError

FOLDER = "checkpoints"
KEPT = 2
NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(out: Path, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Write a checkpoint, and remove all but the last two.

    Args:
        out: the training's folder.
        step: steps done.
        tensors: nested dicts of tensors and numbers: weights, optimiser, averages.
        facts: what a resumed training must agree with.
    """
    place = out / FOLDER / f"step-{step:08d}"
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write(part / "state.pt", lambda file: torch.save(tensors, file))
    _write(part / "facts.json", lambda file: file.write(json.dumps(facts, sort_keys=True, indent=1).encode()))
    if place.exists():  # the same step again, after a resume from an older one
        shutil.rmtree(place)
    os.replace(part, place)
    _sync_folder(place.parent)
    for old in list_checkpoints(out)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _write(path: Path, write: Any) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Let the move itself reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(out: Path) -> list[Path]:
    """Return the whole checkpoints of a training, the oldest first."""
    folder = out / FOLDER
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(path for path in found if (path / "facts.json").is_file() and (path / "state.pt").is_file())


def load_checkpoint(path: Path, facts: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Read a checkpoint; return the steps done, and its tensors.

    Raises:
        DataError: it was made with other data, another model or other settings; the message names each.
    """
    try:
        recorded = json.loads((path / "facts.json").read_text())
        changed = {name: (recorded.get(name), value) for name, value in facts.items() if recorded.get(name) != value}
        differ = [f"{name} was {before!r}, now {now!r}" for name, (before, now) in changed.items()]
        if differ:
            raise DataError(f"{str(path)!r} is of another training ({'; '.join(differ)}): give the same again, or another --out")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"the checkpoint {str(path)!r} cannot be read ({error}): remove it to go on from the one before"
        ) from None
    return int(NAME.fullmatch(path.name)[1]), state  # type: ignore[index]
