"""One writer for a folder: two commands at once would spoil each other's files. The lock ends with its process."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from imagegen.request import RequestError


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Keep others that ask out of a folder, which is made where it is missing. Where locks are not known it is held by nobody.

    Raises:
        RequestError: another process, or another part of this one, writes there, or the folder cannot be made or opened.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        import fcntl

        opened = os.open(folder, os.O_RDONLY)
    except ImportError:  # on Windows
        yield
        return
    except OSError as error:
        raise RequestError(f"cannot write into {str(folder)!r}: {error.strerror or error}; choose another folder") from None
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"another run writes into {str(folder)!r}: wait for it, or choose another folder") from None
        except OSError:
            pass  # some network file systems lock no folders
        yield
    finally:
        os.close(opened)
