"""Fine-tuning that people trust with a night: checked data, encoded once, trained step by step, resumed bit for bit.

`recipe` holds the settings, `data` reads and checks pictures with captions, `cache` encodes them once,
`objective` and `denoising` say what a denoiser is trained on, `loop` trains, `checkpoint` keeps, `workplace`
gives the model back as it was; `distillation` makes a student of few steps.
"""

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from imagegen.families import adapters
from imagegen.families.conditioning import check_trainable, silence_of
from imagegen.finetune.cache import Cache
from imagegen.finetune.data import Dataset, make_buckets, read_dataset
from imagegen.finetune.denoising import Example, Prior, denoising_loss
from imagegen.finetune.distillation import distill
from imagegen.finetune.loop import Learner, Training
from imagegen.finetune.objective import objective_of
from imagegen.finetune.recipe import Recipe, make_recipe
from imagegen.finetune.trained import Tell, Trained, check_folder, one_training, silence
from imagegen.finetune.workplace import FULL, Workplace, follow, start_accelerator
from imagegen.licences import check_right, describe_right, licence_named, record
from imagegen.request import DataError

if TYPE_CHECKING:
    from imagegen.model import Model

PRIOR = "prior"


def finetune(
    model: "Model",
    data: str | Path | Dataset,
    out: str | Path,
    *,
    resume: bool = False,
    data_licence: str | None = None,
    i_have_the_right: bool = False,
    progress: Tell | None = None,
    **settings: Any,
) -> Trained:
    """Fine-tune a model on a folder of pictures with captions; the model itself stays as it was.

    Args:
        model: to start from.
        data: the folder, or what `read_dataset` made of it: `metadata.jsonl`, or `NAME.txt` beside `NAME.png`.
        out: gets the weights, `checkpoints/`, `cache/` and `samples/`.
        resume: go on from the last checkpoint in `out`.
        data_licence: of the pictures, such as `CC-BY-SA-4.0`; recorded in the weights.
        i_have_the_right: to train on outputs of a model whose licence forbids it; recorded in the weights.
        progress: is told what is going on, the work done, and all of it.
        **settings: see `imagegen.finetune.Recipe`: `method`, `num_steps`, `seed`, `batch_size`, `learning_rate`,
            `rank`, `text_encoder`, `ema`, `prior_prompts`, `validation_prompts` …

    Raises:
        DataError: the data or a setting is wrong, a licence forbids it, or a resume is of another training.
        RequestError: another training writes into `out`.
    """
    recipe, out = make_recipe(settings), Path(out)
    missing = adapters.peft_is_missing() if recipe.method == "lora" else None
    if missing:
        raise DataError(missing)
    check_trainable(model.pipeline)
    dataset = data if isinstance(data, Dataset) else read_dataset(data)
    check_folder(out, resume)
    rights, notes = _check_licences(model, dataset, data_licence, i_have_the_right)
    objective = objective_of(model.pipeline.scheduler, recipe.min_snr)
    facts: dict[str, Any] = {"data_sha256": dataset.sha256, "num_pictures": len(dataset.items), "licences": rights}
    facts |= {"model_sha256": model.hashes, "family": model.family.name}
    place = Workplace(model, recipe)
    accelerator = start_accelerator(model, recipe, out)
    tell = progress if progress and accelerator.is_main_process else silence
    with one_training(out, accelerator), contextlib.ExitStack() as work:
        with accelerator.main_process_first():  # the others then find the cache filled
            examples = _encode(model, dataset, out, recipe, tell)
        work.enter_context(place)
        before = Prior(place.old_prediction(), silence_of(model.pipeline)) if recipe.prior_prompts else None
        loss_of = denoising_loss(model.pipeline, place.denoiser, objective, examples, recipe.seed, before, recipe.text_encoder)
        learner = Learner(recipe.method, place.weights, loss_of)
        training = Training([learner], [example.group for example in examples], recipe, out, facts, accelerator)
        if resume:
            training.resume()
        follow(training, model, tell)
        training.finish()
        weights = out / (adapters.FILE if recipe.method == "lora" else FULL)
        if accelerator.is_main_process:
            place.save(out, training.facts | {"num_steps": recipe.num_steps})
        accelerator.wait_for_everyone()
    return Trained(out, weights, training.loss, training.step, (*dataset.notes, *notes))


def _check_licences(
    model: "Model", dataset: Dataset, data_licence: str | None, i_have_the_right: bool
) -> tuple[list[dict[str, str]], list[str]]:
    """Return what to record of the licences of the model and of what made the data, and what to say of them.

    Raises:
        DataError: one forbids it, and nobody said to have the right.
    """
    used = [("the model itself", licence_named(model.licence))]
    used += [("the pictures", licence_named(data_licence))] if data_licence else []
    generated = check_right(dataset.generators, i_have_the_right)
    counts = {fact["what"]: len(dataset.generated[fact["what"]]) for fact in generated}
    notes = [f"{counts[fact['what']]} pictures were made by {fact['what']}: {describe_right(fact)}" for fact in generated]
    return [*record(used), *generated], notes


def _encode(model: "Model", dataset: Dataset, out: Path, recipe: Recipe, tell: Tell) -> list[Example]:
    """Return the data encoded, and the model's own pictures for prior preservation."""
    family = model.family
    cache = Cache(out, model.pipeline, model.hashes, make_buckets(family.size_px, family.multiple_px))
    found = _encode_set(cache, dataset, tell)
    if recipe.prior_prompts:
        prior = _encode_set(cache, _draw_prior(model, out / "cache" / PRIOR, recipe, tell), tell, is_prior=True)
        found *= max(1, round(len(prior) / len(found)))  # as much of the one as of the other
        found += prior
    return found


def _encode_set(cache: Cache, dataset: Dataset, tell: Tell, is_prior: bool = False) -> list[Example]:
    cache.fill(dataset.items, [item.text for item in dataset.items], tell)
    return [Example(cache.latents(item), item.text, cache.text(item.text), is_prior) for item in dataset.items]


def _draw_prior(model: "Model", folder: Path, recipe: Recipe, tell: Tell) -> Dataset:
    """Draw the pictures that are missing, and read them as data."""
    from imagegen.receipt import png_bytes

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(recipe.prior_pictures):
        prompt = recipe.prior_prompts[number % len(recipe.prior_prompts)]
        place = folder / f"{number:04d}.png"
        caption = place.with_suffix(".txt")
        if not (place.exists() and caption.exists()):
            picture = model.generate(prompt, seed=recipe.seed + number).pictures[0]
            for file, content in ((place, png_bytes(picture.image, picture.receipt)), (caption, prompt.encode())):
                part = file.with_name(f".{file.name}.part")
                part.write_bytes(content)
                part.replace(file)
        tell("drawing the prior's pictures", number + 1, recipe.prior_pictures)
    return read_dataset(folder)


class _Callable(ModuleType):
    """Lets `imagegen.finetune(...)` be the function, whichever of the two Python has bound to that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Trained:
        return finetune(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

__all__ = ["Recipe", "Trained", "distill", "finetune", "read_dataset"]
