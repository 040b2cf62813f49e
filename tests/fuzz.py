"""Throw bytes at everything that reads what others wrote: coverage-guided, by atheris (libFuzzer).

    pip install -e ".[dev,fuzz]"
    python tests/fuzz.py all --minutes 10      # of processor time for each; or the names of some of `TARGETS`

A target takes bytes and a folder of its own; it may return, or raise an `imagegen.Error`. Anything else is a fault, and so
is more than 20 s, more than 2 GiB, a file opened for writing elsewhere, a process or a connection started, or an unpickling.
What atheris found to reach new code, and what once was a fault, lies in `tests/fuzz/TARGET/`, and `test_fuzz.py` replays
it; `tests/fuzz/results.json` says how much was tried.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent / "fuzz"
MAX_BYTES = 1 << 16
MAX_FILES = 60  # of a corpus in the repository
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "socket.connect")


def read_receipt(content: bytes, _folder: Path) -> None:
    """Read the JSON of a receipt, and say it in other tools' words."""
    from imagegen.receipt import parse_receipt

    receipt = parse_receipt(content.decode(errors="replace"))
    receipt.to_parameters()
    receipt.where()


def read_picture(content: bytes, folder: Path) -> None:
    """Open a picture with its receipt, and as an upload."""
    from imagegen.receipt import open_picture
    from imagegen.studio.parts import open_upload

    (folder / "a.png").write_bytes(content)
    with contextlib.suppress(_error()):
        open_picture(folder / "a.png")
    open_upload(folder / "a.png")


def read_parameters(content: bytes, _folder: Path) -> None:
    """Read settings in AUTOMATIC1111's words."""
    from imagegen.reference_set import read_parameters

    read_parameters(content.decode(errors="replace"))


def read_profile(content: bytes, folder: Path) -> None:
    """Read a profile and hold it against a machine."""
    from imagegen.profile import read_profile

    (folder / "profile.json").write_bytes(content)
    read_profile(folder / "profile.json").check_fits({"unet": "0"}, {"cpu": "x"})


def read_reference(content: bytes, folder: Path) -> None:
    """Open a reference set."""
    from imagegen.reference_set import open_reference

    (folder / "reference.json").write_bytes(content)
    open_reference(folder)


def read_safetensors(content: bytes, folder: Path) -> None:
    """Read the header of a weight file, what it holds and what a LoRA says of itself."""
    from imagegen.contents import identify
    from imagegen.families.adapters import read_metadata
    from imagegen.weights import read_header, stored_dtype

    (folder / "a.safetensors").write_bytes(content)
    stored_dtype([folder / "a.safetensors"])
    identify(read_header(folder / "a.safetensors"))
    read_metadata(folder / "a.safetensors")


def read_index(content: bytes, folder: Path) -> None:
    """Read an index of shards."""
    from imagegen.weights import component_weights

    (folder / "diffusion_pytorch_model.safetensors.index.json").write_bytes(content)
    (folder / "a.safetensors").touch()
    component_weights(folder)


def read_model_index(content: bytes, folder: Path) -> None:
    """Find a model by its `model_index.json`."""
    from imagegen.sources import find_source

    (folder / "model_index.json").write_bytes(content)
    find_source(folder)


def read_gguf(content: bytes, folder: Path) -> None:
    """Read what a GGUF file holds."""
    from imagegen.contents import identify
    from imagegen.sources import read_gguf

    (folder / "a.gguf").write_bytes(content)
    identify(read_gguf(folder / "a.gguf"))


def read_captions(content: bytes, folder: Path) -> None:
    """Read a folder of training pictures by its captions."""
    from PIL import Image

    from imagegen.finetune.data import find_faults, read_dataset

    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_bytes(content)
    find_faults(folder)
    read_dataset(folder)


def read_prompts(content: bytes, folder: Path) -> None:
    """Read a file of prompts."""
    from imagegen.batch.lines import Line, read_lines

    (folder / "p.jsonl").write_bytes(content)
    for line in read_lines(folder / "p.jsonl"):
        if isinstance(line, Line):
            assert (folder / f"{line.name}.png").parent == folder


def read_flags(content: bytes, _folder: Path) -> None:
    """Read a prompt with flags and weights."""
    from imagegen.catalog import FAMILIES
    from imagegen.families.weighting import has_weights
    from imagegen.studio.flags import read_flags

    words, _ = read_flags(content.decode(errors="replace"), FAMILIES["emoji"])
    has_weights(words)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "receipts": read_receipt,
    "pictures": read_picture,
    "parameters": read_parameters,
    "profiles": read_profile,
    "references": read_reference,
    "safetensors": read_safetensors,
    "indexes": read_index,
    "models": read_model_index,
    "gguf": read_gguf,
    "captions": read_captions,
    "prompts": read_prompts,
    "flags": read_flags,
}


