"""What programs ask: OpenAI's image calls, answered by the engine. Knows nothing of the page.

What OpenAI's API has and this model has not is refused in words; nothing asked for is silently left out.
"""

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imagegen import __version__
from imagegen.engine import Busy, Engine, Refused, Stream
from imagegen.model import Step
from imagegen.request import Error, RequestError
from imagegen.result import Result
from imagegen.server.guard import error_body

MAX_PICTURES = 10  # of one call, as there
MAX_STEPS = 100
MAX_PIXELS = 4096 * 4096  # of a picture that is sent
MAX_PARTIAL = 3
RETRY_AFTER_S = 2
GONE = 499  # nobody reads this answer
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
# What OpenAI's API has and this server has not: the values that ask for nothing, and what to do instead.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (("b64_json",), "pictures are sent in the answer: ask for b64_json"),
    "quality": (("auto", "standard", "medium"), "set num_steps instead"),
    "style": ((), "say it in the prompt"),
    "background": (("auto", "opaque"), "every picture is opaque"),
    "moderation": (("auto",), "whoever started the server decides that"),
    "output_format": (("png",), "every picture is a PNG with its receipt"),
    "output_compression": ((100,), "PNGs lose nothing"),
    "input_fidelity": ((), "set strength instead"),
}


class Generation(BaseModel):
    """A call for pictures from words; beside OpenAI's parameters `seed`, `negative_prompt`, `num_steps` … of this package."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=32_000)
    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_PICTURES)
    size: str | None = Field(None, description="auto, or as in 128x128")
    seed: int | None = Field(None, ge=0)
    negative_prompt: str | None = Field(None, max_length=32_000)
    num_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = None
    scheduler: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=MAX_PARTIAL)
    response_format: str | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_format: str | None = None
    output_compression: int | None = None
    user: str | None = None
    safety_identifier: str | None = None


class Edit(Generation):
    """A call that changes a picture: the form's fields beside its files `image` and `mask`."""

    strength: float | None = None
    input_fidelity: str | None = None


PASSED_ON = ("seed", "negative_prompt", "num_steps", "guidance", "scheduler", "strength")
ERROR = {"description": "what was wrong, in OpenAI's form", "content": {"application/json": {"schema": {"type": "object"}}}}
ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 413, 429), ERROR)
FILE = {"type": "string", "format": "binary"}


def name_of(engine: Engine) -> str:
    """Return how programs name the model; of a local one nothing but its own name."""
    source = engine.model.source
    return Path(source).name if Path(source).exists() else source


def read_settings(asked: Generation, model: str) -> dict[str, Any]:
    """Return what `Engine.stream` takes for a call.

    Raises:
        RequestError: it asks for what this server has not.
    """
    if asked.model not in (None, "", model):
        raise RequestError(f"model {asked.model!r} is not served here: it is {model!r}")
    for name, (allowed, way_out) in ONLY.items():
        value = getattr(asked, name, None)
        if value is not None and value not in allowed:
            raise RequestError(f"{name} {value!r} does not exist here: {way_out}")
    if asked.stream and (asked.n or 1) > 1:
        raise RequestError(f"n must be 1 where stream is true, got {asked.n}")
    settings = {name: getattr(asked, name, None) for name in PASSED_ON} | {"num_images": asked.n}
    if asked.size not in (None, "", "auto"):
        match = SIZE.fullmatch(str(asked.size))
        if match is None:
            raise RequestError(f"size must be auto or WIDTHxHEIGHT, as in 128x128, got {asked.size!r}")
        settings |= {"width": int(match[1]), "height": int(match[2])}
    return {name: value for name, value in settings.items() if value is not None}


