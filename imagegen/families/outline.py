"""A pipeline without its weights: its class and the configurations of its parts, which tell what it makes before it is loaded."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from imagegen.families.components import classes_of, reading
from imagegen.families.libraries import quiet
from imagegen.request import ModelError
from imagegen.sources import Source, read_index


def outline(source: Source) -> Any:
    """Return what stands for a source's pipeline where only its class and its parts' configurations are asked for.

    Raises:
        ModelError: its folder, or its base's, is no diffusers model, or a configuration is missing or damaged.
    """
    folder = source.diffusers_folder
    index = read_index(folder)
    with quiet():
        import diffusers

        kinds = classes_of(folder, index, () if source.vae is None else ("vae",))
        kind = getattr(diffusers, index["_class_name"], None)
    if kind is None:
        raise ModelError(f"{source.name!r} is a {index['_class_name']}, which this diffusers has not: update it")
    places = {name: folder / name for name, part in kinds.items() if issubclass(part, diffusers.ModelMixin)}
    if source.vae is not None and source.vae.contents is None:
        kinds, places = kinds | {"vae": diffusers.AutoencoderKL}, places | {"vae": source.vae.path}
    parts = {name: SimpleNamespace(config=_config(kinds[name], place)) for name, place in places.items()}
    made = type(kind.__name__, (kind,), {"components": parts, "config": index, **parts})
    return object.__new__(made)


def _config(kind: Any, folder: Path) -> dict[str, Any]:
    """Return a part's configuration with its class's defaults, as the part itself would have it."""
    defaults = inspect.signature(kind.__init__).parameters.values()
    with quiet(), reading(folder):
        return {one.name: one.default for one in defaults if one.default is not one.empty} | kind.load_config(str(folder))
