"""Processes that live through a benchmark and compute only when they are told to.

The parent asks one at a time, so that two sides never compute at once and whatever else runs on
the machine meets all of them alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
END = 120
"""Seconds that a child has to end after its orders end."""


class Child:
    """The parent's end of a process that runs ``serve``.

    Args:
        module: what ``python -m`` runs.
        python: which Python; this one if not given.
        environment: added to this process's; a child has one thread.
    """

    def __init__(
        self, module: str, python: Path | str = sys.executable, **environment: str
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        self._process = subprocess.Popen(
            [str(python), "-m", module],
            cwd=ROOT,
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def tell(self, do: str, **order: Any) -> None:
        """Give an order and return at once."""
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **order}), file=self._process.stdin, flush=True)

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer."""
        self.tell(do, **order)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to an order.

        Raises:
            RuntimeError: the process has ended; with the end of what it said.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"a side ended:\n{self._errors.read()[-4000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            # One of several ranks never ends by itself when another has failed.
            self._process.wait(timeout=END if error is None else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """The child's end: carry out orders until there are no more.

    What the handlers print goes to the error output, which the parent shows if this process ends.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        order = json.loads(line)
        found = handlers[order.pop("do")](**order)
        print(json.dumps(found), file=answers, flush=True)
