"""What was measured of each plan on this machine: a picture's time and its fidelity. Knows nothing of Gradio.

The measurements of the model's own tiers are kept in the output folder, for the next start; a profile carries its own.
"""

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.comparison import Trial, try_plan
from imagegen.measure import environment, machine_of
from imagegen.profile import read_profile, write_json
from imagegen.prompts import confirm_prompts
from imagegen.reference_set import open_reference, record_reference
from imagegen.report import in_words
from imagegen.request import Error
from imagegen.speed import EXACT

if TYPE_CHECKING:
    from imagegen.model import Model

FILE = "figures.json"
NUM_PICTURES = 3
UNKNOWN = "not measured here yet"


def measure_tiers(
    model: "Model", tiers: Sequence[str], reference: Path | None, tell: Callable[[str, int, int], Any]
) -> list[Trial]:
    """Make a few pictures under each tier and hold them against their reference.

    Args:
        model: to oneself.
        tiers: names.
        reference: a set for this model; None records one and throws it away.
        tell: is told the plan, the pictures done, and all.

    Returns:
        A trial for each, the exact plan's first.

    Raises:
        PlanError: a tier cannot engage.
    """
    made = Path(tempfile.mkdtemp(prefix="imagegen-tiers-")) if reference is None else None
    try:
        if made is not None:
            record_reference(model, confirm_prompts(model.family.name)[:NUM_PICTURES], made / "set", progress=tell)
        opened = open_reference(reference or made / "set")  # type: ignore[operator]
        cases = [(request, [image]) for request, image in itertools.islice(opened, NUM_PICTURES)]
        trials = []
        for tier in (EXACT.name, *(tier for tier in tiers if tier != EXACT.name)):

            def go_on(trial: Trial, tier: str = tier) -> bool:
                tell(tier, len(trial.measured), len(cases))
                return True

            tell(f"{tier}, warming up", 0, len(cases))
            trials.append(try_plan(model, tier, cases, go_on))
        return trials
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def figures_of(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Return what trials, the exact plan's first, say of each plan.

    Returns:
        By name: `seconds` of a picture, how much `faster` than exact, the worst `psnr_db` (None: identical), and `pictures`.
    """
    exact_s = trials[0].median_s
    return {
        trial.plan: {
            "seconds": round(trial.median_s, 4),
            "faster": round(exact_s / trial.median_s, 3),
            "psnr_db": worst if math.isfinite(worst := trial.worst()) else None,
            "pictures": len(trial.measured),
        }
        for trial in trials
    }


def say(figures: dict[str, Any] | None) -> str:
    """Return the figures of one plan in a few words."""
    if not figures:
        return UNKNOWN
    faster = "" if abs(figures["faster"] - 1) < 0.005 else f", {figures['faster']:.2f} ×"
    return f"{figures['seconds']:.2f} s{faster}, worst {in_words(figures['psnr_db'])}"


def say_profile(path: Path) -> str:
    """Return the figures that a profile carries, in a few words."""
    try:
        profile = read_profile(path)
    except Error:
        return UNKNOWN
    seconds, ratio, worst = profile.speed["median_s"], profile.speed["ratio"], profile.evidence["worst"]
    said = in_words(worst) if profile.budget["metric"] == "psnr_db" else f"{profile.budget['metric']} {worst:.4f}"
    return f"{seconds:.2f} s, {ratio:.2f} × stock, worst {said}"


def _fingerprint(model: "Model") -> dict[str, Any]:
    return {"sha256": model.hashes, "machine": machine_of(model.device), "environment": environment(model.device, model.dtype)}


def keep_figures(root: Path, model: "Model", figures: dict[str, dict[str, Any]]) -> None:
    """Write what was measured, with what it holds for."""
    write_json(root / FILE, _fingerprint(model) | {"plans": figures})


def kept_figures(root: Path, model: "Model") -> dict[str, dict[str, Any]]:
    """Return what was measured earlier of these weights, on this machine, with these versions; nothing else holds."""
    try:
        kept = json.loads((root / FILE).read_text(encoding="utf-8"))
        plans = kept.pop("plans")
        return dict(plans) if kept == json.loads(json.dumps(_fingerprint(model))) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
