"""Where a model comes from: the embedded one, a folder, one file, or the hub; each found without being loaded.

What is found is checked for what would be wrong, or unsafe, whatever pipeline it is for. Knows nothing of pipelines,
and asks the network only for a hub id.
"""

import contextlib
import os
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imagegen import hub
from imagegen.catalog import CARDS, EMBEDDED, embedded_folder
from imagegen.contents import DENOISER, OTHER, WHOLE, Contents, identify, is_plain
from imagegen.request import ModelError
from imagegen.weights import AGAIN, PICKLES, SHARD, TensorFacts, component_weights, name_parts, read_header, read_json

INDEX = "model_index.json"
BUILT_IN = ("sd1", "sd2", "sdxl", "sd3")  # layouts whose configurations and tokenizers ship with the package
LIBRARIES = ("diffusers", "transformers")
SUFFIXES = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: `emoji` for the embedded model, an absolute path, or a hub id without its revision.
        path: its folder, or its one file.
        revision: the commit, of a hub id.
        variant: of the weights, as in `fp16`.
        contents: of one file: what it holds.
        base: of one file: the folder with the rest, its configurations at least.
        vae: another decoder: its folder or file.
    """

    name: str
    path: Path
    revision: str | None = None
    variant: str | None = None
    contents: Contents | None = None
    base: "Source | None" = None
    vae: "Source | None" = field(default=None)

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.path if self.contents is None else self.path.parent

    @property
    def diffusers_folder(self) -> Path:
        """The folder in diffusers' layout that its configurations come from."""
        return self.path if self.base is None else self.base.path

    @property
    def built_in(self) -> bool:
        """Whether its base ships with the package."""
        return self.base is not None and self.base.path.parent == bases_folder()

    def label(self) -> str:
        """Return the name that finds it again, as in `org/name@commit`."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def recorded(self) -> dict[str, str | None]:
        """Return what a receipt records of it, and `find_source` takes to find it again."""
        base = self.base.label() if self.base is not None and not self.built_in else None
        vae = self.vae.label() if self.vae is not None else None
        return {"source": self.name, "revision": self.revision, "variant": self.variant, "base": base, "vae": vae}


def bases_folder() -> Path:
    """Return the folder of the configurations that ship with the package, one folder for each layout."""
    return Path(__file__).resolve().parent / "bases"


def find_source(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    base: str | Path | None = None,
    vae: str | Path | None = None,
    local_files_only: bool = False,
) -> Source:
    """Find a model; downloads it where it is a hub id and not in the cache.

    Args:
        source: `emoji`, a folder, a `.safetensors` or `.gguf` file, or a hub id as in `org/name` or `org/name@revision`.
        revision: branch, tag or commit of a hub id.
        variant: of the weights, as in `fp16`; of one file, those of its base.
        base: for one file: the model that its configurations, tokenizers and whatever it lacks come from; as `source`.
        vae: another decoder: a folder, a file or a hub id.
        local_files_only: ask the hub's cache alone.

    Raises:
        ModelError: it is not there, or is no model; the message says what it is, and how to use it.
    """
    path = local_path(source) if str(source) != EMBEDDED else embedded_folder()
    if path is not None and path.is_file():
        _refuse(revision=revision)
        if base is None and vae is None:
            _refuse(variant=variant)
        found = _find_file(path, base, variant, local_files_only)
    elif path is not None:
        _refuse(revision=revision, base=base)
        found = Source(EMBEDDED if path.resolve() == embedded_folder().resolve() else str(path), path, variant=variant)
    else:
        _refuse(base=base)
        found = _fetch(source, revision, variant, local_files_only)
    if vae is not None:
        found = replace(found, vae=_find_vae(vae, variant, local_files_only))
    _check_variant(found)
    return found


def local_path(given: str | Path, what: str = "a model") -> Path | None:
    """Return where something is on this machine; None where nothing of that name is here.

    Args:
        given: what the user gave; `~` stands for the home folder.
        what: it is for.

    Raises:
        ModelError: it is no name and no path, or a link that leads nowhere.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise ModelError(f"{what} must be a name or a path, got {given!r}")
    if not str(given):
        raise ModelError(f"{what} has an empty name: give a folder, a file or a hub id")
    try:
        path = Path(given).expanduser().absolute()  # the demo changes the folder that it runs in, and receipts are read anywhere
    except RuntimeError:  # nobody of the name after ~
        return None
    return path if _exists(path) else None


