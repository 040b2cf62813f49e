"""Distillation: exact steps between noise levels, lessons whose answer is known, and a student that anyone can run."""

import copy
import json
import shutil
from functools import partial
from hashlib import sha256

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from safetensors import safe_open

import imagegen
from imagegen import DataError, PlanError, RequestError, cli
from imagegen.families import adapters
from imagegen.families.conditioning import predict
from imagegen.finetune import distillation, lessons
from imagegen.finetune.trajectory import Teacher, Trajectories
from imagegen.levers import Target
from imagegen.licences import licence_of
from imagegen.sampling import follow_teacher, levels_of, make_deterministic
from imagegen.speed import make_lever

TINY = {"student_steps": 2, "teacher_steps": 4, "guidance": 3.0, "num_trajectories": 3, "prompts": ("a b", "c")}
SETTINGS = TINY | {"num_steps": 4, "batch_size": 2, "rank": 2, "save_every": 2, "warmup": 1, "ema": 0.5}
SCHEDULERS = {
    "epsilon": DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    "v_prediction": DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "flow": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "flow, Euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.fixture(scope="module")
def clip(folder_of, tmp_path_factory):
    """A tiny Stable Diffusion with a scheduler whose levels are not known, PNDM, as published ones come."""
    folder = shutil.copytree(folder_of("sd1.5"), tmp_path_factory.mktemp("clip") / "model")
    PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    return imagegen.load(folder)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_true_prediction_leads_to_the_very_same_picture_at_every_level(name):
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(6)
    levels = levels_of(scheduler)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 6, 4, 2, 2)
    wide = lambda part, level: part[level].float().view(-1, 1, 1, 1)  # noqa: E731
    at = lambda level: wide(levels.signal, level) * clean + wide(levels.noise, level) * noise  # noqa: E731
    start = torch.arange(6)
    signal, spread = (wide(part, start) for part in (levels.signal, levels.noise))
    truth = {"epsilon": noise, "v_prediction": signal * noise - spread * clean}.get(levels.kind, noise - clean)
    for end in (start + 1, -1):
        first, second = (part.view(-1, 1, 1, 1) for part in levels.jump(start, end))
        expected = clean if isinstance(end, int) else at(end)
        assert torch.allclose(first * at(start) + second * truth, expected, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_students_run_takes_every_nth_level_and_our_steps(name):
    """diffusers' own scheduler, told to follow, moves as `Levels.jump` says."""
    whole = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config)
    whole.set_timesteps(12)
    levels, scheduler = levels_of(whole), type(whole).from_config(whole.config)
    follow_teacher(scheduler, 12, stands_in=False)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == whole.timesteps[::4].tolist() and len(scheduler.sigmas) == 4
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 2, 2)
    for number, time in enumerate(scheduler.timesteps):
        prediction = torch.randn(1, 4, 2, 2)
        first, second = levels.jump(torch.tensor([4 * number]), torch.tensor([4 * number + 4]))
        expected = first * latents + second * prediction
        latents = scheduler.step(prediction, time, latents, return_dict=False)[0]
        assert torch.allclose(latents, expected, atol=1e-4)
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 5, "a number that does not divide the teacher's is the scheduler's own affair"


