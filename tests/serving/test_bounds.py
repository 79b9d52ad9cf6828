"""Bodies that are too large or too slow, however they are sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from unimoe_mcore.serving import bounds
from unimoe_mcore.serving.bounds import Bounds


def heard(parts: list[bytes], wait: float = 0.0) -> tuple[int, bytes]:
    """What comes of a request whose body comes in parts, each after a wait; the app echoes it."""
    sent: list[MutableMapping[str, Any]] = []
    left = list(parts)

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.sleep(wait)
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        whole = b""
        while True:
            message = await receive()
            whole += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": whole})

    scope: dict[str, Any] = {"type": "http", "headers": [(b"host", b"localhost")]}
    asyncio.run(Bounds(echo, ["localhost"])(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_bodies_within_bounds_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_BYTES", 10)
    assert heard([b"12345", b"67890"]) == (200, b"1234567890")


def test_a_body_that_never_said_how_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_BYTES", 10)
    status, body = heard([b"12345", b"67890", b"1"])
    assert status == 413
    assert "too large" in json.loads(body)["error"]


def test_a_body_that_trickles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "UPLOAD_SECONDS", 0.1)
    status, body = heard([b"1"] * 50, wait=0.02)
    assert status == 408
    assert "to arrive" in json.loads(body)["error"]
