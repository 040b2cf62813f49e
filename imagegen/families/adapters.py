"""LoRA: on which layers, how it is saved, and how a file of any usual layout is read.

diffusers and peft do the work; this module decides the layers, proves that keys matched, and keeps files free
of anything but their weights and facts.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from imagegen.families.diffusion import quiet
from imagegen.request import DataError, ModelError
from imagegen.weights import save_weights

FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name: `load_lora_weights(folder)` finds it
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")
ADAPTER = "imagegen-training"


def add_adapter(denoiser: torch.nn.Module, *, rank: int, alpha: int, dora: bool, convolutions: bool, seed: int) -> list[Any]:
    """Put a fresh LoRA on a denoiser's attention, and on its convolutions if asked; return what is trained.

    Args:
        denoiser: its own weights are frozen.
        rank: from 1.
        alpha: from 1; the LoRA's output is scaled by alpha / rank.
        dora: also learn magnitudes. Source: Liu et al. (2024), https://arxiv.org/abs/2402.09353.
        convolutions: also on convolutions.
        seed: of the first values.

    Raises:
        DataError: the denoiser has no such layers.
    """
    from peft import LoraConfig

    names = ATTENTION + (CONVOLUTIONS if convolutions else ())
    if not any(name.endswith(ATTENTION) for name, _ in denoiser.named_modules()):
        raise DataError(f"a {type(denoiser).__name__} has no attention layers {', '.join(ATTENTION)} to put a LoRA on")
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, use_dora=dora, target_modules=list(names), init_lora_weights="gaussian")
        denoiser.add_adapter(config, adapter_name=ADAPTER)
    return [weight for weight in denoiser.parameters() if weight.requires_grad]


def save_adapter(denoiser: torch.nn.Module, folder: Path, facts: dict[str, Any]) -> Path:
    """Write a LoRA in diffusers' layout with facts about it; equal weights and facts make equal files.

    Returns:
        The file's path.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    with quiet():
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser, adapter_name=ADAPTER))
        config = denoiser.peft_config[ADAPTER].to_dict()
    prefix = "unet" if hasattr(denoiser, "down_blocks") else "transformer"
    tensors = {f"{prefix}.{name}": value for name, value in layers.items()}
    kept = {f"{prefix}.{name}": _plain(value) for name, value in sorted(config.items()) if value is not None}
    metadata = {"lora_adapter_metadata": json.dumps(kept, sort_keys=True), "imagegen": json.dumps(facts, sort_keys=True)}
    return save_weights(folder / FILE, tensors, metadata)


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
    """Load a LoRA of a layout that diffusers reads under a name; return its file.

    Raises:
        ModelError: there is no such file, it is no LoRA, or it matches no layer of this model.
    """
    missing = peft_is_missing()
    if missing:
        raise ModelError(missing)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"no LoRA {str(path)!r}: give a .safetensors file, or a folder with {FILE}")
    try:
        keys = load_file(file)
    except Exception as error:
        raise ModelError(f"{str(file)!r} is no safetensors file that can be read: {error}") from None
    if not any("lora" in key for key in keys):
        raise ModelError(f"{str(file)!r} is no LoRA: its first tensor is {next(iter(sorted(keys)), 'none')!r}")
    with quiet():
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, local_files_only=True)
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            _remove(pipeline, name)
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"the LoRA {str(file)!r} does not fit this model: {reason}") from None
    if not _has(pipeline, name):
        raise ModelError(f"the LoRA {str(file)!r} matches no layer of this model: it was made for another one")
    return file


def _has(pipeline: Any, name: str) -> bool:
    return any(name in names for names in pipeline.get_list_adapters().values())


def _remove(pipeline: Any, name: str) -> None:
    if _has(pipeline, name):
        pipeline.delete_adapters(name)
