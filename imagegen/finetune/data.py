"""A folder of pictures with captions: read, checked before anything is trained, and sorted into buckets.

Knows nothing of models. Every fault of the data is an error that names the file, and none is found halfway
through a night.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from imagegen.licences import Licence, licence_named, licence_of, unknown
from imagegen.receipt import CHUNK
from imagegen.request import DataError

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 64_000_000
MAX_CAPTION = 2000  # characters
MIN_SIDE_PX = 16


@dataclass(frozen=True)
class Item:
    """One picture with its caption.

    Attributes:
        path: the file.
        text: the caption.
        sha256: of the file.
        size: width and height in pixels, the camera's rotation applied.
        generator: what the file says made it; None for a picture that says nothing.
        licence: of that generator; None without one.
    """

    path: Path
    text: str
    sha256: str
    size: tuple[int, int]
    generator: str | None
    licence: Licence | None = None


@dataclass(frozen=True)
class Dataset:
    """Checked data.

    Attributes:
        folder: where it lies.
        items: sorted by file name.
        notes: what should be known: duplicates, pictures that a model made.
    """

    folder: Path
    items: tuple[Item, ...]
    notes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The hash of everything that training sees: pictures and captions, whatever the files' names."""
        lines = sorted(f"{item.sha256} {item.text}" for item in self.items)
        return sha256("\n".join(lines).encode()).hexdigest()

    @property
    def generated(self) -> dict[str, list[str]]:
        """The files that a model made, by what made them."""
        found: dict[str, list[str]] = {}
        for item in self.items:
            if item.generator:
                found.setdefault(item.generator, []).append(item.path.name)
        return found

    @property
    def generators(self) -> set[tuple[str, Licence]]:
        """What made those files, with its licence."""
        return {(item.generator, item.licence) for item in self.items if item.generator and item.licence}


def read_dataset(folder: str | Path) -> Dataset:
    """Read and check a folder of pictures: `metadata.jsonl` (`file_name`, `text`), or `NAME.txt` beside `NAME.png`.

    Raises:
        DataError: there is no folder or no picture, a caption is missing, empty, too long or no text, two
            disagree, a file is no picture, cut short, too large or too small, or lies outside.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder {str(folder)!r}: give one of pictures with captions")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    captions = dict(_captions(folder, files))
    if not files:
        raise DataError(f"no pictures in {str(folder)!r}: put {', '.join(SUFFIXES[:3])} … files there, with captions")
    without = [path.name for path in files if path.name not in captions]
    if without:
        what = f"{len(without)} pictures have" if len(without) > 1 else "a picture has"
        raise DataError(f"{what} no caption, {without[0]!r} first: write {Path(without[0]).stem}.txt, or a line in {METADATA}")
    items = tuple(_read_item(path, captions[path.name]) for path in files)
    return Dataset(folder, items, tuple(_notes(items)))


def find_faults(folder: str | Path) -> list[str]:
    """Return everything that `read_dataset` would refuse, one line for each fault; empty where it takes the folder."""
    folder = Path(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    faults = []
    for path in files:
        try:
            _read_item(path, "")
        except DataError as error:
            faults.append(str(error))
    try:
        captions = dict(_captions(folder, files))
        faults += [f"{path.name!r} has no caption" for path in files if path.name not in captions]
    except DataError as error:
        faults.append(str(error))
    if not faults:
        try:
            read_dataset(folder)
        except DataError as error:
            faults.append(str(error))
    return faults


def _captions(folder: Path, files: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield file names with their captions, from one kind of file or the other, or both where they agree."""
    found: dict[str, str] = {}
    for where, name, text in (*_from_metadata(folder), *_from_texts(files)):
        if not text.strip():
            raise DataError(f"{where}: the caption of {name!r} is empty")
        if len(text) > MAX_CAPTION:
            raise DataError(f"{where}: the caption of {name!r} has {len(text)} characters, {MAX_CAPTION} are allowed")
        if found.get(name, text.strip()) != text.strip():
            raise DataError(f"{where}: {name!r} has another caption elsewhere: keep one of them")
        found[name] = text.strip()
    yield from found.items()


def _from_metadata(folder: Path) -> Iterator[tuple[str, str, str]]:
    path = folder / METADATA
    if not path.exists():
        return
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        where = f"{METADATA} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f'{where} is no JSON: write {{"file_name": "a.png", "text": "a red apple"}}') from None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not isinstance(row.get("text"), str):
            raise DataError(f"{where} needs the texts file_name and text, got {line[:80]!r}")
        name = row["file_name"]
        if Path(name).name != name:
            raise DataError(f"{where}: file_name {name!r} must be a file of the folder itself, without a path")
        if not (folder / name).is_file():
            raise DataError(f"{where} names {name!r}, and there is no such file")
        yield where, name, row["text"]


def _from_texts(files: list[Path]) -> Iterator[tuple[str, str, str]]:
    for path in files:
        caption = path.with_suffix(".txt")
        if caption.exists():
            yield caption.name, path.name, _read_text(caption)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path.name!r} is not UTF-8 text: save it as such") from None
    except OSError as error:
        raise DataError(f"{path.name!r} cannot be read: {error.strerror}") from None