def _refuse(**given: object) -> None:
    """Refuse arguments that mean nothing for this kind of source."""
    why = {
        "revision": "is for hub ids: a folder or file has none",
        "base": "is for one file: a folder has everything",
        "variant": "is for folders and hub ids: name the file of that variant",
    }
    for name, value in given.items():
        if value is not None:
            raise ModelError(f"{name}={str(value)!r} {why[name]}; leave it out")


def _exists(path: Path) -> bool:
    try:
        path.stat()
        return True
    except OSError as error:
        if path.is_symlink():
            reason = "leads back to itself" if "symbolic" in str(error.strerror) else "leads nowhere"
            raise ModelError(f"{str(path)!r} is a symbolic link that {reason}") from None
        return False
    except ValueError:  # a null byte
        return False


def _not_there(name: str) -> str:
    if name.startswith(("http://", "https://")):
        return f"{name!r} is an address: give the hub id (org/name), or download the file and give its path"
    ways = f"{', '.join(list(CARDS)[:1])} (the embedded model), a folder, a .safetensors or .gguf file, or a hub id (org/name)"
    return f"no folder {name!r} and no file of that name: give {ways}"


def _fetch(source: str | Path, revision: str | None, variant: str | None, local_files_only: bool) -> Source:
    """Find a model on the hub, or in its cache."""
    found = hub.parse_id(source) if isinstance(source, str) else None
    if found is None:
        raise ModelError(_not_there(str(source)))
    if None not in (found[1], revision) and found[1] != revision:
        raise ModelError(f"{source!r} names another revision than revision={revision!r}: give one of them")
    folder, commit = hub.fetch(found[0], found[1] or revision, variant, local_files_only)
    return Source(found[0], folder, commit, variant)


def _check_variant(source: Source) -> None:
    """Refuse a variant that no weights have, of the source, its base and its decoder.

    Raises:
        ModelError: it is such.
    """
    if source.variant is None:
        return
    folders = [one.path for one in (source, source.base, source.vae) if one is not None and one.contents is None]
    there = {name_parts(path.name)[1] for folder in folders for path in folder.rglob("*.safetensors")} - {None}
    if source.variant not in there:
        hint = f", or give one of its own: {', '.join(sorted(map(str, there)))}" if there else ""
        raise ModelError(f"{str(folders[0])!r} has no variant {source.variant!r}: leave variant= out{hint}")


def _find_file(path: Path, base: str | Path | None, variant: str | None, local_files_only: bool) -> Source:
    """Find a model in one file, and the base that has the rest."""
    name, contents = str(path), read_contents(path)
    if contents.kind not in (WHOLE, DENOISER):
        no_model = ", not a model" if contents.kind == OTHER else ""
        raise ModelError(f"{name!r} is {contents.what}{no_model}: {contents.use}")
    given = _built_in(name, path, contents) if base is None else _find_base(base, variant, local_files_only)
    return Source(name, path, variant=variant, contents=contents, base=given)


def _find_base(base: str | Path, variant: str | None, local_files_only: bool) -> Source:
    """Find the model that has what one file lacks; of one on the hub, the denoiser's weights are not fetched."""
    path = local_path(base, "base=")
    if path is not None and path.is_file():
        raise ModelError(f"base={str(base)!r} is one file: give a folder in diffusers' layout, or a hub id")
    found = hub.parse_id(base) if isinstance(base, str) and path is None else None
    if found is None:
        return replace(find_source(base), variant=variant)
    folder, commit = hub.fetch(*found, variant, local_files_only, without=("unet", "transformer"))
    return Source(found[0], folder, commit, variant)


