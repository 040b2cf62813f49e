"""Plans held against a reference: time, drift, and which lever cost and gave which part of both.

Knows how to measure; what a picture's distance is, `fidelity` knows, and what a lever does, `levers`.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen import fidelity
from imagegen.measure import environment, machine_of, peak_memory_gib, reset_peak_memory
from imagegen.model import Model
from imagegen.profile import finite, read_profile, write_json
from imagegen.reference import FLOOR_PSNR_DB
from imagegen.reference_set import Progress, ReferenceSet, open_reference
from imagegen.report import write_report
from imagegen.request import DataError
from imagegen.result import Result
from imagegen.speed import BUDGETS_DB, EXACT, Plan

if TYPE_CHECKING:
    from PIL.Image import Image

BLAMED_PICTURES = 6
FLOOR_SLACK_DB = 6.0  # the floor was measured on a few pictures: one code value in a few pixels more is still noise


@dataclass
class Trial:
    """A plan's pictures beside their references.

    Attributes:
        plan: its name.
        levers: what each lever did, and why not.
        seconds: for each picture; the first of each shape, which may compile, was made before.
        measured: for each picture what `fidelity.measure_all` says.
        warm_up_s: the time of that first picture and of applying the plan.
        memory_gib: the peak while the pictures were made, where the system tells.
        blame: for each lever in turn, the time it gave and the drift it cost.
        verdict: in words.
        budget_db: the PSNR that every picture should reach: the one asked for, or what the tier promises.
        images: the pictures.
    """

    plan: str
    levers: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    measured: list[dict[str, float | None]] = field(default_factory=list)
    warm_up_s: float = 0.0
    memory_gib: float | None = None
    blame: list[dict[str, Any]] = field(default_factory=list)
    verdict: str = ""
    budget_db: float | None = None
    images: list["Image"] = field(default_factory=list, repr=False)

    @property
    def median_s(self) -> float:
        """The median time of a picture in seconds."""
        return statistics.median(self.seconds)

    def worst(self, metric: str = "psnr_db") -> float:
        """Return the worst value of a metric over the pictures."""
        values = self._values(metric)
        return min(values) if metric != "flip" else max(values)

    def mean(self, metric: str = "psnr_db") -> float:
        """Return a metric's mean; PSNR is that of the mean squared error, so that identical pictures count."""
        values = self._values(metric)
        if not metric.endswith("psnr_db"):
            return statistics.fmean(values)
        return decibels(statistics.fmean(mean_square(value) for value in values))

    def _values(self, metric: str) -> list[float]:
        values = [row[metric] for row in self.measured]
        return [math.nan if value is None else value for value in values]

    def summary(self) -> dict[str, Any]:
        """Return the figures without the pictures, JSON-ready."""
        metrics = [name for name, value in self.measured[0].items() if value is not None] if self.measured else []
        figures = {name: {"worst": self.worst(name), "mean": self.mean(name)} for name in metrics if name != "max_difference"}
        names = ("plan", "verdict", "levers", "warm_up_s", "memory_gib", "blame", "budget_db")
        times = {"median_s": self.median_s, "fastest_s": min(self.seconds), "slowest_s": max(self.seconds)}
        return {name: getattr(self, name) for name in names} | times | {"n": len(self.measured), "fidelity": figures}


def mean_square(psnr_db: float) -> float:
    """Return the mean squared error (of 255²) that a PSNR stands for."""
    return 255**2 / 10 ** (psnr_db / 10)


def decibels(mean_square_error: float) -> float:
    """Return the PSNR in dB of a mean squared error (of 255²)."""
    return math.inf if mean_square_error == 0 else 10 * math.log10(255**2 / mean_square_error)


Cases = Sequence[tuple[dict[str, Any], Sequence["Image"]]]


def try_plan(model: Model, plan: str | Path | Plan, cases: Cases, go_on: Callable[[Trial], bool] = lambda trial: True) -> Trial:
    """Make the cases' pictures under a plan and measure each against its reference.

    Args:
        model: gets its own plan back.
        plan: what `Model.set_plan` takes.
        cases: requests, by the names of `generate`, and the reference of each of their pictures.
        go_on: is asked after every case; the trial ends there where it says no.

    Raises:
        PlanError: the plan cannot engage.
    """
    started = time.perf_counter()
    with model.plan_for_a_while(plan):
        trial = Trial(model.plan.name)
        if model.plan.levers:
            model.generate(**cases[0][0])  # compiles
        trial.warm_up_s = time.perf_counter() - started
        reset_peak_memory(model.device)
        for request, references in cases:
            add_case(trial, model.generate(**request), references)
            if not go_on(trial):
                break
        trial.memory_gib = peak_memory_gib(model.device)
        trial.levers = model.applied
    return trial


