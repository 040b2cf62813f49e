"""The shell's promises: exit codes, one line on stderr, one JSON object on stdout, nothing half-written."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import imagegen
from imagegen import cli

COMMAND = [sys.executable, "-m", "imagegen"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def loaded(model, monkeypatch):
    """Let commands in this process use the session's model, and leave its modules alone."""
    for commands in (cli.pictures, cli.plans):
        monkeypatch.setattr(commands, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(cli.pictures, "imports_for_one_picture", contextlib.nullcontext)


def shell(*arguments, **options):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, **options)


def assert_one_line(capsys, says):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("imagegen: ")
    assert says in captured.err
    assert "Traceback" not in captured.err
    return captured.out


def test_generate_writes_pictures_that_replay(loaded, capsys, tmp_path):
    assert cli.run(["generate", "a red apple", "a blue heart", "--seed", "7", "--num", "2", "--steps", "3", "--out", "made"]) == 0
    names = ["7-a-red-apple.png", "8-a-red-apple.png", "7-a-blue-heart.png", "8-a-blue-heart.png"]
    assert capsys.readouterr().out.split() == [f"made/{name}" for name in names]
    assert sorted(path.name for path in Path("made").iterdir()) == sorted(names)
    assert cli.run(["replay", "made/8-a-blue-heart.png"]) == 0
    assert "the same picture" in capsys.readouterr().out


def test_generate_json_is_one_object(loaded, capsys):
    arguments = ["--seed", "3", "--steps", "2", "--guidance", "1", "--size", "96x64", "--scheduler", "euler", "--json"]
    assert cli.run(["generate", "a red apple", *arguments]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    (picture,) = answer["pictures"]
    receipt = imagegen.read_receipt(picture["file"])
    assert picture["pixels_sha256"] == receipt.pixels_sha256
    assert (picture["seed"], picture["width"], picture["height"], answer["model"]) == (3, 96, 64, "emoji")
    assert receipt.request["scheduler"] == "euler"


def test_image_and_mask_replay_from_the_shell(loaded, capsys):
    Image.linear_gradient("L").resize((128, 128)).save("start.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 64))
    mask.save("mask.png")
    assert cli.run(["generate", "sun", "--seed", "1", "--steps", "4", "--image", "start.png", "--strength", "0.5"]) == 0
    assert cli.run(["generate", "sea", "--seed", "1", "--steps", "4", "--image", "start.png", "--mask", "mask.png"]) == 0
    assert cli.run(["replay", "1-sun.png", "--image", "start.png"]) == 0
    assert cli.run(["replay", "1-sea.png", "--image", "start.png", "--mask", "mask.png"]) == 0
    assert cli.run(["replay", "1-sun.png", "--image", "mask.png"]) == 1
    capsys.readouterr()
    assert cli.run(["replay", "1-sun.png"]) == 2
    assert_one_line(capsys, "give that picture again")


def test_replay_says_no_with_one(loaded, capsys):
    assert cli.run(["generate", "a red apple", "--seed", "7", "--steps", "3"]) == 0
    changed = json.loads(imagegen.read_receipt("7-a-red-apple.png").to_json())
    changed["request"]["seed"] = 8
    imagegen.Picture(Image.open("7-a-red-apple.png").convert("RGB"), imagegen.Receipt(**changed)).save(Path())
    capsys.readouterr()
    assert cli.run(["replay", "8-a-red-apple.png", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["same"] is False
    assert answer["max_difference"] > 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "x", "--size", "100x128"], "multiple of 8"),
        (["generate", "x", "--size", "big"], "--size must be WIDTHxHEIGHT"),
        (["generate", "x", "--steps", "-3"], "num_steps must be from 1"),
        (["generate", "x", "--steps", "many"], "Invalid value"),
        (["generate", "x", "--guidance", "nan"], "finite number"),
        (["generate", "x", "--seed", "-1"], "seed must be from 0"),
        (["generate", "x", "--seed", str(2**53)], "seed must be from 0"),
        (["generate", "x", "--image", "none.png"], "no file 'none.png'"),
        (["generate", "x", "--mask", "none.png"], "no file 'none.png'"),
        (["generate", "x", "--num_inference_steps", "20"], "it is --steps here"),
        (["generate", "x", "--cfg-scale", "4"], "it is --guidance here"),
        (["generate", "x", "--width", "64"], "it is --size WxH here"),
        (["generate", "x", "--sede", "64"], "did you mean --seed?"),
        (["generate"], "Missing argument"),
        (["paint"], "No such command 'paint'"),
        (["show", "none.png"], "no file 'none.png'"),
        (["replay", "none.png"], "no file 'none.png'"),
        (["models", "show", "none"], "no folder 'none'"),
        (["models", "show", "some/one"], "'some/one' is not in the cache of the hub"),
        (["models", "verify", "."], "has no model_index.json"),
        (["models", "show", "emoji", "--revision", "main"], "is for hub ids"),
    ],
)
def test_bad_use_is_one_line_and_exit_two(loaded, capsys, arguments, says):
    assert cli.run(arguments) == 2
    assert assert_one_line(capsys, says) == ""
    assert list(Path().iterdir()) == []


