"""A prompt written out by a language model: any chat endpoint of OpenAI's kind that the server's environment names.

Nothing of it can be set by a visitor. Knows nothing of pictures.
"""

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

from imagegen.request import RequestError

TIMEOUT_S = 30
MAX_CHARACTERS = 2000
TASK = (
    "Rewrite the user's text as one prompt for a text-to-image model: keep everything it says, add what makes a good picture "
    "(subject, setting, light, style), at most 60 words, in the language of the text. Answer with the prompt alone."
)


@dataclass(frozen=True)
class Writer:
    """A chat endpoint.

    Attributes:
        url: up to and including `/chat/completions`.
        model: as the endpoint calls it.
        key: its API key; empty for one that asks for none.
    """

    url: str
    model: str
    key: str = ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses to carry the key anywhere else."""

    def redirect_request(self, *_: object) -> None:
        """Follow nothing."""


def find_writer() -> Writer | None:
    """Return the endpoint of IMAGEGEN_ENHANCE_URL, _MODEL and _KEY; None where there is none.

    Raises:
        RequestError: the address is no http or https address.
    """
    url = os.environ.get("IMAGEGEN_ENHANCE_URL", "").strip().rstrip("/")
    if not url:
        return None
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise RequestError(f"IMAGEGEN_ENHANCE_URL must be an http or https address, got {url!r}")
    if not url.endswith("/chat/completions"):
        url += "/chat/completions"
    return Writer(url, os.environ.get("IMAGEGEN_ENHANCE_MODEL", ""), os.environ.get("IMAGEGEN_ENHANCE_KEY", ""))


def enhance(prompt: str, writer: Writer) -> str:
    """Return the prompt as the endpoint's model writes it out.

    Raises:
        RequestError: the prompt is empty or too long, or the endpoint does not answer as it should.
    """
    if not prompt.strip() or len(prompt) > MAX_CHARACTERS:
        raise RequestError(f"the prompt has {len(prompt.strip())} characters: give from 1 to {MAX_CHARACTERS} to enhance")
    asked = {"messages": [{"role": "system", "content": TASK}, {"role": "user", "content": prompt}], "max_tokens": 300}
    asked |= {"model": writer.model} if writer.model else {}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {writer.key}"} if writer.key else {})
    call = urllib.request.Request(writer.url, json.dumps(asked).encode(), headers)
    try:
        with urllib.request.build_opener(_NoRedirect).open(call, timeout=TIMEOUT_S) as answer:
            said = json.loads(answer.read(1_000_000))
        written = " ".join(str(said["choices"][0]["message"]["content"]).split())
    except urllib.error.HTTPError as error:
        raise RequestError(f"the enhancing service answered {error.code}: ask who runs this server") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestError(
            f"the enhancing service gave no answer ({type(error).__name__}): try again, or go on without"
        ) from None
    if not written:
        raise RequestError("the enhancing service gave an empty answer: try again, or go on without")
    return written[:MAX_CHARACTERS]
