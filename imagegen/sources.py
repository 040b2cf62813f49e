"""Where a model comes from: the embedded one, a folder, one file, or the hub; each found without being loaded.

What is found is checked for what would be wrong, or unsafe, whatever pipeline it is for. Knows nothing of pipelines,
and asks the network only for a hub id.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagegen import hub
from imagegen.catalog import CARDS, EMBEDDED, embedded_folder
from imagegen.contents import DENOISER, OTHER, WHOLE, Contents, identify, is_plain
from imagegen.request import ModelError
from imagegen.weights import AGAIN, PICKLES, component_weights, list_weights, read_header

INDEX = "model_index.json"
BUILT_IN = ("sd1", "sd2", "sdxl", "sd3")  # layouts whose configurations and tokenizers ship with the package
LIBRARIES = ("diffusers", "transformers")
LIMIT = 64 * 2**20  # bytes of a model_index.json, at most


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: as the user gave it, `emoji` for the embedded model; a hub id without its revision.
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
        variant: of the weights, as in `fp16`.
        base: for one file: the model that its configurations, tokenizers and whatever it lacks come from; as `source`.
        vae: another decoder: a folder, a file or a hub id.
        local_files_only: ask the hub's cache alone.

    Raises:
        ModelError: it is not there, or is no model; the message says what it is, and how to use it.
    """
    asked = (revision, variant, local_files_only)
    decoder = _find_vae(vae, local_files_only) if vae is not None else None
    name = str(source)
    if name == EMBEDDED:
        _refuse(revision=revision, base=base)
        return Source(EMBEDDED, embedded_folder(), variant=variant, vae=decoder)
    path = Path(source).absolute()  # the demo changes the folder that it runs in
    if _exists(path):
        _refuse(revision=revision)
        if path.is_dir():
            _refuse(base=base)
            same = path.resolve() == embedded_folder().resolve()
            return Source(EMBEDDED if same else name, path, variant=variant, vae=decoder)
        return _find_file(name, path, base, decoder, local_files_only)
    found = hub.parse_id(name) if isinstance(source, str) else None
    if found is None:
        raise ModelError(_not_there(name))
    _refuse(base=base)
    folder, commit = hub.fetch(found[0], found[1] or asked[0], variant, local_files_only)
    return Source(found[0], folder, commit, variant, vae=decoder)


def _refuse(**given: object) -> None:
    """Refuse arguments that mean nothing for this kind of source."""
    why = {"revision": "is for hub ids: a folder or file has none", "base": "is for one file: a folder has everything"}
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


def _find_file(name: str, path: Path, base: str | Path | None, vae: Source | None, local_files_only: bool) -> Source:
    """Find a model in one file, and the base that has the rest."""
    contents = read_contents(path)
    if contents.kind not in (WHOLE, DENOISER):
        no_model = ", not a model" if contents.kind == OTHER else ""
        raise ModelError(f"{name!r} is {contents.what}{no_model}: {contents.use}")
    given = _built_in(name, path, contents) if base is None else _find_base(base, local_files_only)
    return Source(name, path, contents=contents, base=given, vae=vae)


def _find_base(base: str | Path, local_files_only: bool) -> Source:
    """Find the model that has what one file lacks; of one on the hub, the denoiser's weights are not fetched."""
    if Path(base).is_file():
        raise ModelError(f"base={str(base)!r} is one file: give a folder in diffusers' layout, or a hub id")
    found = hub.parse_id(base) if isinstance(base, str) and not Path(base).exists() else None
    if found is None:
        return find_source(base)
    folder, commit = hub.fetch(*found, None, local_files_only, without=("unet", "transformer"))
    return Source(found[0], folder, commit)


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
    return Source(contents.layout, bases_folder() / contents.layout)


def read_contents(path: Path) -> Contents:
    """Return what one file holds.

    Raises:
        ModelError: it is damaged, or of a kind that is not opened.
    """
    if path.suffix == ".gguf":
        return _read_gguf(path)
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{str(path)!r} is a pickle, which may hold code and is not opened: use its .safetensors, "
            "or convert it with a tool that you trust"
        )
    if path.suffix != ".safetensors":
        raise ModelError(f"{str(path)!r} is no model: give a folder, a .safetensors or a .gguf file")
    if "-of-" in path.stem:
        raise ModelError(f"{str(path)!r} is one shard of several: give the folder of the whole model")
    return identify(read_header(path))


def _read_gguf(path: Path) -> Contents:
    """Return what a GGUF file holds."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ModelError("GGUF files need gguf: pip install 'imagegen-diffusion[gguf]'")
    from gguf import GGUFReader

    from imagegen.weights import TensorFacts

    try:
        names = {tensor.name: TensorFacts("GGUF", tuple(map(int, tensor.shape))) for tensor in GGUFReader(path).tensors}
    except Exception as error:  # whatever the reader meets in damaged bytes
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{str(path)!r} is no GGUF file that can be read ({reason}): {AGAIN}") from None
    contents = identify(names)
    if contents.kind == WHOLE:
        raise ModelError(f"{str(path)!r} is {contents.what}: of GGUF, files of a transformer or UNet alone are read")
    return contents


def _find_vae(vae: str | Path, local_files_only: bool) -> Source:
    """Find a decoder of its own: a folder with a config.json, a file, or a hub id.

    Raises:
        ModelError: there is none.
    """
    path, name = Path(vae).absolute(), str(vae)
    if _exists(path) and path.is_dir():
        if not (path / "config.json").is_file() and (path / "vae" / "config.json").is_file():
            path = path / "vae"
        if not (path / "config.json").is_file():
            raise ModelError(f"vae={name!r} has no config.json: give the folder of a decoder, as in model/vae")
        return Source(name, path)
    if _exists(path):
        contents = read_contents(path)
        if "VAE" not in contents.what or "tiny" in contents.what:
            raise ModelError(f"vae={name!r} is {contents.what}: {contents.use or 'give a decoder'}")
        return Source(name, path, contents=contents)
    found = hub.parse_id(name) if isinstance(vae, str) else None
    if found is None:
        raise ModelError(f"vae={name!r} is not there: give a decoder's folder, its .safetensors file, or a hub id")
    folder, commit = hub.fetch(*found, None, local_files_only)
    return Source(found[0], folder if (folder / "config.json").is_file() else folder / "vae", commit)


def read_index(folder: Path) -> dict[str, Any]:
    """Read a model folder's `model_index.json`, whose entries name a class for each component.

    Raises:
        ModelError: the folder is none, holds no diffusers model, or names code of its own, which is not run.
    """
    if not folder.is_dir():
        raise ModelError(_not_there(str(folder)))
    path = folder / INDEX
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError("it is far too large")
        index = json.loads(path.read_text(encoding="utf-8"))
        kind = index["_class_name"]
        if isinstance(kind, list):
            raise ModelError(f"{str(path)!r} names a pipeline of its own, {kind}: code that comes with weights is not run")
        if not isinstance(kind, str):
            raise ValueError("_class_name is no text")
    except FileNotFoundError:
        raise ModelError(_no_index(folder)) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{str(path)!r} cannot be read: {error}") from None
    return index


def _no_index(folder: Path) -> str:
    """Say what a folder without a model_index.json is."""
    start = f"{str(folder)!r} is no diffusers model: it has no {INDEX}"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind:
        hint = "give it as vae=" if str(kind).startswith("Autoencoder") else "give the folder above it"
        return f"{start}; it is one component, a {kind}: {hint}"
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
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


def all_weights(source: Source) -> list[Path]:
    """Return every weight file of a source, whether it will be loaded or not."""
    return list_weights(source.path) if source.contents is None else [source.path]
