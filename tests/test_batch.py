"""A batch makes one picture for every line, once, whatever stopped it before."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import imagegen
from imagegen import fidelity
from imagegen.batch import ModelRecipe, generate_batch, lines
from imagegen.batch.output import Output
from imagegen.receipt import open_picture

WORDS = ("a red apple", "a blue heart", "a cat face")


@pytest.fixture
def prompts(tmp_path):
    """A file of six good lines, of two shapes in turn."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{n}", "prompt": WORDS[n % 3], "seed": n, "num_steps": 2 + n % 2} for n in range(6)]
    write(file, rows)
    return file


def write(file: Path, rows: list) -> None:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def counts(summary) -> tuple[int, int, int, int]:
    return summary.made, summary.adopted, summary.present, summary.failed


def test_every_line_is_a_picture_equal_to_the_one_made_alone(model, prompts, tmp_path, steps_run):
    out = tmp_path / "out"
    told = []
    summary = generate_batch(prompts, out, model=model, on_progress=lambda *row: told.append(row))
    assert counts(summary) == (6, 0, 0, 0)
    assert told[-1] == ("pictures", 6, 6)
    assert sorted(row["file"] for row in manifest(out)) == [f"p{n}.png" for n in range(6)]
    assert sorted(len(batch) for batch in steps_run) == [3] * (2 + 3), "the three of a shape run together"
    for row in manifest(out):
        picture, receipt = open_picture(out / row["file"])
        asked = json.loads(prompts.read_text().splitlines()[row["line"] - 1])
        assert {name: receipt.request[name] for name in ("prompt", "seed", "num_steps")} == {
            name: asked[name] for name in ("prompt", "seed", "num_steps")
        }
        alone = model.generate(asked["prompt"], seed=asked["seed"], num_steps=asked["num_steps"]).images[0]
        assert fidelity.psnr_db(picture, alone) >= 60


