"""Many people at once: clients who ask one model for pictures, a third of whom leave before theirs is done.

The same crowd asks twice, with requests that join in batches and one at a time. Every picture that was finished is then
made alone, and compared.
"""

import contextlib
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from imagegen import fidelity
from imagegen.engine import Busy, Engine
from imagegen.loader import load
from imagegen.model import Model, Step
from imagegen.prompts import search_prompts
from imagegen.receipt import read_receipt

CLIENTS, MINUTES = 50, 2.0
LEAVES = 3  # every third client
PATIENCE_S = 0.5  # before a client who was told "busy" asks again


@dataclass
class Crowd:
    """What became of a crowd's requests.

    Attributes:
        counts: `finished`, `left` and `busy`.
        errors: everything else, in words.
        memory_gib: of the process, at moments in seconds since the start.
        elapsed_s: until the last one was served.
    """

    folder: Path  # where the finished pictures lie
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    memory_gib: list[tuple[float, float]] = field(default_factory=list)
    elapsed_s: float = 0.0


def resident_gib() -> float | None:
    """Return the memory that this process holds now; None where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30
    return None


def measure_crowd(source: str, *, tiny: bool, device: str) -> dict[str, Any]:
    """Let a crowd ask, in batches and one at a time, and hold every picture to the one made alone.

    Returns:
        `clients`, `seconds`; `batched` and `single`, each with `finished`, `left`, `busy`, `errors` and `per_minute`;
        `ratio` of their pictures per minute; `memory_gib`, the peaks of each half of the batched run; `worst_psnr_db` and
        `largest_difference` of `compared` pictures from those made alone.
    """
    model = load(source, device=device)
    clients, seconds = (9, 4.0) if tiny else (CLIENTS, MINUTES * 60)
    settings: dict[str, Any] = {"num_steps": 2, "width": 64, "height": 64} if tiny else {}
    found: dict[str, Any] = {"clients": clients, "seconds": seconds}
    with tempfile.TemporaryDirectory() as place:
        crowds = {}
        for name, max_batch in (("batched", 8), ("single", 1)):
            with Engine(model, max_batch=max_batch) as engine:
                engine.generate("a red apple", **settings)  # warms up
                crowds[name] = gather(engine, clients, seconds, settings, Path(place) / name)
            crowd = crowds[name]
            per_minute = crowd.counts["finished"] / crowd.elapsed_s * 60
            found[name] = {**crowd.counts, "errors": crowd.errors, "per_minute": per_minute}
        found["ratio"] = found["batched"]["per_minute"] / max(found["single"]["per_minute"], 1e-9)
        halves = [[gib for at, gib in crowds["batched"].memory_gib if (at > seconds / 2) == late] for late in (False, True)]
        found["memory_gib"] = [max(half, default=None) for half in halves]
        compared = [compare(model, path, settings) for path in sorted((Path(place) / "batched").glob("*.png"))]
    found["compared"] = len(compared)
    found["worst_psnr_db"] = min((psnr_db for psnr_db, _ in compared), default=None)
    found["largest_difference"] = max((largest for _, largest in compared), default=None)
    return found


def gather(engine: Engine, clients: int, seconds: float, settings: dict[str, Any], folder: Path) -> Crowd:
    """Let clients ask one picture after the other until the time is over; who then waits is waited for."""
    crowd, ends = Crowd(folder), threading.Event()
    prompts = search_prompts("emoji")
    started = time.perf_counter()

    def ask(client: int) -> None:
        chance = random.Random(client)
        number = 0
        while not ends.is_set():
            number += 1
            prompt, seed = chance.choice(prompts), client * 100_000 + number
            leaves_at = chance.randrange(8) if client % LEAVES == 0 else None  # states read before leaving
            try:
                _visit(engine, crowd, prompt, settings | {"seed": seed}, leaves_at)
            except Busy:
                crowd.counts["busy"] += 1
                ends.wait(PATIENCE_S)
            except Exception as error:  # a figure of the report: no client should see one
                crowd.errors.append(f"{type(error).__name__}: {error}")
                ends.wait(PATIENCE_S)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    while (elapsed_s := time.perf_counter() - started) < seconds:
        gib = resident_gib()
        if gib is not None:
            crowd.memory_gib.append((elapsed_s, gib))
        time.sleep(min(0.5, seconds / 20))
    ends.set()
    for thread in threads:
        thread.join()
    crowd.elapsed_s = time.perf_counter() - started
    return crowd


def _visit(engine: Engine, crowd: Crowd, prompt: str, settings: dict[str, Any], leaves_at: int | None) -> None:
    """Ask for one picture, and keep it or leave."""
    with engine.stream(prompt, **settings) as states:
        for read, state in enumerate(states):
            if isinstance(state, Step) and state.result is not None:
                state.result.save(crowd.folder)
                crowd.counts["finished"] += 1
                return
            if leaves_at is not None and read >= leaves_at:
                crowd.counts["left"] += 1
                return
    crowd.errors.append("the stream ended without a picture")


def compare(model: Model, path: Path, settings: dict[str, Any]) -> tuple[float, int]:
    """Make a picture alone; return its PSNR in dB and its largest difference from the file."""
    request = read_receipt(path).request
    alone = model.generate(request["prompt"], seed=request["seed"], **settings).images[0]
    with Image.open(path) as made:
        return fidelity.psnr_db(made, alone), fidelity.max_difference(made, alone)