def test_bad_use_in_json_is_an_object_too(loaded, capsys):
    assert cli.run(["generate", "", "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == f"imagegen: {json.loads(out)['error']}\n"
    assert "the prompt is empty" in err


def test_unwritable_directory(loaded, capsys):
    Path("file").write_text("")
    assert cli.run(["generate", "x", "--out", "file/below"]) == 2
    assert_one_line(capsys, "choose another --out")


def test_full_disk_leaves_nothing(loaded, capsys, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.run(["generate", "x", "--steps", "1"]) == 2
    assert_one_line(capsys, "No space left on device")
    assert list(Path().iterdir()) == []


def test_broken_model_folder(capsys):
    Path("model_index.json").write_text("{")
    assert cli.run(["generate", "x", "--model", ".", "--out", "made"]) == 2
    assert_one_line(capsys, "cannot be read")


def test_overlong_prompt_warns_and_goes_on(loaded, capsys):
    assert cli.run(["generate", "apple " * 40, "--steps", "1"]) == 0
    assert_one_line(capsys, "longer than the 32 tokens")


def test_show_is_readable_and_json_is_the_receipt(loaded, capsys):
    cli.run(["generate", "a red apple", "--seed", "7", "--steps", "1"])
    capsys.readouterr()
    assert cli.run(["show", "7-a-red-apple.png"]) == 0
    shown = capsys.readouterr().out
    assert "prompt: a red apple" in shown
    assert "seed: 7" in shown
    assert cli.run(["show", "7-a-red-apple.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(imagegen.read_receipt("7-a-red-apple.png").to_json())


def test_models(capsys):
    assert cli.run(["models", "list", "--json"]) == 0
    names = [card["name"] for card in json.loads(capsys.readouterr().out)["models"]]
    assert names[0] == "emoji"
    assert "black-forest-labs/FLUX.1-schnell" in names
    assert cli.run(["models", "show", "emoji", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {file["file"].split("/")[0] for file in shown["files"]} == {"unet", "vae", "text_encoder"}
    assert shown["card"]["licence"] == "Apache-2.0"
    assert cli.run(["models", "verify", "emoji", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_verify_finds_a_truncated_file(folder_of, capsys):
    shutil.copytree(folder_of("sd1.5"), "model")
    assert cli.run(["models", "verify", "model"]) == 0
    Path("model/unet/diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    capsys.readouterr()
    assert cli.run(["models", "verify", "model", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [name for name, wrong in found["files"].items() if wrong] == ["unet/diffusion_pytorch_model.safetensors"]
    assert "truncated" in found["files"]["unet/diffusion_pytorch_model.safetensors"][0]


def test_generate_takes_every_source(folder_of, capsys, monkeypatch):
    monkeypatch.setattr(cli.pictures, "imports_for_one_picture", contextlib.nullcontext)
    folder = folder_of("sd1.5")
    more = ["--seed", "1", "--steps", "1", "--size", "64x64", "--vae", f"{folder}/vae"]
    file = f"{folder}/unet/diffusion_pytorch_model.safetensors"
    assert cli.run(["generate", "a", *more, "--model", file, "--base", str(folder)]) == 0
    recorded = imagegen.read_receipt("1-a.png").model
    assert (recorded["source"], recorded["base"], recorded["vae"]) == (file, str(folder), f"{folder}/vae")
    assert cli.run(["replay", "1-a.png"]) == 0
    assert cli.run(["models", "show", file, "--base", str(folder), "--json"]) == 0
    assert cli.run(["generate", "a", "--model", file]) == 2
    assert "give base=" in capsys.readouterr().err


def test_doctor_estimates_a_model_before_its_download(capsys):
    assert cli.run(["doctor", "--model", "flux.1", "--gpu", "4090", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "estimated" and not found["fits"]["exact"]
    assert cli.run(["doctor", "--model", "sd1.5"]) == 0
    assert "a lower bound" in capsys.readouterr().out
    assert cli.run(["doctor", "--model", "sd1.5", "--gpu", "voodoo"]) == 2
    assert cli.run(["doctor", "--model", "none"]) == 2


def test_doctor(capsys):
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["embedded_model"]["ok"] is True
    assert found["versions"]["imagegen"] == imagegen.__version__
    assert cli.run(["doctor"]) == 0


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["models", "list"], ["show", "none.png"]])
def test_quick_commands_import_no_torch(arguments):
    code = f"import sys; from imagegen import cli; cli.run({arguments!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("command", ["generate", "replay", "show", "doctor", "serve"])
def test_every_commands_help_has_an_example(command, capsys):
    assert cli.run([command, "--help"]) == 0
    assert f"Example: imagegen {command}" in " ".join(capsys.readouterr().out.split())


def test_a_real_process_from_end_to_end():
    done = shell("generate", "a red apple", "--seed", "7", "--steps", "2")
    assert (done.returncode, done.stdout) == (0, "7-a-red-apple.png\n")
    assert "Traceback" not in done.stderr
    assert imagegen.read_receipt("7-a-red-apple.png").request["seed"] == 7


@pytest.mark.parametrize(
    ("number", "after_s"),
    [(signal.SIGINT, 0.2), (signal.SIGINT, 0.9), (signal.SIGINT, 6), (signal.SIGTERM, 0.9), (signal.SIGTERM, 6)],
    ids=["as it starts", "as libraries are imported", "in the middle", "terminated in imports", "terminated in the middle"],
)
def test_a_stop_is_130_and_leaves_nothing(number, after_s):
    process = subprocess.Popen(
        [*COMMAND, "generate", "a red apple", "--steps", "1000", "--out", "made"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )
    try:
        time.sleep(after_s)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err.strip().splitlines()[-1] == "imagegen: stopped"
    assert "Traceback" not in err
    assert not Path("made").exists() or list(Path("made").iterdir()) == []


@pytest.fixture
def reference_folder(loaded, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n# a comment\na rocket\n")
    assert cli.run(["reference", "set", "--prompts", "prompts.txt", "--steps", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 2
    return "set"


def test_compare_says_yes_and_no(reference_folder, capsys):
    given = ["compare", reference_folder, "--min-psnr", "60"]
    assert cli.run([*given, "--plan", "exact", "--report", "r", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"] is True
    assert Path("r/report.html").is_file() and Path("r/report.json").is_file()
    assert cli.run([*given, "--plan", "step-cache(warmup=1)"]) == 1
    assert "outside the budget" in capsys.readouterr().out


def test_compare_with_what_is_no_set_or_plan(reference_folder, capsys):
    assert cli.run(["compare", "r"]) == 2
    capsys.readouterr()
    assert cli.run(["compare", reference_folder, "--plan", "warp"]) == 2
    assert "unknown plan 'warp'" in capsys.readouterr().err


def test_reference_overwrites_nothing(reference_folder, capsys):
    assert cli.run(["reference", reference_folder]) == 2
    assert "no reference is lost" in capsys.readouterr().err


def test_reference_imports(reference_folder, capsys):
    assert cli.run(["reference", "copy", "--import", reference_folder, "--json"]) == 0
    wanted = {"folder": "copy", "source": "import", "pictures": 2, "dtype": None, "noise_floor": None}
    assert json.loads(capsys.readouterr().out) == wanted


def test_tune_without_a_budget_says_which_there_are(loaded, capsys):
    assert cli.run(["tune", "--out", "p.json"]) == 2
    assert "min_psnr_db" in capsys.readouterr().err and not Path("p.json").exists()


def test_pictures_made_with_levers_say_so_and_replay(tmp_path):
    done = shell("generate", "a red apple", "--seed", "7", "--steps", "4", "--plan", "step-cache(warmup=1)", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["plan"] == "step-cache(warmup=1)"
    assert "torchao" not in done.stderr
    shown = shell("show", "7-a-red-apple.png", "--json")
    assert json.loads(shown.stdout)["plan"]["levers"][0]["did"] == "3 steps computed, 1 steps skipped"
    replayed = shell("replay", "7-a-red-apple.png")
    assert (replayed.returncode, replayed.stdout) == (0, "the same picture (identical)\n")


def test_generate_grows_a_picture(loaded, capsys):
    Image.new("RGB", (64, 64), "red").save("start.png")
    arguments = ["a wall", "--image", "start.png", "--margins", "0,32,0,0", "--steps", "2", "--seed", "1"]
    assert cli.run(["generate", *arguments]) == 0
    made = Image.open("1-a-wall.png")
    assert made.size == (96, 64)
    assert made.crop((0, 0, 64, 64)).getcolors() == [(64 * 64, (255, 0, 0))]
    assert cli.run(["replay", "1-a-wall.png", "--image", "start.png"]) == 0
    capsys.readouterr()
    assert cli.run(["generate", "a wall", "--image", "start.png", "--margins", "32"]) == 2
    assert_one_line(capsys, "--margins must be LEFT,RIGHT,TOP,BOTTOM in pixels, as in 64,64,0,0, got '32'")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--control", "start.png"], "load one with model.add_control() first"),
        (["--control-model", "nowhere"], "no ControlNet 'nowhere'"),
        (["--style", "nowhere.safetensors"], "no IP-Adapter 'nowhere.safetensors'"),
        (["--true-guidance", "3"], "takes no true_guidance"),
        (["--long-prompt"], "long_prompt is for Stable Diffusion and SDXL"),
        (["--control-weight", "1"], "control_weight needs control"),
        (["--style-weight", "1"], "style_weight needs style_image"),
    ],
)
def test_generate_says_what_a_model_cannot_follow(loaded, capsys, given, says):
    Image.new("RGB", (64, 64), "red").save("start.png")
    assert cli.run(["generate", "a wall", "--steps", "1", *given]) == 2
    assert_one_line(capsys, says)


def test_a_fault_in_the_last_prompt_is_said_before_the_first_is_drawn(loaded, capsys):
    assert cli.run(["generate", "a wall", " ", "--steps", "1"]) == 2
    assert_one_line(capsys, "prompt")
    assert not list(Path().glob("*.png"))


def test_generate_with_another_family(folder_of):
    done = shell(
        "generate", "a cat", "--model", str(folder_of("flux")), "--size", "64x64", "--steps", "2", "--seed", "1", "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["pictures"][0]["width"] == 64


def test_models_show_a_folders_defaults(folder_of, capsys):
    assert cli.run(["models", "show", str(folder_of("flux-schnell")), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    defaults = {name: shown["defaults"][name] for name in ("name", "num_steps", "guidance", "reference_dtype", "scheduler")}
    assert shown["card"] is None and defaults == {
        "name": "flux.1", "num_steps": 4, "guidance": 1.0, "reference_dtype": "float32",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }  # fmt: skip


def test_models_show_prints_no_internals(folder_of, capsys):
    assert cli.run(["models", "show", str(folder_of("flux"))]) == 0
    shown = capsys.readouterr().out
    assert "modes: text-to-image, image-to-image" in shown
    assert not {line.split(":")[0].strip() for line in shown.splitlines()} & {"variants", "takes", "fixed", "changes", "off"}
    assert "(" not in shown.split("defaults")[1]
