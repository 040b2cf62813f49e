"""The components of a diffusers pipeline: their classes, their weights, and whether the two agree.

Only classes of diffusers and transformers are taken: no code that comes with weights is run.
"""

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from imagegen.families.libraries import quiet
from imagegen.families.paging import pages_given_back
from imagegen.request import ModelError
from imagegen.sources import LIBRARIES, components_of
from imagegen.weights import TensorFacts, component_weights, read_header

WORTH_IT = 2**28  # bytes: smaller weights are converted as they are
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def classes_of(folder: Path, index: dict[str, Any]) -> dict[str, type]:
    """Return the class of every component that a model's index names.

    Args:
        folder: of the model.
        index: its `model_index.json`.

    Raises:
        ModelError: a class is not one of diffusers or transformers, or a folder is missing.
    """
    found = {}
    for name, (library, kind) in components_of(folder, index).items():
        found[name] = _find_class(folder, name, library, kind)
        if not (folder / name).is_dir():
            raise ModelError(f"{str(folder)!r} lacks {name}/, which its model_index.json names: copy or download it again")
    return found


def _find_class(folder: Path, name: str, library: str, kind: str) -> type:
    with quiet():
        from diffusers import pipelines

        known = library in LIBRARIES
        inside = not known and "." not in library and hasattr(pipelines, library)
        if not known and not inside:
            raise ModelError(
                f"{str(folder)!r} names code of its own for {name}, {library}.{kind}: code that comes with weights is not run"
            )
        module = getattr(pipelines, library) if inside else importlib.import_module(library)
        found = getattr(module, kind, None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        place = library if known else "diffusers"
        raise ModelError(f"{str(folder)!r} names {library}.{kind} for {name}, a class that this {place} has not: update it")
    return found


def has_weights(kind: type) -> bool:
    """Return whether a component's class is a module with weights in a folder of its own."""
    import diffusers
    import transformers

    return issubclass(kind, (diffusers.ModelMixin, transformers.PreTrainedModel))


def stored_in(file: Path) -> torch.dtype:
    """Return the dtype of most tensors of a weight file."""
    dtypes = [facts.dtype for facts in read_header(file).values()]
    return DTYPES.get(max(sorted(set(dtypes)), key=dtypes.count), torch.float32)


def load_component(folder: Path, kind: type, dtype: torch.dtype | None, variant: str | None = None) -> Any:
    """Load one component with its weights, as its library does.

    Args:
        folder: of the component, as in `unet/`.
        kind: its class.
        dtype: what its weights become; None for the dtype that they are stored in, where hardly anything is read.
        variant: of the weights.

    Raises:
        ModelError: its weights are damaged, lack a tensor, or have another shape than its configuration says.
    """
    import diffusers

    files = component_weights(folder, variant)
    names: dict[str, TensorFacts] = {}
    for file in files:
        names |= read_header(file)
    _check_dtypes(folder, names)
    stored = stored_in(files[0])
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if variant and any(f".{variant}" in file.name for file in files):
        options["variant"] = variant
    options["torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"] = dtype or stored
    size = sum(file.stat().st_size for file in files)
    converts = dtype is not None and dtype != stored and size > WORTH_IT
    with quiet(), reading(folder), pages_given_back(files) if converts else contextlib.nullcontext():
        module, info = kind.from_pretrained(str(folder), **options)  # type: ignore[attr-defined]
    lacking = sorted(set(info["missing_keys"]) | set(no_values(module)))
    if lacking:
        raise ModelError(
            f"{str(folder)!r} lacks {len(lacking)} tensors of a {kind.__name__}, {lacking[0]!r} among them: "
            "its weights and its config.json are of different models"
        )
    return module


def no_values(module: torch.nn.Module) -> list[str]:
    """Return the names of a module's tensors that no weight file gave a value."""
    return [name for name, value in module.state_dict().items() if value.is_meta]


def _check_dtypes(folder: Path, names: dict[str, TensorFacts]) -> None:
    """Refuse weights of whole numbers whose configuration says nothing of quantisation: they would be read as values."""
    whole = sorted(name for name, facts in names.items() if facts.dtype not in DTYPES and len(facts.shape) > 1)
    whole = [name for name in whole if name.endswith("weight")]
    if not whole:
        return
    try:
        quantised = "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        quantised = False
    if not quantised:
        raise ModelError(
            f"{str(folder)!r} mixes dtypes: {whole[0]!r} is {names[whole[0]].dtype}, quantised by a tool that its config.json "
            "does not name; use weights in float32, bfloat16 or float16"
        )


@contextlib.contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turn whatever the libraries raise at files that do not fit into a ModelError that names the place."""
    try:
        yield
    except ModelError:
        raise
    except MemoryError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # they raise anything, from KeyError to their own kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "out of meta tensor" in reason:
            reason = "it lacks tensors that its configuration, or its base's, names: damaged, or of another model"
        raise ModelError(f"{str(place)!r} cannot be loaded: {reason}") from error
