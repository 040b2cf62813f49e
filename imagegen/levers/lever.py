"""What a lever is: one thing that can be done to a loaded pipeline to make it faster, and undone.

Knows nothing of plans, requests or pictures. A lever never changes what it cannot put back: it sets
attributes of objects (`Patches`), or lets a copy of the denoiser do the work.
"""

import ast
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from imagegen.families.diffusion import denoiser_of

ABSENT = object()


@dataclass(frozen=True)
class RunFacts:
    """What levers may know of the run that begins.

    Attributes:
        guided: whether guidance is computed.
        num_steps: how many steps were asked for; `count_steps` and `Lever.advance` know how many are taken.
        guidance: the guidance.
        scheduler: the run's own scheduler, whose steps are not set yet; None outside a model's run.
        generators: one for each picture, from which its noise is drawn.
    """

    guided: bool
    num_steps: int
    guidance: float = 1.0
    scheduler: Any = None
    generators: tuple[torch.Generator, ...] = ()

    def count_steps(self) -> int:
        """Return how many steps the run takes, from the denoiser's first call on, when the pipeline has set them.

        One from a picture takes fewer than were asked for, each family by a rule of its own, and a scheduler of second
        order takes more. One that does not know where it begins, such as DDIM's, counts the steps before that as well.
        """
        steps = getattr(self.scheduler, "timesteps", None)
        return self.num_steps if steps is None else len(steps) - (getattr(self.scheduler, "begin_index", None) or 0)


