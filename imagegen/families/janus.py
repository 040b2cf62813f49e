"""What both kinds of Janus share: their folders, weights, tokenizer and prompts.

JanusFlow and Janus(-Pro) are language models that also draw. Their official folders are no diffusers folders: one
`config.json`, weights at the top, a tokenizer. Knows nothing of how they draw.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imagegen.families.libraries import quiet
from imagegen.request import ModelError, RequestError
from imagegen.weights import file_fault, read_header, read_json

PAD = "<｜▁pad▁｜>"
BEGIN_OF_IMAGE = "<begin_of_image>"
PATCH_PX = 16  # a picture's side in pixels, of one token
FLOW, PRO = "janusflow", "janus-pro"


@dataclass(frozen=True)
class Folder:
    """A Janus model's folder.

    Attributes:
        folder: where it is.
        config: its `config.json`.
        kind: `janusflow`, or `janus-pro`, which Janus-1.3B is as well.
        file: its weights, where the user named one file; else None.
    """

    folder: Path
    config: dict[str, Any]
    kind: str
    file: Path | None = None

    def weights(self) -> list[Path]:
        """Return the files that hold its weights: safetensors at the top of the folder, else PyTorch's.

        Raises:
            ModelError: there are none.
        """
        if self.file is not None:
            return [self.file]
        found = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("pytorch_model*.bin"))
        if not found:
            raise ModelError(f"{str(self.folder)!r} holds no weights: a Janus folder has model.safetensors or pytorch_model.bin")
        return found


def find(source: Path) -> Folder | None:
    """Return a Janus model's folder, in the official layout or that of transformers; None for everything else.

    Args:
        source: the folder, or the file of weights in it.
    """
    folder = source.parent if source.suffix in (".safetensors", ".bin") else source
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    kind = None
    if isinstance(config, dict) and config.get("model_type") == "multi_modality":
        kind = FLOW if "vision_gen_enc_config" in config else PRO if "gen_vision_config" in config else None
    elif isinstance(config, dict) and config.get("model_type") == "janus":
        kind = PRO
    if kind is None or (folder != source and not _holds_janus(source)):
        return None
    return Folder(folder, config, kind, source if folder != source else None)


def _holds_janus(file: Path) -> bool:
    """Return whether a file beside a Janus model's configuration is its weights, or broken, and nothing that only lies there."""
    if file.suffix == ".bin":
        return file.name.startswith("pytorch_model")
    return file_fault(file) is not None or any(
        name.removeprefix("model.").startswith("language_model.") for name in read_header(file)
    )


def size_px(found: Folder) -> int:
    """Return the width and height of every picture that a model makes.

    Raises:
        ModelError: its configuration does not say.
    """
    try:
        if found.kind == FLOW:
            return found.config["vision_und_enc_config"]["params"]["image_size"] // PATCH_PX * PATCH_PX
        with quiet():
            from imagegen.families import januspro
        layout = januspro.layouts.CONVERTED if found.config["model_type"] == "janus" else januspro.layouts.OFFICIAL
        return layout.configs(found.config)[1]["num_patches"] * PATCH_PX
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        where = str(found.folder / "config.json")
        raise ModelError(f"{where!r} describes no Janus model that can be made ({error!r})") from None


def load(found: Folder, vae: Path | None, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Path]]:
    """Load a Janus model.

    Args:
        found: its folder.
        vae: the folder of JanusFlow's decoder; None for the `vae/` in its own.
        device: where to run.
        dtype: of the weights and of what is computed.

    Returns:
        The pipeline, and its files of weights by name, those of a decoder from elsewhere under `vae/`.

    Raises:
        ModelError: something is missing, damaged or of another model.
    """
    from imagegen.families import janusflow, januspro

    if vae is not None and found.kind != FLOW:
        raise ModelError(f"{str(found.folder)!r} holds its own decoder: leave vae= out")
    files = {file.name: file for file in found.weights()}
    try:
        if found.kind == PRO:
            pipeline = januspro.load(found, device, dtype)
        else:
            decoder = janusflow.find_vae(vae or found.folder)
            pipeline = janusflow.load(found, decoder, device, dtype)
            files |= {f"vae/{file.name}": file for file in sorted(decoder.glob("*.safetensors"))}
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever the libraries raise at entries that are missing or of another kind
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"{str(found.folder / 'config.json')!r} describes no Janus model that can be made ({said})") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, files


