"""Whether a model's files are whole and belong together: their hashes where they are recorded, their tensors by name and shape.

No weights are read but to hash them: modules are made without memory, and one-file models stay mapped in the file.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from imagegen.contents import quantisation_of
from imagegen.families import janus, single_file
from imagegen.families.components import check_tokenizer, classes_of, has_weights, read_config, reading, stored_in
from imagegen.families.libraries import quiet
from imagegen.families.loading import load_pipeline, load_vae
from imagegen.request import ModelError
from imagegen.sources import INDEX, Source, read_gguf, read_index
from imagegen.weights import TensorFacts, component_weights, file_fault, hash_file, read_header

SUMS = "SHA256SUMS"
GONE = "is a link to a file that is not here: a download that was cut off; download it again"
SHOWN = 8  # faults of one kind in one component; the rest are counted


@dataclass
class Inspection:
    """What was found.

    Attributes:
        files: what is wrong, by file or component; an empty list where nothing is.
        notes: what is remarkable and not wrong.
        recorded: of how many files a hash is recorded.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recorded: int = 0

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
    if not found.recorded:
        found.notes.append(f"no hashes are recorded: neither by the hub's cache nor in {SUMS}")
    return found


def _inspect_folder(source: Source, found: Inspection) -> None:
    folder = source.path
    index = read_index(folder)
    replaced = () if source.vae is None else ("vae",)
    _check_files(folder, found, without=replaced)
    try:
        kinds = classes_of(folder, index, replaced)
    except ModelError as error:
        found.add(INDEX, str(error))
        return
    _inspect_components(folder, {name: kind for name, kind in kinds.items() if name not in replaced}, source.variant, found)
    if source.vae is not None:
        _check_vae(source.vae, found)
        _try(found, "vae", load_vae, source, index, kinds, None)


def _inspect_components(folder: Path, kinds: dict[str, type], variant: str | None, found: Inspection, prefix: str = "") -> None:
    """Check components of a folder: weights against their configurations, and that everything else can be read."""
    for name, kind in kinds.items():
        if not has_weights(kind):
            _try(found, f"{prefix}{name}", _read, folder / name, kind)
            continue
        try:
            files = component_weights(folder / name, variant)
        except ModelError as error:
            found.add(f"{prefix}{name}", str(error))
            continue
        faults = {file: file_fault(file) for file in files}
        for file, fault in faults.items():
            known = found.files.get(f"{prefix}{name}/{file.name}")
            found.add(f"{prefix}{name}/{file.name}", *([fault] if fault and not (known and GONE in known) else []))
        if not any(faults.values()):
            wrong = compare_tensors(folder / name, kind, files, variant, found.notes)
            found.add(f"{prefix}{name}/{files[0].name}", *wrong)


def _read(folder: Path, kind: Any) -> None:
    """Read a component that is settings and words alone, such as a scheduler or a tokenizer; nothing that might hold weights.

    Raises:
        ModelError: it cannot be read, or is of a kind that diffusers does not load.
    """
    import diffusers
    import transformers

    if not hasattr(kind, "save_pretrained"):  # transformers' AutoModel and its like
        raise ModelError(f"{str(folder)!r} is named as a {kind.__name__}, which diffusers does not load")
    with quiet():
        words = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)
        pictures = (transformers.FeatureExtractionMixin, transformers.ImageProcessingMixin)
        if not issubclass(kind, (diffusers.SchedulerMixin, *words, *pictures)):
            return
    if "Tokenizer" in kind.__name__ and "ByT5" not in kind.__name__:
        check_tokenizer(folder)
    with quiet(), reading(folder):
        kind.from_pretrained(str(folder), local_files_only=True)


def _inspect_janus(source: Source, folder: janus.Folder, found: Inspection) -> None:
    files = folder.weights()
    _check_files(folder.folder, found, without=() if source.vae is None else ("vae",))
    if source.vae is not None:
        _check_vae(source.vae, found)
    for file in files:
        fault = file_fault(file) if file.suffix == ".safetensors" else None
        found.add(file.name, *([fault] if fault else []))
    if any(file.suffix != ".safetensors" for file in files):
        found.notes.append("weights in PyTorch's format are compared with the configuration when they are loaded")
    elif found.ok:
        vae = source.vae.path if source.vae is not None else None
        with quiet():  # weights stay in the file
            _try(found, "config.json", janus.load, folder, vae, torch.device("cpu"), stored_in(files[0]))


def _inspect_file(source: Source, found: Inspection) -> None:
    assert source.base is not None and source.contents is not None
    folder = source.diffusers_folder
    index = read_index(folder)
    denoiser = "transformer" if "transformer" in index else "unet"
    found.add(source.path.name, *_check_file(source.path, read_sums(source.path.parent).get(source.path.name), found))
    if not source.built_in:
        _check_files(folder, found, "base/", without=(denoiser,))
    if source.vae is not None:
        _check_vae(source.vae, found)
    if source.path.suffix != ".gguf":
        _try(found, source.path.name, load_pipeline, source, torch.device("cpu"), None)
        return
    try:
        kinds = classes_of(folder, index, () if source.vae is None else ("vae",))
    except ModelError as error:
        found.add(f"base/{INDEX}", str(error))
        return
    _try(found, source.path.name, single_file.check_base, source, index["_class_name"], read_config(folder / denoiser))
    if found.ok:
        found.add(source.path.name, *_compare_gguf(source.path, folder / denoiser, kinds[denoiser]))
    rest = {name: kind for name, kind in kinds.items() if name != denoiser and not (name == "vae" and source.vae is not None)}
    _inspect_components(folder, rest, source.base.variant, found, "base/")
    if source.vae is not None:
        _try(found, "vae", load_vae, source, index, kinds, None)


