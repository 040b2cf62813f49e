"""What a model can be given to follow besides words: a ControlNet and an IP-Adapter, added and removed."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from imagegen.catalog import Family
from imagegen.families import control
from imagegen.families.control import Eyes
from imagegen.request import ModelError
from imagegen.weights import hash_file, hash_weights


class Guides(ABC):
    """A model's ControlNet and IP-Adapter."""

    pipeline: Any
    family: Family
    guides: dict[str, dict[str, Any]]
    control: torch.nn.Module | None
    _style: tuple[Path, Eyes] | None = None  # the IP-Adapter, and what it sees through
    _own_eyes: Eyes | None = None  # the model's, while there is an IP-Adapter

    @abstractmethod
    def check_idle(self, what: str) -> None:
        """Refuse a change while pictures are made."""

    def add_control(self, folder: str | Path) -> None:
        """Add a ControlNet, in the place of another if there was one; pictures then take `control=`, `control_weight=`.

        Args:
            folder: of the ControlNet, in diffusers' layout.

        Raises:
            ModelError: there is none, or it is for another family.
        """
        self.check_idle("the ControlNet")
        self.control = control.load_control(self.pipeline, Path(folder))
        self._guide("control", {"name": Path(folder).name, "sha256": hash_weights(Path(folder))})

    def remove_control(self) -> None:
        """Remove the ControlNet."""
        self.check_idle("the ControlNet")
        self.control = None
        self._guide("control", None)

    def add_style(self, path: str | Path, *, image_encoder: str | Path | None = None) -> None:
        """Add an IP-Adapter, in the place of another; pictures then take `style_image=`, `style_weight=`.

        Args:
            path: its .safetensors file.
            image_encoder: folder of the CLIP vision model that it was trained with; by default that of the
                IP-Adapter before, or the model's own.

        Raises:
            ModelError: a file is missing or of another model, or the family takes none; the model is then as before.
        """
        self.check_idle("the IP-Adapter")
        file, before = Path(path), self._style
        usual = before[1] if before else control.eyes_of(self.pipeline)
        eyes = usual if image_encoder is None else control.load_eyes(self.pipeline, Path(image_encoder))
        control.check_style(self.pipeline, file, eyes)
        self.remove_style()
        try:
            self._load_style(file, eyes)
        except ModelError:
            if before:
                self._load_style(*before)
            raise

    def _load_style(self, file: Path, eyes: Eyes) -> None:
        own = control.eyes_of(self.pipeline)
        try:
            control.load_style(self.pipeline, file, eyes)
        except ModelError:
            control.remove_style(self.pipeline, own)
            raise
        self._style, self._own_eyes = (file, eyes), own
        self._guide("style", {"name": file.name, "sha256": hash_file(file)} | ({"encoder": eyes.sha256} if eyes.sha256 else {}))

    def remove_style(self) -> None:
        """Remove the IP-Adapter; nothing of it is left."""
        self.check_idle("the IP-Adapter")
        if self._own_eyes is not None:
            control.remove_style(self.pipeline, self._own_eyes)
            self._style = self._own_eyes = None
            self._guide("style", None)

    def _guide(self, name: str, facts: dict[str, Any] | None) -> None:
        self.guides.pop(name, None)
        if facts:
            self.guides[name] = facts
        self.family = replace(self.family, takes=tuple(sorted(self.guides)))