def read_weights(files: Sequence[Path], rename: Callable[[str], str | None], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read the tensors that are wanted, under their names here.

    Args:
        files: safetensors, or PyTorch's, of which nothing but tensors is unpickled.
        rename: a tensor's name here, or None for one that is not wanted, and not read.
        dtype: what they become.

    Raises:
        ModelError: a file is missing, truncated, or holds more than tensors.
    """
    found = {}
    for file in files:
        try:
            for name, tensor in _tensors(file, lambda name: rename(name) is not None):
                found[rename(name) or ""] = tensor.to(dtype)
        except FileNotFoundError:
            raise ModelError(f"no file {str(file)!r}") from None
        except pickle.UnpicklingError as error:
            raise ModelError(f"{str(file)!r} holds more than tensors, and is not opened: {str(error)[:120]}") from None
        except Exception as error:  # whatever the libraries raise at damaged bytes
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{str(file)!r} cannot be read ({reason}): copy or download it again") from None
    return found


def _tensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dictionary
                if wanted(name):
                    yield name, opened.get_tensor(name)
        return
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise ValueError("it is no dictionary of tensors")
    yield from ((name, tensor.clone()) for name, tensor in loaded.items() if wanted(name))  # the file may change later


def make_language_model(config: dict[str, Any]) -> Any:
    """Return transformers' Llama of a checkpoint's configuration; published ones leave out what is Llama's default.

    Raises:
        ModelError: it is another kind of language model.
    """
    from transformers import LlamaConfig, LlamaModel

    if config.get("model_type", "llama") != "llama":
        raise ModelError(f"Janus's language model is a Llama, and this is a {config['model_type']!r}: it is not run here")
    shape = {name: value for name, value in config.items() if "attn_implementation" not in name}
    return LlamaModel(LlamaConfig(**shape, attn_implementation="sdpa"))


def fill(module: torch.nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """Put weights into a module that was made without; return it, not in training.

    Raises:
        ModelError: tensors are missing, or of another shape.
    """
    try:
        missing, _ = module.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{str(folder)!r} cannot be loaded: {reason}") from None
    if missing:
        raise ModelError(f"{str(folder)!r} cannot be loaded: it lacks {len(missing)} tensors, {missing[0]!r} among them")
    return module.requires_grad_(False).eval()


def read_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer.

    Raises:
        ModelError: it is missing or cannot be read, or lacks the tokens that Janus needs. Without its own pad token the
            unguided half would be another than the model was trained with, and pictures would be ruined quietly.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the libraries raise at missing or damaged files
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the tokenizer of {str(folder)!r} cannot be loaded: {reason}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD
    known = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = {token["content"] for token in known.get("added_tokens", [])} | set(known["model"]["vocab"])
    for what, token in (("beginning of a text", tokenizer.bos_token), ("padding", tokenizer.pad_token)):
        if token not in names:
            raise ModelError(
                f"the tokenizer of {str(folder)!r} has no token for the {what}: take the model's own tokenizer files"
            )
    return tokenizer


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, padded on the left.

    Attributes:
        ids: (B, L) int64, pads before each beginning-of-text token.
        real: (B, L) bool, false at pads.
        positions: (B, L) int64, from 0 at the beginning-of-text token; 0 at pads.
        lengths: (B,) int64, without pads.
    """

    ids: torch.Tensor
    real: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor


def encode_prompts(tokenizer: Any, texts: Sequence[str], device: torch.device, limit: int) -> Prompts:
    """Turn texts into ids, each with exactly one beginning-of-text token, whether its tokenizer adds one or not.

    Args:
        tokenizer: from `read_tokenizer`.
        texts: the prompts as the model wants them, special tokens included.
        device: where the tensors go.
        limit: most tokens that leave room for the picture.

    Raises:
        RequestError: a text is longer than that.
    """
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    longest = max(len(row) for row in rows)
    if longest > limit:
        raise RequestError(f"the prompt has {longest} tokens, and this model reads {limit}: shorten it")
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.arange(longest) - (longest - lengths)[:, None]
    found = (ids, positions >= 0, positions.clamp(min=0), lengths)
    return Prompts(*(tensor.to(device) for tensor in found))


def causal_mask(real: torch.Tensor, length: int) -> torch.Tensor:
    """Return which columns each of the prompt's tokens sees: itself, and what is real and not after it.

    Args:
        real: (B, L) bool.
        length: columns of the keys, L or more; those beyond are not there yet.

    Returns:
        (B, 1, L, length) bool. A pad sees itself, so that its values are numbers, which nobody reads.
    """
    count = real.shape[1]
    before = torch.ones(count, length, dtype=torch.bool, device=real.device).tril()
    seen = torch.nn.functional.pad(real, (0, length - count))[:, None, None] & before
    return seen | torch.eye(count, length, dtype=torch.bool, device=real.device)
