"""From a source to its pipeline: every component with its weights, the stock class around them, nothing from the network."""

from pathlib import Path
from typing import Any

import torch

from imagegen.families import single_file
from imagegen.families.components import (
    check_tokenizer,
    classes_of,
    has_weights,
    load_component,
    no_values,
    read_config,
    reading,
    stored_in,
)
from imagegen.families.libraries import quiet
from imagegen.request import ModelError
from imagegen.sources import Source, read_index, weight_files

# What no pipeline draws without; others, such as a third text encoder, may be left out.
NEEDED = ("text_encoder", "tokenizer", "scheduler", "unet", "transformer", "vae")


def pipeline_class(source: Source) -> str:
    """Return the name of a source's pipeline class.

    Raises:
        ModelError: its folder, or its base's, is no diffusers model.
    """
    return read_index(source.diffusers_folder)["_class_name"]


def load_pipeline(source: Source, device: torch.device, dtype: torch.dtype | None) -> tuple[Any, dict[str, Path]]:
    """Load a source as its stock diffusers pipeline, from local files and safetensors only.

    Args:
        source: found.
        device: where to run.
        dtype: what to compute in; None for the dtypes of the files, which are then hardly read: to see whether they fit.

    Returns:
        The pipeline, and the weight files that it was loaded from, by their names in receipts.

    Raises:
        ModelError: weights are missing, damaged or of another model, or code would come with them.
    """
    folder = source.diffusers_folder
    index = read_index(folder)
    with quiet():
        import diffusers

        kinds = classes_of(folder, index, () if source.vae is None else ("vae",))
        kind = getattr(diffusers, index["_class_name"], None)
    if kind is None:
        raise ModelError(f"{source.name!r} is a {index['_class_name']}, which this diffusers has not: update it")
    loaded: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
    if source.vae is not None:
        loaded["vae"] = load_vae(source, index, kinds, dtype)
    for name, part in kinds.items():
        if "Tokenizer" in part.__name__ and "ByT5" not in part.__name__ and not source.built_in:
            check_tokenizer(folder / name)
    own = [name for name, part in kinds.items() if has_weights(part) and name not in loaded]
    inside: set[str] = set()
    if source.contents is not None:
        denoiser = "transformer" if "transformer" in kinds else "unet"
        inside = single_file.parts_inside(source.contents, denoiser, kinds) - set(loaded)
        own = [name for name in own if name not in inside]
        own = [name for name in own if name not in single_file.OPTIONAL or single_file.is_in(folder / name)]
        single_file.check_base(source, index["_class_name"], read_config(folder / denoiser))
        single_file.check_rest(source, own)
    files = weight_files(source, own)
    for name in sorted(own):
        variant = (source.base or source).variant
        loaded[name] = load_component(folder / name, kinds[name], dtype, variant)
    if source.contents is not None:
        pipeline = single_file.load(source, kind, kinds, inside, loaded, dtype or stored_in_file(source))
    else:
        with quiet(), reading(folder):
            pipeline = kind.from_pretrained(str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, **loaded)
    _check_whole(source, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device), files


def stored_in_file(source: Source) -> torch.dtype:
    """Return the dtype of one file's weights; float32 of quantised ones."""
    return torch.float32 if source.path.suffix == ".gguf" else stored_in(source.path)


def _check_whole(source: Source, pipeline: Any) -> None:
    """Refuse a pipeline without a part that it needs, or with tensors that no file gave a value."""
    for name, component in pipeline.components.items():
        if component is None and name in NEEDED and name not in pipeline._optional_components:
            raise ModelError(f"{str(source.path)!r} cannot be loaded: it has no {name}, which a {type(pipeline).__name__} needs")
        if not isinstance(component, torch.nn.Module):
            continue
        component.eval()  # diffusers leaves a T5 from one file as for training: it would drop words at random
        missing = no_values(component)
        if missing:
            raise ModelError(
                f"{str(source.path)!r} cannot be loaded: {name} lacks {len(missing)} tensors, {missing[0]!r} among them"
            )


def load_vae(source: Source, index: dict[str, Any], kinds: dict[str, type], dtype: torch.dtype | None) -> Any:
    """Load the decoder that was given beside a model.

    Args:
        source: of the model; its own decoder may be missing.
        index: its `model_index.json`.
        kinds: the classes of its components.
        dtype: what the weights become.

    Raises:
        ModelError: the model has none to replace, it is for other latents, or one file whose configuration is nowhere.
    """
    import diffusers

    assert source.vae is not None
    given, usual, own = source.vae, kinds.get("vae", diffusers.AutoencoderKL), source.diffusers_folder / "vae"
    if "vae" not in index:
        raise ModelError(f"vae={given.name!r}: this model has no decoder to replace; leave it out")
    has_own = (own / "config.json").is_file()
    if given.contents is not None:
        if not has_own:
            raise ModelError(
                f"vae={given.name!r} is one file, and {str(own)!r} has no config.json for it: give a decoder's folder"
            )
        with quiet(), reading(given.path):
            decoder = usual.from_single_file(
                str(given.path), config=str(own), torch_dtype=dtype or stored_in(given.path), local_files_only=True
            )
        if no_values(decoder):
            raise ModelError(f"vae={given.name!r} lacks tensors of this model's decoder: it is of another model")
    else:
        with quiet(), reading(given.path):
            name = str(usual.load_config(str(given.path)).get("_class_name"))
            kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) and hasattr(kind, "decode")):
            raise ModelError(f"vae={given.name!r} is a {name}, no decoder of latents")
        decoder = load_component(given.path, kind, dtype, given.variant)
    channels = decoder.config.get("latent_channels")
    with reading(own):
        wanted = usual.load_config(str(own)).get("latent_channels") if has_own else channels
    if wanted != channels:
        raise ModelError(f"vae={given.name!r} decodes latents of {channels} channels, and this model has {wanted}")
    return decoder


def load_stock(source: Source, dtype: torch.dtype) -> Any:
    """Load a source as diffusers does by itself, where it can: a folder, with nothing of ours in between."""
    if source.contents is not None or source.vae is not None:
        return load_pipeline(source, torch.device("cpu"), dtype)[0]
    with quiet():
        from diffusers import DiffusionPipeline

        options = {"variant": source.variant} if source.variant else {}
        return DiffusionPipeline.from_pretrained(source.path, dtype=dtype, local_files_only=True, use_safetensors=True, **options)
