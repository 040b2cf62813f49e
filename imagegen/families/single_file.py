"""One file that holds a model, in the layouts that tools other than diffusers write, read through diffusers' own conversions.

What the file lacks comes from its base: a folder in diffusers' layout, or the configurations that ship with the package,
whose text is read by CLIP's tokenizer.
"""

import contextlib
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagegen.contents import DENOISER, Contents
from imagegen.families.components import WORTH_IT, reading
from imagegen.families.libraries import quiet
from imagegen.families.paging import pages_given_back
from imagegen.request import ModelError
from imagegen.sources import Source, bases_folder

OPTIONAL = ("safety_checker", "image_encoder", "text_encoder_3")  # a base that ships with the package may lack them
PREFIX = "model.diffusion_model."
MERGES = "clip-merges.txt.gz"
BASES = {  # the pipelines that a file of a layout can be a part of
    "sd1": r"(?!StableDiffusion(XL|3))", "sd2": r"(?!StableDiffusion(XL|3))", "sdxl": "StableDiffusionXL",
    "sdxl-refiner": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux(?!2)", "flux.2": "Flux2", "chroma": "Chroma",
}  # fmt: skip


def parts_inside(contents: Contents, denoiser: str, kinds: dict[str, type]) -> set[str]:
    """Return which components come from the file.

    Args:
        contents: of the file.
        denoiser: what the pipeline calls its denoiser.
        kinds: the classes of its components.
    """
    if contents.kind == DENOISER:
        return {denoiser}
    inside = {denoiser} | ({"vae"} if "vae" in contents.parts else set())
    clips = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
    inside |= {name for part, name in clips.items() if part in contents.parts}
    if "t5" in contents.parts:
        inside |= {name for name, kind in kinds.items() if kind.__name__ == "T5EncoderModel"}
    return inside


def is_in(folder: Path) -> bool:
    """Return whether a base's component has weights that are read."""
    return any(folder.glob("*.safetensors"))


def check_rest(source: Source, rest: list[str]) -> None:
    """Refuse a file that lacks components for which its base has no weights.

    Raises:
        ModelError: there are such.
    """
    assert source.base is not None
    lacking = [name for name in rest if not is_in(source.base.path / name)]
    if lacking:
        neither = "" if source.built_in else f", and neither does base={source.base.name!r}"
        ways = "give vae=, or " if lacking == ["vae"] else "give "
        ways += "base=" if source.built_in else "another base="
        raise ModelError(
            f"{source.name!r} holds no {', '.join(lacking)}{neither}: {ways}, the folder or the hub id of a model that has it"
        )


def check_base(source: Source, kind: str, config: Mapping[str, Any]) -> None:
    """Refuse a base of another kind of model than the file.

    Args:
        source: of the file.
        kind: the name of the base's pipeline class.
        config: of the base's denoiser.

    Raises:
        ModelError: it is.
    """
    assert source.contents is not None and source.base is not None
    what, pattern = source.contents.what, BASES.get(source.contents.layout)
    if pattern and not re.match(pattern, kind):
        raise ModelError(
            f"{source.name!r} is {what}, and base={source.base.name!r} is a {kind}: give the model that it belongs to"
        )
    if "guidance_embeds" in config:
        guided = source.contents.guided
        if guided != bool(config["guidance_embeds"]):
            kinds = {True: "guided by an input, as FLUX.1-dev is", False: "not guided, as FLUX.1-schnell is"}
            raise ModelError(
                f"{source.name!r} is {kinds[guided]}, and base={source.base.name!r} is {kinds[not guided]}: give another base="
            )


def load(source: Source, kind: type, kinds: dict[str, type], inside: set[str], loaded: dict[str, Any], dtype: Any) -> Any:
    """Load a model from one file.

    Args:
        source: of the file.
        kind: the pipeline's class.
        kinds: the classes of its components.
        inside: those that are in the file.
        loaded: those that come from elsewhere.
        dtype: what its weights become.

    Raises:
        ModelError: it is damaged, or of another model than its base.
    """
    assert source.contents is not None and source.base is not None
    base = source.base.path
    left_out = {name: None for name in OPTIONAL if name in kinds and name not in inside}
    given = _tokenizers(source, kinds) | left_out | loaded
    converts = source.path.stat().st_size > WORTH_IT
    with quiet(), reading(source.path), pages_given_back([source.path]) if converts else contextlib.nullcontext():
        if source.contents.kind == DENOISER:
            name = "transformer" if "transformer" in kinds else "unet"
            given[name] = _load_denoiser(source, kinds[name], name, dtype)
            return kind.from_pretrained(str(base), dtype=dtype, local_files_only=True, use_safetensors=True, **given)  # type: ignore[attr-defined]
        return kind.from_single_file(  # type: ignore[attr-defined]
            str(source.path), config=str(base), torch_dtype=dtype, local_files_only=True, **given
        )


def _load_denoiser(source: Source, kind: type, name: str, dtype: Any) -> Any:
    """Load a denoiser that stands alone in its file: quantised, of a GGUF file."""
    assert source.base is not None
    if not hasattr(kind, "from_single_file"):
        raise ModelError(f"diffusers reads no single file of a {kind.__name__}: give a folder in its layout")
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    options: dict[str, Any] = {}
    if source.path.suffix == ".gguf":
        from diffusers import GGUFQuantizationConfig

        options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
    return kind.from_single_file(
        with_prefix(load_single_file_checkpoint(str(source.path))) if name == "unet" else str(source.path),
        config=str(source.base.path),
        subfolder=name,
        torch_dtype=dtype,
        local_files_only=True,
        **options,
    )


def with_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return a UNet's tensors; where they lack the prefix by which diffusers knows them, as ComfyUI's do, with it."""
    return {PREFIX + name: value for name, value in tensors.items()} if "input_blocks.0.0.weight" in tensors else tensors


def _tokenizers(source: Source, kinds: dict[str, type]) -> dict[str, Any]:
    """Return CLIP's tokenizers for a base that ships with the package; of another base, its own are read."""
    if not source.built_in:
        return {}
    return {name: clip_tokenizer(source.diffusers_folder / name) for name in kinds if name.startswith("tokenizer")}


def clip_tokenizer(folder: Path) -> Any:
    """Return CLIP's tokenizer of 49408 tokens, as a folder's `tokenizer_config.json` sets it.

    Its tokens are the bytes, the bytes that end a word, what the merges make of them, and two marks, in this order.
    Source: Radford et al. (2021), https://github.com/openai/CLIP, `bpe_simple_vocab_16e6.txt`, the merges that it uses.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    lines = gzip.decompress((bases_folder() / MERGES).read_bytes()).decode("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    names += [config["bos_token"], config["eos_token"]]
    return CLIPTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=merges, **config)
