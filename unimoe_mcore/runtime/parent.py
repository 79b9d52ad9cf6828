"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

DIE_WITH_PARENT = "UNIMOE_PARENT"
"""Environment variable: process id of the launcher that this process must not outlive."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher is gone (Linux; elsewhere nothing).

    A launcher that is killed outright cannot stop its processes. They would go on training, and
    the next launch would find the run directory in use. Call it before anything slow is imported.
    Does nothing unless ``DIE_WITH_PARENT`` names this process's parent; a parent that is gone
    already ends this process.
    """
    named = os.environ.get(DIE_WITH_PARENT, "")
    if sys.platform != "linux" or not named.isdigit():
        return
    if int(named) == os.getppid():
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if int(named) != os.getppid() and not _alive(int(named)):
        os._exit(1)  # it died before, or while, the kernel was asked


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
