"""A batch of pictures on one worker with one core, and on two of Ray's with a core each: what a second worker is worth."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagegen.batch import ModelRecipe, generate_batch
from imagegen.prompts import search_prompts

PICTURES, ROUNDS, CHUNK = 64, 3, 4


def measure_workers(source: str, *, tiny: bool, device: str) -> dict[str, Any]:
    """Make the same pictures with one worker and with two, in turn.

    Loading is left out: the clock starts when every worker has finished its first chunk.

    Returns:
        `pictures` of a run; `one` and `two`, pictures a minute of every round; `ratio` of their medians.
    """
    pictures, rounds = (6 * CHUNK, 1) if tiny else (PICTURES, ROUNDS)
    prompts = search_prompts("emoji")
    settings: dict[str, Any] = {"num_steps": 1, "width": 64, "height": 64} if tiny else {}
    found: dict[str, list[float]] = {"one": [], "two": []}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "prompts.jsonl"
        rows = [{"prompt": prompts[number % len(prompts)], "seed": number} | settings for number in range(pictures)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number in range(rounds):
            with on_one_core():
                found["one"].append(pace(file, Path(place) / f"one-{number}", source, device, 1))
            found["two"].append(pace(file, Path(place) / f"two-{number}", source, device, 2))
    return {"pictures": pictures} | found | {"ratio": statistics.median(found["two"]) / statistics.median(found["one"])}


@contextmanager
def on_one_core() -> Iterator[None]:
    """Keep this process, and torch in it, on one core."""
    import torch

    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def pace(file: Path, out: Path, source: str, device: str, workers: int) -> float:
    """Return how many pictures a minute some workers make."""
    times: list[tuple[int, float]] = []
    generate_batch(
        file,
        out,
        model=ModelRecipe(source, {"device": device}),
        workers=workers,
        max_batch=CHUNK,
        on_progress=lambda _what, done, _total: times.append((done, time.perf_counter())),
    )
    begun = next((done, at) for done, at in times if done >= workers * CHUNK)
    ended = times[-1]
    return 60 * (ended[0] - begun[0]) / (ended[1] - begun[1])
