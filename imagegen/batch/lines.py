"""What a file of prompts asks for: one JSON object a line, checked as far as that needs no model.

Reads the file as it goes: a million lines take no more memory than their names.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagegen.request import PICTURES, RequestError, check_keywords

MAX_LINE_BYTES = 1 << 20
MAX_NAME = 120  # letters of a file's name


@dataclass(frozen=True)
class Line:
    """One request.

    Attributes:
        number: of its line, from 1.
        id: as it was given, or the line's number.
        name: of its file, without `.png`.
        prompt: what to draw.
        settings: what `Model.generate` takes besides; pictures as absolute paths.
        key: 16 hexadecimal digits of all that it asks for.
    """

    number: int
    id: str | int
    name: str
    prompt: str
    settings: dict[str, Any]
    key: str


@dataclass(frozen=True)
class BadLine:
    """One line that asks for nothing that can be made, and why."""

    number: int
    id: str | int
    reason: str


def read_lines(file: Path) -> Iterator[Line | BadLine]:
    """Read a file of prompts, line by line; empty lines are left out.

    Raises:
        RequestError: the file is missing or cannot be read.
    """
    number_of: dict[str, int] = {}
    try:
        with file.open("rb") as opened:
            for number, content in enumerate(_split(opened), start=1):
                if content is not None and not content.strip():
                    continue
                line = _read(number, content, file.parent)
                if isinstance(line, Line):
                    other = number_of.setdefault(line.name.casefold(), number)
                    if other != number:
                        reason = f"its file would be {line.name}.png, as line {other}'s: give it an id of its own"
                        line = BadLine(number, line.id, reason)
                yield line
    except OSError as error:
        raise RequestError(f"cannot read the prompts in {str(file)!r}: {error.strerror or error}") from None


def _split(opened: Any) -> Iterator[bytes | None]:
    """Yield the lines of a file; None for one that is too long, which is never held whole."""
    while line := opened.readline(MAX_LINE_BYTES):
        whole = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
        while line and not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
            line = opened.readline(MAX_LINE_BYTES)
        yield line if whole else None


def _read(number: int, content: bytes | None, folder: Path) -> Line | BadLine:
    given: dict[str, Any] = {}
    try:
        given = _parse(content)
        return _check(number, dict(given), folder)
    except RequestError as error:
        asked = given.get("id")
        known = isinstance(asked, (str, int)) and not isinstance(asked, bool)
        return BadLine(number, asked if known and asked is not None else number, str(error))


def _parse(content: bytes | None) -> dict[str, Any]:
    if content is None:
        raise RequestError(f"the line is longer than {MAX_LINE_BYTES // 1024} KiB")
    try:
        given = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f'no JSON object as in {{"prompt": "a red apple", "seed": 7}} ({error})') from None
    if not isinstance(given, dict):
        raise RequestError(f'no JSON object as in {{"prompt": "a red apple", "seed": 7}}, but {type(given).__name__}')
    return given


def _check(number: int, given: dict[str, Any], folder: Path) -> Line:
    key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]
    asked = given.pop("id", None)
    if asked is not None and (not isinstance(asked, (str, int)) or isinstance(asked, bool)):
        raise RequestError(f"id must be text or a whole number, got {asked!r}")
    prompt = given.pop("prompt", None)
    if not isinstance(prompt, str):
        raise RequestError("no prompt: say what to draw" if prompt is None else f"prompt must be text, got {prompt!r}")
    check_keywords(given)
    if given.get("noise") is not None:
        raise RequestError("noise cannot be given in a file: leave it out")
    if given.get("num_images") not in (None, 1):
        raise RequestError(f"a line makes one picture, got num_images={given['num_images']!r}: write a line for each")
    for name in PICTURES:
        if given.get(name) is not None:
            if not isinstance(given[name], str):
                raise RequestError(f"{name} must be the path of a picture, got {given[name]!r}")
            given[name] = str((folder / given[name]).absolute())
    return Line(number, number if asked is None else asked, file_name(number if asked is None else asked), prompt, given, key)


def file_name(asked: str | int) -> str:
    """Turn an id into a safe name: letters, digits, `.`, `_` and `-`; never hidden, never a path, never reserved.

    Raises:
        RequestError: nothing of it is left.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(asked)[: 4 * MAX_NAME]).strip("-.")[:MAX_NAME]
    if not name:
        raise RequestError(f"nothing of the id {asked!r} can stand in a file's name: use letters and digits")
    return f"{name}-" if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name) else name
