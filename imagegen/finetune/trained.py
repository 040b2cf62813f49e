"""What a training makes, and what every training checks first. Knows nothing of torch."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagegen.finetune.checkpoint import list_checkpoints
from imagegen.lock import only_writer
from imagegen.request import DataError, RequestError

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
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


@contextlib.contextmanager
def one_training(out: Path, accelerator: Any) -> Iterator[None]:
    """Keep other trainings out of a folder: all processes of one write there, the first holds it for them.

    Raises:
        RequestError: another training writes there, or nothing can be written any more.
    """
    with only_writer(out) if accelerator.is_main_process else contextlib.nullcontext():
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            said = f"cannot write into {str(out)!r}: {error.strerror}"
            raise RequestError(f"{said}; make room, and go on with resume: what was saved before is whole") from None


def silence(*_: Any) -> None:
    """Tell nobody."""


def check_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a training, unless it goes on.

    Raises:
        DataError: it does.
    """
    if not resume and list_checkpoints(out):
        raise DataError(f"{str(out)!r} holds another training's checkpoints: resume it, or choose another folder")
