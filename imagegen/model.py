"""Model: ask it for pictures, or follow it step by step.

A model is a run of steps. `generate` waits for its end, `run` is told of every step, and `stream` hands
the steps to a reader, who may stop. Knows nothing of diffusers.
"""

import contextlib
import gc
import itertools
import time
import warnings
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from imagegen import profile as profiles
from imagegen import receipt as receipts
from imagegen.catalog import Family, card_of
from imagegen.families import adapters, diffusion
from imagegen.families.arguments import is_guided
from imagegen.families.weighting import has_weights, reads_on, why_not
from imagegen.fit import choose_rung, measure_needs, out_of_memory, rungs
from imagegen.guides import Guides
from imagegen.levers import RunFacts
from imagegen.measure import environment, machine_of
from imagegen.request import ModelError, PlanError, Request, RequestError, build_request
from imagegen.result import Picture, Result
from imagegen.sources import Source
from imagegen.speed import EXACT, AppliedPlan, Plan, find_plan
from imagegen.variations import Settings, Variations
from imagegen.weights import hash_file, hash_files, hash_weights

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Step:
    """The work after one denoising step; the last one carries the result.

    Attributes:
        index: number of the step, from 0.
        num_steps: steps of this run.
        elapsed_s: seconds since the stream began.
        latents: (B, C, h, w), the state after this step, on the model's device; (B, n) int64, the codes so far, of
            models that draw one token after the other.
        result: the finished pictures, on the last step only.
    """

    index: int
    num_steps: int
    elapsed_s: float
    latents: torch.Tensor
    result: Result | None = None
    _original: torch.Tensor | None = field(default=None, repr=False)
    _model: "Model | None" = field(default=None, repr=False)
    _size: tuple[int, int] = field(default=(0, 0), repr=False)

    def preview(self, index: int) -> "Image":
        """Return picture `index` as far as it is known now: RGB, the size of the finished picture."""
        if self.result is not None:
            return self.result.images[index]
        if self._original is None:
            from PIL import Image

            return Image.new("RGB", self._size, (128, 128, 128))
        assert self._model is not None
        return diffusion.decode_preview(self._model.pipeline, self._original[index], self._size)

    def without_preview(self) -> "Step":
        """Return the same step, of which nothing can be seen: its previews are grey, its latents zero."""
        return replace(self, latents=torch.zeros_like(self.latents), _original=None)