def _try(found: Inspection, name: str, check: Any, *given: Any) -> None:
    """Record what a check says against a file or component."""
    try:
        check(*given)
        found.add(name)
    except ModelError as error:
        found.add(name, str(error))


def _check_vae(vae: Source, found: Inspection) -> None:
    """Hold the files of a decoder given beside the model against their recorded hashes."""
    if vae.contents is None:
        _check_files(vae.path, found, "vae/")
    else:
        found.add(f"vae/{vae.path.name}", *_check_file(vae.path, read_sums(vae.path.parent).get(vae.path.name), found))


def _check_files(folder: Path, found: Inspection, prefix: str = "", without: Collection[str] = ()) -> None:
    """Hold every file of a folder against the hash that is recorded of it, where one is.

    Args:
        folder: of a model.
        found: gets what is wrong.
        prefix: of the names of its files.
        without: components whose weights are not loaded.
    """
    sums = read_sums(folder)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        unused = file.parent.name in without and file.suffix == ".safetensors"
        if file.is_dir() or unused or name.startswith(".cache/"):
            continue
        before = found.recorded
        faults = _check_file(file, sums.get(name), found)
        if faults or found.recorded > before:
            found.add(f"{prefix}{name}", *faults)


def _check_file(file: Path, summed: str | None, found: Inspection) -> list[str]:
    """Return the fault of a file that is not what was recorded, or not here; nothing where nothing was."""
    wanted = recorded_hash(file) or summed
    found.recorded += wanted is not None
    try:
        if wanted is None:
            file.open("rb").close()
            return []
        if len(wanted) == 40:
            content = file.read_bytes()
            have = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        else:
            have = hash_file(file)
    except FileNotFoundError:
        return [GONE]
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    said = f"its hash is {have[:12]}…, and {wanted[:12]}… is recorded: damaged or changed; download it again"
    return [] if have == wanted else [said]


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
        config = read_config(folder)
        with quiet(), reading(folder):
            if issubclass(kind, diffusers.ModelMixin):
                missing, unexpected, shapes = _compare_diffusers(folder, kind, have)
            else:
                inside = variant is not None and f".{variant}" in files[0].name
                missing, unexpected, shapes = _compare_transformers(folder, kind, variant if inside else None)
    except ModelError as error:
        return [str(error)]
    surplus = f"{len(unexpected)} tensors that a {kind.__name__} does not use, {unexpected[0]!r} first" if unexpected else ""
    used = issubclass(kind, diffusers.ModelMixin) and not hasattr(kind, "decode")  # text encoders and decoders are often cut
    if surplus and not used:
        notes.append(f"{folder.name} holds {surplus}")
    faults = [f"lacks {name!r}" for name in missing] + ([f"holds {surplus}"] if surplus and used else [])
    if "quantization_config" not in config:
        faults += [f"{name!r} is {list(is_)}, and its config.json says {list(says)}" for name, is_, says in shapes]
        how = quantisation_of(have)
        faults += [f"is quantised ({how}), which its config.json does not name"] if how else []
    return _shown(faults)


def _shown(faults: list[str]) -> list[str]:
    return faults[:SHOWN] + ([f"and {len(faults) - SHOWN} faults more"] if len(faults) > SHOWN else [])


def _compare_gguf(path: Path, base: Path, kind: Any) -> list[str]:
    """Compare a GGUF file with the denoiser's configuration in its base, as diffusers would name the file's tensors.

    Args:
        path: the file.
        base: the folder of the denoiser in its base.
        kind: the denoiser's class.

    Returns:
        What is wrong: tensors that are missing, of no use, or of another shape.
    """
    from diffusers.loaders import single_file_model as conversions

    try:
        with quiet(), reading(path):
            config = kind.load_config(str(base))
            with torch.device("meta"):
                wanted = kind.from_config(config).state_dict()
                have: dict[str, Any] = {name: torch.empty(facts.shape) for name, facts in read_gguf(path).items()}
                have = single_file.with_prefix(have)
                if conversions._should_convert_state_dict_to_diffusers(wanted, have):
                    own = conversions._get_single_file_loadable_mapping_class(kind)
                    convert = conversions.SINGLE_FILE_LOADABLE_CLASSES[own]["checkpoint_mapping_fn"]
                    have = convert(config=config, checkpoint=have)
    except ModelError as error:
        return [str(error)]
    shapes = {name: (list(have[name].shape), list(wanted[name].shape)) for name in sorted(have.keys() & wanted.keys())}
    faults = [f"lacks {name!r}" for name in sorted(wanted.keys() - have.keys())]
    faults += [f"{name!r} is {is_}, and its base says {says}" for name, (is_, says) in shapes.items() if is_ != says]
    return _shown(faults)


Found = tuple[list[str], list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]


def _compare_diffusers(folder: Path, kind: Any, have: dict[str, TensorFacts]) -> Found:
    """Return the tensors that are missing, unexpected, and of another shape."""
    from diffusers.quantizers import DiffusersAutoQuantizer

    config = kind.load_config(str(folder))
    if config.get("quantization_config") is not None:
        DiffusersAutoQuantizer.from_config(config["quantization_config"], pre_quantized=True).validate_environment(
            torch_dtype=None, device_map=None
        )
    with torch.device("meta"):
        module = kind.from_config(config)
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