def add_case(trial: Trial, result: Result, references: Sequence["Image"]) -> None:
    """Add a result's time for a picture, and what its pictures measure."""
    trial.seconds.append(result.elapsed_s / len(result.images))
    for reference, image in zip(references, result.images, strict=True):
        trial.measured.append(fidelity.measure_all(reference, image))
        trial.images.append(image)


def blame(
    model: Model, plan: Plan, cases: Cases, exact: Trial, go_on: Callable[[Trial], bool] = lambda trial: True
) -> list[dict[str, Any]]:
    """Add a plan's levers one at a time, in the order in which they apply, and measure what each changes.

    Args:
        model: gets its own plan back.
        plan: of several levers.
        cases: as of `try_plan`.
        exact: the exact plan's trial of them.
        go_on: as of `try_plan`.

    Returns:
        For each lever the seconds it took off a picture, the factor, and the squared error that it added;
        in sum they are the whole plan's. Levers interact: each is blamed for what it adds to those before.
    """
    levers = [str(lever) for lever in plan.build()]
    before, parts = exact, list[dict[str, Any]]()
    for count, lever in enumerate(levers, 1):
        now = try_plan(model, Plan(" + ".join(levers[:count]), tuple(levers[:count]), named=False), cases, go_on)
        drift, drift_before = (mean_square(trial.mean()) for trial in (now, before))
        parts.append(
            {
                "lever": lever,
                "gave_s": before.median_s - now.median_s,
                "factor": before.median_s / now.median_s,
                "cost_mse": drift - drift_before,
                "psnr_db_after": now.mean(),
                "worst_psnr_db_after": now.worst(),
            }
        )
        before = now
    total = sum(abs(part["cost_mse"]) for part in parts)
    for part in parts:
        part["share_of_drift"] = abs(part["cost_mse"]) / total if total else 0.0
    return parts


def judge(trial: Trial, floor_db: float, dtype: str | None, budget_db: float | None) -> str:
    """Say in words how a plan's pictures compare, relative to the noise floor, mean and worst; `dtype` "" is not spoken of."""
    worst, mean = trial.worst(), trial.mean()
    against = "" if dtype == "" else f" against {dtype or 'pictures of unknown precision'}"
    if worst == math.inf:
        return f"identical, bit for bit{',' if against else ''}{against}"
    figures = f"worst {worst:.1f} dB, mean {mean:.1f} dB{against}; the noise floor is {floor_db:.1f} dB"
    if worst >= floor_db - FLOOR_SLACK_DB:
        return f"the same within the noise floor of equal runs ({figures})"
    if budget_db is not None:
        return f"{'inside' if worst >= budget_db else 'outside'} the budget of {budget_db:g} dB ({figures})"
    scale = ((50, "no difference to the eye"), (40, "hardly a difference to the eye"), (30, "small differences"))
    words = next((words for bound, words in scale if worst >= bound), "another picture in places")
    return f"{words} ({figures})"