def _read_item(path: Path, text: str) -> Item:
    content = _read_bytes(path)
    try:
        with Image.open(BytesIO(content)) as opened:
            (width, height), frames = opened.size, getattr(opened, "n_frames", 1)
            if width * height > MAX_PIXELS:
                raise DataError(f"{path.name!r} has {width}x{height} pixels, more than {MAX_PIXELS:,}: make it smaller")
            if frames > 1:
                raise DataError(f"{path.name!r} is an animation of {frames} pictures: keep one of them")
            generator = find_generator(opened.info, content)
            licence = find_licence(opened.info, generator) if generator else None
            size = ImageOps.exif_transpose(opened).size  # decodes it whole
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{path.name!r} has too many pixels, more than {MAX_PIXELS:,}: make it smaller") from None
    except UnidentifiedImageError:
        raise DataError(f"{path.name!r} is no picture that can be read: convert it to PNG") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path.name!r} is damaged or cut short: {error}") from None
    if min(size) < MIN_SIDE_PX:
        raise DataError(f"{path.name!r} has {size[0]}x{size[1]} pixels: {MIN_SIDE_PX} is the least side")
    return Item(path, text, sha256(content).hexdigest(), size, generator, licence)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name!r} cannot be read: {error.strerror}") from None


def find_generator(info: dict[Any, Any], content: bytes) -> str | None:
    """Return what a picture's file says made it: our receipt, the text form of other tools, or C2PA; None if nothing."""
    if CHUNK in info:
        try:
            model = json.loads(info[CHUNK])["model"]
            return f"imagegen, {model.get('family')} ({model.get('source')})"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return "imagegen"
    parameters = info.get("parameters")
    if isinstance(parameters, str) and re.search(r"\bSteps: \d+", parameters):
        named = re.search(r"\bModel: ([^,\n]+)", parameters)
        return named[1].strip() if named else "a diffusion model (its parameters chunk names none)"
    if any(name in info for name in ("prompt", "workflow", "invokeai_metadata", "sd-metadata")):
        return "a diffusion model (its metadata names none)"
    if b"c2pa" in content and (b"trainedAlgorithmicMedia" in content or b"jumb" in content):
        return "a generator that signs with C2PA" if b"trainedAlgorithmicMedia" in content else None
    return None


def find_licence(info: dict[Any, Any], generator: str) -> Licence:
    """Return the licence of what made a picture: as our receipt says, or by the generator's name."""
    if CHUNK in info:
        try:
            model = json.loads(info[CHUNK])["model"]
            found = licence_named(model.get("licence"))
            source = str(model.get("source"))
            name = Path(source).name if source.startswith("/") else source  # the folders above it say nothing of the model
            return found if found != unknown() else licence_of(f"{model.get('family')} {name}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return unknown()
    return licence_of(generator)


def _notes(items: tuple[Item, ...]) -> Iterator[str]:
    """Yield what is no error and should be known."""
    by_hash: dict[str, list[Item]] = {}
    for item in items:
        by_hash.setdefault(item.sha256, []).append(item)
    for same in by_hash.values():
        if len(same) > 1:
            yield f"the same picture {len(same)} times: {', '.join(item.path.name for item in same)}"


def open_rgb(item: Item) -> Image.Image:
    """Return an item's picture upright, in sRGB; transparency becomes white."""
    with Image.open(item.path) as opened:
        picture = ImageOps.exif_transpose(opened)
        profile = picture.info.get("icc_profile")
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        if profile:
            picture = _to_srgb(picture, profile)
        return picture.convert("RGB")


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Convert colours by the file's own profile; one that cannot be read counts as sRGB."""
    kind = picture.mode if picture.mode in ("RGB", "CMYK", "L", "LAB") else "RGB"
    try:
        own = ImageCms.ImageCmsProfile(BytesIO(profile))
        made = ImageCms.profileToProfile(picture.convert(kind), own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return picture
    return made or picture


def make_buckets(side_px: int, multiple_px: int, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """Return the sizes (width, height) that training uses: about side² pixels each, in multiples, up to a ratio."""
    area, sizes = side_px**2, set()
    for width in range(multiple_px, int(side_px * max_ratio) + 1, multiple_px):
        height = max(multiple_px, round(area / width / multiple_px) * multiple_px)
        if max(width, height) <= max_ratio * min(width, height) and width * height <= area * 1.1:
            sizes.add((width, height))
    return sorted(sizes | {(side_px, side_px)})


def find_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket whose shape is nearest to a picture's; of those the one with the most pixels."""
    ratio = size[0] / size[1]

    def distance(bucket: tuple[int, int]) -> tuple[float, int]:
        own = bucket[0] / bucket[1]
        return max(own / ratio, ratio / own), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def fit_to_bucket(picture: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """Scale a picture to cover a bucket, and cut what stands over, from both sides alike."""
    return ImageOps.fit(picture, bucket, Image.Resampling.LANCZOS)
