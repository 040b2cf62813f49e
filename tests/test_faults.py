"""Stopped at any moment, every long command ends in one line, leaves nothing half written, and can be run again.

`IMAGEGEN_STOPS=10 python -m pytest -m slow tests/test_faults.py` is the long run whose figures README.md gives.
"""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from safetensors import safe_open

import imagegen
from imagegen.lock import only_writer
from imagegen.reference_set import open_reference, record_reference

NUM_STOPS = int(os.environ.get("IMAGEGEN_STOPS", "2"))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
PATIENCE_S = 300  # until a process must have ended; nothing is measured by it
LONG = {
    "generate": "generate {words} --seed 1 --steps 6 --out made",
    "batch": "batch prompts.jsonl --out made",
    "reference": "reference made --prompts prompts.txt --steps 4",
    "compare": "compare kept --plan exact --plan fast --report made",
    "tune": "tune --min-psnr 30 --prompts prompts.txt --minutes 0.3 --out made/profile.json --report made",
    "bench": "bench --tiny --budget-min 0.2 --out made",
    "finetune": "finetune data --out made --steps 8 --batch-size 2 --save-every 2",
    "distill": "distill --out made --student-steps 4 --teacher-steps 8 --trajectories 4 --steps 4 --prompts prompts.txt",
}
RESUMED = ("finetune", "distill")
WORDS = ("a red apple", "a rocket", "a cat face", "a blue heart", "a pizza", "a tree", "a ghost", "a robot")


