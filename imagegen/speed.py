"""Plans: ordered lists of levers, applied to a pipeline, proved to have engaged, and undone exactly.

`exact` is no lever at all: the stock pipeline's own pictures. The other tiers are data, for each family
the levers that were measured to stay inside the tier's budget, with the measurement beside them.
"""

import ast
import contextlib
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch

from imagegen.levers import LEVERS, Lever, RunFacts, Target
from imagegen.levers.lever import weights_stamp
from imagegen.request import PlanError, RequestError

BUDGETS_DB = {"exact": 60.0, "balanced": 40.0, "fast": 30.0}  # worst PSNR against the exact plan's pictures


@dataclass(frozen=True)
class Plan:
    """An ordered list of levers.

    Attributes:
        name: of the tier or profile, or the levers themselves.
        levers: each as `name` or `name(setting=value, …)`.
        named: the user named the levers, so one that cannot engage is an error; a tier records it.
        measured: what was measured of the plan, in words.
    """

    name: str
    levers: tuple[str, ...] = ()
    named: bool = True
    measured: str = field(default="", compare=False)

    def build(self) -> list[Lever]:
        """Return new levers in the order in which they apply.

        Raises:
            PlanError: a lever or setting is unknown, or two levers conflict.
        """
        levers = sorted((make_lever(text) for text in self.levers), key=lambda lever: lever.stage)
        names = [lever.name for lever in levers]
        for lever in levers:
            if names.count(lever.name) > 1:
                raise PlanError(f"the plan names {lever.name} twice: name it once")
            clashing = [name for name in names if name in lever.conflicts]
            if clashing:
                raise PlanError(f"{lever.name} cannot be combined with {', '.join(clashing)}: leave one of them out")
        return levers


