"""Whether a model's files are whole and belong together: their hashes where they are recorded, their tensors by name and shape.

No weights are read but to hash them: modules are made without memory, and one-file models stay mapped in the file.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from imagegen.families import janus
from imagegen.families.components import DTYPES, classes_of, has_weights, reading, stored_in
from imagegen.families.libraries import quiet
from imagegen.families.loading import load_pipeline
from imagegen.request import ModelError
from imagegen.sources import INDEX, Source, read_index
from imagegen.weights import TensorFacts, component_weights, file_fault, hash_file, read_header

SUMS = "SHA256SUMS"
SHOWN = 8  # faults of one kind in one component; the rest are counted


@dataclass
class Inspection:
    """What was found.

    Attributes:
        files: what is wrong, by file or component; an empty list where nothing is.
        notes: what is remarkable and not wrong.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.files.values())

    def add(self, name: str, *faults: str) -> None:
        """Record a file or component, and what is wrong with it."""
        self.files.setdefault(name, []).extend(faults)


def inspect(source: Source, of_janus: janus.Folder | None = None) -> Inspection:
    """Check a source's files; nothing of it is kept in memory.

    Args:
        source: found.
        of_janus: of a Janus model, its folder.

    Raises:
        ModelError: it is no model at all.
    """
    found = Inspection()
    if of_janus is not None:
        _inspect_janus(source, of_janus, found)
    elif source.contents is None:
        _inspect_folder(source, found)
    else:
        _inspect_file(source, found)
    return found


def _inspect_folder(source: Source, found: Inspection) -> None:
    folder = source.path
    index = read_index(folder)
    try:
        kinds = classes_of(folder, index)
    except ModelError as error:
        found.add(INDEX, str(error))
        return
    sums, recorded = read_sums(folder), 0
    for name, kind in kinds.items():
        if not has_weights(kind):
            continue
        try:
            files = component_weights(folder / name, source.variant)
        except ModelError as error:
            found.add(name, str(error))
            continue
        for file in files:
            wanted = recorded_hash(file) or sums.get(f"{name}/{file.name}")
            recorded += wanted is not None
            fault = file_fault(file)
            found.add(f"{name}/{file.name}", *([fault] if fault else []), *_check_hash(file, wanted))
        if not any(file_fault(file) for file in files):
            faults = compare_tensors(folder / name, kind, files, source.variant, found.notes)
            found.add(f"{name}/{files[0].name}", *faults)
    if not recorded:
        found.notes.append(f"no hashes are recorded: neither by the hub's cache nor in {SUMS}")


def _inspect_janus(source: Source, folder: janus.Folder, found: Inspection) -> None:
    files = folder.weights()
    sums = read_sums(folder.folder)
    for file in files:
        fault = file_fault(file) if file.suffix == ".safetensors" else None
        found.add(file.name, *([fault] if fault else []), *_check_hash(file, recorded_hash(file) or sums.get(file.name)))
    if any(file.suffix != ".safetensors" for file in files):
        found.notes.append("weights in PyTorch's format are compared with the configuration when they are loaded")
    elif found.ok:
        try:
            vae = source.vae.path if source.vae is not None else None
            with quiet():
                janus.load(folder, vae, torch.device("cpu"), stored_in(files[0]))  # they stay in the file
        except ModelError as error:
            found.add("config.json", str(error))


def _inspect_file(source: Source, found: Inspection) -> None:
    path = source.path
    wanted = recorded_hash(path) or read_sums(path.parent).get(path.name)
    found.add(path.name, *_check_hash(path, wanted))
    if wanted is None:
        found.notes.append(f"no hash is recorded: neither by the hub's cache nor in {SUMS}")
    if path.suffix == ".gguf":
        found.notes.append("the shapes of a GGUF file are compared when it is loaded")
        return
    try:
        load_pipeline(source, torch.device("cpu"), None)
    except ModelError as error:
        found.add(path.name, str(error))


