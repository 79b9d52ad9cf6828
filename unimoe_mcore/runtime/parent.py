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
    the next launch would find the run directory in use. Does nothing unless ``DIE_WITH_PARENT``
    names this process's parent.
    """
    if sys.platform != "linux" or os.environ.get(DIE_WITH_PARENT) != str(os.getppid()):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