def read_picture(content: bytes, name: str) -> Any:
    """Open a picture that was sent; how large it would be is looked at before it is unpacked.

    Raises:
        RequestError: it is no PNG, JPEG or WebP, or has too many pixels.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise RequestError(f"{name} is {width}x{height} pixels, more than {MAX_PIXELS}: send a smaller one")
            opened.load()
            return ImageOps.exif_transpose(opened)
    except RequestError:
        raise
    except Exception as error:  # Pillow raises many kinds on a damaged file
        raise RequestError(f"{name} cannot be read as a picture ({type(error).__name__}): send a PNG, JPEG or WebP") from None


def read_mask(mask: Any, picture: Any) -> Any:
    """Turn OpenAI's mask, transparent where to edit, into this package's: L, white where to repaint.

    Args:
        mask: what was sent as mask, or None: then the picture's own transparency is one, where it has any.
        picture: what is edited.

    Raises:
        RequestError: the mask has another size, or no transparency.
    """
    source = picture if mask is None else mask
    if not source.has_transparency_data:
        if mask is None:
            return None
        raise RequestError("mask has no transparent part: make it transparent where the picture is to change")
    if source.size != picture.size:
        raise RequestError(f"mask is {mask.width}x{mask.height} and image {picture.width}x{picture.height}: make them equal")
    return source.convert("RGBA").getchannel("A").point([255 - value for value in range(256)])


@dataclass
class Programs:
    """The calls, over one engine.

    Attributes:
        engine: the queue in front of the model.
        folder: where the PNGs go, as files of the server's owner; nobody is served from there.
    """

    engine: Engine
    folder: Path

    def __post_init__(self) -> None:
        """Keep a thread for everyone who can wait."""
        most = self.engine.max_waiting + self.engine.max_batch + 8
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="imagegen-program")

    async def answer(self, http: Request, kind: str, asked: Generation, pictures: dict[str, Any]) -> Response:
        """Make the pictures of a call and send them, at the end or as they become."""
        stream = self.engine.stream(asked.prompt, **read_settings(asked, name_of(self.engine)), **pictures)
        if asked.stream:
            events = self._events(stream, kind, asked)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._finish, stream)
            while not work.done():
                await asyncio.wait({work}, timeout=0.25)
                if not work.done() and await http.is_disconnected():
                    return Response(status_code=GONE)
            finished = work.result()
        finally:
            stream.close()
        if finished is None:
            return Response(status_code=GONE)
        result, files = finished
        seeds = [picture.receipt.request["seed"] for picture in result.pictures]
        data = [{"b64_json": _text(file), "seed": seed} for file, seed in zip(files, seeds, strict=True)]
        return JSONResponse({"created": int(time.time()), "data": data, **_facts(result)})

    async def in_thread(self, work: Any, *given: Any) -> Any:
        """Do what takes a while without keeping the others waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    def _finish(self, stream: Stream) -> tuple[Result, list[bytes]] | None:
        """Wait for the pictures and return them with their files; None where the stream was closed."""
        for state in stream:
            if isinstance(state, Step) and state.result is not None:
                return state.result, self._keep(state.result)
        return None

    def _keep(self, result: Result) -> list[bytes]:
        """Save the pictures and return their files: what is sent is what is kept."""
        return [path.read_bytes() for path in result.save(self.folder)]

    async def _events(self, stream: Stream, kind: str, asked: Generation) -> AsyncIterator[bytes]:
        """Send the picture as it becomes, and then itself; whoever stops reading ends the work."""
        sent, partial = 0, asked.partial_images or 0
        try:
            while (state := await self.in_thread(next, stream, None)) is not None:
                if not isinstance(state, Step):
                    continue
                if state.result is not None:
                    (file,) = await self.in_thread(self._keep, state.result)
                    yield _event(f"{kind}.completed", {"b64_json": _text(file), **_facts(state.result)})
                elif sent < partial and state.index + 1 >= (sent + 1) * state.num_steps / (partial + 1):
                    preview = await self.in_thread(state.preview, 0)
                    facts = {"partial_image_index": sent, "size": f"{preview.width}x{preview.height}"}
                    yield _event(f"{kind}.partial_image", {"b64_json": _text(_png(preview)), **facts})
                    sent += 1
        except Error as error:
            yield _event("error", json.loads(error_body(str(error), "invalid_request_error")))
        finally:
            stream.close()


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _text(file: bytes) -> str:
    return base64.b64encode(file).decode()


def _facts(result: Result) -> dict[str, Any]:
    """Return what OpenAI's answers say of the pictures."""
    picture = result.images[0]
    return {"size": f"{picture.width}x{picture.height}", "quality": "auto", "background": "opaque", "output_format": "png"}


