"""The page's server: one question at a time, answered in pieces as they come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES, tower_modalities
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.generation.answering import Answer, Answerer
from unimoe_mcore.generation.asked_run import AskedRun
from unimoe_mcore.generation.prompt import MOST_MEDIA, Attachment, Prompt, make_prompt
from unimoe_mcore.generation.sampling import Sampling
from unimoe_mcore.serving.bounds import HEADERS, MOST_BYTES, Bounds

WAITING = 8
"""Questions that may wait for others to be answered."""
ANSWER_SECONDS = 300.0
"""Longest that one answer may take."""
DECODED_AT_ONCE = 2
"""Questions whose files may be in memory and decoded at the same time."""
PAGE = Path(__file__).with_name("page.html")


def build_app(
    run: AskedRun,
    answerer: Answerer,
    names: Collection[str],
    fail: Callable[[Exception], None],
) -> Starlette:
    """The server of a run.

    Args:
        names: under which it may be called, see ``Bounds``.
        fail: called with what went wrong when nothing can be asked any more.
    """
    desk = _Desk(run, answerer, fail)
    return Starlette(
        routes=[
            Route("/", desk.page),
            Route("/run", desk.facts),
            Route("/ask", desk.ask, methods=["POST"]),
        ],
        middleware=[Middleware(Bounds, names=names)],
        exception_handlers={HTTPException: _refused, Exception: _failed},
    )


class _Desk:
    """Where questions are handed in."""

    def __init__(
        self, run: AskedRun, answerer: Answerer, fail: Callable[[Exception], None]
    ) -> None:
        self._run = run
        self._answerer = answerer
        self._fail = fail
        # The model is used by one thread, one step after the other, whoever goes away meanwhile.
        self._thread = ThreadPoolExecutor(1, "answers")
        self._turn = asyncio.Lock()
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)
        self._waiting = 0

    async def page(self, _: Request) -> Response:
        """The page itself."""
        return HTMLResponse(PAGE.read_text(encoding="utf8"), headers=HEADERS)

    async def facts(self, _: Request) -> Response:
        """What the page shows of the run."""
        recipe = self._run.recipe
        towers = () if recipe.stage.kind == "base" else recipe.model.towers
        return JSONResponse(
            {
                "name": recipe.name,
                "stage": recipe.stage.kind,
                "step": self._run.state.step,
                "modalities": [m for tower in towers for m in tower_modalities(tower)],
                "experts": [_expert_name(entry) for entry in recipe.stage.experts],
                "most_media": MOST_MEDIA,
                "most_bytes": MOST_BYTES,
            },
            headers=HEADERS,
        )

    async def ask(self, request: Request) -> Response:
        """A question with its files; lines of JSON: pieces of text, and last the whole answer."""
        if self._waiting >= WAITING:
            raise HTTPException(503, "Too many questions are waiting: ask again in a while.")
        with self._counted():
            try:
                prompt, sampling = await self._heard(request)
            except ClientDisconnect as error:
                raise HTTPException(400, "The files did not arrive whole.") from error
        return StreamingResponse(
            self._answered(prompt, sampling), media_type="application/x-ndjson", headers=HEADERS
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _heard(self, request: Request) -> tuple[Prompt, Sampling]:
        """The question, checked and decoded.

        Raises:
            HTTPException: it cannot be asked.
        """
        async with request.form(max_files=MOST_MEDIA, max_fields=8) as form:
            try:
                sampling = Sampling(
                    _number(form, "temperature", float, 0.0),
                    _number(form, "top_p", float, 1.0),
                    _number(form, "seed", int, 0),
                )
                sampling.check()
                most, question = _number(form, "max_tokens", int, 64), form.get("question")
                if most < 1:
                    raise UserError("An answer has at least 1 token.")
                words = question if isinstance(question, str) else ""
                async with self._decoding:
                    files = await _attachments(form)
                    prompt = await run_in_threadpool(make_prompt, self._run, words, files, most)
            except (UserError, DataError) as error:
                raise HTTPException(400, str(error)) from error
        return prompt, sampling

    async def _answered(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        with self._counted():
            async with self._turn:
                pieces = self._answerer.answer(prompt, sampling)
                until = time.monotonic() + ANSWER_SECONDS
                try:
                    while True:
                        piece = await loop.run_in_executor(self._thread, _next, pieces)
                        if isinstance(piece, Answer):
                            yield _line(_facts(piece, prompt))
                            return
                        if piece:
                            yield _line({"piece": piece})
                        if time.monotonic() > until:
                            words = f"The answer took longer than {ANSWER_SECONDS:.0f} s."
                            yield _line({"error": words})
                            return
                except Exception as error:
                    if not self._answerer.broken:
                        raise
                    self._fail(error)
                    yield _line({"error": _BROKEN})
                finally:
                    # Behind the step that may be under way still.
                    self._thread.submit(pieces.close)


_BROKEN = "Something went wrong, and the server ends; what it was is written where it was started."


def _next(pieces: Iterator[str | Answer]) -> str | Answer:
    return next(pieces)


def _facts(answer: Answer, prompt: Prompt) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "tokens": len(answer.tokens),
        "ended": answer.ended,
        "question_tokens": len(prompt.sample.tokens.ids),
        "experts": {"question": answer.question_experts, "answer": answer.answer_experts},
        "notes": list(prompt.notes),
    }


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _number[Number: (int, float)](
    form: FormData, name: str, kind: type[Number], otherwise: Number
) -> Number:
    """A field of the form.

    Raises:
        UserError: it is no such number.
    """
    value = form.get(name, "")
    try:
        return kind(value) if isinstance(value, str) and value.strip() else otherwise
    except ValueError as error:
        raise UserError(f"{name} is no {'whole ' if kind is int else ''}number.") from error


async def _attachments(form: FormData) -> list[Attachment]:
    return [
        Attachment(modality, _file_name(file), await file.read())
        for modality, file in form.multi_items()
        if modality in MODALITIES and isinstance(file, UploadFile)
    ]


def _file_name(file: UploadFile) -> str:
    name = (file.filename or "a file").replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, name))[:80] or "a file"


def _expert_name(entry: str) -> str:
    """``base``, or the name of the run that gave the expert."""
    return entry if entry == OWN_MLP else Path(entry).parent.name


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=HEADERS)


async def _failed(_: Request, __: Exception) -> Response:
    """After this the server says in its log what it was."""
    sentence = "Something went wrong in the server; what it was is written where it was started."
    return JSONResponse({"error": sentence}, 500, headers=HEADERS)
