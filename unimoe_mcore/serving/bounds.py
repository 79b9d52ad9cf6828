"""What one request may cost, and who may send one; applied before anything of it is looked at."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from unimoe_mcore.generation.prompt import LIMITS

MOST_BYTES = LIMITS.max_bytes + 2**20
"""Of a whole request: one file as large as can be, or several smaller ones, and the question."""
UPLOAD_SECONDS = 120.0
"""Longest that a request may be on its way."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src blob: data:; media-src blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
"""Nothing is loaded from elsewhere, and nobody frames the page."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _RefusedError(Exception):
    """A request that is not heard to its end: status and sentence."""


class Bounds:
    """ASGI middleware: refuses requests of other pages, and those that are too large or slow.

    A page elsewhere could have its own name point to this machine, and would be no other page
    then. By number it cannot; by name only those are heard that are known here.
    """

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], names: Collection[str]
    ) -> None:
        self._app = app
        self._names = {_plain(name) for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, as far as it may come."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {
            name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]
        }
        called = _name_of(headers.get("host", ""))
        if not (_is_number(called) or called in self._names):
            return await _refuse(send, 400, _UNKNOWN_NAME)
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != headers.get("host"):
            return await _refuse(send, 403, "Another page may not ask here.")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            return await _refuse(send, 413, _TOO_MUCH)
        try:
            await self._app(scope, _bounded(receive), send)
        except _RefusedError as refused:
            await _refuse(send, *refused.args)


_UNKNOWN_NAME = (
    "The page is not known by this name: call it by its number, or start it with --allow-host."
)
_TOO_MUCH = f"The files are too large: together they may have {MOST_BYTES >> 20} MiB."


def _plain(name: str) -> str:
    return name.lower().rstrip(".")


def _name_of(host: str) -> str:
    """The name or number in ``name:port``; empty if there is none."""
    try:
        return _plain(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return ""


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _bounded(receive: Receive) -> Receive:
    """Count what comes of a body, and the time that it takes."""
    left, until, whole = MOST_BYTES, asyncio.get_running_loop().time() + UPLOAD_SECONDS, False

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal left, whole
        if whole:  # what is heard now is that the browser goes away
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            sentence = f"The files took longer than {UPLOAD_SECONDS:.0f} s to arrive."
            raise _RefusedError(408, sentence) from None
        left -= len(message.get("body", b""))
        if left < 0:
            raise _RefusedError(413, _TOO_MUCH)
        whole = not message.get("more_body", False)
        return message

    return bounded


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = {**HEADERS, "content-type": "application/json", "connection": "close"}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
