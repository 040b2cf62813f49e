"""CUDA graphs: the denoiser, or a whole step, recorded once and replayed without the host in between.

A step of the schedulers listed here is linear in what it is given, so that one row of numbers stands for
it. The rows are read off diffusers' own scheduler, by steps on unit vectors: another version or option of
it cannot disagree, and one whose steps are not linear is found out and runs outside the graph.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from imagegen.levers.blocks import CACHES
from imagegen.levers.lever import Lever, RunFacts, Style, Target, map_tensors, shapes_of, tensors_of
from imagegen.levers.memory import OFFLOADS
from imagegen.levers.steps import halves_are_one_batch

CAPTURABLE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
MAX_STEPS = 1000
WARM_UPS = 3  # libraries allocate their workspaces in the first calls, which a graph must not record


def record(compute: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record a function of no arguments as a CUDA graph; return its outputs and what computes them anew, in place.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compute()
    return output, graph.replay


class Replayed:
    """A denoiser's function that is recorded once for each set of shapes and strength of a style, and replayed."""

    def __init__(self, compute: Callable[..., Any], style: Style) -> None:
        """Record nothing yet."""
        self.compute = compute
        self.style = style
        self.recorded: dict[tuple[str, str], tuple[list[torch.Tensor], Any, Callable[[], None]]] = {}

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Record for these shapes, unless that was done; the function runs a few times for it."""
        key = (shapes_of(args, kwargs), self.style.key())
        if key in self.recorded:
            return
        device = next(tensor.device for tensor in tensors_of((args, kwargs)) if tensor.dim())
        static_args, static_kwargs = map_tensors(lambda tensor: tensor.to(device, copy=True), (args, kwargs))
        output, replay = record(lambda: self.compute(*static_args, **static_kwargs))
        self.recorded[key] = (tensors_of((static_args, static_kwargs)), output, replay)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return fresh tensors: the next replay overwrites those of the graph."""
        self.prepare(*args, **kwargs)
        inputs, output, replay = self.recorded[shapes_of(args, kwargs), self.style.key()]
        for static, tensor in zip(inputs, tensors_of((args, kwargs)), strict=True):
            static.copy_(tensor, non_blocking=True)
        replay()
        return map_tensors(torch.clone, output)


@dataclass
class _Graph(Lever):
    """What both kinds need and exclude."""

    stage: ClassVar[int] = 4

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        return None if target.device.type == "cuda" else f"{self.name} needs a CUDA device, and the model is on the CPU"


@dataclass
class CudaGraph(_Graph):
    """Record the denoiser alone; guidance and scheduler stay the pipeline's own."""

    name: ClassVar[str] = "cuda-graph"
    conflicts: ClassVar[frozenset[str]] = CACHES | OFFLOADS | {"compile", "deep-cache", "openvino", "step-graph"}

    def apply(self, target: Target) -> None:
        """Stand before the denoiser."""
        replayed = Replayed(target.denoiser.forward, Style(target.denoiser))

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = replayed(*args, **kwargs)
            self.counts["denoiser calls replayed"] += 1
            self.counts["graphs recorded"] = len(replayed.recorded)
            return output

        self.patches.set(target.denoiser, "forward", forward)


@dataclass(frozen=True)
class StepTable:
    """The steps of a run as numbers.

    Attributes:
        rows: (num_steps, 6), float32: a, b, c, d, p, q of x' = a·x + b·out + c·x0_before + d·noise and of
            x0 = p·x + q·out, which the next step calls `x0_before`.
        noisy: whether any step adds noise.
    """

    rows: torch.Tensor
    noisy: bool


def read_table(scheduler: Any) -> StepTable | None:
    """Read the steps off a scheduler; None where they are not linear, or the scheduler is not one of `CAPTURABLE`.

    Args:
        scheduler: diffusers' own, its time steps set, before its first step; not changed.
    """
    if type(scheduler).__name__ not in CAPTURABLE:
        return None
    trial = copy.deepcopy(scheduler)
    for name in ("step", "scale_model_input"):  # a lever may stand before the run's own
        vars(trial).pop(name, None)
    trial.timesteps, trial.sigmas = trial.timesteps.cpu(), trial.sigmas.cpu()
    rows = []
    for index in range(scheduler.begin_index or 0, len(trial.timesteps)):
        row = _read_step(trial, index)
        if row is None:
            return None
        rows.append(row)
    table = torch.stack(rows)
    return StepTable(table, bool(table[:, 3].any()))


