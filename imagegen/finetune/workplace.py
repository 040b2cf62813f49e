"""A model while it is trained: what is put on it, and how it is given back as it was."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imagegen.families import adapters
from imagegen.families.conditioning import Conditions, Prediction, predict
from imagegen.families.diffusion import denoiser_name, denoiser_of, quiet
from imagegen.finetune.loop import Training
from imagegen.finetune.recipe import Recipe
from imagegen.request import DataError
from imagegen.weights import save_weights

if TYPE_CHECKING:
    from imagegen.model import Model

FULL = "diffusion_pytorch_model.safetensors"  # diffusers' own name
SAMPLES = "samples"


class Workplace:
    """A context in which a model's denoiser, and its text encoder if asked, can be trained.

    Attributes:
        parts: the modules that learn, by the pipeline's names.
        denoiser: one of them.
        weights: float32, what is trained.
    """

    def __init__(self, model: "Model", recipe: Recipe) -> None:
        """Change nothing yet.

        Raises:
            DataError: the model is not in a state to be trained.
        """
        if model.loras:
            raise DataError("the model carries LoRAs: call remove_loras() first, and train on the model itself")
        if recipe.method == "full" and model.dtype != torch.float32:
            raise DataError(
                f"training every weight needs them in float32, and the model is in {model.dtype}: load it with dtype='float32'"
            )
        pipeline = model.pipeline
        self.model, self.recipe = model, recipe
        self.denoiser = denoiser_of(pipeline)
        self.parts = {denoiser_name(pipeline): self.denoiser}
        if recipe.text_encoder:
            self.parts["text_encoder"] = pipeline.text_encoder
        self.weights: list[torch.Tensor] = []

    def __enter__(self) -> "Workplace":
        """Put adapters on, or let every weight be trained.

        Raises:
            DataError: a part has no layers for a LoRA.
        """
        recipe = self.recipe
        layers = {name: adapters.find_layers(part, recipe.layers) for name, part in self.parts.items()}
        self._plan = self.model.plan
        self.model.set_plan("exact")
        own = [weight for part in self.parts.values() for weight in part.parameters()]
        self._kept = [(weight, weight.requires_grad) for weight in own]
        self._originals = [weight.detach().clone() for weight in own] if recipe.method == "full" else []
        try:
            for name, part in self.parts.items():
                self.weights += self._open(part, layers[name])
        except BaseException:
            self.__exit__()
            raise
        if recipe.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.denoiser.to(memory_format=torch.channels_last)  # convolutions of a training step: a tenth less time
        return self

    def _open(self, part: torch.nn.Module, layers: list[str]) -> list[torch.Tensor]:
        """Let a part be trained; return the weights that are."""
        recipe = self.recipe
        if recipe.method == "full":
            part.requires_grad_(True)
            return list(part.parameters())
        alpha = recipe.alpha or recipe.rank
        added = adapters.add_adapter(part, layers, rank=recipe.rank, alpha=alpha, dora=recipe.dora, seed=recipe.seed)
        for weight in added:
            weight.data = weight.data.float()
        return added

    def __exit__(self, *_: object) -> None:
        """Leave the model as it was: without adapters, with its own weights and its plan."""
        self.denoiser.to(memory_format=torch.contiguous_format)
        if self.recipe.gradient_checkpointing:
            self.denoiser.disable_gradient_checkpointing()
        for part in self.parts.values():
            adapters.remove_adapter(part)
        with torch.no_grad():
            for (weight, _), original in zip(self._kept, self._originals, strict=False):
                weight.copy_(original)
        for weight, needed in self._kept:
            weight.requires_grad_(needed)
            weight.grad = None
        self.model.set_plan(self._plan)

    def old_prediction(self) -> Prediction:
        """Return what predicts as the denoiser did before it was trained, without gradients."""
        pipeline, denoiser = self.model.pipeline, self.denoiser
        twin = copy.deepcopy(denoiser).requires_grad_(False) if self.recipe.method == "full" else None

        @torch.no_grad()
        def compute(latents: torch.Tensor, times: torch.Tensor, told: Conditions) -> torch.Tensor:
            if twin is not None:
                return predict(pipeline, twin, latents, times, told)
            denoiser.disable_adapters()
            try:
                return predict(pipeline, denoiser, latents, times, told)
            finally:
                denoiser.enable_adapters()

        return compute

    def save(self, out: Path, facts: dict[str, Any]) -> Path:
        """Write what was trained at the top of `out`; return the file."""
        if self.recipe.method == "lora":
            return adapters.save_adapter(self.parts, out, facts)
        self.denoiser.save_config(out)
        metadata = {"format": "pt", "imagegen": json.dumps(facts, sort_keys=True)}
        return save_weights(out / FULL, self.denoiser.state_dict(), metadata)


def start_accelerator(model: "Model", recipe: Recipe, out: Path) -> Any:
    """Return accelerate's Accelerator, on the model's kind of device, with the recipe's tracker started.

    Raises:
        DataError: the tracker is unknown or not installed.
    """
    with quiet():
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        known = [str(tracker) for tracker in get_available_trackers()]
        if isinstance(recipe.tracker, str) and recipe.tracker not in known:
            raise DataError(f"no tracker {recipe.tracker!r} is installed; accelerate finds here: {', '.join(known) or 'none'}")
        accelerator = Accelerator(cpu=model.device.type == "cpu", log_with=recipe.tracker, project_dir=str(out / "logs"))
    if accelerator.num_processes > 1:
        model.pipeline.to(accelerator.device)
    if recipe.tracker is not None:
        accelerator.init_trackers("imagegen", {name: str(value) for name, value in recipe.facts().items()})
    return accelerator


def follow(training: Training, model: "Model", tell: Callable[[str, int, int], Any], **settings: Any) -> None:
    """Run a training: show its progress, feed its tracker, render its validation prompts with those settings."""
    recipe, accelerator = training.recipe, training.accelerator

    def after_step(state: Training, rate: float) -> None:
        tell(f"step, loss {state.loss:.4f}, {rate:.2f} a second", state.step, recipe.num_steps)
        if recipe.tracker is not None:
            accelerator.log({"loss": state.loss, "learning_rate": recipe.rate_at(state.step - 1)}, step=state.step)
        if state.step % recipe.validate_every == 0 and accelerator.is_main_process:
            render(model, recipe.validation_prompts, state, settings)

    try:
        training.run(after_step)
    finally:
        for tracker in accelerator.trackers:  # not end_training(), which ends the processes' company too
            tracker.finish()


def render(model: "Model", prompts: Sequence[str], training: Training, settings: dict[str, Any]) -> None:
    """Render the validation prompts as the model stands, with averages where there are any, each with its own seed.

    They are named `STEP-NUMBER.png`, and carry no receipt: what made them is not a model that could be loaded.
    """
    folder, learner, step = training.out / SAMPLES, training.learners[-1], training.step
    folder.mkdir(parents=True, exist_ok=True)
    learner.swap()
    try:
        for number, prompt in enumerate(prompts):
            made = model.generate(prompt, seed=number, **settings).images[0]
            part = folder / f".{step:06}-{number}.part"
            made.save(part, "PNG")
            part.replace(folder / f"{step:06}-{number}.png")
    finally:
        learner.swap()