@dataclass
class ComparisonReport:
    """What `compare` found.

    Attributes:
        reference: facts of the reference set.
        environment: this machine and its versions.
        trials: one for each plan.
        budget_db: the PSNR that every picture should reach, if one was given; else tiers keep their own promises.
        notes: what should be known when reading it, such as other weights than recorded.
    """

    reference: dict[str, Any]
    environment: dict[str, Any]
    trials: list[Trial]
    budget_db: float | None
    notes: list[str]
    references: list["Image"] = field(default_factory=list, repr=False)
    prompts: list[str] = field(default_factory=list, repr=False)

    @property
    def holds(self) -> bool:
        """Whether every plan stays inside its budget."""
        return all(trial.budget_db is None or trial.worst() >= trial.budget_db for trial in self.trials)

    def to_json(self) -> dict[str, Any]:
        """Return the report's figures."""
        found = {"reference": self.reference, "environment": self.environment, "notes": self.notes, "holds": self.holds}
        return finite(found | {"budget_psnr_db": self.budget_db, "plans": [trial.summary() for trial in self.trials]})

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, which stands alone, and `report.json`; return the page's path.

        Raises:
            PlanError: the folder cannot be written.
        """
        write_json(Path(folder) / "report.json", self.to_json())
        about = {"Reference": f"{self.reference['pictures']} pictures, {self.reference['dtype'] or 'dtype not recorded'}"}
        about |= {name: str(value) for name, value in self.environment.items()}
        return write_report(
            Path(folder) / "report.html", "Plans held against a reference", about, self.notes,
            [trial.summary() for trial in self.trials], self.prompts, self.references,
            {trial.plan: trial.images for trial in self.trials}, self.budget_db,
        )  # fmt: skip


def compare(
    reference: str | Path | ReferenceSet,
    model: Model,
    plans: Sequence[str | Path | Plan] = ("exact",),
    *,
    min_psnr_db: float | None = None,
    progress: Progress | None = None,
) -> ComparisonReport:
    """Make a reference set's pictures again under each plan, and say how far they are off, and why.

    A profile of another model or machine is compared all the same: that is how to see whether it holds.

    Args:
        reference: the set, or its folder.
        model: what makes the pictures; it gets its own plan back.
        plans: what `Model.set_plan` takes.
        min_psnr_db: the budget that every picture has to reach; by default each tier's own.
        progress: is told the plan, the pictures done, and all.

    Raises:
        DataError: the set is none, is damaged, or empty.
        PlanError: a plan cannot engage.
    """
    opened = reference if isinstance(reference, ReferenceSet) else open_reference(reference)
    cases = [(request, [image]) for request, image in opened]
    if not cases:
        raise DataError(f"the reference set {str(opened.folder)!r} holds no pictures")
    tell = progress or (lambda *_: None)

    def told(what: str) -> Callable[[Trial], bool]:
        def go_on(trial: Trial) -> bool:
            tell(what, len(trial.measured), len(cases))
            return True

        return go_on

    exact = try_plan(model, EXACT, cases, told(EXACT.name))
    if model.loras:  # the recorded pictures are without them: plans are held against the exact plan's, made now
        cases = [(request, [image]) for (request, _), image in zip(cases, exact.images, strict=True)]
        exact.measured = [fidelity.measure_all(image, image) for image in exact.images]
    floor_db = (opened.noise_floor or {}).get("psnr_db") or FLOOR_PSNR_DB
    chosen = [(_find(model, plan), plan) for plan in plans]
    trials = []
    for plan, _ in chosen:
        trial = exact if plan == EXACT else try_plan(model, plan, cases, told(plan.name))
        if len(plan.levers) > 1:
            few = cases[:BLAMED_PICTURES]
            alone = Trial("exact", seconds=exact.seconds[: len(few)], measured=exact.measured[: len(few)])
            trial.blame = blame(model, plan, few, alone, told(f"blame of {plan.name}"))
        trial.budget_db = BUDGETS_DB.get(plan.name) if min_psnr_db is None else min_psnr_db
        trial.verdict = judge(trial, floor_db, opened.dtype, trial.budget_db)
        trials.append(trial)
    about = {"folder": str(opened.folder), "source": opened.source, "pictures": len(opened), "dtype": opened.dtype}
    about |= {"noise_floor": opened.noise_floor, "environment": opened.environment}
    here = environment(model.device, model.dtype) | machine_of(model.device)
    prompts = [request["prompt"] for request, _ in cases]
    return ComparisonReport(
        about, here, trials, min_psnr_db, _notes(opened, model, here), [images[0] for _, images in cases], prompts
    )


def _find(model: Model, plan: str | Path | Plan) -> Plan:
    """Return the plan; a profile's without asking whether it fits, its levers as a tier's."""
    if isinstance(plan, Path) or (isinstance(plan, str) and plan.endswith(".json")):
        return Plan(f"profile {Path(plan).name}", tuple(read_profile(plan).plan), named=False)
    return model.find_plan(plan)


def _notes(opened: ReferenceSet, model: Model, here: dict[str, Any]) -> list[str]:
    """Return what differs from when the set was recorded: it may explain a drift."""
    if opened.source != "imagegen":
        return ["the reference comes from elsewhere: its noise, scheduler and precision may differ from these"]
    notes = []
    if model.loras:
        names = ", ".join(lora["name"] for lora in model.loras)
        notes.append(f"with {names}: plans are held against the exact plan's pictures with it, not against the recorded ones")
    if opened.model.get("sha256") != model.hashes:
        notes.append("the reference was recorded from other weights than these")
    for name in ("torch", "diffusers", "device", "dtype"):
        there = opened.environment.get(name)
        if there is not None and there != here.get(name):
            notes.append(f"recorded with {name} {there}, now {here.get(name)}")
    return notes


def as_row(trial: Trial) -> dict[str, Any]:
    """Return a trial as a line of a log, pictures left out."""
    return finite({name: value for name, value in vars(trial).items() if name != "images"})
