"""What becomes of a reader: run in a process of its own, with an end to its time and memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from unimoe_mcore.config.errors import UserError

SECONDS = 20.0
"""A reader of a small file is done in a tenth of one; more is a hang."""
BYTES = 256 << 20
"""What a reader of a small file may take more than it had."""

_READ, _REFUSED, _FAILED = 0, 10, 20


@dataclass(frozen=True)
class Outcome:
    """What a reader did.

    Attributes:
        kind: ``read``, ``refused`` (a sentence), or what must not be: ``failed`` (another error),
            ``crashed`` (ended by a signal), ``hung``, ``memory``.
        words: the sentence, the error's trace, or how much it was.
    """

    kind: str
    words: str

    @property
    def good(self) -> bool:
        """Whether a user could live with it."""
        return self.kind in ("read", "refused")


def outcome(read: Callable[[Path], None], folder: Path, notes: Path) -> Outcome:
    """Run a reader in a fork of this process.

    Args:
        read: reads everything that there is in a folder.
        notes: file in which the fork leaves its words.
    """
    notes.write_text("")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _answer(read, folder, notes)
    began = time.monotonic()
    while True:
        ended, status, _ = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome("hung", f"for {SECONDS:.0f} s")
        time.sleep(0.001)
    words = notes.read_text(errors="replace")
    if os.WIFSIGNALED(status):
        return Outcome("crashed", signal.Signals(os.WTERMSIG(status)).name)
    kinds = {_READ: "read", _REFUSED: "refused"}
    kind = kinds.get(os.WEXITSTATUS(status), "failed")
    return Outcome("memory" if "MemoryError" in words else kind, words)


def _answer(read: Callable[[Path], None], folder: Path, notes: Path) -> None:
    """Read, leave word, and end this process."""
    code = _FAILED
    try:
        # Address space, so that what is taken and not touched counts as well.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        read(folder)
        code = _READ
    except (UserError, DataError) as error:
        code = _REFUSED
        notes.write_text(str(error), errors="replace")
    except BaseException:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        notes.write_text(traceback.format_exc(), errors="replace")
    finally:
        os._exit(code)
