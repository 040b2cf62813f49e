"""LoRA: on which layers, how it is saved, and how a file of any usual layout is read.

diffusers and peft do the work; this module decides the layers, proves that keys matched, and keeps files free
of anything but their weights and facts.
"""

import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from imagegen.contents import identify
from imagegen.families.diffusion import denoiser_name, quiet
from imagegen.request import DataError, ModelError
from imagegen.weights import read_header, save_weights

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's own names
FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name: `load_lora_weights(folder)` finds it
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")
TEXT_READERS = (("add_k_proj", "add_v_proj"), ("attn2.to_k", "attn2.to_v"))  # beside the first, attn2 is the picture's own
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
ADAPTER = "imagegen-training"
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
LAYER = re.compile(r"(?P<part>\w+)\.(?P<layer>.+?)\.(?:lora\.|lora_linear_layer\.|lora_)(?P<way>down|up|A|B)\.weight")
DOWN = re.compile(r"lora(_linear_layer)?[._](down|A)\.(default\.)?weight$")
PEFT = "base_model.model."  # what peft itself puts before every name


def find_layers(module: torch.nn.Module, kind: str = "attention") -> list[str]:
    """Return the names of the layers that a LoRA goes on: a denoiser's attention, or a CLIP text encoder's.

    Args:
        module: a denoiser, or a text encoder.
        kind: `attention`; `convolutions`, for a denoiser's too; `all` of its layers that multiply; or `text`, those that
            read the prompt: what other words mean changes least.

    Raises:
        DataError: it has no such layers.
    """
    if kind == "all" and hasattr(module, "config") and not hasattr(module, "get_input_embeddings"):
        return [name for name, layer in module.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    if kind == "text" and not hasattr(module, "get_input_embeddings"):
        for ends in TEXT_READERS:
            found = [name for name, _ in module.named_modules() if name.endswith(ends)]
            if found:
                return found
        raise DataError(f"a {type(module).__name__} has no layers that read the prompt alone: use 'attention', not 'text'")
    usual = ATTENTION + (CONVOLUTIONS if kind == "convolutions" else ())
    for names in (usual, TEXT_ATTENTION):
        if any(name.endswith(f".{names[0]}") for name, _ in module.named_modules()):
            return list(names)
    known = f"{', '.join(ATTENTION)} or {', '.join(TEXT_ATTENTION)}"
    raise DataError(f"a {type(module).__name__} has no attention layers {known} to put a LoRA on")


def add_adapter(module: torch.nn.Module, layers: list[str], *, rank: int, alpha: int, dora: bool, seed: int) -> list[Any]:
    """Put a fresh LoRA on a module's layers; return what is trained.

    Args:
        module: its own weights are frozen.
        layers: of `find_layers`.
        rank: from 1.
        alpha: from 1; the LoRA's output is scaled by alpha / rank.
        dora: also learn magnitudes. Source: Liu et al. (2024), https://arxiv.org/abs/2402.09353.
        seed: of the first values.

    Raises:
        DataError: the library that the module comes from refuses it.
    """
    from peft import LoraConfig

    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, use_dora=dora, target_modules=layers, init_lora_weights="gaussian")
        try:
            module.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:  # versions that do not go together
            raise DataError(f"a {type(module).__name__} takes no LoRA here: {error}") from None
    return [weight for weight in module.parameters() if weight.requires_grad]


def remove_adapter(module: torch.nn.Module) -> None:
    """Take the LoRA that is being trained off a module, if it has one."""
    from diffusers.utils import recurse_remove_peft_layers

    if ADAPTER in getattr(module, "peft_config", {}):
        recurse_remove_peft_layers(module)
        del module.peft_config
        module._hf_peft_config_loaded = False


