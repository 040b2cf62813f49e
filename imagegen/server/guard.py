"""What is refused before any application sees a request: foreign hosts and origins, large bodies, a wrong token.

Plain ASGI in front of the whole server, so that nothing behind it can be forgotten. Knows nothing of models or pages.
"""

import hashlib
import hmac
import html
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
COOKIE = "imagegen"
UPLOADS = "/gradio_api/upload"  # where the page's files go; Gradio limits each of them
EDITS = "/v1/images/edits"
OPEN = ("/healthz",)  # needs no token
MIB = 2**20
FORM_BYTES = 4096
LOGIN = """<!doctype html><html lang="en"><meta name="viewport" content="width=device-width"><title>imagegen studio</title>
<style>body {{ font: 16px system-ui; color-scheme: light dark; display: grid; place-items: center; min-height: 90vh }}
input, button {{ font: inherit; padding: .5em }}</style>
<form method="post" action="/login"><h1>imagegen studio</h1><p role="status">{message}</p>
<label>Token <input type="password" name="token" autocomplete="current-password" required autofocus></label>
<button>Enter</button></form></html>"""
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", b"frame-ancestors 'self'")]


@dataclass(frozen=True)
class Rules:
    """Who may ask, and how much.

    Attributes:
        hosts: the names by which the server may be asked.
        addresses: whether any numeric address will do as well; a page elsewhere can rebind names only.
        token: what everybody must know, or None.
        body_mib: largest body of a request; of a program's that sends no picture, 1.
        upload_mib: largest body of an upload to the page, all its files together.
    """

    hosts: frozenset[str] = LOOPBACK
    addresses: bool = False
    token: str | None = None
    body_mib: int = 32
    upload_mib: int = 512

    def knows_host(self, header: str) -> bool:
        """Return whether a Host header names this server."""
        name = _host_name(header)
        return name in self.hosts or (self.addresses and _is_address(name))

    def knows_token(self, given: str) -> bool:
        """Compare in a time that tells nothing."""
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())

    def cookie(self) -> str:
        """Return what a browser keeps in the token's place."""
        return hmac.new((self.token or "").encode(), b"imagegen page", hashlib.sha256).hexdigest()


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> bytes:
    """Return an error as OpenAI's clients read it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class Guard:
    """An ASGI application in front of another."""

    def __init__(self, inner: Application, rules: Rules) -> None:
        """Stand before `inner`."""
        self.inner, self.rules = inner, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused; hand on the rest."""
        if scope["type"] == "lifespan":
            return await self.inner(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})  # nothing here speaks that
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, limit = scope["path"], self._limit(scope["path"])
        if not self.rules.knows_host(headers.get("host", "")):
            return await _refuse(send, 403, f"this server is not {headers.get('host', '')!r}: start it with --allow-host")
        if not _same_origin(headers):
            return await _refuse(send, 403, f"a page of {headers.get('origin', 'another site')!r} may not use this server")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            return await _refuse(send, 413, f"the body is larger than {limit // MIB} MiB: send less")
        if self.rules.token is not None and path not in OPEN:
            if path == "/login":
                return await self._log_in(scope, receive, send)
            if not self._is_known(headers):
                return await self._ask_for_token(scope, headers, send)
        await self._hand_on(scope, receive, send, limit)

    def _limit(self, path: str) -> int:
        if path == UPLOADS:
            return self.rules.upload_mib * MIB
        return (1 if path.startswith("/v1/") and path != EDITS else self.rules.body_mib) * MIB

    def _is_known(self, headers: dict[str, str]) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.rules.knows_token(key.strip())
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        return hmac.compare_digest(cookies.get(COOKIE, "").encode(), self.rules.cookie().encode())

    async def _ask_for_token(self, scope: Scope, headers: dict[str, str], send: Send) -> None:
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return await _answer(send, 401, LOGIN.format(message="This server asks for its token.").encode(), b"text/html")
        message = "the token is missing or wrong: send it as the API key (Authorization: Bearer)"
        await _answer(send, 401, error_body(message, "invalid_request_error", "invalid_api_key"), b"application/json")

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            return await _answer(send, 200, LOGIN.format(message="").encode(), b"text/html")
        body = b""
        while len(body) <= FORM_BYTES:
            message = await receive()
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        given = parse_qs(body[:FORM_BYTES].decode("utf-8", "replace")).get("token", [""])[0]
        if not self.rules.knows_token(given):
            page = LOGIN.format(message=html.escape("That is not the token."))
            return await _answer(send, 401, page.encode(), b"text/html")
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{COOKIE}={self.rules.cookie()}; Path=/; HttpOnly; SameSite=Lax{secure}".encode()
        await _answer(send, 303, b"", b"text/plain", [(b"location", b"/"), (b"set-cookie", cookie)])

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        """Let the application answer, and cut off a body that says nothing of its length and grows too large."""
        read, too_large, begun = 0, False, False

        async def receive_some() -> MutableMapping[str, Any]:
            nonlocal read, too_large
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                too_large = True
                return {"type": "http.disconnect"}
            return message

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if too_large and not begun:
                return
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            await self.inner(scope, receive_some, send_guarded)
        except Exception:
            if not too_large or begun:
                raise
        if too_large and not begun:
            await _refuse(send, 413, f"the body is larger than {limit // MIB} MiB: send less")


def _host_name(header: str) -> str:
    """Return the name of a Host header, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _same_origin(headers: dict[str, str]) -> bool:
    """Return whether no page of another site asks. Programs say no origin; browsers do whenever it is not a plain visit."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site") != "cross-site" or headers.get("sec-fetch-mode") == "navigate"
    return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


async def _refuse(send: Send, status: int, message: str) -> None:
    await _answer(send, status, error_body(message, "invalid_request_error"), b"application/json")


async def _answer(send: Send, status: int, body: bytes, kind: bytes, more: list[tuple[bytes, bytes]] | None = None) -> None:
    headers = [(b"content-type", kind + b"; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    closing = [(b"connection", b"close")] if status == 413 else []  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *closing, *HEADERS, *(more or [])]})
    await send({"type": "http.response.body", "body": body})