def test_a_second_run_makes_nothing_and_loads_nothing(model, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    generate_batch(prompts, out, model=model)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    monkeypatch.setattr(ModelRecipe, "load", lambda _: pytest.fail("loaded"))
    assert counts(generate_batch(prompts, out)) == (0, 0, 6, 0)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_a_second_run_finishes_what_is_missing(model, prompts, tmp_path, steps_run):
    out = tmp_path / "out"
    generate_batch(prompts, out, model=model)
    kept = {name: (out / name).read_bytes() for name in ("p0.png", "p1.png")}
    (out / "p3.png").unlink()
    rows = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    rows = [row for row in rows if '"p4"' not in row]
    (out / "manifest.jsonl").write_text("".join(rows) + '{"id": "p5", "li')  # a row was being written
    steps_run.clear()
    assert counts(generate_batch(prompts, out, model=model)) == (1, 1, 4, 0)
    assert {prompt for batch in steps_run for prompt in batch} == {WORDS[0]}
    assert sorted(row["id"] for row in manifest(out)) == [f"p{n}" for n in range(6)]
    assert {name: (out / name).read_bytes() for name in kept} == kept


def test_a_bad_line_fails_alone_and_a_mended_one_is_made(model, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    good = {"prompt": "a red apple", "seed": 1, "num_steps": 1}
    rows = [
        good,
        '{"prompt": "a red',
        "[1, 2]",
        {"seed": 3},
        good | {"id": "steps", "steps": 3},
        good | {"id": "num", "num_images": 2},
        good | {"id": "size", "width": 100},
        good | {"id": ["no"]},
        good | {"id": "..//"},
        good | {"id": "1"},
        good | {"id": "mask", "mask": 7},
        good | {"id": "image", "image": "missing.png"},
        "",
        good | {"prompt": 5},
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        good | {"id": "last"},
    ]
    write(file, rows)
    wrong = {
        2: "no JSON object",
        3: "no JSON object as in .*, but list",
        4: "no prompt: say what to draw",
        5: "unknown setting 'steps': it is num_steps here",
        6: "a line makes one picture, got num_images=2",
        7: "width must be a multiple of 8",
        8: "id must be text or a whole number",
        9: "nothing of the id '..//' can stand in a file's name",
        10: "its file would be 1.png, as line 1's",
        11: "mask must be the path of a picture, got 7",
        12: f"image: no file '{re.escape(str(tmp_path / 'missing.png'))}'",
        14: "prompt must be text, got 5",
        15: "no JSON object",
    }
    summary = generate_batch(file, out, model=model)
    assert counts(summary) == (2, 0, 0, len(wrong))
    found = {row["line"]: row["error"] for row in manifest(out) if "error" in row}
    assert found.keys() == wrong.keys()
    for number, reason in wrong.items():
        assert re.search(reason, found[number]), (number, found[number])
    assert {number for number, _, _ in summary.faults} == wrong.keys()
    rows[4] = good | {"id": "steps"}
    write(file, rows)
    assert counts(generate_batch(file, out, model=model)) == (1, 0, 2, len(wrong) - 1)
    again = {row["line"]: row["error"] for row in manifest(out) if "error" in row}
    assert again == {number: reason for number, reason in found.items() if number != 5}
    assert sorted(row["file"] for row in manifest(out) if "file" in row) == ["1.png", "last.png", "steps.png"]


def test_what_was_made_otherwise_is_neither_kept_nor_lost(model, prompts, tmp_path):
    out = tmp_path / "out"
    generate_batch(prompts, out, model=model)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows[0]["prompt"] = "a frog"
    write(prompts, rows)
    before = (out / "p0.png").read_bytes()
    summary = generate_batch(prompts, out, model=model)
    assert counts(summary) == (0, 0, 5, 1)
    assert "p0.png was made for another request" in summary.faults[0][2]
    (out / "manifest.jsonl").unlink()
    assert "another prompt, 'a red apple'" in generate_batch(prompts, out, model=model).faults[0][2]
    assert (out / "p0.png").read_bytes() == before
    with pytest.raises(imagegen.RequestError, match="made with plan 'exact', now 'fast': choose another --out"):
        generate_batch(prompts, out, model=ModelRecipe("emoji", {"plan": "fast"}))
    assert generate_batch(prompts, out, model=model).made == 0, "a run that was refused holds nobody up"


def test_two_runs_do_not_write_into_one_folder(prompts, tmp_path):
    settings = ModelRecipe("emoji").settings()
    with Output(tmp_path / "out", settings), pytest.raises(imagegen.RequestError, match="another run writes into"):
        generate_batch(prompts, tmp_path / "out")
    with Output(tmp_path / "out", settings):
        pass  # it is free again


def test_any_folder_that_fsspec_knows(model, prompts):
    import fsspec

    out = "memory://pictures/out"
    assert counts(generate_batch(prompts, out, model=model)) == (6, 0, 0, 0)
    assert counts(generate_batch(prompts, out, model=model)) == (0, 0, 6, 0)
    files = fsspec.filesystem("memory")
    assert len(files.cat_file("/pictures/out/manifest.jsonl").splitlines()) == 6
    assert files.cat_file("/pictures/out/p0.png").startswith(b"\x89PNG")


def test_a_full_disk_is_one_line_and_leaves_no_torn_picture(model, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plain = Path.open

    class Full(io.FileIO):
        def write(self, content):
            super().write(content[:10])
            raise OSError(28, "No space left on device")

    def opens(self, *arguments, **options):
        return Full(self, "w") if self.name == ".p2.png.part" else plain(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opens)
    with pytest.raises(imagegen.RequestError, match=r"cannot write p2\.png into .*: No space left on device"):
        generate_batch(prompts, out, model=model)
    assert not [file for file in out.iterdir() if file.name.startswith(".p2")]
    monkeypatch.undo()
    summary = generate_batch(prompts, out, model=model)
    assert (summary.failed, summary.made + summary.present) == (0, 6)


@given(st.one_of(st.text(), st.integers()))
def test_whatever_an_id_is_its_file_stays_in_the_folder(asked):
    try:
        name = lines.file_name(asked)
    except imagegen.RequestError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name)
    assert len(name) <= lines.MAX_NAME + 1
    assert name.split(".")[0].lower() not in ("con", "prn", "aux", "nul", "com1", "lpt1")


@given(st.binary(max_size=400))
def test_any_bytes_are_lines_good_or_bad(content):
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(content)
        file.flush()
        read = list(lines.read_lines(Path(file.name)))
    assert len(read) <= content.count(b"\n") + 1
    assert [line.number for line in read] == sorted({line.number for line in read})


def test_a_line_without_end_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 64)
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "' + b"a" * 500 + b'"}\n{"prompt": "b"}\n')
    first, second = lines.read_lines(tmp_path / "p.jsonl")
    assert (first.number, first.reason) == (1, "the line is longer than 0 KiB")
    assert (second.number, second.prompt) == (2, "b")


def test_the_command_says_what_failed_and_exits_with_1(tmp_path):
    write(tmp_path / "p.jsonl", [{"prompt": "a red apple", "seed": 1, "num_steps": 1}, {"prompt": ""}])
    command = [sys.executable, "-m", "imagegen", "batch", "p.jsonl", "--out", "out", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert {name: answer[name] for name in ("folder", "made", "failed")} == {"folder": "out", "made": 1, "failed": 1}
    assert "imagegen: line 2: the prompt is empty" in done.stderr
    missing = subprocess.run([*command[:4], "no.jsonl", *command[5:]], cwd=tmp_path, capture_output=True, text=True)
    assert (missing.returncode, len(missing.stderr.strip().splitlines())) == (2, 1)
    assert "no file 'no.jsonl'" in missing.stderr


@pytest.mark.parametrize("given", [{"workers": 0}, {"workers": True}, {"max_batch": 1.5}, {"max_batch": 2000}])
def test_numbers_out_of_range(prompts, tmp_path, given):
    with pytest.raises(imagegen.RequestError, match="must be a whole number from 1 to 1024"):
        generate_batch(prompts, tmp_path / "out", **given)


def test_other_weights_under_the_same_name_are_another_model(folder_of, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folder_of("sd1.5"), tmp_path / "model")
    before = ModelRecipe(str(folder)).settings()
    monkeypatch.chdir(tmp_path)
    assert ModelRecipe("model").settings() == before, "the same folder, named otherwise"
    assert ModelRecipe("model").from_anywhere().source == str(folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors[min(tensors)] += 1
    save_file(tensors, weights)
    with Output(tmp_path / "out", before):
        pass
    with (
        pytest.raises(imagegen.RequestError, match=r"were made with model .*: choose another --out"),
        Output(tmp_path / "out", ModelRecipe("model").settings()),
    ):
        pass