def save_adapter(parts: dict[str, torch.nn.Module], folder: Path, facts: dict[str, Any]) -> Path:
    """Write a LoRA in diffusers' layout with facts about it; equal weights and facts make equal files.

    Args:
        parts: the modules that carry it, by the pipeline's names: `unet` or `transformer`, `text_encoder`.
        folder: gets the file.
        facts: ready for JSON.

    Returns:
        The file's path.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    tensors: dict[str, torch.Tensor] = {}
    kept: dict[str, Any] = {}
    with quiet():
        for part, module in parts.items():
            layers = get_peft_model_state_dict(module, adapter_name=ADAPTER)
            if part.startswith("text_encoder"):  # a denoiser's would be mixed with peft's names, and half of it not be read again
                layers = convert_state_dict_to_diffusers(layers)
            config = module.peft_config[ADAPTER].to_dict()
            tensors |= {f"{part}.{name}": value for name, value in layers.items()}
            kept |= {f"{part}.{name}": _plain(value) for name, value in sorted(config.items()) if value is not None}
    metadata = {"lora_adapter_metadata": json.dumps(kept, sort_keys=True), "imagegen": json.dumps(facts, sort_keys=True)}
    return save_weights(folder / FILE, tensors, metadata)


def export_kohya(file: Path, to: Path) -> Path:
    """Write a LoRA of ours in kohya's layout, which AUTOMATIC1111, ComfyUI and Forge read.

    Args:
        file: of `save_adapter`, or its folder.
        to: the new file.

    Raises:
        ModelError: it is no LoRA for a UNet: kohya's names of a transformer's layers are others.
    """
    file = file / FILE if file.is_dir() else file
    tensors, metadata = _read(file)
    adapter = _config_of(metadata, file)
    made: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        found = LAYER.fullmatch(name)
        if found is None or found["part"] not in KOHYA:
            raise ModelError(
                f"{str(file)!r} holds {name!r}: kohya's layout is written for plain LoRAs of a UNet and its text encoder only"
            )
        layer = f"{KOHYA[found['part']]}_{found['layer'].replace('.', '_')}"
        goes_down = found["way"] in ("down", "A")
        rank = value.shape[0 if goes_down else 1]
        made[f"{layer}.{'lora_down' if goes_down else 'lora_up'}.weight"] = value
        made[f"{layer}.alpha"] = torch.tensor(float(adapter.get(f"{found['part']}.lora_alpha", rank)))
    return save_weights(to, made, {"imagegen": metadata.get("imagegen", "{}")})


def _plain(value: Any) -> Any:
    """Return JSON-ready data in a fixed order."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def peft_is_missing() -> str | None:
    """Return what to do where peft is not installed; None where it is."""
    return None if find_spec("peft") else "LoRAs need peft: pip install 'imagegen-diffusion[train]'"


def load_adapter(pipeline: Any, path: Path, name: str) -> Path:
    """Load a LoRA in diffusers', peft's or kohya's layout under a name; return its file.

    Raises:
        ModelError: there is no such file, it is no LoRA, or it matches no layer of this model.
    """
    missing = peft_is_missing()
    if missing:
        raise ModelError(missing)
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"a {type(pipeline).__name__} takes no LoRAs: use the model without")
    file = _find_file(path)
    names = read_header(file)
    if not any("lora" in name for name in names):
        found = identify(names)
        raise ModelError(f"{str(file)!r} is no LoRA, but {found.what}: {found.use or 'load it as a model'}")
    if any(name.endswith(".dora_scale") for name in names):
        raise ModelError(f"{str(file)!r} is a DoRA in kohya's layout, whose magnitudes diffusers leaves out: convert it first")
    of_peft = all(name.startswith(PEFT) for name in names)
    with quiet():
        try:
            if of_peft:
                pipeline.load_lora_weights(_from_peft(pipeline, file), adapter_name=name)
            else:
                weights = {"weight_name": file.name, "local_files_only": True}
                pipeline.load_lora_weights(str(file.parent), adapter_name=name, **weights)
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            _remove(pipeline, name)
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"the LoRA {str(file)!r} does not fit this model: {reason}") from None
    if not _has(pipeline, name):
        raise ModelError(f"the LoRA {str(file)!r} matches no layer of this model: it was made for another one")
    there, taken = sum(bool(DOWN.search(key)) for key in names), _count_layers(pipeline, name)
    if taken < there:
        warnings.warn(
            f"{taken} of the {there} layers of the LoRA {str(file)!r} match this model; the rest is left out", stacklevel=3
        )
    return file