@pytest.fixture
def workplace(model, tmp_path, monkeypatch):
    """Prepare a folder with what every command needs."""
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS) + "\n")
    rows = [{"id": f"n{n}", "prompt": words, "seed": n, "num_steps": 4} for n, words in enumerate(WORDS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data").mkdir()
    for number, words in enumerate(WORDS[:4]):
        Image.new("RGB", (128, 128), (60 * number, 90, 200 - 40 * number)).save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text(words)
    record_reference(model, tmp_path / "prompts.txt", tmp_path / "kept", num_steps=4)
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(name, again=False, room_bytes=None):
    words = LONG[name].split()
    if "{words}" in words:
        words[words.index("{words}") : words.index("{words}") + 1] = WORDS
    if again and name in RESUMED:
        words.append("--resume")
    return subprocess.Popen(
        [sys.executable, "-m", "imagegen", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: prepare(room_bytes),
    )


def prepare(room_bytes):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores Ctrl-C
    if room_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, room_bytes))


def finish(process):
    try:
        return process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()


def assert_whole(folder, may_be_parts):
    """Read every file there to its end: nothing is torn, and nothing is left over that has no name of its own."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        if ".part" in file.name:
            assert may_be_parts, f"{file} is left over"
        elif file.suffix == ".png":
            with Image.open(file) as picture:
                picture.load()
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118 - no dictionary
                    opened.get_tensor(tensor)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_stopped_at_any_moment(workplace, name):
    chance, made = random.Random(name), workplace / "made"
    started = time.monotonic()
    _out, errors = finish(whole := begin(name))
    assert whole.returncode in (0, 1), errors  # 1: compare says that a plan is not near enough
    whole_s, files = time.monotonic() - started, names_in(made)
    shutil.rmtree(made)
    made.mkdir()
    killed = again = False
    for _ in range(NUM_STOPS):
        number = chance.choice(SIGNALS)
        process = begin(name, again)
        time.sleep(chance.uniform(0.1, whole_s))
        process.send_signal(number)
        _out, errors = finish(process)
        killed = killed or number == signal.SIGKILL
        again = (made / "checkpoints").exists()
        if process.returncode not in (0, 1):
            assert process.returncode == (130 if number != signal.SIGKILL else -number), errors
            if number != signal.SIGKILL:
                assert errors.strip().splitlines()[-1] == "imagegen: stopped"
        assert "Traceback" not in errors
        assert_whole(made, may_be_parts=killed)
        if name == "generate" or process.returncode in (0, 1):
            shutil.rmtree(made)  # it would go on numbering its files
            made.mkdir()
            again = False
    _out, errors = finish(last := begin(name, again))
    assert last.returncode == whole.returncode, errors
    assert_whole(made, may_be_parts=killed)
    assert files <= names_in(made)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_full_disk_is_told_in_one_line(workplace, name):
    """No file may become larger than a kilobyte: a write fails halfway, as on a full disk."""
    process = begin(name, room_bytes=1024)
    _out, errors = finish(process)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("imagegen: cannot write") and "made" in last and os.strerror(errno.EFBIG) in last, errors
    assert_whole(workplace / "made", may_be_parts=False)
    _out, errors = finish(again := begin(name))
    assert again.returncode in (0, 1) and "Traceback" not in errors, "with room it is made"
    assert_whole(workplace / "made", may_be_parts=False)


@pytest.mark.parametrize("content", [b"", b"\x00\xff torn", b"[1, 2", b"[" * 100_000, b'{"a": 3}', b"null", None])
def test_a_corrupted_cache_costs_time_alone(model, tmp_path, monkeypatch, content):
    wanted = dict(model.hashes)
    monkeypatch.setenv("IMAGEGEN_CACHE", str(tmp_path))
    for name in ("hashes", "kernels"):
        file = tmp_path / f"{name}.json"
        file.mkdir() if content is None else file.write_bytes(content)
    assert imagegen.load().hashes == wanted


def test_a_cache_that_cannot_be_made_costs_time_alone(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("IMAGEGEN_CACHE", str(tmp_path / "file" / "cache"))
    assert imagegen.load().hashes == model.hashes


def test_two_processes_write_the_same_names_into_one_folder(workplace):
    both = [begin("generate"), begin("generate")]
    said = [finish(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(list((workplace / "made").glob("*.png"))) == 2 * len(WORDS)
    assert_whole(workplace / "made", may_be_parts=False)


@pytest.mark.parametrize("name", ["finetune", "distill", "reference", "bench", "batch"])
def test_a_folder_that_another_run_writes_is_refused_in_words(workplace, name):
    with only_writer(workplace / "made"):
        _out, errors = finish(process := begin(name))
    assert process.returncode == 2
    assert re.search(
        r"^imagegen: another run writes into '\S*made': wait for it, or choose another folder$", errors, re.MULTILINE
    )


def test_a_folder_that_cannot_be_made_is_told_in_words(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(imagegen.RequestError, match=r"cannot write into .*: Not a directory; choose"),
        only_writer(tmp_path / "file/x"),
    ):
        pass


def test_a_recording_that_was_stopped_goes_on(model, tmp_path):
    def stop(what, done, _total):
        if (what, done) == ("recorded", 2):
            raise KeyboardInterrupt

    settings = {"num_steps": 2, "seed": 3}
    with pytest.raises(KeyboardInterrupt):
        record_reference(model, WORDS[:3], tmp_path / "made", progress=stop, **settings)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "made").glob("*.png")}
    assert len(before) == 2
    torn = tmp_path / "made" / ".5-a-cat-face.1.part"
    torn.write_bytes(b"half a picture")
    with only_writer(tmp_path / "made"), pytest.raises(imagegen.RequestError, match="another run writes into"):
        record_reference(model, WORDS[:3], tmp_path / "made", **settings)
    assert torn.exists(), "it may be the other run's"
    with pytest.raises(imagegen.DataError, match="made otherwise than it would be now: choose a new folder"):
        record_reference(model, WORDS[:3], tmp_path / "made", num_steps=3, seed=3)
    assert len(record_reference(model, WORDS[:3], tmp_path / "made", **settings)) == 3
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not torn.exists()
    alone = [model.generate(words, seed=3 + n, num_steps=2).images[0] for n, words in enumerate(WORDS[:3])]
    assert [picture.tobytes() for _, picture in open_reference(tmp_path / "made")] == [picture.tobytes() for picture in alone]
    with pytest.raises(imagegen.DataError, match="not an empty folder"):
        record_reference(model, WORDS[:3], tmp_path / "made", **settings)


def names_in(folder):
    """Return the names of the files that a command is for, not what it keeps for the next run."""
    kept = ("cache", "checkpoints")
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {str(file) for file in files if not file.name.startswith(".") and file.parts[0] not in kept}