def _event(kind: str, data: dict[str, Any]) -> bytes:
    content = {"type": kind, "created_at": int(time.time()), "background": "opaque", "output_format": "png", "quality": "auto"}
    return f"event: {kind}\ndata: {json.dumps(content | data)}\n\n".encode()


def error_answer(error: Exception) -> Response:
    """Return an error as OpenAI's clients read it."""
    message = str(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        wrong = f"{name}: {first['msg']}, got {repr(first.get('input'))[:80]}"
        message = f"unknown parameter {name!r}: leave it out" if unknown else wrong
    fields = {*Edit.model_fields, "image", "mask"}
    param = next((word for word in re.findall(r"\w+", message) if word in fields), None)
    if isinstance(error, Busy):
        body = error_body(message, "requests", "busy", param)
        return Response(body, 429, {"Retry-After": str(RETRY_AFTER_S)}, "application/json")
    code = "refused" if isinstance(error, Refused) else None
    return Response(error_body(message, "invalid_request_error", code, param), 400, media_type="application/json")


def build_router(engine: Engine, folder: Path) -> APIRouter:
    """Return the routes for programs; their pictures are kept in `folder`."""
    router, programs, born = APIRouter(), Programs(engine, folder), int(time.time())
    card = {"id": name_of(engine), "object": "model", "created": born, "owned_by": "imagegen"}

    @router.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Say that the server lives, what it draws with and how many wait."""
        facts = {"status": "ok", "model": name_of(engine), "plan": engine.model.plan.name, "version": __version__}
        return facts | {"waiting": engine.waiting, "running": engine.running}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [card]}

    body = {"required": True, "content": {"application/json": {"schema": Generation.model_json_schema()}}}

    @router.post("/v1/images/generations", responses=ERRORS, openapi_extra={"requestBody": body})
    async def generations(http: Request) -> Response:
        """Make pictures from words."""
        try:
            asked = Generation.model_validate_json(await http.body())
            return await programs.answer(http, "image_generation", asked, {})
        except (Error, ValidationError) as error:
            return error_answer(error)

    schema = Edit.model_json_schema()
    schema["properties"] |= {"image": FILE, "mask": FILE}
    schema["required"] = ["prompt", "image"]
    form = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}

    @router.post("/v1/images/edits", responses=ERRORS, openapi_extra={"requestBody": form})
    async def edits(http: Request) -> Response:
        """Change a picture, or the part of it where its mask is transparent."""
        try:
            asked, files = await _read_form(http)
            pictures = {name: await programs.in_thread(read_picture, content, name) for name, content in files.items()}
            mask = read_mask(pictures.get("mask"), pictures["image"])
            given = {"image": pictures["image"].convert("RGB")} | ({"mask": mask} if mask is not None else {})
            return await programs.answer(http, "image_edit", asked, given)
        except (Error, ValidationError) as error:
            return error_answer(error)

    @router.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def unknown(rest: str) -> Response:
        message = f"there is no /v1/{rest} here: it has models, images/generations and images/edits"
        return Response(error_body(message, "invalid_request_error", "unknown_url"), 404, media_type="application/json")

    return router


async def _read_form(http: Request) -> tuple[Edit, dict[str, bytes]]:
    """Return the fields and the files of a form.

    Raises:
        RequestError: it is no form, or there is not one picture.
        ValidationError: a field is wrong.
    """
    from starlette.exceptions import HTTPException

    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("the body must be multipart/form-data: send image as a file")
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    try:
        async with http.form(max_files=4, max_fields=len(Edit.model_fields) + 4) as form:
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                if name in fields or name in files:
                    raise RequestError(f"{name} is given twice: this server takes one")
                if isinstance(value, str):
                    fields[name] = value
                else:
                    files[name] = await value.read()
    except HTTPException as error:
        raise RequestError(f"the form cannot be read: {error.detail}") from None
    if "image" not in files or files.keys() - {"image", "mask"}:
        raise RequestError("image must be sent as a file, and with it at most a mask")
    return Edit.model_validate(fields), files
