"""Trainings of a visitor: their data, and runs that go on when the page is closed. Knows nothing of Gradio."""

import json
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagegen.families import adapters
from imagegen.finetune import finetune
from imagegen.finetune.checkpoint import list_checkpoints
from imagegen.finetune.data import METADATA, SUFFIXES
from imagegen.finetune.workplace import SAMPLES
from imagegen.profile import write_json
from imagegen.receipt import slug
from imagegen.request import DataError, Error
from imagegen.studio.parts import TRAININGS, Stopped, Studio, check_upload

DATA, SETTINGS, LOSSES = "data", "settings.json", "losses.txt"
MAX_FILES = 500
LOSS = re.compile(r"loss (\d+\.\d+)")


@dataclass
class Run:
    """A training that goes on.

    Attributes:
        folder: of the training.
        stop: ends it within one step, once set.
        message: what goes on, or how it ended.
        done: steps.
        total: steps in all; 0 until that is known.
        losses: step and loss, also of the runs before.
        error: what was wrong, in words.
        ended: set at the end, whatever the end.
    """

    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)
    message: str = "waiting for the model"
    done: int = 0
    total: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    error: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def tell(self, what: str, done: int, total: int) -> None:
        """Take note of how it goes on; end it where that was asked."""
        self.message, self.done, self.total = what, done, total
        found = LOSS.search(what)
        if found and what.startswith("step"):
            self.losses.append((done, float(found[1])))
            with (self.folder / LOSSES).open("a", encoding="utf-8") as file:
                file.write(f"{done} {found[1]}\n")
        if self.stop.is_set():
            raise Stopped


def gather(files: Sequence[str], place: Path) -> dict[str, str]:
    """Bring uploads into a folder under names of our own.

    Args:
        files: pictures, `NAME.txt` captions and `metadata.jsonl`; as uploaded.
        place: a new folder.

    Returns:
        The caption of each picture there; empty where there is none.

    Raises:
        DataError: there are none, or too many.
        RequestError: a picture has too many pixels.
    """
    pictures = [Path(file) for file in files if Path(file).suffix.lower() in SUFFIXES]
    if not pictures or len(files) > MAX_FILES:
        raise DataError(f"give pictures ({', '.join(SUFFIXES[:3])} …) with captions, at most {MAX_FILES} files; got {len(files)}")
    said = _captions(files)
    place.mkdir(parents=True)
    captions = {}
    for number, path in enumerate(pictures, 1):
        name = f"{number:03d}-{slug(path.stem)}{path.suffix.lower()}"
        shutil.copyfile(path, place / name)
        captions[name] = said.get(path.name, said.get(path.stem, ""))
    return captions


def _captions(files: Sequence[str]) -> dict[str, str]:
    """Return the captions among uploads, by the names that they were uploaded under, with suffix or without."""
    found: dict[str, str] = {}
    for path in map(Path, files):
        if path.suffix.lower() not in (".txt", ".jsonl", ".json"):
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix.lower() == ".txt":
                found[path.stem] = text.strip()
                continue
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            found |= {str(row["file_name"]): str(row["text"]) for row in rows}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name!r} cannot be read ({type(error).__name__}): save it as UTF-8 text") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f'{path.name!r} has a line that is not of the form {{"file_name": "a.png", "text": "…"}}') from None
    return found


def check_sizes(place: Path) -> list[str]:
    """Return what is too large to be opened, a line for each picture; by their headers alone."""
    faults = []
    for path in sorted(place.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            try:
                check_upload(path)
            except Error as error:
                faults.append(f"{path.name!r}: {error}")
    return faults


def write_captions(place: Path, captions: Mapping[str, str]) -> None:
    """Write the captions of a data folder; of files that are there alone."""
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items() if text.strip()]
    (place / METADATA).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def new_training(folder: Path, name: str, data: Path, settings: dict[str, Any]) -> Path:
    """Take checked data into a new training; return its folder.

    Args:
        folder: the visitor's.
        name: what the visitor calls it; cut down to letters and digits.
        data: is moved there.
        settings: of `finetune`.
    """
    stem, number = slug(name), 1
    while (place := folder / TRAININGS / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    place.mkdir(parents=True)
    shutil.copytree(data, place / DATA)
    write_json(place / SETTINGS, settings)
    return place


def unfinished(folder: Path) -> dict[str, Path]:
    """Return the visitor's trainings that can go on, by name."""
    places = sorted((folder / TRAININGS).glob(f"*/{SETTINGS}"))
    return {path.parent.name: path.parent for path in places if not (path.parent / adapters.FILE).is_file()}


def start(studio: Studio, place: Path) -> Run:
    """Start a training, or go on with one, in a thread of its own: it does not end with the page.

    Raises:
        DataError: it runs already, or its settings cannot be read.
    """
    before = studio.trainings.get(place)
    if before is not None and not before.ended.is_set():
        raise DataError(f"the training {place.name!r} is running: stop it first")
    try:
        settings = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"the training {place.name!r} has no readable settings: start a new one") from None
    run = studio.trainings[place] = Run(place, losses=read_losses(place))
    threading.Thread(target=_train, args=(studio, run, settings), name="imagegen-training", daemon=True).start()
    return run


def _train(studio: Studio, run: Run, settings: dict[str, Any]) -> None:
    place = run.folder
    settings["validation_prompts"] = tuple(settings.get("validation_prompts", ()))
    try:
        with studio.engine.alone() as model:
            run.tell("reading the data", 0, 1)
            made = finetune(model, place / DATA, place, resume=bool(list_checkpoints(place)), progress=run.tell, **settings)
        run.message = f"done: {made.num_steps} steps, loss {made.loss:.4f}"
    except Stopped:
        run.message = f"stopped after step {run.done} of {run.total}: it goes on from its last checkpoint"
    except Error as error:
        run.error = run.message = str(error).replace(f"{place}/", "")
    except Exception as error:  # the thread's end is all that the page sees of it
        run.error = run.message = f"the training failed ({type(error).__name__}: {error})"
    finally:
        run.ended.set()


def read_losses(place: Path) -> list[tuple[int, float]]:
    """Return step and loss of a training's runs so far; where steps were taken again, the later ones."""
    try:
        lines = (place / LOSSES).read_text(encoding="utf-8").split("\n")
    except OSError:
        return []
    pairs = [line.split() for line in lines if re.fullmatch(r"\d+ \d+\.\d+", line)]
    return sorted({int(step): float(loss) for step, loss in pairs}.items())


def samples(place: Path) -> list[Path]:
    """Return the sample pictures of a training, the last first."""
    return sorted((place / SAMPLES).glob("*.png"), reverse=True)
