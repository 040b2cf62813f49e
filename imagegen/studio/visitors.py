"""Who is looking: every browser keeps a key, and the key names a folder that nobody else can name.

The key itself is never part of a path or an address: its hash is. Knows nothing of Gradio.
"""

import re
import secrets
import threading
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path

KEY = re.compile(r"[A-Za-z0-9_-]{43}")
MAX_SESSIONS = 4096  # those that went longest without a request are forgotten, and get a new folder
HISTORY = 48


class Visitors:
    """The folders of those who have the page open.

    Attributes:
        root: the folder that theirs are in.
    """

    def __init__(self, root: Path) -> None:
        """Know nobody yet."""
        self.root = root
        self._keys: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def enter(self, session: str | None, key: object) -> str:
        """Remember whose session it is; return the key to keep, a new one where that given is none."""
        kept = key if isinstance(key, str) and KEY.fullmatch(key) else secrets.token_urlsafe(32)
        if session:
            with self._lock:
                self._keys[session] = kept
                self._keys.move_to_end(session)
                while len(self._keys) > MAX_SESSIONS:
                    self._keys.popitem(last=False)
        return kept

    def folder(self, session: str | None) -> Path:
        """Return the folder of a session, which may not be there yet; one that never entered gets one of its own."""
        with self._lock:
            key = self._keys.get(session or "")
        return self.root / folder_name(key or self.enter(session, None))

    def pictures(self, session: str | None) -> list[Path]:
        """Return the session's finished pictures, the newest first."""
        found = [path for path in self.folder(session).glob("*.png") if not path.name.startswith(".")]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:HISTORY]


def folder_name(key: str) -> str:
    """Return what a key's folder is called: 96 bits of its hash."""
    return "visitor-" + sha256(key.encode()).hexdigest()[:24]
