"""When one process of a run fails the others fail with it: only the first one says why."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from datetime import timedelta
from typing import NoReturn

from data_pipeline.errors import DataError
from unimoe_mcore.config.errors import UserError

WRONG_INPUT, WRONG_CODE, INTERRUPTED = 2, 1, 130
"""Exit codes: something that the user can mend, everything else, and Ctrl-C."""

_PATIENCE = 20.0
"""Seconds that a process which failed later waits to be ended. torchrun's agent ends all processes
as soon as one has left: leaving at once could cut off the one that is still speaking."""


def sentence(error: BaseException) -> str:
    """What is wrong, if it is something that a user can mend; empty for every other error."""
    if isinstance(error, UserError | DataError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}."
    return ""


def leave(error: BaseException) -> NoReturn:
    """End this process because of ``error``; say it if no other process of the run failed before.

    Must be called while the connections to the other processes are still open, that is where the
    error is caught and before anything is destroyed: the others fail when they close, and by then
    the first one has to be known. Errors that a user can mend become one sentence, all others a
    traceback, Ctrl-C nothing (the launcher says it). Exits without tearing down what may wait for
    processes that are gone.
    """
    if isinstance(error, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    words = sentence(error)
    if not _is_first():
        time.sleep(_PATIENCE)
    elif words:
        print(f"error: {words}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(WRONG_INPUT if words else WRONG_CODE)


def _is_first() -> bool:
    """Whether no other process of this run has asked before; true where nobody can tell."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed as dist

    try:
        # The agent's own store: it is there before the process groups are, and outlives them.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"unimoe/failed/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True