def test_schedulers_whose_levels_are_not_known_are_replaced():
    made = make_deterministic(EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    assert type(made) is DPMSolverMultistepScheduler and made.config.beta_schedule == "scaled_linear"


class Linear(torch.nn.Module):
    """A denoiser that says its value and what it is told, whatever it sees."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))
        self.dtype = torch.float32

    def forward(self, latents, timestep, encoder_hidden_states, return_dict):
        return (latents * 0 + self.value + encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1),)


def make_course(student, teacher, tmp_path, steps=6, every=3):
    """Flow matching with a constant velocity, which goes straight: every number of steps arrives at the same place."""
    scheduler = FlowMatchEulerDiscreteScheduler()

    class StableDiffusionPipeline:  # the kind that training knows denoisers of one text by
        device = torch.device("cpu")

    pipeline = StableDiffusionPipeline()
    pipeline.scheduler = scheduler
    told = lambda prompt: {"encoder_hidden_states": torch.full((2, 3), 0.5 * len(prompt))}  # noqa: E731
    silence = {"encoder_hidden_states": torch.zeros(1, 2, 3)}
    made = Teacher(pipeline, partial(predict, pipeline, teacher), 2.0, silence)
    runs = Trajectories(tmp_path, made, {}, ("a", "bb"), steps, seed=0)
    runs.fill(4, (1, 2, 2), told, lambda *_: None)
    conditions = [told(runs.prompt(number)) for number in range(4)]
    return lessons.Course(pipeline, student, levels_of(runs.scheduler), every, runs, conditions, seed=0), made


def test_a_teachers_run_is_where_guidance_leads(tmp_path):
    """Velocity 1 + c, guidance 2: 1 + 2c; from noise x at level s the run is at x - (1 - s)(1 + 2c)."""
    course, _ = make_course(Linear(0.0), Linear(1.0), tmp_path)
    for number, words in enumerate((0.5, 1.0, 0.5, 1.0)):
        states = course.trajectories.states(number)
        gone = (course.levels.noise[0] - course.levels.noise).float().view(-1, 1, 1, 1)
        assert torch.allclose(states, states[0] - gone * (1 + 2 * words), atol=1e-5)


@pytest.mark.parametrize("lesson", [lessons.trajectory_loss, lessons.consistency_loss])
def test_a_students_loss_is_its_error_in_the_prediction(lesson, tmp_path):
    """The student says v + c and should say 1 + 2c: on one prompt alone, (1 + c - v)²."""
    course, _ = make_course(Linear(0.0), Linear(1.0), tmp_path)
    chosen = [(0, 0), (1, 2)]  # both of c = 0.5
    right, wrong = (copy.copy(course) for _ in range(2))
    object.__setattr__(right, "student", Linear(1.5))
    object.__setattr__(wrong, "student", Linear(1.0))
    assert float(lesson(right)(0, chosen).detach()) < 1e-6
    if lesson is lessons.trajectory_loss:
        assert float(lesson(wrong)(0, chosen).detach()) == pytest.approx(0.25, rel=0.05)
    else:  # of a part's three steps the first only is the teacher's; the rest is the student's own
        assert 1e-3 < float(lesson(wrong)(3, chosen).detach()) <= 0.26


def test_distribution_matching_moves_the_student_towards_its_teacher(tmp_path):
    """Its gradient has the sign of the error, and is none where student, critic and teacher agree."""
    for value, sign in ((1.0, -1), (2.0, 1), (1.5, 0)):
        course, teacher = make_course(Linear(value), Linear(1.0), tmp_path)
        critic_loss, student_loss = lessons.distribution_losses(course, teacher, Linear(value), anchor=0.0)
        student_loss(0, [(0, 0), (1, 2)]).backward()
        slope = float(course.student.value.grad)
        assert np.sign(round(slope, 2)) == sign
        assert torch.isfinite(critic_loss(0, [(0, 0), (1, 2)]))


def digest(path):
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module", params=lessons.LESSONS)
def student(request, clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("student")
    before = draw(clip)
    made = imagegen.distill(clip, out, lesson=request.param, **SETTINGS)
    assert draw(clip) == before, "the teacher stays as it was"
    return request.param, made


def draw(model, **settings):
    return model("a b", seed=3, width=64, height=64, **({"num_steps": 2, "guidance": 2.0} | settings)).images[0]


def test_distilling_in_two_goes_is_distilling_in_one(clip, student, tmp_path):
    lesson, made = student
    imagegen.distill(clip, tmp_path, lesson=lesson, **SETTINGS | {"num_steps": 2})
    again = imagegen.distill(clip, tmp_path, lesson=lesson, resume=True, **SETTINGS)
    assert digest(again.weights) == digest(made.weights)
    with pytest.raises(DataError, match=r"guidance was 3\.0, now 2\.0"):
        imagegen.distill(clip, tmp_path, lesson=lesson, resume=True, **SETTINGS | {"guidance": 2.0})


def test_its_file_says_whose_student_it_is(clip, student):
    lesson, made = student
    with safe_open(made.weights, "pt") as file:
        facts = json.loads(file.metadata()["imagegen"])
    assert facts["lesson"] == lesson and facts["student_steps"] == 2 and facts["teacher_steps"] == 4
    assert facts["model_sha256"] == clip.hashes and facts["licences"][0]["kind"] == "unknown"
    assert any("unknown" in note for note in made.notes)


def test_as_a_plan_it_draws_what_stock_diffusers_draws_with_its_lora(clip, student):
    from diffusers import StableDiffusionPipeline

    _, made = student
    clip.set_plan(f"student(file={made.folder})")
    try:
        result = clip("a b", seed=3, width=64, height=64)
        receipt = result.pictures[0].receipt
        with pytest.raises(RequestError, match="guidance must be 1"):
            draw(clip)
        with pytest.raises(RequestError, match="scheduler must be left out"):
            draw(clip, guidance=1.0, scheduler="euler")
        eight = draw(clip, guidance=1.0, num_steps=4)
    finally:
        clip.set_plan("exact")
    assert receipt.request["num_steps"] == 2 and receipt.request["guidance"] == 1
    assert receipt.plan["levers"][0]["did"].startswith("2 denoiser calls of pytorch_lora_weights.safetensors, sha256")
    stock = StableDiffusionPipeline.from_pretrained(clip.folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(made.folder))
    levels = {"solver_order": 1, "timestep_spacing": "trailing"}
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, **levels)
    settings = {"width": 64, "height": 64, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(3)}
    stock.scheduler.set_timesteps(4)
    times = stock.scheduler.timesteps[::2]
    theirs = stock("a b", timesteps=times.tolist(), **settings).images[0]
    difference = np.abs(np.asarray(theirs).astype(int) - np.asarray(result.images[0])).max()
    assert difference <= 1 and eight != result.images[0]


def test_the_teacher_is_followed_under_the_exact_plan_and_a_carried_lora_is_refused_first(clip, student, tmp_path):
    _, made = student
    clip.add_lora(made.weights)
    try:
        with pytest.raises(DataError, match="remove_loras"):
            imagegen.distill(clip, tmp_path, **SETTINGS)
    finally:
        clip.remove_loras()
    assert list(tmp_path.iterdir()) == []
    clip.set_plan("step-cache(warmup=1)")
    try:
        again = imagegen.distill(clip, tmp_path, lesson=student[0], **SETTINGS)
        assert clip.plan.name.startswith("step-cache")
    finally:
        clip.set_plan("exact")
    assert digest(again.weights) == digest(made.weights)


def test_a_student_of_other_weights_or_none_is_refused(clip, model, student, tmp_path):
    _, made = student
    with pytest.raises(PlanError, match="distilled from other weights"):
        model.set_plan(f"student(file={made.folder})")
    with pytest.raises(PlanError, match=r"no student 'turbo\.safetensors'"):
        clip.set_plan("turbo")
    with pytest.raises(PlanError, match="is no student"):
        model.set_plan(f"student(file={model.folder / 'vae'})")
    assert model.plan.name == "exact" and clip.plan.name == "exact"


def test_a_student_knows_its_teachers_weights_by_content_whatever_file_they_are_in(clip, student):
    lever = make_lever(f"student(file={student[1].folder})")
    (unet,) = (value for name, value in clip.hashes.items() if name.startswith("unet/"))
    assert lever.requires(Target(clip.pipeline, hashes=lambda: {"moved.safetensors": unet})) is None
    assert "other weights" in lever.requires(Target(clip.pipeline, hashes=lambda: {"moved.safetensors": "0" * 64}))


def test_turbo_is_the_student_in_the_models_own_folder(clip, student):
    _, made = student
    (clip.folder / "turbo.safetensors").write_bytes(made.weights.read_bytes())
    try:
        clip.set_plan("turbo")
        turbo = clip("a b", seed=3, width=64, height=64).pictures[0]
        clip.set_plan(f"student(file={made.folder})")
        difference = np.abs(np.asarray(clip("a b", seed=3, width=64, height=64).images[0]).astype(int) - turbo.image).max()
    finally:
        clip.set_plan("exact")
        (clip.folder / "turbo.safetensors").unlink()
    assert turbo.receipt.plan["name"] == "turbo" and difference <= 2


def test_full_weights_are_a_student_too(clip, tmp_path):
    made = imagegen.distill(clip, tmp_path, method="full", **SETTINGS | {"num_steps": 1, "learning_rate": 1e-3})
    clip.set_plan(f"student(file={tmp_path})")
    try:
        assert draw(clip, guidance=1.0) != draw_exact(clip)
    finally:
        clip.set_plan("exact")
    assert made.weights.name == "diffusion_pytorch_model.safetensors"


def draw_exact(model):
    with model.plan_for_a_while("exact"):
        return draw(model, guidance=1.0)


def test_wrong_settings_and_a_forbidden_teacher(clip, tmp_path, monkeypatch):
    wrong = [{"student_steps": 3}, {"lesson": "magic"}, {"dora": True}, {"prior_prompts": ("a",)}, {"learning_rat": 1}]
    for settings in wrong:
        with pytest.raises(DataError):
            imagegen.distill(clip, tmp_path, **SETTINGS | settings)
    dev = licence_of("FLUX.1-dev")
    monkeypatch.setattr(distillation, "licence_named", lambda name: dev)
    with pytest.raises(DataError, match=r"FLUX\.1-dev-Non-Commercial.*--i-have-the-right"):
        imagegen.distill(clip, tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
    made = imagegen.distill(clip, tmp_path, i_have_the_right=True, **SETTINGS | {"num_steps": 1})
    assert json.loads(adapters.read_metadata(made.weights)["imagegen"])["licences"][0]["right"] == "the user says to have it"


def test_the_command(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.training, "load_model", lambda *_: clip)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nc\n")
    command = [
        "distill",
        "--out",
        str(tmp_path / "out"),
        "--student-steps",
        "2",
        "--teacher-steps",
        "4",
        "--prompts",
        str(prompts),
    ]
    command += ["--trajectories", "3", "--steps", "2", "--batch-size", "2", "--rank", "2", "--json"]
    assert cli.run(command) == 0
    captured = capsys.readouterr()
    assert "3/3 following the teacher" in captured.err and "2/2 step, loss" in captured.err
    assert json.loads(captured.out)["num_steps"] == 2
    assert cli.run([*command, "--student-steps", "3"]) == 2
    assert "must divide" in capsys.readouterr().err