def _error() -> type[Exception]:
    from imagegen.request import Error

    return Error


@contextlib.contextmanager
def watched() -> Iterator[Path]:
    """Give a folder; whatever is written elsewhere, run or unpickled inside the `with` block raises AssertionError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        state = {"on": True}

        def audit(event: str, given: tuple) -> None:
            if not state["on"]:
                return
            assert event not in FORBIDDEN, f"{event}: {given!r}"
            if event == "open" and isinstance(given[0], (str, bytes)) and given[1] and set(given[1]) & set("wax+"):
                place = Path(os.fsdecode(given[0])).resolve()
                assert place.is_relative_to(folder) or place == Path(os.devnull), f"writes {place}"

        sys.addaudithook(audit)  # for good: it sleeps from now on
        try:
            yield folder
        finally:
            state["on"] = False


def run_one(target: str, content: bytes, folder: Path) -> None:
    """Give a target some bytes in an empty folder of its own.

    Raises:
        Exception: a fault.
    """
    place = folder / "case"
    place.mkdir()
    try:
        with contextlib.suppress(_error()):
            TARGETS[target](content, place)
    finally:
        shutil.rmtree(place)


def fuzz(target: str, seconds: int, corpus: Path, faults: Path) -> None:
    """Fuzz one target in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["imagegen", "json"]):
        import imagegen.batch.lines
        import imagegen.families.adapters
        import imagegen.finetune.data
        import imagegen.reference_set
        import imagegen.sources
        import imagegen.studio.flags
        import imagegen.studio.parts  # noqa: F401
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as name:
        TARGETS[target](b"", Path(name))  # what is imported late is imported now
    limits = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"]
    with watched() as folder:
        options = [sys.argv[0], *limits, f"-artifact_prefix={faults}/", str(corpus), str(HERE / target)]
        atheris.Setup(options, lambda content: run_one(target, content, folder))
        atheris.Fuzz()


def processor_s() -> float:
    """Return the processor time that this process's children have used, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def campaign(target: str, minutes: float) -> None:
    """Fuzz one target in a process of its own, keep what reaches new code, and write down how much was tried."""
    with tempfile.TemporaryDirectory() as name:
        corpus, faults = Path(name) / "corpus", Path(name) / "faults"
        corpus.mkdir()
        faults.mkdir()
        runs: list[int] = []
        used_s, found = 0.0, []
        while used_s < 60 * minutes and not found:  # a busy machine gives less of itself than the clock says
            left_s = max(1, round(60 * minutes - used_s))
            command = [sys.executable, __file__, target, "--inside", str(left_s), str(corpus), str(faults)]
            before_s = processor_s()
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
            used_s += processor_s() - before_s
            new = [int(line.rpartition(":")[2]) for line in done.stdout.splitlines() if "number_of_executed_units" in line]
            runs += new
            found = sorted(faults.iterdir())
            if not new:
                break
        for file in found:
            shutil.copy(file, HERE / target / f"fault-{file.name[-12:]}")
        kept = sorted((file for file in corpus.iterdir() if file.stat().st_size < 4096), key=lambda file: file.stat().st_size)
        for file in kept[:: max(1, len(kept) // MAX_FILES)][:MAX_FILES]:
            shutil.copy(file, HERE / target / file.name[:12])
        results = HERE / "results.json"
        told = json.loads(results.read_text()) if results.exists() else {}
        before = told.get(target, {"runs": 0, "minutes": 0, "faults": 0})
        told[target] = {
            "runs": before["runs"] + sum(runs),
            "minutes": round(before["minutes"] + used_s / 60, 2),
            "faults": before["faults"] + len(found),
        }
        results.write_text(json.dumps(dict(sorted(told.items())), indent=1) + "\n")
        print(f"{target}: {sum(runs):,} runs, {len(kept)} files reach new code, {len(found)} faults", flush=True)
        if found or not runs:
            print("\n".join(done.stdout.splitlines()[-25:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--inside", nargs=3, metavar=("SECONDS", "CORPUS", "FAULTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        seconds, corpus, faults = arguments.inside
        fuzz(arguments.targets[0], int(seconds), Path(corpus), Path(faults))
    for target in () if arguments.inside else TARGETS if "all" in arguments.targets else arguments.targets:
        (HERE / target).mkdir(parents=True, exist_ok=True)
        campaign(target, arguments.minutes)