def _check_hash(file: Path, wanted: str | None) -> list[str]:
    """Return the fault of a file that is not what was recorded; nothing where nothing was."""
    if wanted is None:
        return []
    content = file.read_bytes() if len(wanted) == 40 else b""
    have = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() if content else hash_file(file)
    return (
        []
        if have == wanted
        else [f"its hash is {have[:12]}…, and {wanted[:12]}… is recorded: damaged or changed; download it again"]
    )


def recorded_hash(file: Path) -> str | None:
    """Return the hash that the hub gave a file: SHA-256, or git's SHA-1 of one that it keeps in git; None where none is known.

    The hub's cache keeps files under their hashes; a download into a folder keeps them in `.cache/huggingface`.
    """
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", target.name):
        return target.name
    for folder in file.absolute().parents:
        note = folder / ".cache" / "huggingface" / "download" / f"{file.absolute().relative_to(folder).as_posix()}.metadata"
        if note.is_file():
            lines = note.read_text(encoding="utf-8", errors="replace").split()
            return lines[1] if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", lines[1]) else None
    return None


def read_sums(folder: Path) -> dict[str, str]:
    """Return the hashes of a folder's `SHA256SUMS`, as sha256sum writes it, by file."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    found = (re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line) for line in lines)
    return {match[2]: match[1].lower() for match in found if match}


def compare_tensors(folder: Path, kind: Any, files: list[Path], variant: str | None, notes: list[str]) -> list[str]:
    """Compare a component's weight files with its configuration.

    Args:
        folder: of the component.
        kind: its class.
        files: its weights, which are whole.
        variant: of the weights that was asked for.
        notes: gets what is remarkable and not wrong.

    Returns:
        What is wrong: tensors that are missing, of another shape, or quantised without a word.
    """
    import diffusers

    have: dict[str, TensorFacts] = {}
    for file in files:
        have |= read_header(file)
    try:
        with quiet(), reading(folder):
            if issubclass(kind, diffusers.ModelMixin):
                missing, unexpected, shapes = _compare_diffusers(folder, kind, have)
            else:
                inside = variant is not None and f".{variant}" in files[0].name
                missing, unexpected, shapes = _compare_transformers(folder, kind, variant if inside else None)
    except ModelError as error:
        return [str(error)]
    if unexpected:
        notes.append(
            f"{folder.name} holds {len(unexpected)} tensors that a {kind.__name__} does not use, {unexpected[0]!r} first"
        )
    whole = sorted(name for name, facts in have.items() if facts.dtype not in DTYPES and name.endswith("weight"))
    quantised = "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    faults = [f"lacks {name!r}" for name in missing]
    if not quantised:
        faults += [f"{name!r} is {list(is_)}, and its config.json says {list(says)}" for name, is_, says in shapes]
        faults += [f"{name!r} is {have[name].dtype}, which its config.json does not name" for name in whole]
    return faults[:SHOWN] + ([f"and {len(faults) - SHOWN} faults more"] if len(faults) > SHOWN else [])


Found = tuple[list[str], list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]


def _compare_diffusers(folder: Path, kind: Any, have: dict[str, TensorFacts]) -> Found:
    """Return the tensors that are missing, unexpected, and of another shape."""
    with torch.device("meta"):
        module = kind.from_config(kind.load_config(str(folder)))
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    named = dict(have)
    module._fix_state_dict_keys_on_load(named)  # names of older versions
    ignored = [re.compile(pattern) for pattern in kind._keys_to_ignore_on_load_unexpected or ()]
    unexpected = [name for name in sorted(named.keys() - wanted.keys()) if not any(one.search(name) for one in ignored)]
    shared = sorted(named.keys() & wanted.keys())
    shapes = [(name, named[name].shape, wanted[name]) for name in shared if named[name].shape != wanted[name]]
    return sorted(wanted.keys() - named.keys()), unexpected, shapes


def _compare_transformers(folder: Path, kind: Any, variant: str | None) -> Found:
    """Return the same, told by the library itself, which renames tensors of older versions."""
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "ignore_mismatched_sizes": True}
    options |= {"variant": variant} if variant else {}
    _, info = kind.from_pretrained(str(folder), device_map="meta", output_loading_info=True, **options)
    shapes = [(name, tuple(is_), tuple(says)) for name, is_, says in sorted(info["mismatched_keys"])]
    return sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), shapes
