"""Levers that compute less: whole steps, deep blocks or guidance taken from the steps before.

Which steps are computed follows a fixed schedule, never a threshold over the batch: a picture must
not depend on what it was made with.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from imagegen.levers.lever import Lever, RunFacts, Target, map_tensors, tensors_of
from imagegen.request import RequestError


def extrapolate(history: Sequence[tuple[int, Any]], index: int) -> Any:
    """Continue a series by the polynomial through its points (Lagrange's form).

    Args:
        history: (step, value) of the last computed steps, one more than the polynomial's order.
        index: the step to guess.

    Source: TaylorSeer, Liu et al. (2025), https://arxiv.org/abs/2503.06923, on the denoiser's output.
    """
    guess = 0
    for step, value in history:
        weight = 1.0
        for other, _ in history:
            if other != step:
                weight *= (index - other) / (step - other)
        guess = guess + weight * value
    return guess


def continue_output(history: Sequence[tuple[int, Any]], index: int) -> Any:
    """Return an output of the same kind as those before, every tensor of it continued; arguments as of `extrapolate`."""
    steps, outputs = zip(*history, strict=True)
    series = zip(*map(tensors_of, outputs), strict=True)
    guesses = iter([extrapolate([*zip(steps, values, strict=True)], index) for values in series])
    return map_tensors(lambda _: next(guesses), outputs[-1])


@dataclass
class Scheduled(Lever):
    """A lever that computes the first `warmup` steps, then every `interval`-th, and the last.

    In the second half of the steps, where less is decided, it may be every `late`-th: 0 is as before. `order`
    is that of the polynomial that continues what was computed: 0 repeats the last.
    """

    warmup: int = 3
    interval: int = 2
    late: int = 0
    order: int = 0

    def __post_init__(self) -> None:
        """Start before the first step."""
        super().__post_init__()
        self.index = self.num_steps = self.seen = 0
        self.histories: dict[Any, list[tuple[int, Any]]] = {}
        self.calls = 0  # of the denoiser within this step: pipelines may call it once for each half of guidance

    def begin(self, run: RunFacts) -> None:
        """Forget the last run."""
        self.index, self.num_steps, self.calls, self.seen = 0, run.num_steps, 0, 0
        self.histories.clear()

    def advance(self, index: int, num_steps: int) -> None:
        """Go to the next step."""
        self.index, self.num_steps, self.calls = index + 1, num_steps, 0

    def end(self) -> None:
        """Forget this run: nothing of it may reach the next picture, even one that the pipeline makes outside a plan."""
        self.begin(RunFacts(False, 0))

    def is_due(self) -> bool:
        """Return whether this step is computed in full."""
        position, due = self.position(), self.warmup - 1
        while due < position:
            due += self.late if self.late and 2 * due >= self.num_steps else self.interval
        return position < self.warmup or due == position or self.index >= self.num_steps - 1

    def position(self) -> int:
        """Return where the schedule is: at this step."""
        return self.index

    def remember(self, slot: Any, value: Any) -> None:
        """Keep what was computed at this step, and what its continuation needs."""
        self.histories[slot] = [*self.histories.get(slot, []), (self.index, value)][-(self.order + 1) :]

    def requires(self, target: Target) -> str | None:
        """Return what is wrong with the settings."""
        if self.warmup < 1 or self.interval < 2 or self.late < 0 or self.late == 1 or not 0 <= self.order <= 2:
            return f"{self} is impossible: warmup is from 1, interval from 2, late 0 or from 2, order 0, 1 or 2"
        return None


@dataclass
class StepCache(Scheduled):
    """Skip the denoiser on some steps and continue its output from the steps before."""

    name: ClassVar[str] = "step-cache"
    per_picture: ClassVar[bool] = True
    stage: ClassVar[int] = 8
    conflicts: ClassVar[frozenset[str]] = frozenset({"first-block-cache", "taylorseer-cache", "mag-cache", "sea-cache"})

    def apply(self, target: Target) -> None:
        """Stand between the pipeline and its denoiser."""

        def around(compute: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call, self.calls = self.calls, self.calls + 1
                sample = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
                slot = (call, len(sample))  # other rows, when guidance goes on or off, are another series
                history = self.histories.get(slot)
                if self.is_due() or not history:
                    self.counts["steps computed"] += 1
                    output = compute(*args, **kwargs)
                    self.remember(slot, output)
                    return output
                self.counts["steps skipped"] += 1
                return continue_output(history, self.index)

            return forward

        self.patches.wrap(target.denoiser, "forward", around)

    def engaged(self) -> str:
        """Return the steps skipped."""
        return super().engaged() if self.counts["steps skipped"] else ""


@dataclass
class DeepCache(Scheduled):
    """On some steps compute a UNet's outermost `depth` blocks only and keep the deep ones' last output.

    Source: Ma et al. (2023), DeepCache, https://arxiv.org/abs/2312.00858.
    """

    depth: int = 1

    name: ClassVar[str] = "deep-cache"
    per_picture: ClassVar[bool] = True
    stage: ClassVar[int] = 6
    conflicts: ClassVar[frozenset[str]] = frozenset({"openvino", "compile"})

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: it needs a UNet with blocks to leave out."""
        blocks = getattr(target.worker, "down_blocks", None)
        if blocks is None or not all(hasattr(target.worker, name) for name in ("mid_block", "up_blocks")):
            return f"deep-cache is for UNets, and this is a {type(target.worker).__name__}: use step-cache"
        if not 1 <= self.depth < len(blocks) or self.order:
            return f"deep-cache here takes a depth from 1 to {len(blocks) - 1} and order 0"
        return super().requires(target)

    def apply(self, target: Target) -> None:
        """Stand before every deep block, and count the calls of the whole."""
        unet = target.worker
        middle = [unet.mid_block] if unet.mid_block is not None else []
        deep = [*unet.down_blocks[self.depth :], *middle, *unet.up_blocks[: len(unet.up_blocks) - self.depth]]
        for number, block in enumerate(deep):
            self.patches.wrap(block, "forward", partial(self._around, number))

        def count(compute: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self.calls += 1
                return compute(*args, **kwargs)

            return forward

        self.patches.wrap(target.denoiser, "forward", count)

    def _around(self, number: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            sample = args[0] if args else kwargs["hidden_states"]
            slot = (number, self.calls, sample.shape)
            kept = self.histories.get(slot)
            if self.is_due() or not kept:
                output = compute(*args, **kwargs)
                self.remember(slot, output)
                return output
            self.counts["deep blocks skipped"] += 1
            return kept[-1][1]

        return forward


@dataclass
class GuidanceCache(Scheduled):
    """On some steps compute the prompt's half of guidance only and continue the difference to the other half."""

    warmup: int = 5

    name: ClassVar[str] = "guidance-cache"
    per_picture: ClassVar[bool] = True
    stage: ClassVar[int] = 7
    conflicts: ClassVar[frozenset[str]] = frozenset({"guidance-interval"})
    guided = False

    def begin(self, run: RunFacts) -> None:
        """Remember whether there are two halves at all."""
        super().begin(run)
        self.guided = run.guided

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: the two halves must be one batch."""
        return halves_are_one_batch(self, target) or super().requires(target)

    def position(self) -> int:
        """Return how many steps reached the denoiser before this one: a step cache may stand in front."""
        return self.seen

    def apply(self, target: Target) -> None:
        """Stand between the pipeline and its denoiser."""
        self.patches.wrap(target.denoiser, "forward", self._around)

    def _around(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            due, history = self.is_due(), self.histories.get(0)
            self.seen += 1
            rows = len(args[0] if args else kwargs["sample"])
            if not self.guided or due or not history or len(history[-1][1]) * 2 != rows:
                output = compute(*args, **kwargs)
                if self.guided and rows % 2 == 0:
                    without, given = output[0].chunk(2)
                    self.remember(0, without - given)
                return output
            self.counts["half steps skipped"] += 1
            given = _prompt_half(compute, args, kwargs, rows)
            return (torch.cat([given + extrapolate(history, self.index), given]),)

        return forward


@dataclass
class GuidanceInterval(Lever):
    """Guide only between two shares of the steps; outside, the prompt's half alone is computed.

    Source: Kynkäänniemi et al. (2024), https://arxiv.org/abs/2404.07724.
    """

    start: float = 0.0
    stop: float = 0.8

    name: ClassVar[str] = "guidance-interval"
    per_picture: ClassVar[bool] = True
    stage: ClassVar[int] = 7
    conflicts: ClassVar[frozenset[str]] = frozenset({"guidance-cache"})
    guided = False

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage: the two halves must be one batch."""
        if not 0 <= self.start < self.stop <= 1:
            return f"guidance-interval takes shares of the steps, 0 <= start < stop <= 1, got {self.start} and {self.stop}"
        return halves_are_one_batch(self, target)

    def begin(self, run: RunFacts) -> None:
        """Start before the first step."""
        self.guided, self.index, self.num_steps = run.guided, 0, run.num_steps

    def advance(self, index: int, num_steps: int) -> None:
        """Go to the next step."""
        self.index, self.num_steps = index + 1, num_steps

    def end(self) -> None:
        """Outside a run, guide as the pipeline says."""
        self.guided = False

    def apply(self, target: Target) -> None:
        """Stand between the pipeline and its denoiser."""

        def around(compute: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not self.guided or self.start <= self.index / max(self.num_steps, 1) < self.stop:
                    return compute(*args, **kwargs)
                self.counts["half steps skipped"] += 1
                given = _prompt_half(compute, args, kwargs, len(args[0] if args else kwargs["sample"]))
                return (torch.cat([given, given]),)

            return forward

        self.patches.wrap(target.denoiser, "forward", around)


def halves_are_one_batch(lever: Lever, target: Target) -> str | None:
    """Return why a lever cannot act on guidance here; None where both halves are one batch."""
    unet = getattr(target.pipeline, "unet", None)
    if unet is not None and getattr(unet.config, "time_cond_proj_dim", None) is None:  # else guidance is an input
        return None
    return f"{lever.name} needs a pipeline that computes both halves of guidance as one batch, as those with a UNet do"


def _prompt_half(compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> torch.Tensor:
    """Compute the second half of a batch, where diffusers puts the prompt."""
    halve = lambda tensor: tensor[rows // 2 :] if tensor.dim() and len(tensor) == rows else tensor  # noqa: E731
    return compute(*map_tensors(halve, args), **map_tensors(halve, kwargs))[0]


@dataclass
class FewerSteps(Lever):
    """Take fewer steps, with another scheduler if one is named, where the user named neither."""

    num_steps: int = 12
    scheduler: str | None = None

    name: ClassVar[str] = "fewer-steps"
    per_picture: ClassVar[bool] = True
    stage: ClassVar[int] = 0

    def requires(self, target: Target) -> str | None:
        """Return what is wrong with the settings."""
        if self.num_steps < 1:
            return "fewer-steps needs at least one step"
        if self.scheduler is not None:
            from imagegen.families.arguments import methods_called
            from imagegen.sampling import make_scheduler

            try:
                make_scheduler(target.pipeline.scheduler, self.scheduler, methods_called(target.pipeline))
            except RequestError as error:
                return f"fewer-steps: {error}"
        return None

    def apply(self, target: Target) -> None:
        """Change nothing of the model: defaults are the request's."""

    def default_settings(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Return the steps, and the scheduler where one is named; nothing where the user gave either."""
        if "num_steps" in given or "scheduler" in given:
            return {}
        return {"num_steps": self.num_steps} | ({"scheduler": self.scheduler} if self.scheduler else {})

    def begin(self, run: RunFacts) -> None:
        """Count the runs that took this many steps."""
        self.counts[f"runs of {self.num_steps} steps"] += run.num_steps == self.num_steps
