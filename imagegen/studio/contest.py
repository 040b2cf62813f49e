"""One picture made by several plans, each beside its reference: time for each stage, drift, blame, and words for it.

Knows nothing of the page.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen import fidelity
from imagegen.comparison import Trial, add_case, blame, judge
from imagegen.families.diffusion import stock_runner
from imagegen.loader import load
from imagegen.model import Model, Step
from imagegen.reference import FLOOR_MAX_DIFFERENCE, FLOOR_PSNR_DB
from imagegen.report import in_words
from imagegen.request import Request, RequestError, build_request
from imagegen.result import Result
from imagegen.speed import BUDGETS_DB, EXACT, Plan

if TYPE_CHECKING:
    from PIL.Image import Image

Told = Callable[[str, int, int], None]
SETTINGS = ("seed", "num_steps", "guidance", "negative_prompt", "width", "height", "scheduler")


@dataclass
class Entry:
    """One picture held against the reference.

    Attributes:
        name: of the plan, or what picture it is.
        path: its file.
        measured: what `fidelity.measure_all` says.
        verdict: in words.
        seconds: that it took; None for a picture that was not made now.
        stages: `prompt_s`, `steps_s` and `decoding_s`, where it was made now.
        blame: for each lever in turn, what it gave and cost.
        levers: what each lever did.
    """

    name: str
    path: Path
    measured: dict[str, float | None]
    verdict: str
    seconds: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    blame: list[dict[str, Any]] = field(default_factory=list)
    levers: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Contest:
    """A reference and what was held against it.

    Attributes:
        reference: its file.
        against: what the reference is, in words.
        floor: `psnr_db` and `max_difference` of runs that should be equal.
        entries: in the order of their making.
        reference_s: seconds that the reference took, where it was made now.
    """

    reference: Path
    against: str
    floor: dict[str, float]
    entries: list[Entry] = field(default_factory=list)
    reference_s: float | None = None


def default_floor(found: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the noise floor that was recorded with a reference, or the one that fp32 runs on a CPU keep."""
    return {
        "psnr_db": (found or {}).get("psnr_db") or FLOOR_PSNR_DB,
        "max_difference": (found or {}).get("max_difference") or FLOOR_MAX_DIFFERENCE,
    }