def make_lever(text: str) -> Lever:
    """Return a new lever from `name` or `name(setting=value, …)`.

    Raises:
        PlanError: there is no such lever or setting, or a value is of the wrong kind.
    """
    match = re.fullmatch(r"\s*([a-z0-9-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None or match[1] not in LEVERS:
        raise PlanError(f"unknown lever {text.strip()!r}: there are {', '.join(LEVERS)}")
    kind = LEVERS[match[1]]
    known = {setting.name: setting for setting in fields(kind)}
    settings: dict[str, Any] = {}
    for part in _split(match[2] or "", ","):
        if not part:
            continue
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not value:
            raise PlanError(f"{kind.name} has no setting {part!r}: it takes {', '.join(known) or 'none'}")
        if name in settings:
            raise PlanError(f"{kind.name} names {name} twice: name it once")
        settings[name] = _read_value(kind.name, name, value, known[name].type)
    return kind(**settings)


def _split(text: str, mark: str) -> list[str]:
    """Split a text at a mark, where that stands outside quotes and brackets."""
    pieces, depth = [""], 0
    for token in re.findall(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", text, re.DOTALL):
        depth += (token in "([") - (token in ")]")
        if token == mark and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces]


def _read_value(lever: str, name: str, text: str, kind: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    value = tuple(value) if isinstance(value, list) else value
    if not _is_a(value, kind):
        raise PlanError(f"{lever}: {name} must be of the kind {getattr(kind, '__name__', kind)}, got {text!r}")
    return float(value) if kind is float else value  # type: ignore[arg-type]


def _is_a(value: Any, kind: Any) -> bool:
    """Return whether a value is of a setting's kind; numbers are finite, and no truth values."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(inner, get_args(kind)[0]) for inner in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return isinstance(value, kind) and not isinstance(value, bool)


ZEN3 = "20 steps on two threads of an AMD EPYC (Zen 3), OpenVINO 2026.4, 2026-11-24"
TIERS: dict[str, dict[str, Plan]] = {
    "emoji": {
        "balanced": Plan(
            "balanced", ("prompt-cache", "openvino"), named=False, measured=f"1.95 x exact, worst 87.3 dB of 30; {ZEN3}"
        ),
        "fast": Plan(
            "fast",
            ("prompt-cache", "openvino", "step-cache(warmup=4, interval=2, late=3, order=1)"),
            named=False,
            measured=f"3.2 x exact, worst 31.7 dB of 30; {ZEN3}",
        ),
    },
    "stable-diffusion": {
        "balanced": Plan("balanced", ("prompt-cache", "openvino"), named=False, measured="not measured on real weights"),
        "fast": Plan("fast", ("prompt-cache", "openvino"), named=False, measured="not measured on real weights"),
    },
}
EXACT = Plan("exact")
TURBO = Plan("turbo", ("student", "prompt-cache", "openvino"), named=False, measured="another model: see its own figures")


def find_plan(plan: str | Plan, family: str) -> Plan:
    """Return a plan by the name of its tier, or read it from `lever + lever(setting=value)`.

    Raises:
        PlanError: there is no such tier or lever, or the levers conflict.
    """
    if isinstance(plan, Plan):
        plan.build()
        return plan
    text = str(plan).strip()
    if text in (EXACT.name, TURBO.name):
        return EXACT if text == EXACT.name else TURBO
    tiers = TIERS.get(family, {})
    if text in tiers:
        return tiers[text]
    if text in BUDGETS_DB:
        raise PlanError(f"nothing was measured for {family!r} yet, so it has no plan {text!r}: use exact, or name levers")
    try:
        found = Plan(text, tuple(_split(text, "+")))
        found.build()
    except PlanError as error:
        if "(" in text or "+" in text or text in LEVERS:
            raise
        ways = ", ".join(["exact", *tiers, "turbo", "a profile.json", "or levers joined by +"])
        raise PlanError(f"unknown plan {text!r}: use {ways} ({', '.join(LEVERS)})") from error
    return found


class AppliedPlan:
    """A plan at work on a pipeline.

    Attributes:
        plan: the plan.
        levers: those that were applied, in order.
        left_out: those that cannot engage here, with the reason; only where a tier chose them.
    """

    def __init__(
        self,
        plan: Plan,
        pipeline: Any,
        kept: dict[Any, Any] | None = None,
        memory: tuple[str, ...] = (),
        folder: Path | None = None,
        hashes: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """Apply a plan; on an error nothing stays changed.

        Args:
            plan: the plan.
            pipeline: the diffusers pipeline.
            kept: of the plans before on the same pipeline, so that what was compiled is found again.
            memory: levers that make the model fit, besides the plan's own; nobody named them.
            folder: where the model's files are, if there are any.
            hashes: returns the SHA-256 of its weight files by name.

        Raises:
            PlanError: a lever that the user named cannot engage; the message says why and the way out.
        """
        self.plan = plan
        self.memory = tuple(lever for lever in memory if lever not in plan.levers)
        self.levers: list[Lever] = []
        self.left_out: list[tuple[Lever, str]] = []
        self._pipeline = pipeline
        self._target = partial(Target, pipeline, kept, folder, hashes)
        self._lock = threading.Lock()
        self._runs = 0
        self._apply()

    def _apply(self) -> None:
        self.levers, self.left_out = [], []
        target = self._target()  # anew each time: a component may have been replaced
        try:
            for lever in replace(self.plan, levers=self.plan.levers + self.memory).build():
                reason = getattr(self._pipeline, "unfit_levers", {}).get(lever.name) or lever.requires(target)
                if reason and (lever.essential or self.plan.named) and str(lever) not in self.memory:
                    raise PlanError(reason)
                if reason:
                    self.left_out.append((lever, reason))
                    continue
                self.levers.append(lever)
                lever.apply(target)
        except BaseException:
            self.undo()
            raise
        self._stamp = self._stamp_now()

    def _stamp_now(self) -> tuple[Any, ...]:
        """Return what changes whenever the weights do that levers derived theirs from, or encodings."""
        components = self._pipeline.components.values() if self.plan.levers or self.memory else ()
        return weights_stamp(part for part in components if isinstance(part, torch.nn.Module))

    @property
    def busy(self) -> bool:
        """Whether a run is going on."""
        return self._runs > 0

    def undo(self) -> None:
        """Undo every lever, the last one first.

        Raises:
            PlanError: a run is going on.
        """
        if self._runs:
            raise PlanError("a run is still going: finish or close its stream before changing the plan")
        while self.levers:
            self.levers.pop().undo()

    @contextlib.contextmanager
    def running(self, run: RunFacts) -> Iterator[None]:
        """Enclose one run, in the thread that computes it; nothing of it is left afterwards.

        Raises:
            RequestError: another run of this plan is going on, whose state it would share.
        """
        with self._lock:
            if self._runs and self.levers:
                name = self.plan.name
                raise RequestError(f"the plan {name!r} serves one run at a time: finish or close the other stream first")
            if not self._runs and self._stamp_now() != self._stamp:
                self.undo()  # a LoRA, or other weights: what levers derived from the old ones is made anew
                self._apply()
            self._runs += 1
        begun: list[Lever] = []
        try:
            with contextlib.nullcontext() if any(lever.name == "attention" for lever in self.levers) else native_attention:
                for lever in self.levers:
                    lever.begin(run)
                    begun.append(lever)
                yield
        finally:
            try:
                for lever in reversed(begun):
                    lever.end()
                if any(lever.moves_weights for lever in begun):
                    self._stamp = self._stamp_now()
            finally:
                with self._lock:
                    self._runs -= 1

    def advance(self, index: int, num_steps: int) -> None:
        """Tell the levers that step `index` of `num_steps` is done."""
        for lever in self.levers:
            lever.advance(index, num_steps)

    def default_settings(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Return the request settings that the plan changes, other than those that the user gave."""
        return {name: value for lever in self.levers for name, value in lever.default_settings(given).items()}

    def report(self) -> list[dict[str, Any]]:
        """Return what each lever did, and why not."""
        done = [{"lever": str(lever), "engaged": bool(lever.engaged()), "did": lever.engaged()} for lever in self.levers]
        return done + [{"lever": str(lever), "engaged": False, "why_not": reason} for lever, reason in self.left_out]


class _NativeAttention:
    """Makes diffusers' process-wide attention backend the native one while any run is inside: others may have changed it.

    Runs overlap and leave in any order, so the first one in changes it and the last one out changes it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._way_back = contextlib.ExitStack()

    def __enter__(self) -> None:
        dispatch = sys.modules.get("diffusers.models.attention_dispatch")
        with self._lock:
            if self._inside == 0 and dispatch is not None:  # never imported, it was never changed
                self._way_back.enter_context(dispatch.attention_backend("native"))
            self._inside += 1

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._way_back.close()


native_attention = _NativeAttention()
