"""Engine: one queue in front of one model, for many people at once.

Requests wait in a bounded queue and run in a thread of the engine's own, in the order they came; a reader who is
slow, or has left, keeps nobody waiting. Those that differ in words and seeds only join the first of them in one
batch, since noise is per picture. Knows nothing of pages, servers or pipelines.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch

from imagegen.model import Model, Step
from imagegen.request import Error, Request, RequestError
from imagegen.result import Result
from imagegen.variations import Settings

if TYPE_CHECKING:
    from PIL.Image import Image


class Busy(Error):
    """Too many requests wait already: try again later."""


class Refused(Error):
    """The safety check refused a picture: it is shown to nobody."""


# Tells a prompt and its finished picture (RGB) apart: why it may not be shown, or None where it may.
Safety = Callable[[str, "Image"], str | None]


@dataclass(frozen=True)
class Waiting:
    """A request in the queue.

    Attributes:
        position: how many others go before it, whatever runs now.
    """

    position: int


class _Job:
    """What waits for the model, and what its reader is told.

    Attributes:
        request: checked; None for one who wants the model to oneself.
        noise: to start from, where it was given.
        told: `Waiting`, `Step`, the model, an error, or None at the end.
        left: set once nobody waits for it any more.
    """

    def __init__(self, request: Request | None = None, noise: torch.Tensor | None = None) -> None:
        self.request, self.noise = request, noise
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.left = threading.Event()


class _AllLeft(BaseException):
    """Raised inside the model's work when nobody waits for its pictures."""


