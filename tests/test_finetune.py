"""Training: its result is a function of data, model, settings and seed, whatever kills it on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file

import imagegen
from imagegen import DataError, ModelError, cli
from imagegen.families import adapters
from imagegen.families.conditioning import encode_captions, predict, silence_of
from imagegen.fidelity import max_difference
from imagegen.finetune.checkpoint import list_checkpoints, save_checkpoint
from imagegen.finetune.loop import Learner, Training, batch_of, batches, seeded
from imagegen.finetune.objective import objective_of
from imagegen.finetune.recipe import Recipe

SETTINGS = {"num_steps": 6, "batch_size": 2, "rank": 2, "save_every": 2, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures of a shape that the embedded model does not know."""
    place = tmp_path_factory.mktemp("data")
    for number in range(5):
        picture = Image.new("RGB", (128, 128 if number < 3 else 96), "white")
        ImageDraw.Draw(picture).polygon([(20 + number, 20), (100, 30), (60, 90)], fill=(200, 40 * number, 90))
        picture.save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"a zorp number {number}")
    return place


def digest(path):
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(model, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    before = model("a red apple", seed=1, num_steps=2).images[0]
    parts = sorted(model.pipeline.unet.state_dict())
    result = imagegen.finetune(model, folder, out, **SETTINGS)
    assert sorted(model.pipeline.unet.state_dict()) == parts
    assert model("a red apple", seed=1, num_steps=2).images[0] == before, "the model stays as it was"
    return result


def test_the_same_again_is_the_same_file(model, folder, trained, tmp_path):
    again = imagegen.finetune(model, folder, tmp_path, **SETTINGS)
    assert digest(again.weights) == digest(trained.weights) and again.num_steps == 6
    other = imagegen.finetune(model, folder, tmp_path / "other", **SETTINGS | {"seed": 4})
    assert digest(other.weights) != digest(trained.weights)


def test_training_in_two_goes_is_training_in_one(model, folder, trained, tmp_path):
    imagegen.finetune(model, folder, tmp_path, **SETTINGS | {"num_steps": 4})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    resumed = imagegen.finetune(model, folder, tmp_path, **SETTINGS, resume=True)
    assert digest(resumed.weights) == digest(trained.weights)


def test_a_resume_with_nothing_saved_starts_afresh(model, folder, trained, tmp_path):
    assert digest(imagegen.finetune(model, folder, tmp_path, **SETTINGS, resume=True).weights) == digest(trained.weights)


@pytest.mark.parametrize(("change", "says"), [({"rank": 3}, "rank was 2, now 3"), ({"seed": 9}, "seed was 3, now 9")])
def test_a_resume_of_another_training_says_what_differs(model, folder, trained, change, says):
    with pytest.raises(DataError, match=says):
        imagegen.finetune(model, folder, trained.folder, **SETTINGS | change, resume=True)


def test_a_folder_with_a_training_is_not_begun_anew(model, folder, trained):
    with pytest.raises(DataError, match="resume it"):
        imagegen.finetune(model, folder, trained.folder, **SETTINGS)


def test_the_loss_falls(model, folder, tmp_path):
    losses = []
    settings = {"num_steps": 60, "batch_size": 4, "rank": 8, "learning_rate": 2e-3, "save_every": 60}
    told = lambda what, done, total: losses.append(float(what.split()[2].rstrip(","))) if what.startswith("step") else None  # noqa: E731
    imagegen.finetune(model, folder, tmp_path, **settings, progress=told)
    assert len(losses) == 60 and np.mean(losses[-15:]) < 0.8 * np.mean(losses[:15])


def test_full_training_changes_every_part_and_gives_the_model_back(model, folder, tmp_path):
    before = {name: value.clone() for name, value in model.pipeline.unet.state_dict().items()}
    result = imagegen.finetune(model, folder, tmp_path, **SETTINGS | {"method": "full", "num_steps": 2})
    after = model.pipeline.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    from diffusers import UNet2DConditionModel

    made = UNet2DConditionModel.from_pretrained(tmp_path)
    changed = [name for name, value in made.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > 0.9 * len(before) and result.weights.parent == tmp_path


def test_stock_diffusers_loads_it_and_draws_our_picture(model, stock, trained):
    model.add_lora(trained.weights, weight=0.7)
    try:
        mine = model("a zorp number 1", seed=5, num_steps=4)
        assert mine.pictures[0].receipt.loras[0]["weight"] == 0.7
        assert mine.pictures[0].receipt.loras[0]["sha256"] == digest(trained.weights)
    finally:
        model.remove_loras()
    mine.save(trained.folder / "made")
    made = next((trained.folder / "made").glob("*.png"))
    with pytest.raises(imagegen.ReceiptError, match=r"made with pytorch_lora_weights\.safetensors at 0\.7"):
        imagegen.replay(made, model=model)
    renamed = shutil.copy(trained.weights, trained.folder / "made/renamed.safetensors")
    for file in (trained.weights, renamed):
        assert cli.run(["replay", str(made), "--lora", f"{file}:0.7"]) == 0
    stock.load_lora_weights(str(trained.folder), adapter_name="style")
    stock.set_adapters("style", 0.7)
    try:
        generator = torch.Generator("cpu").manual_seed(5)
        theirs = stock("a zorp number 1", num_inference_steps=4, guidance_scale=4.0, generator=generator).images[0]
    finally:
        stock.unload_lora_weights()
    assert mine.images[0] == theirs
    assert model("a zorp number 1", seed=5, num_steps=4).images[0] != theirs


def test_the_file_holds_its_facts_and_nothing_of_the_machine(trained):
    from safetensors import safe_open

    with safe_open(trained.weights, "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["imagegen"])
    assert facts["num_steps"] == 6 and len(facts["data_sha256"]) == 64 and facts["family"] == "emoji"
    assert str(trained.folder) not in json.dumps(metadata)


def test_a_lora_that_matches_nothing_is_an_error(model, tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"unet.nothing.here.lora_A.weight": torch.zeros(2, 4), "unet.nothing.here.lora_B.weight": torch.zeros(4, 2)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(ModelError, match=r"matches no layer|does not fit"):
        model.add_lora(tmp_path / "x.safetensors")
    save_file({"unet.conv_in.weight": torch.zeros(2, 4)}, tmp_path / "y.safetensors")
    with pytest.raises(ModelError, match="is no LoRA"):
        model.add_lora(tmp_path / "y.safetensors")
    (tmp_path / "z.safetensors").write_text("<html>")
    with pytest.raises(ModelError, match="it is a web page, not weights"):
        model.add_lora(tmp_path / "z.safetensors")
    with pytest.raises(ModelError, match="no LoRA"):
        model.add_lora(tmp_path / "none.safetensors")


def test_without_peft_it_says_what_to_install(model, folder, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"\[train\]"):
        imagegen.finetune(model, folder, tmp_path, **SETTINGS)
    with pytest.raises(ModelError, match=r"\[train\]"):
        model.add_lora(trained.weights)


def test_batches_are_of_one_shape_and_every_picture_comes():
    groups = [(number % 2,) for number in range(7)]
    for epoch in range(3):
        made = list(batches(groups, 2, 0, epoch))
        assert {index for batch in made for index in batch} == set(range(7))
        assert all(len(batch) == 2 and len({groups[index] for index in batch}) == 1 for batch in made)
    assert [batch_of(groups, 2, 0, step) for step in range(4)] == list(batches(groups, 2, 0, 0))


def test_draws_are_functions_of_what_is_given():
    assert torch.randn(3, generator=seeded(1, "a")).equal(torch.randn(3, generator=seeded(1, "a")))
    assert not torch.randn(3, generator=seeded(1, "a")).equal(torch.randn(3, generator=seeded(2, "a")))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_objectives_are_the_schedulers_own(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    clean = torch.randn(3, 4, 8, 8)
    noised = objective_of(scheduler).noise(clean, [seeded(number) for number in range(3)])
    noise = torch.stack([torch.randn(4, 8, 8, generator=seeded(number)) for number in range(3)])
    assert torch.allclose(noised.latents, scheduler.add_noise(clean, noise, noised.times), atol=1e-6)
    expected = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, noised.times)
    assert torch.allclose(noised.target, expected, atol=1e-6)
    capped = objective_of(scheduler, min_snr=5.0).noise(clean, [seeded(number) for number in range(3)])
    ratio = scheduler.alphas_cumprod[noised.times] / (1 - scheduler.alphas_cumprod[noised.times])
    assert torch.allclose(capped.weights, ratio.clamp(max=5) / (ratio if kind == "epsilon" else ratio + 1))


def test_flow_matching_goes_straight(model):
    clean = torch.randn(2, 4, 8, 8)
    noised = objective_of(model.pipeline.scheduler).noise(clean, [seeded(1), seeded(2)])
    share = (noised.times / 1000).reshape(-1, 1, 1, 1)
    assert torch.allclose(noised.latents - share * noised.target, clean, atol=1e-5)
    with pytest.raises(DataError, match="flow matching"):
        objective_of(model.pipeline.scheduler, min_snr=5.0)


def test_wrong_settings(model, folder, tmp_path):
    for wrong in ({"method": "magic"}, {"num_steps": 0}, {"ema": 1.0}, {"rank": 0}, {"learning_rate": -1.0}, {"accumulate": 3}):
        with pytest.raises(DataError):
            imagegen.finetune(model, folder, tmp_path, **SETTINGS | wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"weights": [torch.ones(2)]}, {"a": 1})
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, 2, {}, {"a": 1})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_compare_with_a_lora_holds_plans_against_its_own_pictures(model, trained, tmp_path):
    imagegen.record_reference(model, ["a red apple", "a zorp number 1"], tmp_path / "set", num_steps=4)
    model.add_lora(trained.weights)
    try:
        found = imagegen.compare(tmp_path / "set", model, ["exact", "step-cache(warmup=1)"])
    finally:
        model.remove_loras()
    assert found.trials[0].worst() == float("inf") and found.trials[1].worst() < 60
    assert any("with pytorch_lora_weights.safetensors" in note for note in found.notes)


def test_the_command_shows_its_progress_and_goes_on(model, folder, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.training, "load_model", lambda *_: model)
    command = [
        "finetune",
        str(folder),
        "--out",
        str(tmp_path),
        "--batch-size",
        "2",
        "--rank",
        "2",
        "--save-every",
        "2",
        "--seed",
        "3",
    ]
    assert cli.run([*command, "--steps", "3"]) == 0
    assert "3/3 step, loss" in capsys.readouterr().err
    assert cli.run([*command, "--steps", "6", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 6
    assert digest(tmp_path / adapters.FILE) == digest(trained.weights)
    assert cli.run([*command, "--steps", "6", "--rank", "5", "--resume"]) == 2
    assert "rank was 2, now 5" in capsys.readouterr().err
    assert cli.run(["finetune", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2


@pytest.mark.slow
def test_twenty_kills_change_nothing(folder, trained, tmp_path):
    chance = random.Random(0)
    command = [sys.executable, "-m", "imagegen", "finetune", str(folder), "--out", str(tmp_path), "--resume"]
    command += ["--steps", "6", "--batch-size", "2", "--rank", "2", "--save-every", "2", "--seed", "3"]
    kills = 0
    while kills < 20:
        run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        lines = chance.randrange(1, 14)
        for _ in range(lines):
            if not run.stderr.readline():
                break
        time.sleep(chance.random() * 0.3)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        kills += 1
        if kills % 4 == 0:  # begin anew, so that early points are met again
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    subprocess.run(command, check=True, capture_output=True)
    assert digest(tmp_path / adapters.FILE) == digest(trained.weights)


def run_two(script, *arguments):
    """Run a script in two processes by torchrun and return what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run([*command, *arguments], timeout=240, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_train_like_one(folder, trained, tmp_path):
    """The same global batch in two parts: sums in another order, nothing else."""
    arguments = ["finetune", str(folder), "--out", str(tmp_path), "--steps", "6", "--batch-size", "2"]
    done = run_two(["-m", "imagegen"], *arguments, "--rank", "2", "--save-every", "2", "--seed", "3")
    assert done.stderr.count("6/6 step, loss") == 1, "one process speaks"
    facts = json.loads((list_checkpoints(tmp_path)[-1] / "facts.json").read_text())
    assert facts["num_processes"] == 2
    alone, together = (load_file(path / adapters.FILE) for path in (trained.folder, tmp_path))
    assert alone.keys() == together.keys()
    size = max(value.abs().max() for value in alone.values())
    assert max((alone[name] - together[name]).abs().max() for name in alone) < 1e-3 * size


def test_each_process_computes_its_own_part_of_every_batch(tmp_path):
    seen, weight = {}, torch.zeros(1, requires_grad=True)
    for rank in (0, 1):
        company = SimpleNamespace(
            num_processes=2, process_index=rank, is_main_process=False, reduce=lambda value, reduction: value
        )

        def loss_of(step, chosen, rank=rank):
            seen.setdefault(step, {})[rank] = list(chosen)
            return weight.sum()

        recipe = Recipe(num_steps=2, batch_size=4, save_every=9)
        Training([Learner("one", [weight], loss_of)], [()] * 8, recipe, tmp_path, {}, company).run(lambda *_: None)
    for step, parts in seen.items():
        whole = list(enumerate(batch_of([()] * 8, 4, 0, step)))
        assert len(parts[0]) == len(parts[1]) == 2 and sorted(parts[0] + parts[1]) == whole


def test_validation_pictures_are_rendered_and_change_nothing(model, folder, trained, tmp_path):
    settings = {"validation_prompts": ("a zorp number 1",), "validate_every": 3}
    again = imagegen.finetune(model, folder, tmp_path, **SETTINGS | settings)
    assert digest(again.weights) == digest(trained.weights)
    found = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert found == ["000003-0.png", "000006-0.png"]
    model.add_lora(again.weights)
    try:
        expected = model("a zorp number 1", seed=0).images[0]
    finally:
        model.remove_loras()
    assert max_difference(Image.open(tmp_path / "samples" / "000006-0.png"), expected) <= 1  # training lays weights out otherwise


def test_averages_are_what_is_rendered_and_kept(model, folder, trained, tmp_path):
    """After one step the average is decay of the first value and the rest of the trained one."""
    kept = {}
    for name, ema in (("plain", 0.0), ("averaged", 0.75)):
        imagegen.finetune(model, folder, tmp_path / name, **SETTINGS | {"num_steps": 1, "ema": ema})
        kept[name] = load_file(tmp_path / name / adapters.FILE)
    ups = [name for name in kept["plain"] if ".lora_B." in name]  # they begin at zero
    assert ups and all(torch.allclose(kept["averaged"][name], 0.25 * kept["plain"][name], atol=1e-9) for name in ups)


def test_less_memory_by_checkpointing_changes_no_bit(model, folder, trained, tmp_path):
    unet, calls = model.pipeline.unet, []
    hook = unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        made = imagegen.finetune(model, folder, tmp_path, **SETTINGS | {"gradient_checkpointing": True})
    finally:
        hook.remove()
    assert len(calls) == 2 * SETTINGS["num_steps"], "once forward, once more backward"
    assert all(torch.equal(value, load_file(trained.weights)[name]) for name, value in load_file(made.weights).items())
    assert not model.pipeline.unet.is_gradient_checkpointing


def test_accumulation_is_a_larger_batch_in_parts(model, folder, trained, tmp_path):
    rows = []
    hook = model.pipeline.unet.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    try:
        made = imagegen.finetune(model, folder, tmp_path, **SETTINGS | {"accumulate": 2})
    finally:
        hook.remove()
    assert rows == [1] * 2 * SETTINGS["num_steps"]
    alone, parts = load_file(trained.weights), load_file(made.weights)
    size = max(value.abs().max() for value in alone.values())
    assert max((alone[name] - parts[name]).abs().max() for name in alone) < 1e-3 * size


def test_bf16_goes_the_same_way_less_exactly(model, folder, trained, tmp_path):
    made = imagegen.finetune(model, folder, tmp_path, **SETTINGS | {"precision": "bf16", "num_steps": 2})
    same = imagegen.finetune(model, folder, tmp_path / "fp32", **SETTINGS | {"num_steps": 2})
    assert made.loss != same.loss and abs(made.loss - same.loss) < 0.02 * same.loss
    assert all(value.dtype == torch.float32 for value in load_file(made.weights).values())


def test_a_tracker_of_accelerate_is_told_every_step(model, folder, tmp_path):
    from accelerate.tracking import GeneralTracker, on_main_process

    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", False

        def __init__(self):
            super().__init__()
            self.config, self.rows = {}, []

        @property
        def tracker(self):
            return self.rows

        @on_main_process
        def store_init_configuration(self, values):
            self.config = values

        @on_main_process
        def log(self, values, step=None, **_):
            self.rows.append((step, values))

    notes = Notes()
    made = imagegen.finetune(model, folder, tmp_path, **SETTINGS, tracker=notes)
    assert [step for step, _ in notes.rows] == [1, 2, 3, 4, 5, 6] and notes.rows[-1][1]["loss"] == made.loss
    assert notes.config["rank"] == "2"
    with pytest.raises(DataError, match="no tracker 'nothing' is installed"):
        imagegen.finetune(model, folder, tmp_path / "other", **SETTINGS, tracker="nothing")


def test_pictures_of_a_model_that_forbids_it_need_a_word(model, folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    info = PngInfo()
    info.add_text("parameters", "a zorp\nSteps: 20, Sampler: Euler, Model: flux1-dev-fp8")
    Image.open(data / "0.png").save(data / "0.png", pnginfo=info)
    with pytest.raises(DataError, match=r"flux1-dev-fp8 is under FLUX\.1-dev-Non-Commercial.*--i-have-the-right"):
        imagegen.finetune(model, data, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    made = imagegen.finetune(model, data, tmp_path / "out", **SETTINGS | {"num_steps": 1}, i_have_the_right=True)
    assert any("forbidden" in note for note in made.notes)
    with safe_open(made.weights, "pt") as file:
        base, generator = json.loads(file.metadata()["imagegen"])["licences"]
    assert base["licence"] == "Apache-2.0" and generator["right"] == "the user says to have it"


def test_an_unknown_setting_names_the_right_one(model, folder, tmp_path):
    with pytest.raises(DataError, match="did you mean learning_rate"):
        imagegen.finetune(model, folder, tmp_path, learning_rat=1e-3)


def test_a_prior_holds_the_model_to_its_own_predictions(model, folder, tmp_path):
    """Trained on nothing but its prior a model has nothing to learn; and a prior keeps other prompts nearer."""
    from imagegen.finetune.denoising import Example, Prior, denoising_loss

    latents = torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(0))
    told = {"encoder_hidden_states": encode_captions(model.pipeline, ["a cat"])["encoder_hidden_states"][0]}
    example, unet = Example(latents, "a cat", told, is_prior=True), model.pipeline.unet
    same = Prior(lambda *call: predict(model.pipeline, unet, *call), silence_of(model.pipeline))
    with torch.no_grad():
        loss = denoising_loss(model.pipeline, unet, objective_of(model.pipeline.scheduler), [example], 0, same)
        assert float(loss(0, [(0, 0), (1, 0)])) == 0
        none = denoising_loss(model.pipeline, unet, objective_of(model.pipeline.scheduler), [example], 0)
        assert float(none(0, [(0, 0), (1, 0)])) > 0.01
    settings = {"num_steps": 12, "batch_size": 2, "rank": 4, "learning_rate": 3e-3, "warmup": 1}
    before, drift = model("a red apple", seed=1).images[0], {}
    for name, prior in (("alone", {}), ("kept", {"prior_prompts": ("a red apple", "a dog"), "prior_pictures": 4})):
        made = imagegen.finetune(model, folder, tmp_path / name, **settings, **prior)
        model.add_lora(made.weights)
        try:
            drift[name] = np.square(np.asarray(model("a red apple", seed=1).images[0]).astype(float) - before).mean()
        finally:
            model.remove_loras()
    assert drift["kept"] < drift["alone"]
