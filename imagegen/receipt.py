"""What a PNG remembers: the request, the weights, the plan and the machine that made it.

A receipt is one `iTXt` chunk named `imagegen` (JSON, see `receipt.schema.json`) beside one
`parameters` chunk in the form that other tools read. Knows nothing of torch.
"""

import contextlib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from imagegen.request import PICTURES, ReceiptError, Request, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
CHUNK = "imagegen"
NUMBER = (int, float)
REQUIRED_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "num_steps": int,
    "guidance": NUMBER,
    "width": int,
    "height": int,
}
OPTIONAL_NUMBERS = ("strength", "temperature")
LARGEST = 1e300  # a number of the request beyond it is no setting, and prints as none


@dataclass(frozen=True)
class Receipt:
    """Everything needed to make one picture again and to tell whether it is the same.

    Attributes:
        version: version of this format.
        request: the request's settings with the picture's own seed and one image, `mode`, and for
            input pictures `image_sha256`, `mask_sha256` …; `noise` is true where the start was given.
        pixels_sha256: SHA-256 of the RGB pixels, row by row, three bytes each.
        model: `source`, `revision` (a commit, of a hub id), `variant`, `base`, `vae`, `family`, `sha256` of every weight
            file, `licence`; `control` and `style` where a ControlNet or an IP-Adapter was loaded, each with its `name`
            and `sha256`.
        loras: applied LoRA files with their hashes and weights.
        plan: the plan's `name` and what each lever did.
        environment: versions, device and dtype.
        fidelity: measured distance from the reference, where known.
    """

    version: int
    request: dict[str, Any]
    pixels_sha256: str
    model: dict[str, Any]
    loras: list[dict[str, Any]]
    plan: dict[str, Any]
    environment: dict[str, Any]
    fidelity: dict[str, Any] | None = field(default=None)

    def where(self) -> dict[str, Any]:
        """Return what `load` takes beside the source to find the same model again."""
        return {name: self.model.get(name) for name in ("revision", "variant", "base", "vae")}

    def to_json(self) -> str:
        """Return the receipt as the JSON that the PNG carries."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    def to_parameters(self) -> str:
        """Return the settings in AUTOMATIC1111's text form, which other tools read."""
        request, model = self.request, self.model
        hashes = model["sha256"]
        denoisers = [value for name, value in hashes.items() if name.startswith(("unet/", "transformer/"))]
        weights = next(iter(denoisers or hashes.values()), "")
        fields = {
            "Steps": request["num_steps"],
            "Sampler": request.get("scheduler") or self.environment.get("scheduler", "default"),
            "CFG scale": f"{request['guidance']:g}",
            "Seed": request["seed"],
            "Size": f"{request['width']}x{request['height']}",
            "Model hash": weights[:10],
            "Model": re.sub(r"[,:\n]", " ", str(model["source"])),
        }
        if request.get("strength") is not None:
            fields["Denoising strength"] = f"{request['strength']:g}"
        if request.get("temperature") is not None:
            fields["Temperature"] = f"{request['temperature']:g}"
        fields["Version"] = f"imagegen {self.environment.get('imagegen', '')}"
        lines = [request["prompt"]]
        if request["negative_prompt"]:
            lines.append(f"Negative prompt: {request['negative_prompt']}")
        lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
        return "\n".join(lines)


def pixels_sha256(picture: "Image") -> str:
    """Return the SHA-256 of a picture's pixels in its own mode, row by row."""
    return hashlib.sha256(picture.tobytes()).hexdigest()


def describe_request(request: Request, given_noise: bool) -> dict[str, Any]:
    """Return the request as a receipt records it: input pictures by hash."""
    described = request.settings() | {"mode": request.mode, "noise": given_noise}
    given = {name: getattr(request, name) for name in PICTURES}
    return described | {f"{name}_sha256": pixels_sha256(picture) for name, picture in given.items() if picture is not None}


