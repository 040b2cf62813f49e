"""Plans: ordered lists of levers, applied to a pipeline, proved to have engaged, and undone exactly.

`exact` is no lever at all: the stock pipeline's own pictures. The other tiers are data, for each family
the levers that were measured to stay inside the tier's budget, with the measurement beside them.
"""

import ast
import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from imagegen.levers import LEVERS, Lever, Target
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
    known = kind.__dataclass_fields__
    settings: dict[str, Any] = {}
    for part in re.findall(r"[^,()]*(?:\([^)]*\))?[^,()]*", match[2] or ""):
        if not part.strip():
            continue
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known or not value:
            raise PlanError(f"{kind.name} has no setting {part.strip()!r}: it takes {', '.join(known) or 'none'}")
        settings[name] = _read_value(kind.name, name, value, known[name].type)
    return kind(**settings)


def _read_value(lever: str, name: str, text: str, kind: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    wanted = (int, float) if kind is float else kind
    if kind in (int, float, str) and (not isinstance(value, wanted) or isinstance(value, bool)):
        raise PlanError(f"{lever}: {name} must be a {kind.__name__}, got {text!r}")
    return tuple(value) if isinstance(value, list) else value


TIERS: dict[str, dict[str, Plan]] = {
    "emoji": {
        "balanced": Plan("balanced", ("prompt-cache", "openvino"), named=False, measured=""),
        "fast": Plan("fast", ("prompt-cache", "openvino", "step-cache(warmup=3, interval=2)"), named=False, measured=""),
    },
    "stable-diffusion": {
        "balanced": Plan("balanced", ("prompt-cache", "openvino"), named=False, measured="not measured on real weights"),
        "fast": Plan("fast", ("prompt-cache", "openvino"), named=False, measured="not measured on real weights"),
    },
}
EXACT = Plan("exact")


def find_plan(plan: str | Plan, family: str) -> Plan:
    """Return a plan by the name of its tier, or read it from `lever + lever(setting=value)`.

    Raises:
        PlanError: there is no such tier or lever, or the levers conflict.
    """
    if isinstance(plan, Plan):
        plan.build()
        return plan
    text = str(plan).strip()
    if text == "exact":
        return EXACT
    if text == "turbo":
        raise PlanError("turbo is a distilled model of its own, and this version has none for it: use fast")
    tiers = TIERS.get(family, {})
    if text in tiers:
        return tiers[text]
    if text in BUDGETS_DB:
        raise PlanError(f"nothing was measured for {family!r} yet, so it has no plan {text!r}: use exact, or name levers")
    try:
        found = Plan(text, tuple(part.strip() for part in text.split("+")))
        found.build()
    except PlanError as error:
        if "(" in text or "+" in text or text in LEVERS:
            raise
        ways = ", ".join(["exact", *tiers, "a profile.json", "or levers joined by +"])
        raise PlanError(f"unknown plan {text!r}: use {ways} ({', '.join(LEVERS)})") from error
    return found


class AppliedPlan:
    """A plan at work on a pipeline.

    Attributes:
        plan: the plan.
        levers: those that were applied, in order.
        left_out: those that cannot engage here, with the reason; only where a tier chose them.
    """

    def __init__(self, plan: Plan, pipeline: Any, kept: dict[Any, Any] | None = None) -> None:
        """Apply a plan; on an error nothing stays changed.

        Args:
            plan: the plan.
            pipeline: the diffusers pipeline.
            kept: of the plans before on the same pipeline, so that what was compiled is found again.

        Raises:
            PlanError: a lever that the user named cannot engage; the message says why and the way out.
        """
        self.plan = plan
        self.levers: list[Lever] = []
        self.left_out: list[tuple[Lever, str]] = []
        self._target = Target(pipeline, kept) if plan.levers else None
        self._running = False
        self._apply()

    def _apply(self) -> None:
        self.levers, self.left_out = [], []
        try:
            for lever in self.plan.build():
                assert self._target is not None
                reason = lever.requires(self._target)
                if reason and self.plan.named:
                    raise PlanError(reason)
                if reason:
                    self.left_out.append((lever, reason))
                    continue
                self.levers.append(lever)
                lever.apply(self._target)
        except BaseException:
            self.undo()
            raise
        self._stamp = weights_stamp(self._target.denoiser) if self._target and self.levers else ()

    def undo(self) -> None:
        """Undo every lever, the last one first.

        Raises:
            PlanError: a run is going on.
        """
        if self._running:
            raise PlanError("a run is still going: finish or close its stream before changing the plan")
        while self.levers:
            self.levers.pop().undo()

    @contextlib.contextmanager
    def running(self, guided: bool, num_steps: int) -> Iterator[None]:
        """Enclose one run, in the thread that computes it; nothing of it is left afterwards.

        Raises:
            RequestError: another run of this plan is going on, whose state it would share.
        """
        if self._running:
            raise RequestError(f"the plan {self.plan.name!r} serves one run at a time: finish or close the other stream first")
        if self._target and self.levers and weights_stamp(self._target.denoiser) != self._stamp:
            self.undo()  # a LoRA, or other weights: what levers derived from the old ones is made anew
            self._apply()
        begun: list[Lever] = []
        self._running = bool(self.levers)
        try:
            with contextlib.nullcontext() if any(lever.name == "attention" for lever in self.levers) else native_attention():
                for lever in self.levers:
                    lever.begin(guided, num_steps)
                    begun.append(lever)
                yield
        finally:
            for lever in reversed(begun):
                lever.end()
            self._running = False

    def advance(self, index: int, num_steps: int) -> None:
        """Tell the levers that step `index` of `num_steps` is done."""
        for lever in self.levers:
            lever.advance(index, num_steps)

    def default_settings(self) -> dict[str, Any]:
        """Return the request settings that the plan changes where the user gave none."""
        return {name: value for lever in self.levers for name, value in lever.default_settings().items()}

    def report(self) -> list[dict[str, Any]]:
        """Return what each lever did, and why not."""
        done = [{"lever": str(lever), "engaged": bool(lever.engaged()), "did": lever.engaged()} for lever in self.levers]
        return done + [{"lever": str(lever), "engaged": False, "why_not": reason} for lever, reason in self.left_out]


@contextlib.contextmanager
def native_attention() -> Iterator[None]:
    """Make diffusers' process-wide attention backend the native one for a while: others may have changed it."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:  # then no one has changed it
        yield
        return
    with dispatch.attention_backend("native"):
        yield
