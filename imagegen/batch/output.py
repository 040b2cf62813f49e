"""Where a batch writes: PNGs, one row of `manifest.jsonl` each, and what makes a second run of it go on.

A picture is there before its row is, both appear whole: whatever dies, a picture without a row is adopted and a torn
row dropped. Any folder that fsspec knows will do; only on a local disk are two runs at once kept apart.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from imagegen.batch.lines import BadLine, Line
from imagegen.lock import only_writer
from imagegen.receipt import ReceiptError, read_receipt
from imagegen.request import RequestError

MANIFEST = "manifest.jsonl"
SETTINGS = "batch.json"


class Output:
    """A folder of pictures and its manifest, open for one run.

    Attributes:
        folder: as it was given.
        finished: the key of every picture's request by the name of its file.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        """Open a folder, or go on with it.

        Args:
            folder: a path, or an address that fsspec knows.
            settings: what decides the pictures besides their lines, JSON-ready.

        Raises:
            RequestError: it cannot be written, another run writes there, or its pictures were made otherwise.
        """
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.folder = str(folder)
        self._held = contextlib.ExitStack()
        try:
            self._files, self._path = fsspec.core.url_to_fs(self.folder)
            self._local = isinstance(self._files, LocalFileSystem)
            if self._local:
                self._held.enter_context(only_writer(self._path))
            self._files.makedirs(self._path, exist_ok=True)
            self._check_settings(settings)
            self._present = {name for place in self._files.ls(self._path, detail=False) if (name := _stem(place)) is not None}
            self.finished: dict[str, str] = {}
            self._faults: dict[int, tuple[str | int, str]] = {}  # line -> id, reason
            self._still_failing: set[int] = set()  # in this run
            self._outdated = False  # some rows are to be left out in the end
            self._read_manifest()
        except (OSError, ValueError, ImportError, RecursionError) as error:
            self._held.close()
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"cannot write into {self.folder!r}: {_why(error)}; choose another --out") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        """Leave one row of every line, where the run came to its end, and let others come."""
        try:
            if kind is None and (self._outdated or self._faults.keys() != self._still_failing):
                self._tidy(self._still_failing)
        finally:
            self._held.close()

    def state_of(self, line: Line) -> str:
        """Return `made`, `adopted` or `missing`; what was found without its row gets one.

        Raises:
            RequestError: a file of that name is there and is not this request's picture.
        """
        if line.name not in self._present:
            self._outdated = self._outdated or line.name in self.finished  # somebody removed the picture
            return "missing"
        if line.name in self.finished:
            if self.finished[line.name] not in ("", line.key):
                raise RequestError(f"{line.name}.png was made for another request: give the line another id, or remove the file")
            return "made"
        try:
            request = read_receipt(io.BytesIO(self._files.cat_file(self._at(f"{line.name}.png")))).request
        except ReceiptError as error:
            raise RequestError(f"{line.name}.png is there and is no picture of ours ({error}): move it away") from None
        asked = {"prompt": line.prompt} | {name: value for name, value in line.settings.items() if name in request}
        wrong = [name for name, value in asked.items() if value is not None and request[name] != value]
        if wrong:
            raise RequestError(f"{line.name}.png is there with another {wrong[0]}, {request[wrong[0]]!r}: move it away")
        self._record(line)
        return "adopted"

    def write(self, line: Line, png: bytes) -> None:
        """Write a picture, then its row.

        Raises:
            RequestError: the disk is full, or the folder cannot be written any more.
        """
        try:
            self._write_whole(f"{line.name}.png", [png])
        except OSError as error:
            raise RequestError(f"cannot write {line.name}.png into {self.folder!r}: {_why(error)}") from None
        self._record(line)

    def fail(self, line: Line | BadLine, reason: str) -> None:
        """Write down why a line has no picture, unless that is known already."""
        self._still_failing.add(line.number)
        known = self._faults.get(line.number)
        if known == (line.id, reason):
            return
        self._outdated = self._outdated or known is not None
        self._faults[line.number] = (line.id, reason)
        self._append({"id": line.id, "line": line.number, "error": reason})

    def _record(self, line: Line) -> None:
        self.finished[line.name] = line.key
        self._append({"id": line.id, "line": line.number, "file": f"{line.name}.png", "request": line.key})

    def _append(self, row: dict[str, Any]) -> None:
        content = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            with self._files.open(self._at(MANIFEST), "ab") as opened:
                opened.write(content)
        except OSError as error:
            raise RequestError(f"cannot write {MANIFEST} into {self.folder!r}: {_why(error)}") from None

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    def _check_settings(self, settings: dict[str, Any]) -> None:
        place = self._at(SETTINGS)
        if not self._files.exists(place):
            self._write_whole(SETTINGS, [json.dumps(settings, indent=1).encode()])
            return
        before = json.loads(self._files.cat_file(place))
        if not isinstance(before, dict):
            raise ValueError(f"{SETTINGS} holds no JSON object")
        for name in settings.keys() | before.keys():
            if settings.get(name) != before.get(name):
                said = f"{name} {before.get(name)!r}, now {settings.get(name)!r}"
                raise RequestError(f"the pictures in {self.folder!r} were made with {said}: choose another --out")

    def _read_manifest(self) -> None:
        """Read the rows of the runs before; a torn one is taken out."""
        if not self._files.exists(self._at(MANIFEST)):
            return
        torn = False
        for content in self._rows():
            row = _row(content)
            torn = torn or row is None or not content.endswith(b"\n")
            if row is None:
                continue
            if "file" in row:
                name = row["file"].removesuffix(".png")
                self._outdated = self._outdated or name in self.finished
                self.finished[name] = row.get("request", "")
            else:
                self._outdated = self._outdated or row["line"] in self._faults
                self._faults[row["line"]] = (row["id"], row["error"])
        if torn:
            self._tidy(set(self._faults))

    def _rows(self) -> Iterator[bytes]:
        with self._files.open(self._at(MANIFEST), "rb") as opened:
            yield from opened

    def _tidy(self, failing: set[int]) -> None:
        """Write the manifest anew: the last row of every picture, and of every line that fails."""
        last = {_subject(row): index for index, content in enumerate(self._rows()) if (row := _row(content)) is not None}
        kept = (
            content.rstrip(b"\n") + b"\n"
            for index, content in enumerate(self._rows())
            if (row := _row(content)) is not None and last[_subject(row)] == index and ("file" in row or row["line"] in failing)
        )
        self._write_whole(MANIFEST, kept)
        self._outdated = False

    def _write_whole(self, name: str, content: Iterable[bytes]) -> None:
        """Write a file, given in pieces, so that it appears whole or not at all."""
        if not self._local:
            with tempfile.NamedTemporaryFile() as whole:
                whole.writelines(content)
                whole.flush()
                self._files.put_file(whole.name, self._at(name))
            return
        part = Path(self._at(f".{name}.part"))
        try:
            with part.open("wb") as opened:
                opened.writelines(content)
            os.replace(part, self._at(name))
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _stem(place: str) -> str | None:
    name = place.rstrip("/").rpartition("/")[2]
    return name.removesuffix(".png") if name.endswith(".png") else None


def _row(content: bytes) -> dict[str, Any] | None:
    """Return a row of the manifest; None for a torn one."""
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("id"), (str, int)) and isinstance(row.get("line"), int)
    return row if whole and (isinstance(row.get("file"), str) or isinstance(row.get("error"), str)) else None


def _subject(row: dict[str, Any]) -> str | int:
    """Return what a later row replaces a row by: its file, or its line."""
    return row["file"] if "file" in row else row["line"]


def _why(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