def parse_receipt(text: str) -> Receipt:
    """Read a receipt's JSON.

    Raises:
        ReceiptError: it is no JSON, of a newer version, or not of the schema.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReceiptError(f"the receipt is no valid JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("version"), int):
        raise ReceiptError("the receipt has no version number: it was not written by imagegen, or is damaged")
    if data["version"] > VERSION:
        raise ReceiptError(f"the receipt has version {data['version']}, newer than {VERSION}: update imagegen")
    kinds = {"request": dict, "pixels_sha256": str, "model": dict, "loras": list, "plan": dict, "environment": dict}
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind):
            raise ReceiptError(f"the receipt's {name!r} is missing or no {kind.__name__}: it is damaged")
    for name, wanted in REQUIRED_SETTINGS.items():
        if not isinstance(data["request"].get(name), wanted):
            raise ReceiptError(f"the receipt's request has no usable {name!r}: it is damaged")
    for name in ("guidance", *OPTIONAL_NUMBERS):
        value = data["request"].get(name)
        if value is not None and not _is_number(value):
            raise ReceiptError(f"the receipt's request has an unusable {name!r}: it is damaged")
    hashes = data["model"].get("sha256")
    if not isinstance(data["model"].get("source"), str) or not isinstance(hashes, dict):
        raise ReceiptError("the receipt's model has no source or weight hashes: it is damaged")
    if not all(isinstance(value, str) for value in hashes.values()):
        raise ReceiptError("the receipt's model has a weight hash that is no text: it is damaged")
    if not all(isinstance(lora, dict) and _is_number(lora.get("weight", 1.0)) for lora in data["loras"]):
        raise ReceiptError("the receipt's 'loras' holds what is no LoRA with a weight: it is damaged")
    if not all(isinstance(data["model"].get(name, {}), dict) for name in ("control", "style")):
        raise ReceiptError("the receipt's model has a control or a style that is no object: it is damaged")
    known: dict[str, Any] = {name: data.get(name) for name in Receipt.__dataclass_fields__}
    return Receipt(**known)


def _is_number(value: object) -> bool:
    return isinstance(value, NUMBER) and not isinstance(value, bool) and not abs(value) > LARGEST


def remembered_prompt(picture: "Image") -> str:
    """Return the prompt that a picture made here remembers; empty where it remembers none."""
    text = picture.info.get(CHUNK)
    try:
        return parse_receipt(str(text)).request["prompt"] if text else ""
    except ReceiptError:
        return ""


def open_picture(path: "str | Path | BinaryIO") -> tuple["Image", Receipt]:
    """Open a PNG and its receipt: the picture as RGB, and what it remembers.

    Raises:
        ReceiptError: the file is missing, is no picture, or carries no receipt.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.load()
            text = getattr(opened, "text", {}).get(CHUNK)
            picture = opened.convert("RGB")
    except FileNotFoundError:
        raise ReceiptError(f"no file {str(path)!r}") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise ReceiptError(f"{str(path)!r} cannot be read as a picture ({error})") from None
    if text is None:
        raise ReceiptError(f"{str(path)!r} carries no imagegen receipt: was it re-saved by a tool that strips metadata?")
    return picture, parse_receipt(str(text))


def read_receipt(path: "str | Path | BinaryIO") -> Receipt:
    """Return the receipt of a PNG, a file or an open one.

    Raises:
        ReceiptError: the file is missing, is no picture, or carries no receipt.
    """
    return open_picture(path)[1]


def png_bytes(picture: "Image", receipt: Receipt) -> bytes:
    """Return the picture as a PNG that carries its receipt."""
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt(CHUNK, receipt.to_json())
    chunks.add_itxt("parameters", receipt.to_parameters())
    written = BytesIO()
    picture.save(written, format="PNG", pnginfo=chunks)
    return written.getvalue()


def slug(prompt: str) -> str:
    """Turn a prompt into a short safe part of a file name."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:48].strip("-") or "picture"


def write_new(folder: Path, stem: str, content: bytes) -> Path:
    """Write `STEM.png` into a folder, or `STEM-2.png` … where that is taken; overwrite nothing.

    The file appears whole or not at all.

    Raises:
        RequestError: the folder cannot be written, or the disk is full.
    """
    part = folder / f".{stem}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        number = 1
        while True:
            path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            try:
                os.link(part, path)  # unlike os.replace, fails where the name is taken
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise RequestError(f"cannot write into {str(folder)!r}: {error.strerror or error}; choose another directory") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