def _read_step(trial: Any, index: int) -> torch.Tensor | None:
    """Read one step off: unit vectors give the numbers, random ones show that nothing else was at work."""
    chance = torch.Generator().manual_seed(index)
    # columns: x, out and x0_before alone, then none of them (noise alone), then all at random
    given = torch.cat([torch.eye(3), torch.zeros(3, 1), torch.randn(3, 4, generator=chance)], dim=1)
    given = given.reshape(3, 1, 8, 1, 1)  # a picture of eight channels
    keeps_original = getattr(trial, "model_outputs", None) is not None
    trial._step_index = index
    trial.is_scale_input_called = True
    if keeps_original:
        trial.model_outputs[-1] = given[2].clone()
    options = {"generator": chance.manual_seed(index), "return_dict": False}
    after = trial.step(given[1].clone(), trial.timesteps[index], given[0].clone(), **options)[0]
    original = trial.model_outputs[-1] if keeps_original else torch.zeros_like(given[0])
    noise = torch.randn(after.shape, generator=chance.manual_seed(index)).flatten()
    given, after, original = given.reshape(3, 8), after.flatten(), original.flatten()
    d = after[3] / noise[3]
    a, b, c = (after - d * noise)[:3]
    row = torch.stack([a, b, c, d, original[0], original[1]])
    wrong = (after - (a * given[0] + b * given[1] + c * given[2] + d * noise)).abs().max()
    wrong_original = (original - (original[0] * given[0] + original[1] * given[1])).abs().max()
    return row if max(wrong, wrong_original) <= 1e-4 * max(1.0, float(after.abs().max())) else None