class Model(Variations, Guides):
    """A loaded model.

    Attributes:
        source: what it was loaded from: `emoji`, a folder, a file or a hub id.
        folder: where its files are.
        origin: the same with its revision, variant, base and decoder.
        family: what it can make, and its defaults.
        pipeline: the diffusers pipeline, for everything that is not here.
        guides: the ControlNet (`control`) and the IP-Adapter (`style`) that were added: `name` and `sha256`.
        control: the ControlNet itself, or None.
        loras: those that were added: `name` of the file, its `sha256`, and its `weight`.
        memory: which memory levers a budget chose, or an out-of-memory error added, and why; in words.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        family: Family,
        pipeline: Any,
        memory_gib: float | None = None,
        files: Mapping[str, Path] | None = None,
        origin: Source | None = None,
    ) -> None:
        """Wrap a loaded pipeline; users call `load`. `files` are its weights by name, if they are not all of the folder's."""
        self.source = source
        self.origin = origin or Source(source, folder)
        self._files = files
        self.folder = folder
        self.family = family
        self.pipeline = pipeline
        self.loras: list[dict[str, Any]] = []
        self.guides = {}
        self.control = None
        self._kept: dict[Any, Any] = {}
        self._rung, self.memory = 0, ""
        if memory_gib is not None:
            needs = measure_needs(pipeline, family.size_px)
            self._rung, self.memory = choose_rung(needs, memory_gib, pipeline.device)
        self._applied = self._apply(EXACT)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.pipeline.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.pipeline.dtype

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file by its path inside the folder."""
        return hash_weights(self.folder) if self._files is None else hash_files(self._files)

    @property
    def licence(self) -> str | None:
        """The name of its licence, where it is known."""
        card = card_of(self.source)
        return card.licence if card else None

    @property
    def plan(self) -> Plan:
        """The speed plan."""
        return self._applied.plan

    @property
    def applied(self) -> list[dict[str, Any]]:
        """What each lever of the plan did so far, and why not."""
        return self._applied.report()

    def set_plan(self, plan: str | Path | Plan) -> None:
        """Change the speed plan; the old one is undone exactly.

        Args:
            plan: `exact`, `balanced` or `fast`; a profile file that `tune` wrote; levers joined by `+`, as
                in `openvino + step-cache(interval=2)`; or a `Plan`.

        Raises:
            PlanError: there is no such plan or lever, one that was named cannot engage here, the profile
                is another model's or machine's, or a run is going on. The old plan is kept then.
        """
        chosen = self.find_plan(plan)
        before = self._applied.plan
        self._applied.undo()
        try:
            self._applied = self._apply(chosen)
        except BaseException:
            self._applied = self._apply(before)
            raise

    def _apply(self, plan: Plan) -> AppliedPlan:
        memory = rungs(self.pipeline.device)[self._rung].levers
        return AppliedPlan(plan, self.pipeline, self._kept, memory, self.folder, lambda: self.hashes)

    def _make_room(self, reason: str, back_to: tuple[int, str]) -> None:
        """Go down to the next rung of memory levers that the plan allows, and say so.

        Args:
            reason: the error, in words.
            back_to: the rung, and what was said of it, to go back to where none is left.

        Raises:
            ModelError: none is left.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        plan = self.plan
        self._applied.undo()
        for lower in range(self._rung + 1, len(rungs(self.device))):
            self._rung = lower
            with contextlib.suppress(PlanError):  # it conflicts with the plan
                self._applied = self._apply(plan)
                rung = rungs(self.device)[self._rung]
                differ = "" if rung.same else "; pictures may differ slightly from those before"
                self.memory = f"out of memory: from now on with {' + '.join(rung.levers)}{differ}"
                warnings.warn(f"{self.memory} ({reason})", stacklevel=2)
                return
        self._rung, self.memory = back_to
        self._applied = self._apply(plan)
        raise ModelError(f"out of memory ({reason}): make smaller pictures, fewer at once, or load the model in bfloat16")

    @contextlib.contextmanager
    def plan_for_a_while(self, plan: str | Path | Plan) -> Iterator[None]:
        """Change the plan inside a `with` block; the one before comes back."""
        before = self.plan
        if isinstance(plan, Plan | str) and plan in (before, before.name):
            yield
            return
        self.set_plan(plan)
        try:
            yield
        finally:
            self.set_plan(before)

    def check_idle(self, what: str) -> None:
        """Refuse to change a part of the model while pictures are made with it.

        Raises:
            RequestError: a run is going on.
        """
        if self._applied.busy:
            raise RequestError(f"a run is still going: finish or close its stream before changing {what}")

    def add_lora(self, path: str | Path, *, weight: float = 1.0) -> None:
        """Add a LoRA in diffusers', peft's or kohya's layout; several add up.

        Args:
            path: the .safetensors file, or its folder.
            weight: its strength; 0 is without it, 1 as it was trained.

        Raises:
            ModelError: there is no such file, it is no LoRA, or it matches no layer of this model.
        """
        if not isinstance(weight, (int, float)) or not abs(weight) < 100:
            raise ModelError(f"weight must be a number below 100, got {weight!r}")
        if not isinstance(path, (str, Path)):
            raise ModelError(f"a LoRA is the path of its file or folder, got {path!r}")
        self.check_idle("the LoRAs")
        name = f"lora{len(self.loras)}"
        file = adapters.load_adapter(self.pipeline, Path(path), name)
        self.loras.append({"name": file.name, "sha256": hash_file(file), "weight": float(weight)})
        names = [f"lora{number}" for number in range(len(self.loras))]
        self.pipeline.set_adapters(names, [lora["weight"] for lora in self.loras])

    def remove_loras(self) -> None:
        """Remove every LoRA; nothing of them is left."""
        if self.loras:
            self.check_idle("the LoRAs")
            self.pipeline.unload_lora_weights()
        self.loras.clear()

    def find_plan(self, plan: str | Path | Plan) -> Plan:
        """Return the plan that `set_plan` would apply; changes nothing.

        Raises:
            PlanError: there is none, or the profile is another model's or machine's.
        """
        if isinstance(plan, Path) or (isinstance(plan, str) and plan.endswith(".json")):
            profile = profiles.read_profile(plan)
            profile.check_fits(self.hashes, machine_of(self.device))
            return Plan(f"profile {Path(plan).name}", tuple(profile.plan), named=True)
        return find_plan(plan, self.family.name)

    def generate(self, prompt: str, **settings: Unpack[Settings]) -> Result:
        """Make pictures from a prompt.

        Args:
            prompt: what to draw; in Stable Diffusion, SDXL and FLUX `(word:1.3)` weighs a word.
            **settings: `seed`, `num_images`, `num_steps`, `guidance` (1 is off), `negative_prompt`,
                `width`, `height` (pixels), `scheduler`; `image` with `strength` repaints a picture,
                `mask` only where it is white, `margins` (left, right, top, bottom) around it; an
                editing model takes `image` alone; `control` and `style_image`, each with its weight,
                are followed by what `add_control` and `add_style` loaded; `long_prompt` reads a prompt
                to its end; `true_guidance` adds guidance in two passes where `guidance` is an input of
                the model; `noise` (B, C, h, w) of unit variance replaces the noise that the seeds
                would draw; `temperature` is for models that draw one token after the other, 0
                taking the most likely.

        Raises:
            RequestError: a setting is wrong; the message says which and what to do.
        """
        return self.run(prompt, None, **settings)

    __call__ = generate

    def run(self, prompt: str, on_step: Callable[[Step], None] | None, **settings: Unpack[Settings]) -> Result:
        """Make pictures in this thread and tell `on_step`, if any, of every step; else as `generate`.

        An exception raised in `on_step`, or Ctrl-C, ends the work and leaves the model as it was.

        Raises:
            RequestError: a setting is wrong.
        """
        request = self._prepare(prompt, settings)
        tell = (lambda steps: on_step(steps[0])) if on_step else None
        return self.run_together([request], tell, settings.get("noise"))[0]

    def check(self, prompt: str, **settings: Unpack[Settings]) -> Request:
        """Return the request that `generate` would run: its defaults filled in, its seed drawn; nothing runs.

        Raises:
            RequestError: a setting is wrong.
        """
        said = {name: value for name, value in settings.items() if value is not None}
        request = build_request(prompt, self.family, self._applied.default_settings(said) | said)
        noise = settings.get("noise")
        if noise is not None and not isinstance(noise, torch.Tensor):
            raise RequestError(f"noise must be a torch tensor, got {type(noise).__name__}")
        diffusion.check_scheduler(self.pipeline, request)
        return request

    def joined_by(self, request: Request) -> Hashable | None:
        """Return what requests of one batch have in common; None for one that runs alone.

        From text alone, and under levers that treat every picture by itself, they may differ in prompt, negative
        prompt, seed and number of pictures: noise is per picture.
        """
        others = (request.control, request.style_image, request.temperature)
        plain = request.mode == "text-to-image" and not request.long_prompt and all(other is None for other in others)
        weighed = has_weights(request.prompt) or has_weights(request.negative_prompt)
        if not plain or weighed or not self.family.joins or not all(lever.per_picture for lever in self._applied.levers):
            return None
        return replace(request, prompt="", negative_prompt="any" if request.negative_prompt else "", seed=0, num_images=1)

    def run_together(
        self,
        requests: Sequence[Request],
        on_step: Callable[[list[Step]], None] | None = None,
        noise: torch.Tensor | None = None,
    ) -> list[Result]:
        """Make the pictures of checked requests as one batch, in this thread.

        Args:
            requests: of `check`; several are equal in `joined_by`.
            on_step: is told of every step, one `Step` for each request; what it raises ends the work.
            noise: what a single request's `noise` was.

        Raises:
            RequestError: a request cannot run.
        """
        run = self._ready(requests[0], noise, requests[1:])
        ends = list(itertools.accumulate(request.num_images for request in requests))
        rows = [slice(end - request.num_images, end) for request, end in zip(requests, ends, strict=True)]
        started = time.perf_counter()

        def tell(state: diffusion.StepState) -> None:
            assert on_step is not None
            elapsed_s = time.perf_counter() - started
            parts = (replace(state, latents=state.latents[own], original=state.original[own]) for own in rows)
            on_step([self._step(part, request, elapsed_s) for part, request in zip(parts, requests, strict=True)])

        images = run(tell if on_step else None)
        elapsed_s = time.perf_counter() - started
        return [
            self._result(*pair, elapsed_s, noise is not None)
            for pair in zip(requests, (images[own] for own in rows), strict=True)
        ]

    def stream(self, prompt: str, **settings: Unpack[Settings]) -> Generator[Step, None, None]:
        """Make pictures step by step; takes what `generate` takes.

        Yields a `Step` after every denoising step. Leaving the loop stops the work within one step
        and leaves the model as it was. The last step carries `.result`.

        Raises:
            RequestError: a setting is wrong; raised here, before anything runs.
        """
        request, noise = self._prepare(prompt, settings), settings.get("noise")
        return self._read(request, diffusion.in_lock_step(self._ready(request, noise)), given_noise=noise is not None)

    def notice_about(self, prompt: str, name: str = "prompt") -> str | None:
        """Return what `generate` will warn of: a prompt's end that the text encoder will not read, weights it does not know."""
        reason = why_not(self.pipeline, self.family) if has_weights(prompt) else None
        if reason:
            return f"the {name}'s weights are read as plain words: {reason}"
        limit, cut = diffusion.cut_text(self.pipeline, prompt, self.family.chat)
        return f"the {name} is longer than the {limit} tokens this model reads; left out: {cut!r}" if cut else None

    def _prepare(self, prompt: str, settings: Settings) -> Request:
        """Check everything before anything runs; a prompt too long for the text encoder warns."""
        request = self.check(prompt, **settings)
        whole = reads_on(self.pipeline, self.family, request)
        for text, name in ((request.prompt, "prompt"), (request.negative_prompt, "negative prompt")):
            if text and not whole and (notice := self.notice_about(text, name)):
                warnings.warn(notice, stacklevel=4)
        return request

    def _ready(
        self, request: Request, noise: torch.Tensor | None, beside: Sequence[Request] = ()
    ) -> Callable[[diffusion.OnStep | None], list[Any]]:
        run = diffusion.prepare_run(self.pipeline, request, self.family, noise, self.control, beside)
        return self._with_plan(request, run)

    def _with_plan(self, request: Request, run: diffusion.Run) -> Callable[[diffusion.OnStep | None], list[Any]]:
        """Let the plan's levers follow a run, in whatever thread it is computed."""
        guided = is_guided(request, self.family)
        facts = RunFacts(guided, request.num_steps, request.guidance, run.scheduler, run.generators)

        def followed(on_step: diffusion.OnStep | None) -> list[Any]:
            applied = self._applied  # the plan when the run begins, which may be later than its request

            def after_step(state: diffusion.StepState) -> None:
                applied.advance(state.index, state.num_steps)
                if on_step is not None:
                    on_step(state)

            with applied.running(facts):
                return run(after_step if applied.levers or on_step else None)

        def retried(on_step: diffusion.OnStep | None) -> list[Any]:
            back_to = (self._rung, self.memory)
            while True:
                try:
                    return followed(on_step)
                except (RuntimeError, MemoryError) as error:
                    reason = out_of_memory(error)
                    if reason is None:
                        raise
                self._make_room(reason, back_to)  # outside of the handler, whose traceback holds on to the tensors

        return retried

    def _read(self, request: Request, states: Generator[Any, None, None], given_noise: bool) -> Generator[Step, None, None]:
        """Turn the family's states into steps: one is held back, so that the last carries the result."""
        started = time.perf_counter()
        held: Step | None = None
        try:
            for state in states:
                elapsed_s = time.perf_counter() - started
                if isinstance(state, list):
                    assert held is not None
                    yield replace(held, elapsed_s=elapsed_s, result=self._result(request, state, elapsed_s, given_noise))
                    return
                if held is not None:
                    yield held
                held = self._step(state, request, elapsed_s)
        finally:
            states.close()

    def _step(self, state: diffusion.StepState, request: Request, elapsed_s: float) -> Step:
        size = (request.width, request.height)
        return Step(state.index, state.num_steps, elapsed_s, state.latents, None, state.original, self, size)

    def _result(self, request: Request, images: list["Image"], elapsed_s: float, given_noise: bool) -> Result:
        receipts_of = (self._receipt(request.of_picture(index), image, given_noise) for index, image in enumerate(images))
        return Result([Picture(*pair) for pair in zip(images, receipts_of, strict=True)], elapsed_s)

    def _receipt(self, request: Request, image: "Image", given_noise: bool) -> receipts.Receipt:
        scheduler = getattr(self.pipeline, "scheduler", None)
        return receipts.Receipt(
            version=receipts.VERSION,
            request=receipts.describe_request(request, given_noise),
            pixels_sha256=receipts.pixels_sha256(image),
            model={
                **self.origin.recorded(),
                "family": self.family.name,
                "sha256": self.hashes,
                "licence": self.licence,
                **self.guides,
            },
            loras=[dict(lora) for lora in self.loras],
            plan={"name": self.plan.name, "levers": self.applied},
            environment=environment(self.device, self.dtype) | ({"scheduler": type(scheduler).__name__} if scheduler else {}),
        )
