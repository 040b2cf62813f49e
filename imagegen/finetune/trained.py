"""What a training makes, and what every training checks first. Knows nothing of torch."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagegen.finetune.checkpoint import list_checkpoints
from imagegen.lock import only_writer
from imagegen.request import DataError

Tell = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Attributes:
        folder: its `--out`.
        weights: the file of weights.
        loss: of the last step.
        num_steps: steps done.
        notes: what should be known of the data and of licences.
    """

    folder: Path
    weights: Path
    loss: float
    num_steps: int
    notes: tuple[str, ...]


def one_training(out: Path, accelerator: Any) -> contextlib.AbstractContextManager[None]:
    """Keep other trainings out of a folder: all processes of one write there, the first holds it for them."""
    return only_writer(out) if accelerator.is_main_process else contextlib.nullcontext()


def silence(*_: Any) -> None:
    """Tell nobody."""


def check_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a training, unless it goes on.

    Raises:
        DataError: it does.
    """
    if not resume and list_checkpoints(out):
        raise DataError(f"{str(out)!r} holds another training's checkpoints: resume it, or choose another folder")
