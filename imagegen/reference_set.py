"""Reference sets: a folder of pictures that later ones are held against, recorded here or made by another tool.

`reference.json` names, for every picture, the request that makes it; beside it lie the PNGs. A recorded
set carries the noise floor: how far the `exact` plan drifts from itself over batch sizes and thread
counts, nothing else.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imagegen import fidelity
from imagegen.lock import only_writer
from imagegen.measure import environment
from imagegen.model import Model
from imagegen.profile import write_json
from imagegen.prompts import confirm_prompts, read_prompts
from imagegen.receipt import CHUNK, describe_request, open_picture, parse_receipt, pixels_sha256, slug, write_new
from imagegen.request import DataError, ReceiptError, Request, build_request

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
FILE = "reference.json"
SETTINGS = ("prompt", "negative_prompt", "seed", "num_steps", "guidance", "width", "height", "scheduler")
FLOOR_PICTURES = 4
Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class ReferenceSet:
    """A folder of reference pictures.

    Attributes:
        folder: where it is.
        source: `imagegen`, or `import` for pictures of another tool or version.
        model: `source`, `family` and `sha256` of the weight files; empty for imports.
        dtype: what the pictures were computed in, where known.
        environment: versions and device that made them; empty for imports.
        noise_floor: `psnr_db` (worst) and `max_difference` of the exact plan over batches and threads, or None.
        pictures: for each, `file`, `request` and `pixels_sha256`.
    """

    folder: Path
    source: str
    model: dict[str, Any]
    dtype: str | None
    environment: dict[str, Any]
    noise_floor: dict[str, Any] | None
    pictures: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.pictures)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], "Image"]]:
        """Yield every picture's request and the picture, RGB.

        Raises:
            DataError: a picture is missing, or not the one that was recorded.
        """
        for entry in self.pictures:
            picture = _open(self.folder / entry["file"])
            if pixels_sha256(picture) != entry["pixels_sha256"]:
                raise DataError(f"{str(self.folder / entry['file'])!r} is not the picture that was recorded: record it again")
            yield entry["request"], picture

    def save(self) -> None:
        """Write `reference.json`, which makes the folder a reference set."""
        data = {"version": VERSION} | {name: value for name, value in asdict(self).items() if name != "folder"}
        write_json(self.folder / FILE, data)


def record_reference(
    model: Model,
    prompts: Sequence[str] | str | Path | None,
    folder: str | Path,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    guidance: float | None = None,
    progress: Progress | None = None,
) -> ReferenceSet:
    """Record a model's pictures under the `exact` plan, in the family's reference dtype, and the noise floor.

    Args:
        model: whatever its plan, it runs `exact` here and gets its plan back.
        prompts: what to draw; the path of a text file, one prompt a line; None takes thirty of ours.
        folder: a new or empty folder, or one where this very recording was stopped: it goes on.
        seed: of the first picture; the next has the next seed.
        num_steps: denoising steps; the family's by default.
        guidance: the family's by default.
        progress: is told what is done, how many, of how many.

    Raises:
        DataError: the folder holds something, there are no prompts, or the model has another dtype.
    """
    folder = Path(folder)
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != model.family.reference_dtype:
        wanted = model.family.reference_dtype
        raise DataError(
            f"a reference of {model.family.name} is computed in {wanted}, this model in {dtype}: load it without dtype="
        )
    if isinstance(prompts, (str, Path)):
        prompts = read_prompts(prompts)
    chosen = confirm_prompts(model.family.name) if prompts is None else list(prompts)
    if not chosen:
        raise DataError("no prompts: give at least one")
    tell = progress or (lambda *_: None)
    given = {"num_steps": num_steps, "guidance": guidance}
    requests = [build_request(prompt, model.family, given | {"seed": seed + index}) for index, prompt in enumerate(chosen)]
    names = [f"{request.seed}-{slug(request.prompt)}" for request in requests]
    _refuse_to_overwrite(folder, {f"{name}.png" for name in names})
    with only_writer(folder), model.plan_for_a_while("exact"):
        for file in filter(is_torn, folder.iterdir()):
            file.unlink()
        entries: list[dict[str, Any]] = []
        images: list[Image] = []
        for index, (name, request) in enumerate(zip(names, requests, strict=True)):
            settings = {name: value for name, value in request.settings().items() if name in SETTINGS}
            file = folder / f"{name}.png"
            if file.exists():
                image = _made_before(file, model, request)
            else:
                picture = model.generate(**settings).pictures[0]
                image = picture.image
                write_new(folder, name, picture.png())
            entries.append({"file": file.name, "request": settings, "pixels_sha256": pixels_sha256(image)})
            images.append(image)
            tell("recorded", index + 1, len(requests))
        floor = measure_floor(model, [entry["request"] for entry in entries[:FLOOR_PICTURES]], images[:FLOOR_PICTURES])
    about = {"source": model.source, "family": model.family.name, "sha256": model.hashes}
    made = ReferenceSet(folder, "imagegen", about, dtype, environment(model.device, model.dtype), floor, entries)
    made.save()
    return made


def is_torn(file: Path) -> bool:
    """Say whether a file is what `write_new` leaves where its process is killed."""
    return file.name.startswith(".") and file.suffix == ".part"


def _refuse_to_overwrite(folder: Path, ours: Collection[str] = ()) -> None:
    """Refuse a folder that holds anything but what a stopped recording left: files of these names, and torn ones."""
    if not folder.exists():
        return
    if not folder.is_dir() or any(file.name not in ours and not is_torn(file) for file in folder.iterdir()):
        raise DataError(f"{str(folder)!r} is not an empty folder: choose a new one, so that no reference is lost")


def _made_before(file: Path, model: Model, request: Request) -> "Image":
    """Return the picture that a stopped recording left.

    Raises:
        DataError: it was made otherwise than now.
    """
    try:
        picture, receipt = open_picture(file)
    except ReceiptError as error:
        raise DataError(f"{error}: choose a new folder") from None
    now = environment(model.device, model.dtype)
    same = (
        receipt.request == describe_request(request, False)
        and receipt.model["sha256"] == model.hashes
        and not receipt.plan["levers"]
        and all(receipt.environment.get(name) == value for name, value in now.items())
        and receipt.pixels_sha256 == pixels_sha256(picture)
    )
    if not same:
        raise DataError(f"{str(file)!r} is there and was made otherwise than it would be now: choose a new folder")
    return picture


def measure_floor(model: Model, requests: list[dict[str, Any]], images: Sequence["Image"]) -> dict[str, Any]:
    """Return the drift of the exact plan from itself, over batch sizes and, on a CPU, thread counts.

    Args:
        model: under the exact plan.
        requests: of a few pictures.
        images: those pictures, each made alone.
    """
    drifts: list[tuple[float, int]] = []

    def compare(others: Sequence["Image"], to: Sequence["Image"]) -> None:
        drifts.extend((fidelity.psnr_db(a, b), fidelity.max_difference(a, b)) for a, b in zip(to, others, strict=True))

    for request, image in zip(requests, images, strict=True):  # the first of three
        compare(model.generate(**request, num_images=3).images[:1], [image])
    if model.device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            compare([model.generate(**request).images[0] for request in requests], images)
        finally:
            torch.set_num_threads(threads)
    worst = min(drift[0] for drift in drifts)
    return {"psnr_db": worst, "max_difference": max(drift[1] for drift in drifts), "pictures": len(drifts)}


def open_reference(folder: str | Path) -> ReferenceSet:
    """Open a reference set.

    Raises:
        DataError: the folder is none, or what it says cannot be used.
    """
    folder = Path(folder)
    try:
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{str(folder)!r} holds no {FILE}: record or import it with imagegen reference") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{str(folder / FILE)!r} cannot be read: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("version"), int) or not isinstance(data.get("pictures"), list):
        raise DataError(f"{str(folder / FILE)!r} is no reference set")
    if data["version"] > VERSION:
        raise DataError(f"{str(folder / FILE)!r} has version {data['version']}, newer than {VERSION}: update imagegen")
    for entry in data["pictures"]:
        request = entry.get("request") if isinstance(entry, dict) else None
        if not isinstance(request, dict) or not isinstance(request.get("prompt"), str) or not isinstance(entry.get("file"), str):
            raise DataError(f"{str(folder / FILE)!r} is damaged: a picture has no file or request")
        if Path(entry["file"]).name != entry["file"]:
            raise DataError(f"{str(folder / FILE)!r} names a file outside its folder: {entry['file']!r}")
    names = ("source", "model", "dtype", "environment", "noise_floor", "pictures")
    known: dict[str, Any] = {name: data.get(name) for name in names}
    return ReferenceSet(folder, **known)


def import_reference(folder: str | Path, out: str | Path | None = None) -> ReferenceSet:
    """Make a folder of pictures from another tool, or an older version, a reference set.

    Args:
        folder: the pictures.
        out: a new or empty folder to copy them to; by default `reference.json` goes beside them.

    The prompt and settings of each picture come from its receipt, from the `parameters` text that
    other tools write into PNGs, from `NAME.txt` beside it (the prompt), or from `metadata.jsonl`
    (`file_name`, `text` or `prompt`, and settings by our names).

    Raises:
        DataError: there are no pictures, or one has no prompt or no seed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder {str(folder)!r}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise DataError(f"{str(folder)!r} holds no pictures")
    listed = _read_metadata(folder / "metadata.jsonl")
    entries: list[dict[str, Any]] = []
    for file in files:
        picture = _open(file)
        found = _settings_of(file) | listed.get(file.name, {})
        if not found.get("prompt"):
            raise DataError(f"{str(file)!r} has no prompt: write it into {file.stem}.txt or metadata.jsonl")
        if not isinstance(found.get("seed"), int):
            raise DataError(f'{str(file)!r} has no seed: give it as "seed" in metadata.jsonl')
        request = {"width": picture.width, "height": picture.height} | found
        request = {name: request[name] for name in SETTINGS if request.get(name) is not None}
        entries.append({"file": file.name, "request": request, "pixels_sha256": pixels_sha256(picture)})
    if out is not None:
        _refuse_to_overwrite(Path(out))
        Path(out).mkdir(parents=True, exist_ok=True)
        for entry in entries:
            shutil.copyfile(folder / entry["file"], Path(out) / entry["file"])
    made = ReferenceSet(Path(out or folder), "import", {}, None, {}, None, entries)
    made.save()
    return made


