"""The fastest plan inside a fidelity budget, measured on this machine.

Every lever alone on a few prompts; then combinations, the one that should be fastest first, each
measured, since levers interact; then, from the fastest down, confirmation on prompts that the search
never saw. Stock diffusers runs in turn with the plan that is confirmed.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.comparison import Trial, add_case, as_row, blame, decibels, judge, mean_square, try_plan
from imagegen.families import diffusion
from imagegen.measure import environment, machine_of
from imagegen.model import Model
from imagegen.profile import VERSION, Profile, finite
from imagegen.prompts import confirm_prompts, search_prompts
from imagegen.reference import FLOOR_PSNR_DB
from imagegen.reference_set import Progress
from imagegen.report import write_report
from imagegen.request import PlanError, RequestError, build_request
from imagegen.speed import EXACT, Plan
from imagegen.weights import cache_folder

if TYPE_CHECKING:
    from PIL.Image import Image

SEARCH_PICTURES = 6
SEARCH_SHARE = 0.55  # of the time may go into the search
SLACK_DB = 2.0  # predictions are that far off: what is predicted to miss the budget by less is measured
SAFE = {"psnr_db": 4.0, "ssim": 0.02, "flip": 0.02}  # thirty pictures have a worse one among them than six, by so much
SAME_PACE = 0.1  # an interrupted search's times hold while the exact plan still takes as long, within this
MARGIN = {"psnr_db": 1.0, "ssim": 0.005, "flip": 0.005}  # the search has to keep clear of the budget by this
# Levers that exclude each other or act on the same thing, as alternatives; each alone, then one of each.
BACKENDS = ("openvino", "bf16", "int8-dynamic", "int8-weight-only", "fp8", "channels-last", "compile")
STEP_CACHES = (
    *(f"step-cache(warmup={warmup}, interval={interval}, late={late}, order=1)"
      for warmup, interval, late in ((6, 2, 2), (5, 2, 3), (4, 2, 3), (4, 2, 4), (3, 2, 3), (4, 2, 5), (4, 3, 4))),
    *(f"deep-cache(interval={interval}, depth={depth})" for depth, interval in ((2, 2), (1, 2), (1, 3))),
    *("first-block-cache(threshold=0.03)", "first-block-cache(threshold=0.08)", "first-block-cache(threshold=0.15)"),
    *("taylorseer-cache(interval=2)", "taylorseer-cache(interval=4)", "mag-cache(threshold=0.06)"),
)  # fmt: skip
GUIDANCE = (
    *(f"guidance-cache(warmup={warmup}, interval={interval}, order={order})"
      for warmup, interval, order in ((5, 2, 0), (5, 2, 1), (4, 3, 1))),
    "guidance-interval(stop=0.8)",
)  # fmt: skip
FEWER_STEPS = ("fewer-steps(num_steps=12)", "fewer-steps(num_steps=8)")
GROUPS = (BACKENDS, STEP_CACHES, GUIDANCE)
ALWAYS = "prompt-cache"  # exact and as good as free, so part of every combination


@dataclass(frozen=True)
class Budget:
    """How far a picture may be from its reference.

    Attributes:
        metric: `psnr_db`, `ssim` or `flip`.
        bound: the least PSNR or SSIM, or the greatest FLIP, of every picture.
        max_memory_gib: the most memory that the process (on CUDA: torch) may take, or None.
    """

    metric: str
    bound: float
    max_memory_gib: float | None = None

    def keeps(self, value: float, margin: float = 0.0) -> bool:
        """Return whether a value is inside, by a margin."""
        return value <= self.bound - margin if self.metric == "flip" else value >= self.bound + margin


def make_budget(
    min_psnr_db: float | None, min_ssim: float | None, max_flip: float | None, max_memory_gib: float | None
) -> Budget:
    """Return the budget; exactly one bound has to be given.

    Raises:
        RequestError: none or several are given, or a bound is out of range.
    """
    given = {"psnr_db": min_psnr_db, "ssim": min_ssim, "flip": max_flip}
    chosen = {metric: bound for metric, bound in given.items() if bound is not None}
    if len(chosen) != 1:
        raise RequestError("give one budget: min_psnr_db (as in 30), min_ssim (as in 0.95) or max_flip (as in 0.05)")
    metric, bound = chosen.popitem()
    high = 120.0 if metric == "psnr_db" else 1.0
    if not isinstance(bound, (int, float)) or not 0 <= bound <= high:
        raise RequestError(f"the budget must be from 0 to {high:g}, got {bound!r}")
    if max_memory_gib is not None and not max_memory_gib > 0:
        raise RequestError(f"max_memory_gib must be above 0, got {max_memory_gib!r}")
    return Budget(metric, float(bound), max_memory_gib)


@dataclass(frozen=True)
class TunedProfile(Profile):
    """A profile fresh from the tuner: with the trials behind it, for the report."""

    trials: list[Trial] = field(default_factory=list, repr=False)
    references: list["Image"] = field(default_factory=list, repr=False)
    prompts: list[str] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)

    def save_report(self, folder: str | Path) -> Path:
        """Write `report.html`, which stands alone: the Pareto chart, blame and picture pairs; return its path.

        Raises:
            PlanError: the folder cannot be written.
        """
        evidence, speed = self.evidence, self.speed
        rate = f"failure rate below {evidence['failure_rate_below']:.0%} (95 % confidence)"
        times = f"{speed['median_s']:.3f} s, stock diffusers in turn {speed['stock_median_s']:.3f} s: {speed['ratio']:.2f} ×"
        about = {
            "Budget": f"{self.budget['metric']} {self.budget['bound']:g}",
            "Plan": " + ".join(self.plan) or "exact",
            "Evidence": f"{evidence['n']} unseen pictures, worst {evidence['worst']}; {rate}",
            "Time for a picture": times,
        }
        about |= {name: str(value) for name, value in (self.environment | self.machine | self.request).items()}
        rows = [trial.summary() for trial in self.trials]
        images = {trial.plan: trial.images for trial in self.trials if len(trial.images) == len(self.references)}
        bound = self.budget["bound"] if self.budget["metric"] == "psnr_db" else None
        return write_report(
            Path(folder) / "report.html", "The fastest plan inside a budget", about, self.notes, rows,
            self.prompts, self.references, images, bound,
        )  # fmt: skip


def tune(
    model: Model,
    *,
    min_psnr_db: float | None = None,
    min_ssim: float | None = None,
    max_flip: float | None = None,
    max_memory_gib: float | None = None,
    num_steps: int | None = None,
    guidance: float | None = None,
    num_images: int = 1,
    any_steps: bool = False,
    prompts: Sequence[str] | None = None,
    minutes: float = 8.0,
    progress: Progress | None = None,
    watch: Callable[[Trial], Any] | None = None,
) -> TunedProfile:
    """Find the fastest plan whose every picture was measured to stay inside the budget, on this machine.

    What was measured before an interruption is found again by the next call with the same settings.

    Args:
        model: gets its own plan back.
        min_psnr_db: the least PSNR of every picture against stock diffusers; or
        min_ssim: the least SSIM; or
        max_flip: the greatest FLIP.
        max_memory_gib: the most memory while a picture is made.
        num_steps: denoising steps; the family's by default.
        guidance: the family's by default.
        num_images: pictures of a call: 1 for latency, more for throughput.
        any_steps: allow plans with fewer steps than `num_steps`.
        prompts: at least 7 of yours, the first 6 to search on and the others to confirm; ours by default.
        minutes: the time limit.
        progress: is told what is going on, the work done, and all of it where known.
        watch: is shown every configuration that was measured in the search.

    Raises:
        RequestError: no budget or several, or a setting is wrong.
    """
    budget = make_budget(min_psnr_db, min_ssim, max_flip, max_memory_gib)
    if not isinstance(minutes, (int, float)) or not minutes > 0:
        raise RequestError(f"minutes must be above 0, got {minutes!r}")
    diffusion.check_stock(model.origin)
    if prompts is not None and len(prompts) <= SEARCH_PICTURES:
        raise RequestError(f"give more than {SEARCH_PICTURES} prompts: those to search on, and others to confirm")
    searching = search_prompts(model.family.name) if prompts is None else list(prompts[:SEARCH_PICTURES])
    confirming = confirm_prompts(model.family.name) if prompts is None else list(prompts[SEARCH_PICTURES:])
    settings = {"num_steps": num_steps, "guidance": guidance, "num_images": num_images}
    names = ("prompt", "seed", "num_steps", "guidance", "num_images", "width", "height")

    def requests(texts: Sequence[str], seed: int) -> list[dict[str, Any]]:
        built = [build_request(text, model.family, settings | {"seed": seed + 100 * n}) for n, text in enumerate(texts)]
        return [{name: getattr(request, name) for name in names} for request in built]

    search = Search(model, budget, requests(searching, 1), minutes, any_steps, progress or (lambda *_: None), watch)
    with model.plan_for_a_while(EXACT):
        search.run()
        return search.confirm(requests(confirming, 10_001))


class Search:
    """One search: what was measured, and what is left of the time."""

    def __init__(
        self,
        model: Model,
        budget: Budget,
        requests: list[dict[str, Any]],
        minutes: float,
        any_steps: bool,
        tell: Progress,
        watch: Callable[[Trial], Any] | None = None,
    ) -> None:
        """Read what an interrupted search of the same settings left."""
        self.model, self.budget, self.tell, self.watch = model, budget, tell, watch or (lambda _: None)
        self.requests = requests
        self.groups = (*GROUPS, FEWER_STEPS) if any_steps else GROUPS
        self.started = time.monotonic()
        self.limit_s = minutes * 60
        self.trials: dict[str, Trial] = {}
        self.left_out: dict[str, str] = {}
        facts = [model.hashes, machine_of(model.device), environment(model.device, model.dtype), requests]
        key = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.log = cache_folder() / "tune" / f"{key}.jsonl"
        self.earlier = dict(_read_log(self.log))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self.started

    @property
    def has_time(self) -> bool:
        """Whether the search may begin to measure one thing more."""
        return self.elapsed_s < SEARCH_SHARE * self.limit_s

    def run(self) -> None:
        """Measure every lever alone, then combinations, the one predicted fastest first."""
        self.tell("stock pictures to search on", 0, 1)
        self.cases = [(request, self.model.generate(**request).images) for request in self.requests]
        before = self.earlier.pop(EXACT.name, None)
        measured = self.measure(EXACT, self.cases)
        assert measured is not None  # only a lever can fail to engage
        self.exact = measured
        if before and abs(before.median_s / measured.median_s - 1) > SAME_PACE:  # the machine was busy then, or is now
            self.earlier.clear()
        self.measure(Plan(ALWAYS, (ALWAYS,)), self.cases)
        kept = [self.alone(group) for group in self.groups]
        while (plan := self.most_promising(kept)) is not None and self.has_time:
            self.measure(plan, self.cases)

    def alone(self, group: Sequence[str]) -> list[str]:
        """Measure each lever of a group alone; return those that engaged and that no other of them beats in all."""
        found: dict[str, Trial] = {}
        for number, lever in enumerate(group, 1):
            self.tell(f"alone: {lever}", number, len(group))
            if lever == "compile" and "openvino" in found:
                self.left_out[lever] = "openvino engaged, and compiling takes minutes: name compile in a plan to try it"
                continue
            if not self.has_time and lever not in self.earlier:
                self.left_out[lever] = "no time was left to try it: give more minutes"
                continue
            trial = self.measure(Plan(lever, (lever,)), self.cases)
            if trial is None:
                continue
            if not all(part["engaged"] for part in trial.levers):
                self.left_out[lever] = "it did not engage: no step was skipped"
            elif trial.median_s > 0.98 * self.exact.median_s:
                self.left_out[lever] = f"it is no faster here: {trial.median_s:.3f} s, exact {self.exact.median_s:.3f} s"
            else:
                found[lever] = trial
        return [lever for lever, trial in found.items() if not any(self.beats(other, trial) for other in found.values())]

    def beats(self, trial: Trial, other: Trial) -> bool:
        """Return whether a trial is both faster and closer than another."""
        return trial.median_s < 0.98 * other.median_s and self.drift(trial) <= self.drift(other)

    def measure(self, plan: Plan, cases: Any) -> Trial | None:
        """Try a plan, or find what was measured of it before; None where it cannot engage or takes too long."""
        if plan.name in self.trials:
            return self.trials[plan.name]
        slow_s = 1.5 * self.trials[EXACT.name].median_s if plan != EXACT else math.inf
        trial = self.earlier.get(plan.name)
        if trial is None:
            try:
                trial = try_plan(self.model, plan, cases, lambda trial: self.go_on(trial, slow_s))
            except PlanError as error:
                self.left_out[plan.name] = str(error)
                return None
            self.note(trial)
        if len(trial.seconds) < len(cases):
            self.left_out[plan.name] = f"it is slower here: {trial.median_s:.3f} s, exact {self.exact.median_s:.3f} s"
            return None
        trial.verdict = judge(trial, FLOOR_PSNR_DB, "stock diffusers", self.bound_db)
        self.trials[plan.name] = trial
        self.watch(trial)
        return trial

    def go_on(self, trial: Trial, slow_s: float) -> bool:
        """Tell of every picture, and end a trial that is slower than that."""
        self.tell(f"measuring {trial.plan}", len(trial.seconds), len(self.requests))
        return trial.seconds[-1] < slow_s

    @property
    def bound_db(self) -> float | None:
        """The budget where it is a PSNR."""
        return self.budget.bound if self.budget.metric == "psnr_db" else None

    def note(self, trial: Trial) -> None:
        """Write a trial down, so that an interrupted search goes on; a log that cannot be written costs time only."""
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(as_row(trial)) + "\n")
        except OSError:
            return

    def drift(self, trial: Trial) -> float:
        """Return a trial's worst distance in a measure that adds up over levers, roughly."""
        worst = trial.worst(self.budget.metric)
        return {"psnr_db": mean_square(worst), "ssim": 1 - worst, "flip": worst}[self.budget.metric]

    def predicted(self, levers: Sequence[str]) -> tuple[float, float]:
        """Return the seconds and the worst drift that a combination should have if its levers did not interact."""
        trials = [self.trials[lever] for lever in levers]
        whole_s = self.exact.median_s
        seconds = whole_s * math.prod([trial.median_s / whole_s for trial in trials])
        return seconds, sum(self.drift(trial) for trial in trials)

    def may_keep(self, drift: float) -> bool:
        """Return whether a predicted drift is inside the budget, or so near that it has to be measured."""
        value = {"psnr_db": decibels(drift) + SLACK_DB, "ssim": 1 - drift * 0.7, "flip": drift * 0.7}[self.budget.metric]
        return self.budget.keeps(value)

    def most_promising(self, kept: Sequence[Sequence[str]]) -> Plan | None:
        """Return the combination predicted fastest that is not measured yet and may beat what is; None if none may."""
        best_s = min((trial.median_s for trial in self.inside(SAFE[self.budget.metric])), default=math.inf)
        found: list[tuple[float, tuple[str, ...]]] = []
        for choice in product(*((None, *levers) for levers in kept)):
            levers = tuple(lever for lever in choice if lever is not None)
            if not levers:
                continue
            levers = (ALWAYS, *levers) if ALWAYS in self.trials else levers
            if len(levers) < 2 or " + ".join(levers) in self.trials or " + ".join(levers) in self.left_out:
                continue
            seconds, drift = self.predicted(levers)
            if seconds < best_s and self.may_keep(drift) and _fit_together(levers):
                found.append((seconds, levers))
        if not found:
            return None
        seconds, levers = min(found)
        self.tell(f"together: {' + '.join(levers)}", len(self.trials), len(self.trials) + len(found))
        return Plan(" + ".join(levers), levers)

    def inside(self, margin: float = 0.0) -> list[Trial]:
        """Return the trials inside the budget by a margin, fastest first."""
        cap = self.budget.max_memory_gib
        kept = [
            trial
            for trial in self.trials.values()
            if self.budget.keeps(trial.worst(self.budget.metric), margin)
            and (cap is None or trial.memory_gib is None or trial.memory_gib <= cap)
        ]
        return sorted(kept, key=lambda trial: trial.median_s)

    def confirm(self, requests: list[dict[str, Any]]) -> TunedProfile:
        """Try the fastest plans on unseen prompts, in turn with stock diffusers, until one keeps the budget."""
        stock = diffusion.stock_runner(self.model.origin, self.model.device, self.model.dtype, self.model.family)
        safe = self.inside(MARGIN[self.budget.metric])
        order = [*safe, *(trial for trial in self.inside() if trial not in safe)]
        notes = []
        for trial in [*order, self.exact]:
            last = trial.plan == EXACT.name
            pace_s = (trial.median_s + self.exact.median_s) * len(requests) * requests[0]["num_images"]
            if not last and self.elapsed_s + pace_s > self.limit_s:
                notes.append(f"no time was left to confirm {trial.plan}: give more minutes")
                continue
            plan = EXACT if last else Plan(trial.plan, tuple(part["lever"] for part in trial.levers))
            confirmed, stock_s, references = self.side_by_side(plan, stock, requests, last)
            worst = confirmed.worst(self.budget.metric)
            if last or (self.budget.keeps(worst) and len(confirmed.seconds) == len(requests)):
                return self.profile(plan, confirmed, stock_s, references, requests, notes)
            notes.append(f"{trial.plan} kept the budget in the search and left it on an unseen picture ({worst:.4g})")
        raise AssertionError("the exact plan is always there")

    def side_by_side(
        self, plan: Plan, stock: Any, requests: list[dict[str, Any]], is_last: bool
    ) -> tuple[Trial, list[float], list["Image"]]:
        """Make the unseen pictures by stock diffusers and by a plan in turn; stop at one outside the budget."""
        confirmed, stock_s, references = Trial(plan.name), list[float](), list[Any]()
        with self.model.plan_for_a_while(plan):
            if plan.levers:
                self.model.generate(**requests[0])
            for number, request in enumerate(requests, 1):
                self.tell(f"confirming {plan.name}", number, len(requests))
                if is_last and number > 3 and self.elapsed_s > self.limit_s:
                    break
                given = {name: value for name, value in request.items() if name != "prompt"}
                asked = build_request(request["prompt"], self.model.family, given)
                started = time.perf_counter()
                made = stock(asked)
                stock_s.append((time.perf_counter() - started) / len(made))
                references += made
                add_case(confirmed, self.model.generate(**request), made)
                if not is_last and not self.budget.keeps(confirmed.worst(self.budget.metric)):
                    break
            confirmed.levers = self.model.applied
        return confirmed, stock_s, references

    def profile(
        self, plan: Plan, confirmed: Trial, stock_s: list[float], references: list["Image"],
        requests: list[dict[str, Any]], notes: list[str],
    ) -> TunedProfile:  # fmt: skip
        """Put together what was found, and forget the log."""
        if len(plan.levers) > 1:
            confirmed.blame = blame(self.model, plan, self.cases, self.exact)
        confirmed.verdict = judge(confirmed, FLOOR_PSNR_DB, "stock diffusers", self.bound_db)
        n, metric = len(confirmed.measured), self.budget.metric
        worst = confirmed.worst(metric)
        others = [trial for trial in self.trials.values() if trial.plan != plan.name]
        trials = [confirmed, *sorted(others, key=lambda trial: trial.median_s)]
        frontier = [t for t in self.trials.values() if not any(self.beats(other, t) for other in self.trials.values())]
        model = {"source": self.model.source, "family": self.model.family.name, "sha256": self.model.hashes}
        evidence: dict[str, Any] = {"n": n, "worst": worst, "mean": confirmed.mean(metric), "failure_rate_below": min(1.0, 3 / n)}
        evidence |= {"margin": abs(worst - self.budget.bound), "searched_on": len(self.cases), "blame": confirmed.blame}
        speed = {"median_s": confirmed.median_s, "range_s": [min(confirmed.seconds), max(confirmed.seconds)],
                 "stock_median_s": statistics.median(stock_s), "stock_range_s": [min(stock_s), max(stock_s)],
                 "ratio": statistics.median(stock_s) / confirmed.median_s}  # fmt: skip
        self.log.unlink(missing_ok=True)
        made = finite(
            {
                "model": model,
                "machine": machine_of(self.model.device),
                "environment": environment(self.model.device, self.model.dtype),
                "budget": {"metric": metric, "bound": self.budget.bound, "max_memory_gib": self.budget.max_memory_gib},
                "request": {name: value for name, value in requests[0].items() if name not in ("prompt", "seed")},
                "plan": list(plan.levers),
                "evidence": evidence,
                "speed": speed,
                "frontier": [trial.summary() for trial in sorted(frontier, key=lambda trial: trial.median_s)],
            }
        )
        notes += [f"{name}: {reason}" for name, reason in self.left_out.items()]
        texts = [request["prompt"] for request in requests for _ in range(request["num_images"])]
        return TunedProfile(VERSION, **made, trials=trials, references=references, prompts=texts, notes=notes)


def _fit_together(levers: Sequence[str]) -> bool:
    try:
        Plan("", tuple(levers)).build()
    except PlanError:
        return False
    return True


def _read_log(path: Path) -> Iterator[tuple[str, Trial]]:
    """Yield the trials of an interrupted search; a last line that was cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            trial = Trial(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        for row in trial.measured:  # null stands for identical
            row.update({name: math.inf for name in ("psnr_db", "foreground_psnr_db") if row.get(name) is None})
        yield trial.plan, trial