def _built_in(name: str, path: Path, contents: Contents) -> Source:
    """Return the base that ships with the package for a whole model.

    Raises:
        ModelError: there is none, or the file lacks what only a base could give.
    """
    ask = "give base=, the folder or the hub id of the model that it belongs to (--base)"
    if contents.kind == DENOISER:
        raise ModelError(f"{name!r} is {contents.what}, without text encoders and decoder: {ask}")
    if contents.layout not in BUILT_IN:
        raise ModelError(f"{name!r} is {contents.what}, whose configurations and tokenizers do not ship with imagegen: {ask}")
    if not is_plain(read_header(path)):
        raise ModelError(f"{name!r} is {contents.what}, whose configurations do not ship with imagegen: {ask}")
    if "t5" in contents.parts:
        raise ModelError(f"{name!r} holds a T5 text encoder, whose tokenizer does not ship with imagegen: {ask}")
    if contents.layout == "sd2":
        _check_sd2(name, path.stem.lower())
    return Source(contents.layout, bases_folder() / contents.layout)


def _check_sd2(name: str, stem: str) -> None:
    """Refuse a Stable Diffusion 2 file that is not of 768 px by its name, which alone tells, and warn where that is silent.

    Raises:
        ModelError: it is of 512 px.
    """
    if re.search(r"768|(^|[^a-z0-9])v([^a-z0-9]|$)|v[-_ ]?pred", stem):
        return
    ways = "give base=, the folder or the hub id of a model of its kind (--base)"
    if re.search(r"512|turbo|base|epsilon", stem):
        raise ModelError(
            f"{name!r} is by its name no Stable Diffusion 2 model of 768 px (v-prediction), the one whose configuration "
            f"ships with imagegen: {ways}"
        )
    warnings.warn(
        f"{name!r} is taken for a Stable Diffusion 2 model of 768 px (v-prediction), as its name does not say: "
        f"if pictures are noise, {ways}",
        stacklevel=2,
    )


def read_contents(path: Path) -> Contents:
    """Return what one file holds.

    Raises:
        ModelError: it is damaged, or of a kind that is not opened.
    """
    kind = path.suffix.lower()
    if kind in PICKLES:
        raise ModelError(
            f"{str(path)!r} is a pickle, which may hold code and is not opened: use its .safetensors, "
            "or convert it with a tool that you trust"
        )
    if kind not in SUFFIXES:
        raise ModelError(f"{str(path)!r} is no model: give a folder, a .safetensors or a .gguf file")
    if kind != path.suffix:
        raise ModelError(f"{str(path)!r} ends in {path.suffix}, which diffusers does not know: rename it to end in {kind}")
    if kind == ".gguf":
        return _identify_gguf(path)
    if SHARD.search(path.stem):
        raise ModelError(f"{str(path)!r} is one shard of several: give the folder of the whole model")
    return identify(read_header(path))


def _identify_gguf(path: Path) -> Contents:
    """Return what a GGUF file holds."""
    contents = identify(read_gguf(path))
    if contents.kind == WHOLE:
        raise ModelError(f"{str(path)!r} is {contents.what}: of GGUF, files of a transformer or UNet alone are read")
    return contents


def read_gguf(path: Path) -> dict[str, TensorFacts]:
    """Return what a GGUF file holds, by name, with the shapes that it stands for; no tensor is read.

    Raises:
        ModelError: it is damaged, or its reader is not installed.
    """
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ModelError("GGUF files need gguf: pip install 'imagegen-diffusion[gguf]'")
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
        return {tensor.name: TensorFacts("GGUF", tuple(int(side) for side in reversed(tensor.shape))) for tensor in tensors}
    except Exception as error:  # whatever the reader meets in damaged bytes
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{str(path)!r} is no GGUF file that can be read ({reason}): {AGAIN}") from None