def _open(path: Path) -> "Image":
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read as a picture ({error})") from None


def _settings_of(file: Path) -> dict[str, Any]:
    """Return what a picture's own chunks, or the text beside it, say of its making."""
    from PIL import Image

    with Image.open(file) as opened:
        texts = {name: value for name, value in opened.info.items() if isinstance(value, str)}
    if CHUNK in texts:
        try:
            return {name: value for name, value in parse_receipt(texts[CHUNK]).request.items() if name in SETTINGS}
        except ReceiptError as error:
            raise DataError(f"{str(file)!r}: {error}") from None
    if "parameters" in texts:
        return read_parameters(texts["parameters"])
    beside = file.with_suffix(".txt")
    return {"prompt": beside.read_text(encoding="utf-8").strip()} if beside.is_file() else {}


def read_parameters(text: str) -> dict[str, Any]:
    """Read the `parameters` text of other tools: prompt, negative prompt, steps, seed, guidance."""
    head, _, tail = text.rpartition("\nSteps:")
    if not head:
        return {"prompt": text.strip()} if text.strip() else {}
    prompt, _, negative = head.partition("\nNegative prompt:")
    found: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    fields = dict(re.findall(r"([A-Z][A-Za-z ]*): ([^,]+)", "Steps:" + tail))
    for name, ours, kind in (("Steps", "num_steps", int), ("Seed", "seed", int), ("CFG scale", "guidance", float)):
        try:
            found[ours] = kind(fields[name])
        except (KeyError, ValueError):
            continue
    return found


def _read_metadata(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        return {}
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row.pop("file_name")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(f"{str(file)!r}, line {number}: no JSON object with a file_name ({error})") from None
        if "text" in row:
            row["prompt"] = row.pop("text")
        found[name] = {key: value for key, value in row.items() if key in SETTINGS}
    return found
