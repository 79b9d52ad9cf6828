"""Runs a function in N gloo processes and hands back what each returned.

A launch costs 8 to 12 seconds (torch and Megatron are imported in every process), so one function
should try many cases and return a dictionary of results.

    results = run_distributed("tests.runtime.cases_groups:layouts", processes=2, timeout=60)
    assert results[0]["expert"] == results[1]["expert"]
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


class RankError(AssertionError):
    """A process of ``run_distributed`` failed or did not finish; holds the first traceback."""


def run_distributed(
    target: str, processes: int, timeout: float = 120.0, prepare: bool = True, **arguments: Any
) -> list[Any]:
    """Call ``target`` in ``processes`` processes and return their results in rank order.

    The processes see ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``
    as under torchrun, have gone through ``prepare_device()``, and run one thread each. Setting up
    process groups is left to the function (``runtime.groups.initialise``, and between two layouts
    ``destroy(keep_world=True)``).

    Args:
        target: ``package.module:function``, importable from the repository's root.
        processes: number of processes on this machine.
        timeout: seconds after which all are ended.
        prepare: call ``prepare_device()`` before the target's module is imported.
        arguments: passed on to the function as keywords; must survive JSON.

    Raises:
        RankError: with the traceback of the rank that failed first (the others usually fail
            because it left them), or with every rank's last output after the timeout.
    """
    with TemporaryDirectory(prefix="distributed-") as name:
        folder = Path(name)
        call = {"target": target, "prepare": prepare, "arguments": arguments}
        (folder / "call.json").write_text(json.dumps(call))
        port = free_port()
        ranks = [_start(folder, rank, processes, port) for rank in range(processes)]
        try:
            _wait(ranks, folder, timeout)
        finally:
            for process in ranks:
                _end(process)
        return [
            json.loads((folder / f"result.{rank}.json").read_text()) for rank in range(processes)
        ]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on at this moment.

    Below those that the system gives to connections: the many of gloo would take it before it is
    listened on.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randint(20000, 32000)))
            return int(probe.getsockname()[1])


def _start(folder: Path, rank: int, processes: int, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    with (folder / f"output.{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.distributed", str(folder)],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that checkpoint workers end with their rank
        )


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    limit = time.monotonic() + timeout
    while any(process.poll() is None for process in ranks):
        if time.monotonic() > limit:
            raise RankError(f"no end after {timeout:.0f} s\n" + _last_output(folder, len(ranks)))
        if any(process.poll() not in (None, 0) for process in ranks):
            break
        time.sleep(0.02)
    if all(process.poll() == 0 for process in ranks):
        return
    first = _first_traceback(folder)
    if first is None:  # killed by a signal, or before the worker's own try block
        codes = [process.poll() for process in ranks]
        raise RankError(f"exit codes {codes}\n" + _last_output(folder, len(ranks)))
    raise RankError(first)


def _first_traceback(folder: Path) -> str | None:
    time.sleep(0.2)  # the rank at fault may still be writing while a victim has already ended
    errors = [json.loads(path.read_text()) for path in folder.glob("error.*.json")]
    if not errors:
        return None
    first = min(errors, key=lambda error: error["time"])
    return f"rank {first['rank']} failed first:\n{first['traceback']}"


def _last_output(folder: Path, processes: int) -> str:
    parts = []
    for rank in range(processes):
        text = (folder / f"output.{rank}.txt").read_text(errors="replace")
        parts.append(f"--- rank {rank}\n{text[-3000:]}")
    return "\n".join(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill one rank with everything it started; the group is its own, made by ``_start``."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _worker(folder: Path) -> int:
    rank = int(os.environ["RANK"])
    try:
        call = json.loads((folder / "call.json").read_text())
        if call["prepare"]:
            from unimoe_mcore.runtime.devices import prepare_device

            prepare_device()
        module, function = call["target"].split(":")
        result = getattr(importlib.import_module(module), function)(**call["arguments"])
        _publish(folder / f"result.{rank}.json", result)
    except BaseException:
        now, text = time.time(), traceback.format_exc()
        print(text, flush=True)
        _publish(folder / f"error.{rank}.json", {"time": now, "rank": rank, "traceback": text})
        return 1
    return 0


def _publish(path: Path, value: Any) -> None:
    """Write JSON and make it visible in one step: the launcher reads while ranks still run."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(value))
    partial.rename(path)


if __name__ == "__main__":
    status = _worker(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(status)  # gloo threads of a failed group can block a normal interpreter exit