class Stream(Iterator[Waiting | Step]):
    """What becomes of one request: `Waiting` whenever its place changes, then the model's steps, the last with `.result`.

    Closing it, leaving its `with` block or losing it ends the work within one step.
    """

    def __init__(self, job: _Job) -> None:
        """Read a job; `Engine.stream` makes them."""
        self._job = job
        self._ended = False

    def __next__(self) -> Waiting | Step:
        """Wait for the next state and return it.

        Raises:
            Error: the request failed.
        """
        if self._ended or self._job.left.is_set():
            raise StopIteration
        told = self._job.told.get()
        failed = isinstance(told, BaseException)
        self._ended = failed or told is None or (isinstance(told, Step) and told.result is not None)
        if failed:
            raise told
        if told is None:
            raise StopIteration
        return told

    def close(self) -> None:
        """Say that nobody waits for the pictures any more; from any thread, and more than once."""
        self._job.left.set()
        self._job.told.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Engine:
    """One queue in front of one model: bounded, fair, batching.

    Attributes:
        model: the model; whoever uses it otherwise than through the engine does so inside `alone`.
        max_waiting: how many may wait.
        max_batch: how many pictures are made at once where requests join; a single request may ask for more.
        safety: looks at every finished picture before anybody sees it; previews are grey then.
    """

    def __init__(self, model: Model, *, max_waiting: int = 32, max_batch: int = 8, safety: Safety | None = None) -> None:
        """Put a queue in front of a model.

        Raises:
            RequestError: a number is below 1.
        """
        if max_waiting < 1 or max_batch < 1:
            raise RequestError(f"max_waiting and max_batch are from 1, got {max_waiting} and {max_batch}")
        self.model, self.max_waiting, self.max_batch, self.safety = model, max_waiting, max_batch, safety
        self._queue: list[_Job] = []
        self._running: list[_Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="imagegen-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return sum(not job.left.is_set() for job in self._queue)

    @property
    def running(self) -> int:
        """How many requests are being worked on."""
        return sum(not job.left.is_set() for job in self._running)

    def stream(self, prompt: str, **settings: Unpack[Settings]) -> Stream:
        """Make pictures step by step when it is their turn; takes what `Model.generate` takes.

        Returns:
            An iterator: `Waiting` while it waits, then a `Step` after every step, the last with `.result`. Where
            another request of its batch fails, the steps begin anew.

        Raises:
            RequestError: a setting is wrong.
            Busy: too many wait already.
        """
        job = _Job(self.model.check(prompt, **settings), settings.get("noise"))
        self._join(job)
        return Stream(job)

    def generate(self, prompt: str, **settings: Unpack[Settings]) -> Result:
        """Make pictures when it is their turn and wait for them; takes what `Model.generate` takes.

        Raises:
            RequestError: a setting is wrong.
            Busy: too many wait already.
        """
        with self.stream(prompt, **settings) as states:
            for state in states:
                if isinstance(state, Step) and state.result is not None:
                    return state.result
        raise Error("the engine was closed before the pictures were made")

    @contextlib.contextmanager
    def alone(self) -> Iterator[Model]:
        """Wait for one's turn and have the model to oneself inside the `with` block, whatever is done with it.

        Raises:
            Busy: too many wait already.
        """
        job = _Job()
        self._join(job)
        try:
            while isinstance(told := job.told.get(), Waiting):
                pass
            if isinstance(told, BaseException):
                raise told
            yield self.model
        finally:
            job.left.set()

    def close(self) -> None:
        """End the work within one step; whoever waits is told so."""
        with self._changed:
            self._closed = True
            for job in self._running:
                if job.request is None:  # its work is another thread's, and goes on
                    job.left.set()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _join(self, job: _Job) -> None:
        with self._changed:
            if self._closed:
                raise Error("the engine is closed: make another one")
            self._queue = [other for other in self._queue if not other.left.is_set()]
            if len(self._queue) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests wait already: try again in a moment")
            self._queue.append(job)
            if self._running or len(self._queue) > 1:
                job.told.put(Waiting(len(self._queue) - 1))
            self._changed.notify_all()

    def _work(self) -> None:
        """Run what waits, until the engine is closed."""
        while True:
            with self._changed:
                self._running = []
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    for job in self._queue:
                        job.told.put(Error("the engine was closed before its turn came"))
                    return
                jobs = self._take()
            if jobs and jobs[0].request is None:
                jobs[0].told.put(self.model)
                jobs[0].left.wait()
            elif jobs:
                self._run(jobs)

    def _take(self) -> list[_Job]:
        """Take what runs next off the queue, the first and those that join it, and tell the others where they are now."""
        waiting = [job for job in self._queue if not job.left.is_set()]
        self._running = waiting[:1]
        shared = self._shared_by(waiting[0]) if waiting else None
        if shared is not None:
            room = self.max_batch - _pictures(waiting[0])
            for job in waiting[1:]:
                if _pictures(job) <= room and self._shared_by(job) == shared:
                    self._running.append(job)
                    room -= _pictures(job)
        self._queue = [job for job in waiting if job not in self._running]
        for position, job in enumerate(self._queue):
            job.told.put(Waiting(position))
        return self._running

    def _shared_by(self, job: _Job) -> Hashable | None:
        """Return what a job's batch has in common; None where it runs alone."""
        return self.model.joined_by(job.request) if job.request is not None and job.noise is None else None

    def _run(self, jobs: list[_Job]) -> None:
        """Make the pictures of some jobs together. Where that fails each is made alone: the fault is one's own."""
        try:
            self._make(jobs)
        except _AllLeft:
            for job in jobs:
                job.told.put(Error("the engine was closed before the pictures were made"))
        except BaseException as error:  # handed to the reader
            if len(jobs) == 1:
                jobs[0].told.put(error)
                return
            for job in jobs:
                if not job.left.is_set():
                    self._run([job])

    def _make(self, jobs: list[_Job]) -> None:
        held: list[Step] = []

        def tell(steps: list[Step]) -> None:
            nonlocal held
            if self._closed or all(job.left.is_set() for job in jobs):
                raise _AllLeft
            for job, step in zip(jobs, held, strict=False):
                job.told.put(step)
            held = steps if self.safety is None else [step.without_preview() for step in steps]

        requests = [job.request for job in jobs if job.request is not None]
        results = self.model.run_together(requests, tell, jobs[0].noise)
        for job, step, result in zip(jobs, held, results, strict=True):
            refused = self._look_at(result)
            job.told.put(refused or replace(step, elapsed_s=result.elapsed_s, result=result))

    def _look_at(self, result: Result) -> Error | None:
        """Return why a result may not be shown. A check that fails has allowed nothing."""
        if self.safety is None:
            return None
        try:
            for picture in result.pictures:
                reason = self.safety(picture.receipt.request["prompt"], picture.image)
                if reason is not None:
                    return Refused(f"the picture was refused: {reason}")
        except Exception as error:
            return Refused(f"the safety check itself failed ({type(error).__name__}): nothing is shown")
        return None


def _pictures(job: _Job) -> int:
    return job.request.num_images if job.request is not None else 1