def _count_layers(pipeline: Any, name: str) -> int:
    """Return how many layers of all parts carry a LoRA of that name."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(name in getattr(layer, "lora_A", {}) for part in parts for layer in part.modules())


def _find_file(path: Path) -> Path:
    places = [path / FILE, path / PEFT_FILE] if path.is_dir() else [path]
    for place in places:
        if place.is_file():
            return place
    raise ModelError(f"no LoRA {str(path)!r}: give a .safetensors file, or a folder with {FILE} or {PEFT_FILE}")


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    read_header(file)  # says what is wrong
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def read_metadata(file: Path) -> dict[str, str]:
    """Return what a safetensors file says of itself, without reading its tensors.

    Raises:
        ModelError: it cannot be read.
    """
    read_header(file)
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _config_of(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    """Return peft's settings of an adapter, as its file says them.

    Raises:
        ModelError: they are damaged.
    """
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{str(file)!r} says of itself what is no JSON object: it is damaged")
    return config


@torch.no_grad()
def merge_file(module: torch.nn.Module, file: Path) -> None:
    """Put trained weights into a denoiser: all of them, or a LoRA of ours, whose products are added.

    Args:
        module: changed in place; it may carry LoRAs, which stay.
        file: of `save_adapter`, or full weights in diffusers' layout.

    Raises:
        ModelError: it does not fit.
    """
    tensors, metadata = _read(file)
    adapter = _config_of(metadata, file)
    found = {name: LAYER.fullmatch(name) for name in tensors}
    if not any(found.values()):
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            raise ModelError(f"{str(file)!r} does not fit this model: {' '.join(str(error).split())[:200]}") from None
        return
    pairs: dict[str, dict[bool, torch.Tensor]] = {}
    for name, parts in found.items():
        if parts is None:
            raise ModelError(f"{str(file)!r} holds {name!r}, which cannot be merged: only plain LoRAs can")
        pairs.setdefault(parts["layer"], {})[parts["way"] in ("down", "A")] = tensors[name].float()
    part = next(parts["part"] for parts in found.values() if parts)
    scale = adapter[f"{part}.lora_alpha"] / adapter[f"{part}.r"]
    for layer, pair in pairs.items():
        _add_product(module, layer, pair[False], pair[True], scale, file)


def _add_product(module: torch.nn.Module, layer: str, up: torch.Tensor, down: torch.Tensor, scale: float, file: Path) -> None:
    """Add a LoRA's product to a layer's own weight."""
    try:
        own = module.get_submodule(layer)
        weight = getattr(own, "base_layer", own).weight
        product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    except (AttributeError, RuntimeError) as error:
        raise ModelError(f"{str(file)!r} does not fit this model: {layer}: {error}") from None
    weight.add_((scale * product).to(weight))


def _from_peft(pipeline: Any, file: Path) -> dict[str, torch.Tensor]:
    """Return peft's own layout as diffusers reads it; its scale, which lies in another file, goes into the weights."""
    try:
        config = json.loads((file.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise ModelError(f"{str(file)!r} is in peft's layout, and its {PEFT_CONFIG} cannot be read: {error}") from None
    part = denoiser_name(pipeline)
    scaled = {key: value * scale if ".lora_B." in key else value for key, value in _read(file)[0].items()}
    return {f"{part}.{key.removeprefix(PEFT)}": value for key, value in scaled.items()}


def _has(pipeline: Any, name: str) -> bool:
    return any(name in names for names in pipeline.get_list_adapters().values())


def _remove(pipeline: Any, name: str) -> None:
    if _has(pipeline, name):
        pipeline.delete_adapters(name)
