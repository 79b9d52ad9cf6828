"""The page, served by its command: over HTTP, and in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser
from tests.conftest import Asked
from tests.distributed import REPOSITORY
from tests.generation.bad_inputs import FILES
from tests.media import clip, picture, sound
from tests.workspace import questions
from unimoe_mcore.serving.bounds import MOST_BYTES

MOST_KIB = 2 * 2**20
"""Of memory, that the server or a process that it started may ever have had."""
BAD_FILES = (
    "168 megapixels",
    "a huge header",
    "half a JPEG",
    "three hours",
    "a video without frames",
)
"""All others are tests of the command, which refuses them by the same code."""


@dataclass(frozen=True)
class Server:
    """The command under way."""

    process: subprocess.Popen[str]
    port: int

    def request(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, **options)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()

    def ask(self, question: str, *files: tuple[str, bytes], **more: str) -> tuple[int, list[Any]]:
        """Status and lines of an answer."""
        boundary, body = uuid.uuid4().hex, b""
        for name, value in {"question": question, **more}.items():
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
            body += head.encode() + value.encode() + b"\r\n"
        for modality, data in files:
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{modality}"; '
            body += head.encode() + b'filename="../<b>file.png"\r\n\r\n' + data + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        status, _, answer = self.request("POST", "/ask", body=body, headers=headers)
        return status, [json.loads(line) for line in answer.splitlines()]


@pytest.fixture(scope="module")
def server(asked: Asked) -> Iterator[Server]:
    command = [sys.executable, "-m", "unimoe_mcore.chat", str(asked.run), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killer = threading.Timer(240, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        address = re.search(r"ask at http://127\.0\.0\.1:(\d+)", said)
        assert address, said + process.stdout.read()
        yield Server(process, int(address[1]))
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""  # nothing went wrong on the way
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        # Neither it nor any process that decoded for it grew: three hours of sound and 168
        # megapixels were among what they were given.
        assert used.ru_maxrss < MOST_KIB
    finally:
        killer.cancel()
        process.kill()
        process.wait()


def test_what_the_page_is_told(server: Server) -> None:
    status, headers, body = server.request("GET", "/run")
    facts = json.loads(body)
    assert (status, facts["name"], facts["step"]) == (200, "asked", 60)
    assert facts["modalities"] == ["image", "video", "speech", "audio"]
    assert facts["experts"] == ["base", "stage2-image", "stage2-speech", "stage2-audio"]
    assert "default-src 'none'" in headers["content-security-policy"]


def test_answers_are_those_of_the_command(server: Server, asked: Asked) -> None:
    for (dataset, number, _), answer in zip(asked.rows[::3], asked.answers[::3], strict=True):
        question, _, media = questions(dataset, "test")[number]
        status, lines = server.ask(question, *((m.modality, m.data) for m in media))
        assert status == 200
        *pieces, last = lines
        assert last["answer"] == "".join(piece["piece"] for piece in pieces) == answer["text"]
        assert last["experts"]["answer"] == answer["answer_experts"]
        assert last["experts"]["question"] == answer["question_experts"]


def test_questions_at_once_do_not_mix(server: Server, asked: Asked) -> None:
    (question, _, low), (_, _, middle) = questions("aud_drum", "test")[:2]
    wanted = [answer["text"] for answer in asked.answers[12:14]]
    assert len(set(wanted)) == 2
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        media = (low, middle)[number % 2]
        _, lines = server.ask(question, *((m.modality, m.data) for m in media))
        found[number] = lines[-1]["answer"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {0: wanted[0], 1: wanted[1], 2: wanted[0], 3: wanted[1]}


def test_files_that_cannot_be_used(server: Server) -> None:
    """All at once."""
    files = {name: FILES[name][1]() for name in BAD_FILES}
    found: dict[str, tuple[int, list[Any]]] = {}

    def ask(name: str) -> None:
        found[name] = server.ask("What?", (FILES[name][0], files[name]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in BAD_FILES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for name in BAD_FILES:
        status, (line,) = found[name]
        assert status == 400
        assert FILES[name][2] in line["error"]
        assert line["error"].startswith("<b>file.png ")  # a name, not a path
        assert "\n" not in line["error"]


@pytest.mark.parametrize(
    ("question", "more", "words"),
    [
        ("", {}, "The question is empty"),
        ("<video>?", {}, "has <video> once, but a file is given for it never"),
        ("?", {"max_tokens": "0"}, "at least 1 token"),
        ("?", {"max_tokens": "1000000000"}, "the model has room for"),
        ("?", {"max_tokens": "inf"}, "no whole number"),
        ("?", {"temperature": "hot"}, "no number"),
        ("?", {"temperature": "nan"}, "not between 0 and 100"),
        ("?", {"seed": "-1"}, "seed"),
        ("why " * 6000, {}, "at most 20000 are taken"),
    ],
)
def test_questions_that_cannot_be_asked(
    question: str, more: dict[str, str], words: str, server: Server
) -> None:
    status, (line,) = server.ask(question, **more)
    assert status == 400
    assert words in line["error"]


def test_requests_that_are_not_heard(server: Server) -> None:
    for expected, options in {
        403: {"headers": {"Origin": "http://elsewhere.example"}},
        413: {"headers": {"Content-Length": str(MOST_BYTES + 1)}},
        400: {"headers": {"Host": "elsewhere.example"}},
    }.items():
        status, _, body = server.request("POST", "/ask", **options)
        assert status == expected
        assert b"Traceback" not in body
    assert server.request("POST", "/ask", body=b"nonsense")[0] == 400
    assert server.request("GET", "/ask")[0] == 405
    assert server.request("GET", "/../../etc/passwd")[0] == 404


def test_somebody_who_goes_away_holds_nothing_up(server: Server) -> None:
    for _ in range(10):  # more than may wait
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.putrequest("POST", "/ask")
        connection.putheader("Content-Type", "multipart/form-data; boundary=x")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"--x\r\n")
        connection.close()
    until = time.monotonic() + 30
    status = 0
    while status != 200 and time.monotonic() < until:  # it may not have noticed yet
        status, lines = server.ask("Which colour?", ("image", picture().data))
        assert status in (200, 503)
    assert "answer" in lines[-1]


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(width: int, server: Server, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/"
    files = {"p.png": picture().data, "s.wav": sound(8000).data, "v.mp4": clip().data}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with browser() as started:
        page = started.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(30_000)
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        asked_for: list[str] = []
        page.on("request", lambda request: asked_for.append(request.url))
        page.goto(address)
        assert "Step 60" in page.text_content("#about:not(:empty)")

        page.set_input_files("#files", [tmp_path / "p.png", tmp_path / "s.wav"])
        page.select_option("#chosen select", "audio")
        page.fill("#question", "Which pitch?")
        page.click("#send")
        bar = page.wait_for_selector("article .bar.answer")
        assert page.text_content("article .answer").strip()
        assert re.search(r"answer: base \d+ %, stage2-image \d+ %", bar.get_attribute("aria-label"))
        assert page.locator("article img").bounding_box()["height"] > 50

        # Dropped, not chosen.
        page.evaluate(
            """bytes => {
                const transfer = new DataTransfer();
                const file = new File([new Uint8Array(bytes)], "v.mp4", {type: "video/mp4"});
                transfer.items.add(file);
                document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer}));
            }""",
            list(files["v.mp4"]),
        )
        assert page.locator("#chosen video").count() == 1
        page.fill("#question", "Which colour is <video>?")
        page.press("#question", "Enter")
        page.wait_for_selector("article:nth-of-type(2) .bar.answer")

        assert wrong == []
        page.fill("#question", "And <image>?")
        page.press("#question", "Enter")
        error = page.wait_for_selector("article:nth-of-type(3) .error")
        assert "has <image> once, but a file is given for it never" in error.text_content()

        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ask = page.locator("#send").bounding_box()
        assert ask["y"] + ask["height"] <= 900
        last = page.locator("article").last.bounding_box()
        assert last["y"] + last["height"] <= page.locator("#form").bounding_box()["y"]
        assert all(url.startswith((address, "blob:", "data:")) for url in asked_for)
        if folder := os.environ.get("UNIMOE_SCREENSHOTS"):
            page.screenshot(path=str(Path(folder) / f"chat-{width}.png"))


def test_what_was_refused_can_be_mended(server: Server, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(picture().data)
    with browser() as started:
        page = started.new_page()
        page.set_default_timeout(30_000)
        page.goto(f"http://127.0.0.1:{server.port}/")
        assert "Step 60" in page.text_content("#about:not(:empty)")
        page.set_input_files("#files", [tmp_path / "p.png"])
        page.fill("#question", "And <video>?")
        page.press("#question", "Enter")
        page.wait_for_selector("article .error")
        page.wait_for_selector("#chosen img")
        assert page.input_value("#question") == "And <video>?"
        page.fill("#question", "And <image>?")
        page.press("#question", "Enter")
        page.wait_for_selector("article:nth-of-type(2) .bar.answer")
        assert page.locator("#chosen img").count() == 0
        assert page.input_value("#question") == ""
        shown = "all => all.every(each => each.complete && each.naturalWidth)"
        assert page.eval_on_selector_all("article img", shown)
        # A server that is gone when the page asks it what it is.
        page.route("**/run", lambda route: route.abort())
        page.reload()
        assert "start it again" in page.text_content("#about.error")
