"""Weight files: which of a folder count, hashed once, read and checked by their headers alone.

Hashes are remembered by path, size and modification time, so that a start does not read every
weight twice. Knows nothing of torch, nor of what the tensors are for.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imagegen.request import ModelError

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors",)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call a component's weights
SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # at the end of a shard's name
LIMIT = 64 * 2**20  # bytes of a configuration or an index, at most
AGAIN = "copy or download it again"
_PICKLE = "pickles may hold code and are not opened; use its .safetensors, or convert it with a tool that you trust"


class TensorFacts(NamedTuple):
    """One tensor by its header: `dtype` as safetensors names it, and `shape`."""

    dtype: str
    shape: tuple[int, ...]


def cache_folder() -> Path:
    """Return the folder for what may be thrown away: `$IMAGEGEN_CACHE`, or `~/.cache/imagegen`."""
    return Path(os.environ.get("IMAGEGEN_CACHE") or Path.home() / ".cache" / "imagegen")


def list_weights(folder: Path) -> list[Path]:
    """Return a model folder's weight files, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def name_parts(name: str) -> tuple[str, str | None]:
    """Return the stem and the variant in a weight file's name: `model` and `fp16` of `model.fp16-00001-of-00002.safetensors`."""
    stem = SHARD.sub("", name.rpartition("/")[2].removesuffix(".safetensors"))
    first, _, rest = stem.partition(".")
    return (first, rest or None) if first in STEMS else (stem, None)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; it may be anybody's.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or none that anybody would write.
    """
    if path.stat().st_size > LIMIT:
        raise ValueError("it is far too large")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


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


def stored_dtype(files: Iterable[Path]) -> str:
    """Return the dtype of most bytes of the largest weight file, as safetensors names it; empty where none is readable."""
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size, default=None)
    if largest is None or file_fault(largest):
        return ""  # loading says what is wrong with the file
    sizes: Counter[str] = Counter()
    for tensor in read_header(largest).values():
        bits = re.search(r"\d+", tensor.dtype)  # as in BF16 and F8_E4M3
        sizes[tensor.dtype] += math.prod(tensor.shape) * (int(bits[0]) if bits else 8)
    return max(sorted(sizes), key=lambda dtype: sizes[dtype])


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


def component_weights(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the weight files of one component's folder: one, or the shards that its index names.

    Args:
        folder: of the component, as in `unet/`.
        variant: as in `fp16`; a component that lacks it has its plain files taken, as diffusers does.

    Raises:
        ModelError: there are none, or an index is damaged, names a file that is missing, or one elsewhere.
    """
    for infix in (f".{variant}", "") if variant else ("",):
        for stem in STEMS:
            index, file = folder / f"{stem}.safetensors.index{infix}.json", folder / f"{stem}{infix}.safetensors"
            shards, one = os.path.lexists(index), os.path.lexists(file)
            if one and (stem == "model" or not shards):  # where both lie there, transformers takes the file, diffusers the shards
                return [file]
            if shards:
                return _shards(index)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if others:
        raise ModelError(f"{str(folder)!r} holds its weights as a pickle only ({others[0]}): {_PICKLE}")
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    there = f"it holds {', '.join(found[:3])}, give variant= for those of a variant" if found else "copy or download it again"
    raise ModelError(f"{str(folder)!r} lacks its weights, {' or '.join(f'{stem}.safetensors' for stem in STEMS)}: {there}")


def _lies_beside(name: str) -> bool:
    return name not in ("", "..") and Path(name).name == name and "\\" not in name


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        wrong = [name for name in names if not (isinstance(name, str) and _lies_beside(name))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{str(index)!r} is no index of shards that can be read ({error}): copy or download it again") from None
    if wrong:
        raise ModelError(f"{str(index)!r} names {wrong[0]!r}, which is no file beside it: it is not opened")
    missing = [name for name in names if not os.path.lexists(index.with_name(name))]
    if missing or not names:
        some = f"{missing[0]!r}, which is missing" if missing else "no shards"
        raise ModelError(f"{str(index)!r} names {some}: copy or download it again")
    return [index.with_name(name) for name in names]


def read_header(path: Path) -> dict[str, TensorFacts]:
    """Return what a safetensors file holds, by name; no tensor is read.

    Raises:
        ModelError: it is missing, damaged, or another kind of file; the message says which.
    """
    wrong = file_fault(path)
    if wrong:
        raise ModelError(f"{str(path)!r} {wrong}")
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: TensorFacts(facts["dtype"], tuple(facts["shape"])) for name, facts in header.items() if name != "__metadata__"}


def file_fault(path: Path) -> str | None:
    """Return what is wrong with a safetensors file, in words that follow its name; None where nothing is."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            start = file.read(512)
        size = path.stat().st_size
    except OSError as error:
        loop = "it is a symbolic link that leads back to itself" if error.errno == errno.ELOOP else error.strerror
        return f"cannot be read: {loop}"
    other = _other_kind(start)
    if other:
        return f"cannot be read: {other}"
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8:
        return (
            f"cannot be read: its header takes {length} bytes and the file has {size}: truncated or no safetensors file; {AGAIN}"
        )
    try:
        with safe_open(path, framework="numpy") as opened:
            return None if list(opened.keys()) else "holds no tensors"
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        return f"cannot be read ({error}): truncated or no safetensors file; {AGAIN}"


def _other_kind(start: bytes) -> str | None:
    """Return what a file is that begins like this, if it cannot be safetensors."""
    text = start.lstrip().lower()
    if start[8:9] == b"{":
        return None  # eight bytes of a length, which may look like any of these, and the header
    if not start:
        return f"it is empty; {AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, not the weights: run `git lfs pull` in its folder"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, not weights: a download that failed or needs a login; download it again"
    if text.startswith((b'{"error', b'{"message')):
        return "it is a server's answer, not weights: a download that failed; download it again"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"it is a pickle or a zip: {_PICKLE}"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file: name it .gguf, and give base="
    return None


def read_remembered(name: str) -> dict[str, str]:
    """Return what `NAME.json` in the cache folder holds; a damaged file holds nothing."""
    try:
        read = json.loads((cache_folder() / f"{name}.json").read_text())
    except (OSError, ValueError, RecursionError):
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
