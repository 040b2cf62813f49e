"""The components of a diffusers pipeline: their classes, their weights, and whether the two agree.

Only classes of diffusers and transformers are taken: no code that comes with weights is run.
"""

import contextlib
import importlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from imagegen.contents import quantisation_of
from imagegen.families.libraries import quiet
from imagegen.families.paging import pages_given_back
from imagegen.request import ModelError
from imagegen.sources import LIBRARIES, components_of
from imagegen.weights import TensorFacts, component_weights, read_header, read_json, stored_dtype

WORTH_IT = 2**28  # bytes: smaller weights are converted as they are
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def classes_of(folder: Path, index: dict[str, Any], without: Collection[str] = ()) -> dict[str, type]:
    """Return the class of every component that a model's index names.

    Args:
        folder: of the model.
        index: its `model_index.json`.
        without: components that may be missing.

    Raises:
        ModelError: a class is not one of diffusers or transformers, or a folder is missing.
    """
    found = {}
    for name, (library, kind) in components_of(folder, index).items():
        found[name] = _find_class(folder, name, library, kind)
        if name not in without and not (folder / name).is_dir():
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


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer's folder without its words or its settings: its library would make one that reads nothing.

    Raises:
        ModelError: they are missing.
    """
    names = {path.name for path in folder.iterdir()}
    has_words = bool(names & {"tokenizer.json", "vocab.txt"}) or names >= {"vocab.json", "merges.txt"}
    has_words = has_words or any(name.endswith((".model", ".tiktoken")) for name in names)
    if not has_words:
        raise ModelError(
            f"{str(folder)!r} holds no words (tokenizer.json, vocab.json and merges.txt, or a .model file): "
            "copy or download it again"
        )
    if "tokenizer_config.json" not in names:
        raise ModelError(f"{str(folder)!r} lacks tokenizer_config.json: copy or download it again")


def has_weights(kind: type) -> bool:
    """Return whether a component's class is a module with weights in a folder of its own."""
    import diffusers
    import transformers

    return issubclass(kind, (diffusers.ModelMixin, transformers.PreTrainedModel))


def stored_in(file: Path) -> torch.dtype:
    """Return the dtype of most bytes of a weight file."""
    return DTYPES.get(stored_dtype([file]), torch.float32)


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
    config = read_config(folder)
    _check_dtypes(folder, config, names)
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
    surplus = sorted(info["unexpected_keys"]) if issubclass(kind, diffusers.ModelMixin) and not hasattr(kind, "decode") else []
    if surplus:  # of text encoders and decoders, files often hold more than is used
        raise ModelError(
            f"{str(folder)!r} holds {len(surplus)} tensors that a {kind.__name__} of its config.json has not, {surplus[0]!r} "
            "among them: its weights and its config.json are of different models"
        )
    return module


def read_config(folder: Path) -> dict[str, Any]:
    """Return a component's configuration, empty where the libraries will say what is wrong with it.

    Raises:
        ModelError: it asks for code from elsewhere.
    """
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    config = config if isinstance(config, dict) else {}
    for name, value in config.items():
        if "attn_implementation" in name and "/" in str(value):
            raise ModelError(
                f"{str(folder / 'config.json')!r} asks for {name}={value!r}, code from the hub: "
                "code that comes with weights is not run"
            )
    return config


def no_values(module: torch.nn.Module) -> list[str]:
    """Return the names of a module's tensors that no weight file gave a value."""
    return [name for name, value in module.state_dict().items() if value.is_meta]


def _check_dtypes(folder: Path, config: dict[str, Any], names: dict[str, TensorFacts]) -> None:
    """Refuse quantised weights whose configuration says nothing of it: they would be read as values."""
    how = quantisation_of(names)
    if how and "quantization_config" not in config:
        raise ModelError(
            f"{str(folder)!r} is quantised ({how}) by a tool that its config.json does not name; "
            "use weights in float32, bfloat16 or float16"
        )


@contextlib.contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turn whatever the libraries raise at files that do not fit into a ModelError that names the place."""
    usual = torch.get_default_dtype()
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
    finally:
        torch.set_default_dtype(usual)  # diffusers leaves its own where a constructor fails
