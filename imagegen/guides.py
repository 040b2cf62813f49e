"""What a model can be given to follow besides words: a ControlNet and an IP-Adapter, added and removed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from imagegen.catalog import Family
from imagegen.families import control
from imagegen.weights import hash_file, hash_weights


class Guides:
    """A model's ControlNet and IP-Adapter."""

    pipeline: Any
    family: Family
    guides: dict[str, dict[str, Any]]
    control: torch.nn.Module | None

    def add_control(self, folder: str | Path) -> None:
        """Add a ControlNet, in the place of another if there was one; pictures then take `control=`, `control_weight=`.

        Args:
            folder: of the ControlNet, in diffusers' layout.

        Raises:
            ModelError: there is none, or it is for another family.
        """
        self.control = control.load_control(self.pipeline, Path(folder))
        self._guide("control", {"name": Path(folder).name, "sha256": hash_weights(Path(folder))})

    def remove_control(self) -> None:
        """Remove the ControlNet."""
        self.control = None
        self._guide("control", None)

    def add_style(self, path: str | Path, *, image_encoder: str | Path | None = None) -> None:
        """Add an IP-Adapter, in the place of another; pictures then take `style_image=`, `style_weight=`.

        Args:
            path: its .safetensors file.
            image_encoder: folder of the CLIP vision model that it was trained with, unless the model has its own.

        Raises:
            ModelError: a file is missing or of another model, or the family takes none.
        """
        self.remove_style()
        control.load_style(self.pipeline, Path(path), None if image_encoder is None else Path(image_encoder))
        self._guide("style", {"name": Path(path).name, "sha256": hash_file(Path(path))})

    def remove_style(self) -> None:
        """Remove the IP-Adapter; nothing of it is left."""
        if "style" in self.guides:
            control.remove_style(self.pipeline)
            self._guide("style", None)

    def _guide(self, name: str, facts: dict[str, Any] | None) -> None:
        self.guides.pop(name, None)
        if facts:
            self.guides[name] = facts
        self.family = replace(self.family, takes=tuple(sorted(self.guides)))
