"""What makes the pictures of a batch: a model in this process, or one in each of Ray's workers.

Ray is imported where it is used: it is an extra.
"""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.batch.lines import Line
from imagegen.request import Error, ModelError, RequestError

if TYPE_CHECKING:
    from imagegen.model import Model

MAX_DEATHS = 3  # of the workers that had a line in hand, before it is given up
AHEAD = 2  # chunks that a worker has, so that it never waits for the next
Made = tuple[Line, bytes | str]  # a line with its PNG, or with why there is none


@dataclass(frozen=True)
class ModelRecipe:
    """How to load a model, in whatever process.

    Attributes:
        source: what `load` takes.
        options: its keyword arguments.
        loras: files and weights.
    """

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    loras: tuple[tuple[str, float], ...] = ()

    def load(self) -> "Model":
        """Load it.

        Raises:
            ModelError, PlanError: as `load`.
        """
        from imagegen.loader import load

        model = load(self.source, **self.options)
        for path, weight in self.loras:
            model.add_lora(path, weight=weight)
        return model

    def settings(self) -> dict[str, Any]:
        """Return what decides the pictures: the model's name and weights, dtype, plan and LoRAs."""
        from imagegen.loader import find_model
        from imagegen.sources import files_of
        from imagegen.weights import hash_file, hash_files

        where = {name: self.options.get(name) for name in ("revision", "variant", "base", "vae")}
        source, of_janus = find_model(self.source, where)
        files = files_of(source) if of_janus is None else {path.name: path for path in of_janus.weights()}
        weights = hashlib.sha256("".join(sorted(hash_files(files).values())).encode()).hexdigest()
        dtype = self.options.get("dtype")
        loras = [
            [Path(path).name, hash_file(Path(path)) if Path(path).is_file() else None, weight] for path, weight in self.loras
        ]
        plan = self.options.get("plan", "exact")
        model = {"name": Path(source.name).name, "sha256": weights}
        return {"model": model, "dtype": dtype and str(dtype), "plan": str(getattr(plan, "name", plan)), "loras": loras}

    def from_anywhere(self) -> "ModelRecipe":
        """Return the same with absolute paths, for processes that run in other folders."""
        from imagegen.sources import local_path

        def absolute(value: str | Path) -> str:
            path = local_path(value)
            return str(value) if path is None else str(path.absolute())

        options = {name: absolute(value) if name in ("base", "vae") and value else value for name, value in self.options.items()}
        loras = tuple((str(Path(path).absolute()), weight) for path, weight in self.loras)
        return ModelRecipe(absolute(self.source), options, loras)


class Maker:
    """A loaded model that makes the pictures of lines: those that allow it in one batch, a fault is one line's own."""

    def __init__(self, model: "Model", max_batch: int) -> None:
        """Take a model."""
        from imagegen.engine import Engine

        self._engine = Engine(model, max_waiting=max(64, 2 * max_batch), max_batch=max_batch)

    def make(self, lines: list[Line]) -> list[bytes | str]:
        """Return each line's PNG, or why there is none."""
        with self._engine.alone():  # so that all wait before the first begins
            streams = [self._begin(line) for line in lines]
        return [stream if isinstance(stream, str) else self._finish(stream) for stream in streams]

    def _begin(self, line: Line) -> Any:
        try:
            return self._engine.stream(line.prompt, **line.settings)
        except Error as error:
            return str(error)

    def _finish(self, stream: Any) -> bytes | str:
        try:
            with stream:
                for state in stream:
                    result = getattr(state, "result", None)
                    if result is not None:
                        return result.pictures[0].png()
            return "stopped before the picture was made"
        except Error as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """End."""
        self._engine.close()


def in_this_process(load: "Callable[[], Model]", chunks: Iterator[list[Line]], max_batch: int) -> Generator[Made, None, None]:
    """Make the pictures one chunk after the other."""
    with contextlib.closing(Maker(load(), max_batch)) as maker:
        for chunk in chunks:
            yield from zip(chunk, maker.make(chunk), strict=True)


def on_ray(
    recipe: ModelRecipe, chunks: Iterator[list[Line]], max_batch: int, workers: int, address: str | None
) -> Generator[Made, None, None]:
    """Make the pictures on workers that each hold the model; one that dies is started again and its lines are made anew.

    Raises:
        RequestError: Ray is missing, or there is no cluster at the address.
        ModelError: a worker cannot load the model.
    """
    try:
        import ray
    except ImportError:
        raise RequestError("several workers run on Ray: pip install 'imagegen-diffusion[ray]', or leave --workers out") from None

    ours = not ray.is_initialized()
    if ours:
        _start(ray, workers, address)
    try:
        have = ray.cluster_resources()
        cpus = max(1, int(have.get("CPU", 1)) // workers)
        gpus = 0 if recipe.options.get("device") == "cpu" else min(1, have.get("GPU", 0) / workers)
        actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=MAX_DEATHS)(_Worker)
        pool: list[Any] = [actor.remote(recipe.from_anywhere(), max_batch) for _ in range(workers)]
        try:
            ray.get([worker.ready.remote() for worker in pool])
        except ray.exceptions.RayError as error:
            raise ModelError(_reason(error)) from None
        yield from _share(ray, pool, chunks)
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any, workers: int, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=max(workers, os.cpu_count() or 1), include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RequestError(f"no Ray cluster at {address!r}: {error}") from None


class _Worker:
    """A maker in a process of Ray's."""

    def __init__(self, recipe: ModelRecipe, max_batch: int) -> None:
        self._maker = Maker(recipe.load(), max_batch)

    def ready(self) -> bool:
        return True

    def make(self, lines: list[Line]) -> list[bytes | str]:
        return self._maker.make(lines)


def _share(ray: Any, pool: list[Any], chunks: Iterator[list[Line]]) -> Iterator[Made]:
    """Keep every worker busy, and no more than that waiting: the file is read as fast as pictures come."""
    flying: dict[Any, tuple[Any, list[Line]]] = {}

    def send(worker: Any, chunk: list[Line]) -> None:
        flying[worker.make.remote(chunk)] = (worker, chunk)

    for worker, chunk in zip(pool * AHEAD, itertools.islice(chunks, len(pool) * AHEAD), strict=False):
        send(worker, chunk)
    while flying:
        ready, _ = ray.wait(list(flying), num_returns=1)
        worker, chunk = flying.pop(ready[0])
        try:
            made = ray.get(ready[0])
        except ray.exceptions.RayError as error:
            if len(chunk) > 1:  # one of them may be what kills the workers
                for line in chunk:
                    send(worker, [line])
                continue
            made = [f"its worker died {MAX_DEATHS + 1} times: {_reason(error)}"]
        if (more := next(chunks, None)) is not None:
            send(worker, more)
        yield from zip(chunk, made, strict=True)


def _reason(error: Exception) -> str:
    """Return the last line of what Ray tells of an error: the error itself."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
