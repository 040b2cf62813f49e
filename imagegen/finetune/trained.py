"""What a training makes, and what every training checks first. Knows nothing of torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagegen.finetune.checkpoint import list_checkpoints
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


def silence(*_: Any) -> None:
    """Tell nobody."""


def check_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a training, unless it goes on.

    Raises:
        DataError: it does.
    """
    if not resume and list_checkpoints(out):
        raise DataError(f"{str(out)!r} holds another training's checkpoints: resume it, or choose another folder")
