"""Batch: a file of prompts becomes a folder of pictures, on one process or on many, and nothing is made twice."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.batch.lines import BadLine, Line, read_lines
from imagegen.batch.output import Output
from imagegen.batch.worker import ModelRecipe, in_this_process, on_ray
from imagegen.catalog import EMBEDDED
from imagegen.request import RequestError

if TYPE_CHECKING:
    from imagegen.model import Model

MAX_SHAPES = 8  # kinds of requests that wait for others of their kind; memory stays flat


@dataclass
class Summary:
    """What became of a file of prompts.

    Attributes:
        folder: where the pictures are.
        made: pictures that this run made.
        adopted: those that were there without a row of the manifest.
        present: those that were there already.
        failed: lines without a picture.
        faults: (line, id, reason) of the first twenty of them.
        elapsed_s: of this run.
    """

    folder: str
    made: int = 0
    adopted: int = 0
    present: int = 0
    failed: int = 0
    faults: list[tuple[int, str | int, str]] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def done(self) -> int:
        """Lines that nothing is left to do for."""
        return self.made + self.adopted + self.present + self.failed


def generate_batch(
    prompts: str | Path,
    out: str | Path,
    *,
    model: "Model | ModelRecipe | str | Path" = EMBEDDED,
    workers: int = 1,
    address: str | None = None,
    max_batch: int = 8,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Summary:
    """Make one picture for every line of a file; run again after whatever happened, it finishes what is missing.

    Args:
        prompts: a file of JSON objects, one a line: `prompt`, `id` if wanted, and what `Model.generate` takes.
        out: a folder, or an address that fsspec knows (`s3://…`), for `ID.png` and `manifest.jsonl`.
        model: a model, how to load one, or what `load` takes. Several workers load it themselves.
        workers: processes that each hold the model; more than one run on Ray.
        address: of a Ray cluster; with it even one worker runs there.
        max_batch: how many pictures of equal shape are made at once.
        on_progress: is told what is done: in words, how many lines, of how many.

    Raises:
        RequestError: the file or the folder is no good; a line that is none only fails alone.
        ModelError: the model cannot be loaded.
    """
    for name, value in (("workers", workers), ("max_batch", max_batch)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1024:
            raise RequestError(f"{name} must be a whole number from 1 to 1024, got {value!r}")
    file, started = Path(prompts), time.perf_counter()
    if not file.is_file():
        raise RequestError(f"no file {str(prompts)!r}: it holds a JSON object a line, as in " + '{"prompt": "a red apple"}')
    on_cluster = workers > 1 or address is not None
    loaded, recipe = _find(model, on_cluster)
    with Output(out, recipe.settings()) as output:
        summary = Summary(str(out))
        total = _count(file)

        def tell() -> None:
            if on_progress is not None:
                on_progress("pictures", summary.done, total)

        tell()
        chunks = _in_chunks(_missing(file, output, summary), max_batch)
        first = next(chunks, [])
        chunks = itertools.chain([first], chunks)
        if on_cluster:
            results = on_ray(recipe, chunks, max_batch, workers, address)
        else:
            results = in_this_process(lambda: loaded or recipe.load(), chunks, max_batch)
        with contextlib.closing(results):
            for line, made in results if first else ():  # a model is loaded where there is something to make
                if isinstance(made, str):
                    _fail(output, summary, line, made)
                else:
                    output.write(line, made)
                    summary.made += 1
                tell()
        tell()
    summary.elapsed_s = time.perf_counter() - started
    return summary


def _find(model: "Model | ModelRecipe | str | Path", on_cluster: bool) -> tuple["Model | None", ModelRecipe]:
    """Return the model itself, where there is one, and how others load it."""
    if isinstance(model, ModelRecipe):
        return None, model
    if isinstance(model, (str, Path)):
        return None, ModelRecipe(str(model))
    if on_cluster and (model.loras or model.guides):
        raise RequestError("workers load the model themselves, without what was added to it: pass a ModelRecipe with loras=")
    recorded: dict[str, Any] = dict(model.origin.recorded())
    source = recorded.pop("source")
    dtype = str(model.dtype).removeprefix("torch.")
    options = recorded | {"device": model.device.type, "plan": model.plan}
    if dtype != model.family.reference_dtype:
        options["dtype"] = dtype
    return model, ModelRecipe(source, options)


def _count(file: Path) -> int:
    with file.open("rb") as opened:
        return sum(bool(line.strip()) for line in opened)


def _missing(file: Path, output: Output, summary: Summary) -> Iterator[Line]:
    """Read the lines that have no picture yet, and count the others."""
    for line in read_lines(file):
        if isinstance(line, BadLine):
            _fail(output, summary, line, line.reason)
            continue
        try:
            state = output.state_of(line)
        except RequestError as error:
            _fail(output, summary, line, str(error))
            continue
        summary.present += state == "made"
        summary.adopted += state == "adopted"
        if state == "missing":
            yield line


def _fail(output: Output, summary: Summary, line: Line | BadLine, reason: str) -> None:
    output.fail(line, reason)
    summary.failed += 1
    if len(summary.faults) < 20:
        summary.faults.append((line.number, line.id, reason))


def _in_chunks(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    """Put lines that differ in words and seeds only together; the oldest kind goes as it is where there are too many."""
    waiting: dict[str, list[Line]] = {}
    for line in lines:
        said = {name: value for name, value in line.settings.items() if name not in ("seed", "negative_prompt")}
        kind = repr(sorted(said.items())) + str(bool(line.settings.get("negative_prompt")))
        waiting.setdefault(kind, []).append(line)
        if len(waiting[kind]) >= size:
            yield waiting.pop(kind)
        elif len(waiting) > MAX_SHAPES:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()
