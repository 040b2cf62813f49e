"""What the tuner found, as a file: the fastest plan inside a budget, on one machine, with its evidence.

Plain data; knows nothing of torch or of what a lever is.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagegen.request import PlanError

VERSION = 1


@dataclass(frozen=True)
class Profile:
    """A tuned plan.

    Attributes:
        version: version of this format.
        model: `source`, `family` and `sha256` of every weight file.
        machine: the fingerprint of the machine it was measured on (`measure.machine_of`).
        environment: versions, device and dtype (`measure.environment`).
        budget: `metric`, `bound`, and the memory cap in GiB where one was given.
        request: `num_steps`, `guidance`, `width`, `height`, `num_images` that were measured.
        plan: the levers, each as `name(setting=value, …)`.
        evidence: `n` unseen pictures, `worst`, `mean`, `failure_rate_below` (95 %), `margin`.
        speed: seconds for a picture by the plan and by stock diffusers, medians and spreads, and the ratio.
        frontier: every plan that nothing else beat, with its figures.
    """

    version: int
    model: dict[str, Any]
    machine: dict[str, Any]
    environment: dict[str, Any]
    budget: dict[str, Any]
    request: dict[str, Any]
    plan: list[str]
    evidence: dict[str, Any]
    speed: dict[str, Any]
    frontier: list[dict[str, Any]]

    def save(self, path: str | Path) -> Path:
        """Write it as JSON beside its place, and move it in.

        Raises:
            PlanError: it cannot be written there.
        """
        return write_json(Path(path), {name: getattr(self, name) for name in Profile.__dataclass_fields__})

    def check_fits(self, hashes: dict[str, str], machine: dict[str, Any]) -> None:
        """Refuse another model or machine.

        Raises:
            PlanError: it was tuned for other weights, or elsewhere.
        """
        if hashes != self.model["sha256"]:
            raise PlanError(f"this profile was tuned for other weights ({self.model.get('source')}): run imagegen tune for these")
        pairs = {name: (value, machine.get(name)) for name, value in self.machine.items()}
        changed = [f"{name} {there!r}, here {here!r}" for name, (there, here) in pairs.items() if there != here]
        if changed:
            raise PlanError(f"this profile was tuned on another machine ({'; '.join(changed)}): run imagegen tune here")


def write_json(path: Path, data: Any) -> Path:
    """Write JSON beside its place and move it in; infinite numbers become null.

    Raises:
        PlanError: it cannot be written there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(finite(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise PlanError(f"cannot write {str(path)!r}: {error.strerror}; choose another path") from None
    finally:
        with contextlib.suppress(OSError):  # it has moved, or the folder itself is what is wrong
            part.unlink()
    return path


def finite(value: Any) -> Any:
    """Return JSON-ready data: numbers that JSON lacks become null."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def read_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        PlanError: there is none, or it is damaged or newer than this version.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"no profile {str(path)!r}: imagegen tune writes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"the profile {str(path)!r} cannot be read: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("version"), int):
        raise PlanError(f"{str(path)!r} is no profile of imagegen tune")
    if data["version"] > VERSION:
        raise PlanError(f"the profile {str(path)!r} has version {data['version']}, newer than {VERSION}: update imagegen")
    kinds = {"model": dict, "machine": dict, "budget": dict, "request": dict, "plan": list, "evidence": dict}
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind):
            raise PlanError(f"the profile {str(path)!r} has no usable {name!r}: it is damaged")
    if not isinstance(data["model"].get("sha256"), dict) or not all(isinstance(lever, str) for lever in data["plan"]):
        raise PlanError(f"the profile {str(path)!r} is damaged: its model has no hashes, or its plan is no list of levers")
    empty: dict[str, Any] = {"environment": {}, "speed": {}, "frontier": []}
    known: dict[str, Any] = {name: data.get(name, empty.get(name)) for name in Profile.__dataclass_fields__}
    return Profile(**known)