class StepLoop:
    """What a recorded step reads and writes: on the device, at fixed addresses, whatever the run."""

    def __init__(self, latents: torch.Tensor, guided: bool, num_noises: int) -> None:
        """Allocate.

        Args:
            latents: (B, …), of the shape, device and dtype of every run's.
            guided: whether the denoiser's output is that of two halves.
            num_noises: steps that add noise; 0 where none does.
        """
        device = latents.device
        self.rows = torch.zeros(MAX_STEPS, 6, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.guidance = torch.ones((), device=device)
        self.guided = guided
        self.latents = torch.zeros_like(latents, dtype=torch.float32)
        self.original = torch.zeros_like(self.latents)
        self.noise = torch.zeros(num_noises, *latents.shape, device=device)

    def begin(self, table: StepTable, guidance: float, noise: torch.Tensor | None) -> None:
        """Start a run."""
        self.rows[: len(table.rows)].copy_(table.rows)
        self.guidance.fill_(guidance)
        self.original.zero_()
        if noise is not None:
            self.noise.copy_(noise)

    def step(self, output: torch.Tensor) -> None:
        """Take one step with the denoiser's output; reads nothing back, so that a graph can record it."""
        output = output.float()
        if self.guided:
            without, given = output.chunk(2)
            output = without + self.guidance * (given - without)
        a, b, c, d, p, q = self.rows.index_select(0, self.index)[0].unbind()
        original = p * self.latents + q * output
        latents = a * self.latents + b * output + c * self.original
        if len(self.noise):
            latents = latents + d * self.noise.index_select(0, self.index)[0]
        self.latents.copy_(latents)
        self.original.copy_(original)


@dataclass
class StepGraph(_Graph):
    """Record a whole step: denoiser, guidance and scheduler in one graph; for the schedulers in `CAPTURABLE`.

    With another scheduler the denoiser alone is recorded, and `engaged` says so.
    """

    name: ClassVar[str] = "step-graph"
    conflicts: ClassVar[frozenset[str]] = (
        CACHES
        | OFFLOADS
        | {"compile", "deep-cache", "openvino", "cuda-graph", "step-cache", "guidance-cache", "guidance-interval"}
    )

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: guidance has to be the plain kind."""
        return super().requires(target) or halves_are_one_batch(self, target)

    def apply(self, target: Target) -> None:
        """Stand before the denoiser."""
        self.compute, self.style = target.denoiser.forward, Style(target.denoiser)
        self.replayed = Replayed(self.compute, self.style)  # for schedulers whose steps are no table
        self.recorded: dict[Any, tuple[StepLoop, Replayed]] = {}
        self.run: RunFacts | None = None
        self.patches.set(target.denoiser, "forward", self._forward)

    def begin(self, run: RunFacts) -> None:
        """Watch the run's own scheduler, whose steps the pipeline sets later."""
        self.run, self.index, self.table_read = run, 0, False
        self.loop: StepLoop | None = None
        self.table: StepTable | None = None
        self.sample: torch.Tensor | None = None
        if run.scheduler is None:
            return
        scale, step = getattr(run.scheduler, "scale_model_input", None), run.scheduler.step

        def watch(sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.sample = sample
            return scale(sample, *args, **kwargs) if scale is not None else sample

        def replayed_step(output: torch.Tensor, time: Any, sample: torch.Tensor, **options: Any) -> Any:
            if self.loop is None:
                return step(output, time, sample, **options)
            scheduler = run.scheduler
            scheduler._step_index = (scheduler.begin_index or 0) + self.index + 1
            if getattr(scheduler, "model_outputs", None) is not None:
                scheduler.model_outputs[-1] = self.loop.original.to(sample.dtype, copy=True)
            self.index += 1
            return (self.loop.latents.to(sample.dtype, copy=True),)

        if scale is not None:
            run.scheduler.scale_model_input = watch
        run.scheduler.step = replayed_step

    def end(self) -> None:
        """Let the run's tensors go; what was recorded stays for the next one of its shapes."""
        self.run = self.loop = self.table = self.sample = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        run = self.run
        if run is not None and run.scheduler is not None and not self.table_read:
            self.table, self.table_read = read_table(run.scheduler), True
        if run is None or self.table is None:
            self.counts["denoiser calls replayed, the scheduler outside"] += 1
            return self.replayed(*args, **kwargs)
        sample = self.sample if self.sample is not None else rows
        latents = sample.chunk(2)[0] if run.guided else sample
        loop, replayed = self._find(args, kwargs, latents, run, self.table)
        if self.loop is None:
            noise = _draw(run, latents, len(self.table.rows)) if self.table.noisy else None
            replayed.prepare(*args, **kwargs)
            loop.begin(self.table, run.guidance, noise)
            self.loop = loop
        loop.latents.copy_(latents)
        loop.index.fill_(self.index)
        self.counts["whole steps replayed"] += 1
        return replayed(*args, **kwargs)

    def _find(self, args: Any, kwargs: Any, latents: torch.Tensor, run: RunFacts, table: StepTable) -> tuple[StepLoop, Replayed]:
        """Return the loop and the recording of these shapes."""
        num_noises = len(table.rows) if table.noisy else 0
        key = (shapes_of(args, kwargs), tuple(latents.shape), run.guided, num_noises)
        if key not in self.recorded:
            loop = StepLoop(latents, run.guided, num_noises)

            def whole(*args: Any, **kwargs: Any) -> Any:
                output = self.compute(*args, **kwargs)
                loop.step(output[0])
                return output

            self.recorded[key] = (loop, Replayed(whole, self.style))
        return self.recorded[key]


def _draw(run: RunFacts, latents: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Return the noise of every step, (num_steps, B, …): what the stock scheduler would draw, in its order."""
    from diffusers.utils.torch_utils import randn_tensor

    generators = list(run.generators) if len(run.generators) > 1 else run.generators[0]
    drawn = [randn_tensor(latents.shape, generator=generators, device=latents.device) for _ in range(num_steps)]
    return torch.stack(drawn)
