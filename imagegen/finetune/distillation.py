"""Distil a model into a student that needs a few steps and no guidance.

The student is a LoRA for its teacher, or full weights; its file says which teacher, which of the teacher's
levels it steps over, and the teacher's licence. `trajectory` keeps the teacher's runs, `lessons` holds the losses.
"""

import contextlib
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.families import adapters
from imagegen.families.conditioning import check_trainable, predict, silence_of
from imagegen.families.latents import noise_shape
from imagegen.finetune.cache import Cache
from imagegen.finetune.lessons import LESSONS, Course, consistency_loss, distribution_losses, trajectory_loss
from imagegen.finetune.loop import Learner, Training
from imagegen.finetune.recipe import make_recipe
from imagegen.finetune.trained import Tell, Trained, check_folder, one_training, silence
from imagegen.finetune.trajectory import Teacher, Trajectories
from imagegen.finetune.workplace import FULL, Workplace, follow, start_accelerator
from imagegen.licences import check_right, describe_right, licence_named
from imagegen.prompts import training_prompts
from imagegen.request import DataError
from imagegen.sampling import levels_of

if TYPE_CHECKING:
    from imagegen.model import Model

DEFAULTS: dict[str, Any] = {"num_steps": 1000, "batch_size": 16, "learning_rate": 3e-4, "rank": 32, "layers": "all", "ema": 0.99}
CRITIC_TURNS = 2  # of the critic for one of the student's


def distill(
    model: "Model",
    out: str | Path,
    *,
    student_steps: int = 4,
    lesson: str = "trajectory",
    teacher_steps: int | None = None,
    guidance: float | None = None,
    prompts: Sequence[str] = (),
    num_trajectories: int = 1000,
    anchor: float = 1.0,
    resume: bool = False,
    i_have_the_right: bool = False,
    progress: Tell | None = None,
    **settings: Any,
) -> Trained:
    """Distil a model into a student of few steps that needs no guidance; the model itself stays as it was.

    Args:
        model: the teacher.
        out: gets the student's weights, `checkpoints/`, `cache/` and `samples/`.
        student_steps: from 1; must divide the teacher's.
        lesson: `trajectory` (arrive where the teacher does), `consistency` (agree with oneself one teacher's step
            further on), or `distribution` (make pictures whose distribution is the teacher's).
        teacher_steps: the family's default where none are given.
        guidance: of the teacher, likewise; the student keeps it built in.
        prompts: what to learn on; by default those that come with the package for the model's family.
        num_trajectories: runs of the teacher to learn from, computed once and kept in `cache/`.
        anchor: with `distribution`, how much of `trajectory` is added.
        resume: go on from the last checkpoint in `out`.
        i_have_the_right: to distil a model whose licence forbids it; recorded in the weights.
        progress: is told what is going on, the work done, and all of it.
        **settings: see `imagegen.finetune.Recipe`; by default 1000 steps of 16, rank 32 on every layer, EMA 0.99.

    Raises:
        DataError: a setting is wrong, the licence forbids it, or a resume is of another training.
    """
    recipe, out = make_recipe(DEFAULTS | settings), Path(out)
    teacher_steps = teacher_steps or model.family.num_steps
    if lesson not in LESSONS:
        raise DataError(f"lesson must be one of {', '.join(LESSONS)}, got {lesson!r}")
    if not 1 <= student_steps <= teacher_steps or teacher_steps % student_steps:
        raise DataError(f"student_steps must divide the teacher's {teacher_steps}, got {student_steps!r}")
    if recipe.text_encoder or recipe.prior_prompts or recipe.dora:
        raise DataError(
            "distillation trains plain weights on a teacher's pictures: leave text_encoder, prior_prompts and dora out"
        )
    missing = adapters.peft_is_missing() if recipe.method == "lora" else None
    if missing:
        raise DataError(missing)
    check_trainable(model.pipeline)
    check_folder(out, resume)
    licence = licence_named(model.licence)
    rights = check_right([(f"the teacher, {model.source}", licence)], i_have_the_right)
    guidance = model.family.guidance if guidance is None else guidance
    facts: dict[str, Any] = {"lesson": lesson, "student_steps": student_steps, "teacher_steps": teacher_steps}
    facts |= {"guidance": guidance, "anchor": anchor, "num_trajectories": num_trajectories, "licences": rights}
    facts |= {"teacher": model.source, "model_sha256": model.hashes, "family": model.family.name}
    place, pipeline = Workplace(model, recipe), model.pipeline
    accelerator = start_accelerator(model, recipe, out)
    tell = progress if progress and accelerator.is_main_process else silence
    prompts = tuple(prompts) or training_prompts(model.family.name)
    cache = Cache(out, pipeline, model.hashes, [])
    teacher = Teacher(pipeline, partial(predict, pipeline, place.denoiser), guidance, silence_of(pipeline))
    trajectories = Trajectories(out, teacher, {"model_sha256": model.hashes}, prompts, teacher_steps, recipe.seed)
    with one_training(out, accelerator), contextlib.ExitStack() as work:
        with accelerator.main_process_first(), model.plan_for_a_while("exact"):
            trajectories.fill(num_trajectories, latents_shape(model), cache.text, tell)
            told = [cache.text(trajectories.prompt(number)) for number in range(num_trajectories)]
        work.enter_context(place)
        every = teacher_steps // student_steps
        course = Course(pipeline, place.denoiser, levels_of(trajectories.scheduler), every, trajectories, told, recipe.seed)
        learners = _learners(lesson, course, teacher, place, anchor)
        training = Training(learners, [()] * num_trajectories, recipe, out, facts, accelerator)
        if resume:
            training.resume()
        follow(training, model, tell, num_steps=student_steps, guidance=1.0)
        training.finish()
        weights = out / (adapters.FILE if recipe.method == "lora" else FULL)
        if accelerator.is_main_process:
            place.save(out, training.facts | {"num_steps": recipe.num_steps})
        accelerator.wait_for_everyone()
    return Trained(
        out, weights, training.loss, training.step, tuple(f"{fact['what']}: {describe_right(fact)}" for fact in rights)
    )


def latents_shape(model: "Model") -> tuple[int, int, int]:
    """Return (C, h, w) of the latents of a picture of native size."""
    _, channels, height, width = noise_shape(model.pipeline, 1, model.family.size_px, model.family.size_px)
    return channels, height, width


def _learners(lesson: str, course: Course, teacher: Teacher, place: Workplace, anchor: float) -> list[Learner]:
    """Return who learns, in the order of their turns."""
    if lesson == "trajectory":
        return [Learner("student", place.weights, trajectory_loss(course))]
    if lesson == "consistency":
        return [Learner("student", place.weights, consistency_loss(course))]
    critic = copy.deepcopy(place.denoiser)
    adapters.remove_adapter(critic)
    critic.requires_grad_(True)
    as_before = Teacher(teacher.pipeline, place.old_prediction(), teacher.guidance, teacher.silence)
    critics, students = distribution_losses(course, as_before, critic, anchor)
    return [
        Learner("critic", list(critic.parameters()), critics, turns=CRITIC_TURNS, rate=0.1),
        Learner("student", place.weights, students),
    ]