def _find_vae(vae: str | Path, variant: str | None, local_files_only: bool) -> Source:
    """Find a decoder of its own: a folder with a config.json, a file, or a hub id; of the variant, where it has it.

    Raises:
        ModelError: there is none.
    """
    path = local_path(vae, "vae=")
    if path is None:
        found = hub.parse_id(vae) if isinstance(vae, str) else None
        if found is None:
            raise ModelError(f"vae={str(vae)!r} is not there: give a decoder's folder, its .safetensors file, or a hub id")
        folder, commit = hub.fetch(*found, variant, local_files_only, only="vae")
        return Source(found[0], folder if (folder / "config.json").is_file() else folder / "vae", commit, variant)
    name = str(path)
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / "vae" / "config.json").is_file():
            path = path / "vae"
        if not (path / "config.json").is_file():
            raise ModelError(f"vae={name!r} has no config.json: give the folder of a decoder, as in model/vae")
        return Source(name, path, variant=variant)
    contents = read_contents(path)
    if "VAE" not in contents.what or "tiny" in contents.what:
        raise ModelError(f"vae={name!r} is {contents.what}: {contents.use or 'give a decoder'}")
    return Source(name, path, contents=contents)


def read_index(folder: Path) -> dict[str, Any]:
    """Read a model folder's `model_index.json`, whose entries name a class for each component.

    Raises:
        ModelError: the folder is none, holds no diffusers model, or names code of its own, which is not run.
    """
    if not folder.is_dir():
        raise ModelError(_not_there(str(folder)))
    path = folder / INDEX
    try:
        index = read_json(path)
        kind = index["_class_name"]
        if isinstance(kind, list):
            raise ModelError(f"{str(path)!r} names a pipeline of its own, {kind}: code that comes with weights is not run")
        if not isinstance(kind, str):
            raise ValueError("_class_name is no text")
    except FileNotFoundError:
        raise ModelError(_no_index(folder)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{str(path)!r} cannot be read: {error}") from None
    return index


def _no_index(folder: Path) -> str:
    """Say what a folder without a model_index.json is."""
    start = f"{str(folder)!r} is no diffusers model: it has no {INDEX}"
    try:
        kind = read_json(folder / "config.json").get("_class_name")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind:
        hint = "give it as vae=" if str(kind).startswith("Autoencoder") else "give the folder above it"
        return f"{start}; it is one component, a {kind}: {hint}"
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) == 1:
        return f"{start}; it holds {files[0]}: give the file itself"
    return start


def components_of(folder: Path, index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the library and the class of every component that an index names, those that are null left out.

    Raises:
        ModelError: an entry is damaged, or a component's folder is missing.
    """
    found = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if len(value) != 2 or not all(part is None or isinstance(part, str) for part in value):
            raise ModelError(f"{str(folder / INDEX)!r} names {name!r} as {value}, which is no library and class")
        if value[0] is None or value[1] is None:
            continue
        if Path(name).name != name or "\\" in name:
            raise ModelError(
                f"{str(folder / INDEX)!r} names a component {name!r}, which is no folder beside it: it is not opened"
            )
        found[name] = (value[0], value[1])
    return found


def weight_files(source: Source, parts: list[str]) -> dict[str, Path]:
    """Return the weight files that a source is loaded from, by their names in receipts.

    Args:
        source: found.
        parts: components with weights that come from its folder, or its base's.

    Raises:
        ModelError: one is missing.
    """
    files = {}
    if source.contents is not None:
        files[source.path.name] = source.path
    folder = source.diffusers_folder
    for part in parts:
        for file in component_weights(folder / part, (source.base or source).variant):
            files[f"{part}/{file.name}"] = file
    if source.vae is not None:
        at = source.vae.path
        for file in [at] if source.vae.contents is not None else component_weights(at, source.vae.variant):
            files[f"vae/{file.name}"] = file
    return files


def files_of(source: Source) -> dict[str, Path]:
    """Return the weight files that a folder's components, or one file, are loaded from; those of broken ones are left out."""
    if source.contents is not None:
        return {source.path.name: source.path}
    found: dict[str, Path] = {}
    for part in components_of(source.path, read_index(source.path)):
        with contextlib.suppress(ModelError):  # loading says what is wrong, and a tokenizer has none
            found |= {f"{part}/{file.name}": file for file in component_weights(source.path / part, source.variant)}
    return found
