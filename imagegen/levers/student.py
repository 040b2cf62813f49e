"""The lever that is another model: a student distilled from this one, of few steps and no guidance."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from imagegen.families import adapters
from imagegen.levers.compute import _OnACopy
from imagegen.levers.lever import RunFacts, Target
from imagegen.request import ModelError, RequestError
from imagegen.sampling import STAND_IN, follow_teacher, has_known_levels, prediction_of
from imagegen.weights import hash_file

FILE = "turbo.safetensors"


@dataclass
class Student(_OnACopy):
    """Let a student that `distill` made compute, in its own number of steps and without guidance.

    `file` is its LoRA or full weights, or the folder that `distill` wrote them to; a relative one that is not
    there is looked for in the model's own folder.
    """

    file: str = FILE

    name: ClassVar[str] = "student"
    stage: ClassVar[int] = 0
    essential: ClassVar[bool] = True
    conflicts: ClassVar[frozenset[str]] = frozenset({"fewer-steps", "guidance-cache", "guidance-interval"})

    def requires(self, target: Target) -> str | None:
        """Return why it cannot engage."""
        try:
            file = self._find(target)
            facts = read_facts(file)
        except ModelError as error:
            return str(error)
        wanted = facts["model_sha256"]
        denoisers = {name: value for name, value in wanted.items() if name.startswith(("unet/", "transformer/"))}
        if not set((denoisers or wanted).values()) <= set(target.hashes().values()):
            return f"the student {str(file)!r} was distilled from other weights than this model's: distil it again"
        return None

    def _find(self, target: Target) -> Path:
        for place in (Path(self.file), (target.folder or Path()) / self.file):
            files = (
                [place] if place.is_file() else [place / name for name in (adapters.FILE, "diffusion_pytorch_model.safetensors")]
            )
            for file in files:
                if file.is_file():
                    return file
        raise ModelError(f"no student {self.file!r}, here or in the model's folder: make one with imagegen distill")

    def apply(self, target: Target) -> None:
        """Put the student's weights into a copy of the denoiser."""
        self.path = self._find(target)
        self.facts, self.sha256 = read_facts(self.path), hash_file(self.path)
        own = target.pipeline.scheduler
        self.stands_in = not has_known_levels(own)
        self.scheduler = STAND_IN if self.stands_in and prediction_of(own) != "flow" else None
        super().apply(target)

    def change(self, worker: torch.nn.Module) -> None:
        """Load what was trained into the copy."""
        adapters.merge_file(worker, self.path)

    def default_settings(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Return the student's own number of steps, no guidance, and a scheduler of known levels where the model's has none."""
        own = {"num_steps": self.facts["student_steps"], "guidance": 1.0}
        own |= {"scheduler": self.scheduler} if self.scheduler else {}
        return {name: value for name, value in own.items() if name not in given}

    def begin(self, run: RunFacts) -> None:
        """Let the run step over the teacher's levels.

        Raises:
            RequestError: guidance or another scheduler was asked for.
        """
        if run.guided:
            raise RequestError(
                f"guidance must be 1 or left out with a student, which has its teacher's built in, got {run.guidance:g}"
            )
        if not (has_known_levels(run.scheduler) or (self.stands_in and self.scheduler is None)):
            raise RequestError("scheduler must be left out with a student, which was distilled for its teacher's levels")
        follow_teacher(run.scheduler, self.facts["teacher_steps"], self.stands_in)

    def engaged(self) -> str:
        """Return what it did, and which file it was."""
        done = super().engaged()
        return f"{done} of {self.path.name}, sha256 {self.sha256[:16]}" if done else ""


def read_facts(file: Path) -> dict[str, Any]:
    """Return what a student's file says of itself.

    Raises:
        ModelError: it is none.
    """
    try:
        facts = json.loads(adapters.read_metadata(file)["imagegen"])
        if isinstance(facts["student_steps"], int) and isinstance(facts["teacher_steps"], int) and facts["model_sha256"].items():
            return facts
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise ModelError(f"{str(file)!r} is no student that imagegen distill made: its file does not say how many steps it takes")