class Target:
    """The pipeline that levers act on.

    Attributes:
        pipeline: the diffusers pipeline.
        denoiser: the module that the pipeline calls at every step.
        worker: the module that computes: the denoiser, or a copy of it in another precision.
        kept: what levers want to find again when a plan comes back, such as compiled code.
        folder: where the model's files are; None where it has none.
        hashes: a function that returns the SHA-256 of the model's weight files by name.
    """

    def __init__(
        self,
        pipeline: Any,
        kept: dict[Any, Any] | None = None,
        folder: Path | None = None,
        hashes: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """Point at a pipeline; nothing is changed."""
        self.pipeline = pipeline
        self.folder = folder
        self.hashes = hashes
        self.kept = {} if kept is None else kept
        self.denoiser = denoiser_of(pipeline)
        self.worker = self.denoiser

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        return next(self.denoiser.parameters()).device


class Patches:
    """Attributes set on objects, each put back exactly as it was, the last one first."""

    def __init__(self) -> None:
        """Start with none."""
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute; what the object itself held there, if anything, comes back on `undo`."""
        self.keep(owner, name)
        setattr(owner, name, value)

    def keep(self, owner: Any, name: str) -> None:
        """Put back on `undo` what an object itself holds there now, or holds not, whoever changes it until then."""
        before = vars(owner).get(name, ABSENT)
        put_back = partial(vars(owner).pop, name, None) if before is ABSENT else partial(setattr, owner, name, before)
        self._undo.append(put_back)

    def wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace a method by what `make` builds around it."""
        self.set(owner, name, make(getattr(owner, name)))

    def count(self, owner: Any, name: str, counts: Counter[str], label: str) -> None:
        """Count the calls of a method."""

        def around(compute: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                counts[label] += 1
                return compute(*args, **kwargs)

            return counted

        self.wrap(owner, name, around)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Do this as well on `undo`, in its turn."""
        self._undo.append(action)

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()


@dataclass
class Lever(ABC):
    """One speed-up. Its fields are its settings.

    Class attributes:
        name: how plans name it.
        stage: levers apply in the order of their stages, whatever the order they are named in.
        exact: the pictures stay inside the noise floor by construction; others are measured.
        per_picture: it treats every picture of a batch by itself, whatever the others are, and takes any number of them
            without preparing anew: several people's requests may be one batch.
        conflicts: names of the levers that it cannot be combined with; to say it in one of two is enough.
        moves_weights: a run leaves the weights, unchanged, in another place.
        essential: a plan without it would be another plan: where it cannot engage, the plan is refused.
    """

    name: ClassVar[str]
    stage: ClassVar[int] = 5
    exact: ClassVar[bool] = False
    per_picture: ClassVar[bool] = False
    conflicts: ClassVar[frozenset[str]] = frozenset()
    moves_weights: ClassVar[bool] = False
    essential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Start with nothing patched and nothing counted."""
        self.patches = Patches()
        self.counts: Counter[str] = Counter()

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage on this pipeline and machine, with the way out; None where it can."""
        return None

    @abstractmethod
    def apply(self, target: Target) -> None:
        """Make the change."""

    def undo(self) -> None:
        """Put everything back exactly."""
        self.patches.undo()

    def begin(self, run: RunFacts) -> None:  # noqa: B027  most levers have nothing to do here
        """A run begins in this thread."""

    def advance(self, index: int, num_steps: int) -> None:  # noqa: B027  most levers have nothing to do here
        """Step `index` of `num_steps` is done; `num_steps` is exact from here on."""

    def end(self) -> None:  # noqa: B027  most levers have nothing to do here
        """The run is over, however it ended: nothing of it may be left."""

    def engaged(self) -> str:
        """Return what it did so far, from counters, in words; empty where it did nothing."""
        return ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)

    def default_settings(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Return the request settings that it changes, other than those that the user gave."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return its settings as JSON-ready data."""
        return {setting.name: getattr(self, setting.name) for setting in fields(self)}

    def __str__(self) -> str:
        """Write it as plans do: `name(setting=value, …)`, defaults left out."""
        changed = {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default}
        inner = ", ".join(f"{name}={_write(value)}" for name, value in changed.items())
        return f"{self.name}({inner})" if inner else self.name


def _write(value: Any) -> str:
    """Write a setting so that it is read back as it was; quotes only where it would not be."""
    if not isinstance(value, str) or re.search(r"[\s,+()\[\]'\"\\]", value) or not value:
        return repr(value)
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)


def weights_stamp(modules: Iterable[torch.nn.Module]) -> tuple[Any, ...]:
    """Return what changes whenever modules or their weights do: another module, values loaded or trained, a LoRA.

    A LoRA is also switched and scaled without a change of any weight, and fused through `.data`, which torch
    does not count; peft says so on its layers. Other writes in place through `.data` stay unseen.
    """
    stamp: list[Any] = []
    for module in modules:
        stamp += [(id(weight), weight.data_ptr(), weight._version) for weight in module.parameters()]
        for layer in module.modules():
            if hasattr(layer, "merged_adapters"):
                scales = tuple(getattr(layer, "scaling", {}).items())
                stamp.append((scales, tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters)))
    return tuple(stamp)


def map_tensors(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor of nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = {key: map_tensors(change, inner) for key, inner in value.items()}
        return type(value)(**changed) if is_dataclass(value) else changed  # a ModelOutput also counts its entries
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(change, inner) for inner in value)
    return value


def shapes_of(*values: Any) -> str:
    """Return what a recording or compilation holds for: the shapes and dtypes, and everything that is no tensor."""
    return str(map_tensors(lambda tensor: (tuple(tensor.shape), tensor.dtype), values))


class Style:
    """How strongly a denoiser follows an IP-Adapter: its attention processors know, outside of weights and arguments."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        """Find the processors: another IP-Adapter brings other weights, and its own."""
        processors: list[Any] = [getattr(module, "processor", None) for module in denoiser.modules()]
        self.processors = [processor for processor in processors if hasattr(processor, "scale")]

    def key(self) -> str:
        """Return what changes with the strengths."""
        return str([processor.scale for processor in self.processors])

    def carry_to(self, copied: "Style") -> None:
        """Give a copy of the denoiser the same strengths."""
        for own, other in zip(self.processors, copied.processors, strict=True):
            other.scale = own.scale


def keyword_arguments(signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    return dict(signature.bind(*args, **kwargs).arguments)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors of nested tuples, lists and dicts, in order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return found