def run_timed(model: Model, request: dict[str, Any], on_step: Callable[[int, int], Any]) -> tuple[Result, dict[str, float]]:
    """Make a picture and return it with the seconds of its stages.

    The first step's time beyond the others' median is the prompt's; what is left after the last step is the decoder's.
    On a GPU, where steps run behind the clock, they are told apart roughly.
    """
    ends: list[float] = []

    def told(step: Step) -> None:
        ends.append(step.elapsed_s)
        on_step(step.index + 1, step.num_steps)

    result = model.run(request["prompt"], told, **{name: request.get(name) for name in SETTINGS})
    paces = sorted(late - early for early, late in itertools.pairwise(ends))
    pace_s = paces[len(paces) // 2] if paces else ends[0]
    prompt_s = max(ends[0] - pace_s, 0.0)
    return result, {"prompt_s": prompt_s, "steps_s": ends[-1] - prompt_s, "decoding_s": max(result.elapsed_s - ends[-1], 0.0)}


def make_stock(model: Model, wanted: Request, tell: Told) -> tuple["Image", float]:
    """Return stock diffusers' picture of a request, computed now in float32, and the seconds it took.

    Raises:
        ModelError: diffusers has no pipeline of its own for this model.
    """
    run = stock_runner(model.origin, model.device, family=model.family)
    started = time.perf_counter()

    def on_step(done: int, of: int) -> bool:
        tell("stock diffusers", done, of)
        return True

    image = run(wanted, on_step)[0]
    return image, time.perf_counter() - started


def try_entry(
    model: Model,
    plan: str | Path | Plan,
    request: dict[str, Any],
    reference: "Image",
    floor: dict[str, float],
    folder: Path,
    tell: Told,
    look: Callable[["Image"], Any],
) -> tuple[Entry, Trial]:
    """Make a request's picture under a plan, let it be looked at, save it, and hold it against the reference.

    Raises:
        PlanError: the plan cannot engage.
        RequestError: the two differ in size.
    """
    with model.plan_for_a_while(plan):
        name = model.plan.name
        if model.plan.levers:
            run_timed(model, request, lambda done, of: tell(f"{name}, warming up", done, of))  # compiles
        result, stages = run_timed(model, request, lambda done, of: tell(name, done, of))
        trial = Trial(name, levers=model.applied, budget_db=BUDGETS_DB.get(name))
    look(result.images[0])
    add_case(trial, result, [reference])
    verdict = judge(trial, floor["psnr_db"], "", trial.budget_db)
    path = result.save(folder)[0]
    return Entry(name, path, trial.measured[0], verdict, result.elapsed_s, stages, levers=trial.levers), trial


def hold_models(
    models: Mapping[str, str],
    like: Model,
    request: dict[str, Any],
    contest: Contest,
    folder: Path,
    tell: Told,
    look: Callable[["Image"], Any],
) -> None:
    """Add an entry for each of other models, loaded one after the other on the device of `like` under the exact plan.

    Raises:
        ModelError: one cannot be loaded.
        RequestError: one cannot make the request, or its picture is of another size.
    """
    from PIL import Image

    with Image.open(contest.reference) as opened:
        reference = opened.convert("RGB")
    for name, source in models.items():
        tell(f"loading {name}", 0, 1)
        other = load(source, device=like.device)
        entry, _ = try_entry(other, EXACT, request, reference, contest.floor, folder, tell, look)
        entry.name = name
        contest.entries.append(entry)


def blame_entry(model: Model, entry: Entry, request: dict[str, Any], reference: "Image", exact: Trial) -> None:
    """Find what each lever of an entry's plan gave and cost, where there are several."""
    levers = tuple(part["lever"] for part in entry.levers if "why_not" not in part)
    if len(levers) > 1:
        asked = {name: request.get(name) for name in ("prompt", *SETTINGS)}
        entry.blame = blame(model, Plan(entry.name, levers, named=False), [(asked, [reference])], exact)


def hold_plans(
    model: Model,
    plans: Mapping[str, str | Path],
    request: dict[str, Any],
    contest: Contest,
    folder: Path,
    with_blame: bool,
    tell: Told,
    look: Callable[["Image"], Any],
) -> None:
    """Add an entry to the contest for each plan, the exact one's time first: the others are held against it.

    Nothing is saved of a picture at which `look` raises an error.
    """
    from PIL import Image

    with Image.open(contest.reference) as opened:
        reference = opened.convert("RGB")
    exact_entry, exact = try_entry(model, EXACT, request, reference, contest.floor, folder, tell, look)
    contest.entries.append(exact_entry)
    for name, plan in plans.items():
        if plan == EXACT.name:
            continue
        entry, _ = try_entry(model, plan, request, reference, contest.floor, folder, tell, look)
        entry.name = name
        if with_blame:
            tell(f"which lever of {name} costs what", 0, 1)
            blame_entry(model, entry, request, reference, exact)
        contest.entries.append(entry)


def hold_picture(picture: "Image", name: str, path: Path, contest: Contest, reference: "Image") -> None:
    """Add a picture that was made before.

    Raises:
        RequestError: the two differ in size.
    """
    measured = fidelity.measure_all(reference, picture)
    trial = Trial(name, measured=[measured])
    verdict = judge(trial, contest.floor["psnr_db"], "", None)
    contest.entries.append(Entry(name, path, measured, verdict))


def speed_up(contest: Contest, entry: Entry) -> str:
    """Return how much faster an entry was than the exact plan's, in words; empty where that is not known."""
    exact = next((other.seconds for other in contest.entries if other.name == EXACT.name), None)
    return f"{exact / entry.seconds:.2f} ×" if exact and entry.seconds else ""


def rows_of(contest: Contest) -> list[list[str]]:
    """Return a table's rows: name, time, speed-up, PSNR, SSIM, FLIP, largest difference; the noise floor last."""
    rows = []
    for entry in contest.entries:
        seconds = "" if entry.seconds is None else f"{entry.seconds:.3f} s"
        rows.append([entry.name, seconds, speed_up(contest, entry), *in_figures(entry.measured)])
    floor = contest.floor
    return [
        *rows,
        ["noise floor of equal runs", "", "", f"{floor['psnr_db']:.1f} dB", "", "", f"{floor['max_difference']:g} of 255"],
    ]


def in_figures(measured: Mapping[str, float | None]) -> list[str]:
    """Return PSNR, SSIM, FLIP and the largest difference for people; a metric whose package is missing is a dash."""
    psnr, largest = measured["psnr_db"], measured["max_difference"]
    others = ["–" if (value := measured.get(name)) is None else f"{value:.4f}" for name in ("ssim", "flip")]
    return [in_words(math.inf if psnr is None else psnr), *others, f"{largest:.0f} of 255"]


def chance_of(right: int, of: int) -> float:
    """Return how likely somebody who guesses is right at least so often: the upper tail of a fair coin's binomial."""
    return sum(math.comb(of, count) for count in range(right, of + 1)) / 2**of


def tally(right: int, of: int) -> str:
    """Say what a blind test shows so far."""
    if not of:
        return "No answer yet."
    chance = chance_of(right, of)
    told = "that is hardly luck: the difference can be seen" if chance < 0.05 else "that can well be luck"
    return f"{right} of {of} right; somebody who guesses does as well in {chance:.0%} of tries: {told}."


def settings_of(prompt: str, seed: Any, model: Model) -> dict[str, Any]:
    """Return the request for a prompt and a seed, at the family's own settings.

    Raises:
        RequestError: a value is wrong.
    """
    text = str(seed if seed is not None else "").strip()
    if text and not text.isdecimal():
        raise RequestError(f"seed must be a whole number, got {text!r}")
    return build_request(prompt, model.family, {"seed": int(text) if text else None}).settings()
