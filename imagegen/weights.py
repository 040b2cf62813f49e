"""The weight files of a model folder: hashed once, checked without building the model.

Hashes are remembered by path, size and modification time, so that a start does not read every
weight twice. Knows nothing of torch.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from imagegen.request import ModelError

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors",)


def cache_folder() -> Path:
    """Return the folder for what may be thrown away: `$IMAGEGEN_CACHE`, or `~/.cache/imagegen`."""
    return Path(os.environ.get("IMAGEGEN_CACHE") or Path.home() / ".cache" / "imagegen")


def list_weights(folder: Path) -> list[Path]:
    """Return a model folder's weight files, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def save_weights(path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> Path:
    """Write a safetensors file beside its place and move it in; equal tensors and metadata make equal bytes.

    safetensors itself writes metadata in an order of its own, another one in every process.
    """
    from safetensors.torch import save

    content = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def stored_dtype(folder: Path) -> str:
    """Return the dtype of most tensors of the largest weight file, as safetensors names it; empty where none is readable."""
    try:
        with max(list_weights(folder), key=lambda path: path.stat().st_size).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        dtypes = [tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"]
        return max(set(dtypes), key=dtypes.count)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return ""  # loading says what is wrong with the file


def hash_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every weight file by its path inside the folder.

    Raises:
        ModelError: a file cannot be read.
    """
    return hash_files({path.relative_to(folder).as_posix(): path for path in list_weights(folder)})


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their names.

    Raises:
        ModelError: a file cannot be read.
    """
    remembered = read_remembered("hashes")
    found, fresh = {}, False
    for name, path in files.items():
        try:
            facts = path.stat()
            key = f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}"
            if key not in remembered:
                remembered[key] = hash_file(path)
                fresh = True
        except OSError as error:
            raise ModelError(f"cannot read the weights {str(path)!r}: {error.strerror}") from None
        found[name] = remembered[key]
    if fresh:
        remember("hashes", remembered)
    return found


def check_weights(folder: Path) -> dict[str, list[str]]:
    """Read every weight file's header without loading it; return what is wrong with each file.

    Raises:
        ModelError: the folder holds no weights.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[str]] = {}
    for path in list_weights(folder):
        wrong = found.setdefault(path.relative_to(folder).as_posix(), [])
        try:
            with safe_open(path, framework="numpy") as file:
                if not list(file.keys()):
                    wrong.append("holds no tensors")
        except (SafetensorError, OSError) as error:
            wrong.append(f"cannot be read ({error}): truncated or no safetensors file; copy or download it again")
    if not found:
        raise ModelError(f"{str(folder)!r} holds no .safetensors weights")
    return found


def read_remembered(name: str) -> dict[str, str]:
    """Return what `NAME.json` in the cache folder holds; a damaged file holds nothing."""
    try:
        read = json.loads((cache_folder() / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in read.items() if isinstance(value, str)} if isinstance(read, dict) else {}


def remember(name: str, values: dict[str, str]) -> None:
    """Store values for `read_remembered`; a cache that cannot be written costs time, not the picture."""
    with contextlib.suppress(OSError):
        file = cache_folder() / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(values, indent=1))
        os.replace(part, file)
