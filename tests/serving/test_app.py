"""The page's server with a model that does what no trained one does: says nothing, or breaks."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from unimoe_mcore import chat
from unimoe_mcore.generation.answering import Answer
from unimoe_mcore.serving import app

QUESTION = b'--x\r\nContent-Disposition: form-data; name="question"\r\n\r\n?\r\n--x--\r\n'
HEADERS = {"Content-Type": "multipart/form-data; boundary=x"}
RUN: Any = SimpleNamespace(recipe=SimpleNamespace(name="r"))
PROMPT = SimpleNamespace(
    sample=SimpleNamespace(tokens=SimpleNamespace(ids=[1, 2])), text="?", notes=(), most=1
)


class Model:
    """An ``Answerer`` that says what it is told to, a piece each time that it is asked."""

    def __init__(self, *pieces: str | Answer | Exception, forever: bool = False) -> None:
        self.pieces, self.forever = pieces, forever
        self.broken, self.left = False, 0

    def answer(self, *_: Any) -> Iterator[str | Answer]:
        try:
            while True:
                for piece in self.pieces:
                    time.sleep(0.01)
                    if isinstance(piece, Exception):
                        self.broken = True
                        raise piece
                    yield piece
                if not self.forever:
                    return
        finally:
            self.left += 1


ANSWER = Answer("yes", [1], "end", {}, {})


@contextlib.contextmanager
def served(model: Any) -> Iterator[int]:
    """The server's port while it runs in a thread."""
    listening = chat._listening("127.0.0.1", 0)
    listening.listen(64)
    built = app.build_app(RUN, model, ["localhost"], lambda _: None)
    server = uvicorn.Server(uvicorn.Config(built, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listening.close()
    assert not thread.is_alive()


def asked(port: int, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/ask", body=QUESTION, headers={**HEADERS, **headers})
    return connection.getresponse()


@pytest.fixture(autouse=True)
def prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "make_prompt", lambda *_: PROMPT)


def test_an_answer_without_text_has_an_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may say newlines or halves of characters for ever."""
    monkeypatch.setattr(app, "ANSWER_SECONDS", 0.3)
    with served(Model("", forever=True)) as port:
        lines = asked(port).read().splitlines()
    assert [json.loads(line) for line in lines] == [{"error": "The answer took longer than 0 s."}]


def test_somebody_who_stops_an_answer_without_text() -> None:
    model = Model("", forever=True)
    with served(model) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/ask", body=QUESTION, headers=HEADERS)
        time.sleep(0.3)
        connection.close()
        until = time.monotonic() + 10
        while not model.left and time.monotonic() < until:
            time.sleep(0.02)
        assert model.left == 1
        model.pieces = (ANSWER,)
        assert json.loads(asked(port).read())["answer"] == "yes"


def test_few_questions_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def decode(*_: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1
        return PROMPT

    monkeypatch.setattr(app, "make_prompt", decode)
    found: list[int] = []
    with served(Model(ANSWER)) as port:
        threads = [
            threading.Thread(target=lambda: found.append(asked(port).status)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [200] * 8
    assert most == app.DECODED_AT_ONCE


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7:8000", 200),
        ("localhost", 200),
        ("LOCALHOST.", 200),
        ("elsewhere.example:8000", 400),
        ("127.0.0.1.elsewhere.example", 400),
        ("", 400),
        ("[::1", 400),
    ],
)
def test_by_which_names_it_may_be_called(host: str, status: int, port: int) -> None:
    assert asked(port, Host=host).status == status


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(Model(ANSWER)) as found:
        yield found


def test_the_machine_has_names_beyond_itself() -> None:
    assert chat._names("127.0.0.1") == ["localhost"]
    assert {"localhost", "0.0.0.0", chat.socket.gethostname()} <= set(chat._names("0.0.0.0"))


def test_the_server_ends_when_nothing_can_be_asked_any_more() -> None:
    listening = chat._listening("127.0.0.1", 0)
    listening.listen(64)
    model: Any = Model("so ", ValueError("a step broke"))
    said: list[bytes] = []
    client = threading.Thread(
        target=lambda: said.append(asked(listening.getsockname()[1]).read()), daemon=True
    )
    client.start()
    began = time.monotonic()
    with pytest.raises(ValueError, match="a step broke"):
        chat._serve(RUN, model, listening, "127.0.0.1", [])
    assert time.monotonic() - began < 15
    client.join(timeout=10)
    first, last = map(json.loads, said[0].splitlines())
    assert first == {"piece": "so "}
    assert "the server ends" in last["error"]
