"""A process that must not outlive its launcher (whose kill ``test_resume.py`` tries in earnest)."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed import REPOSITORY
from unimoe_mcore.runtime.parent import DIE_WITH_PARENT

CHILD = """
from unimoe_mcore.runtime.parent import die_with_parent

die_with_parent()
print("alive")
"""


@pytest.mark.parametrize(
    ("launcher", "code", "said"),
    [
        ("", 0, "alive\n"),
        (str(os.getpid()), 0, "alive\n"),
        (str(os.getppid()), 0, "alive\n"),  # somebody's launcher, but not this process's
        ("1073741824", 1, ""),  # the launcher went while Python was starting
    ],
)
def test_a_process_starts_only_while_its_launcher_is_there(
    launcher: str, code: int, said: str
) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), DIE_WITH_PARENT: launcher}
    ended = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, ended.stdout) == (code, said)


def test_the_kernel_ends_it_with_its_launcher() -> None:
    """A launcher that starts the child, tells its number and is gone without a word to it."""
    program = f"""
import os, subprocess, sys
environment = os.environ | {{"{DIE_WITH_PARENT}": str(os.getpid())}}
child = subprocess.Popen(
    [sys.executable, "-c", {CHILD + "import time; time.sleep(60)"!r}],
    env=environment, stdout=subprocess.PIPE, text=True,
)
print(child.pid, child.stdout.readline(), flush=True)
os._exit(0)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    number, said = ended.stdout.split()
    assert said == "alive"
    limit = time.monotonic() + 5
    while psutil.pid_exists(int(number)) and time.monotonic() < limit:
        if psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.01)
    assert time.monotonic() < limit
