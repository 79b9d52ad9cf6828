"""The run directory: the truth about a run.

``runs/<name>/`` holds ``config.yaml`` (resolved), ``version.json``, ``metrics.jsonl``,
``validation.jsonl``, ``events.jsonl``, ``parameters.json``, ``checkpoints/``, ``evaluation/``,
``mirrors/`` if there are any and, when the run is done, ``gives/``.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, TextIO

from unimoe_mcore.config.errors import UserError

PACKAGES = ("torch", "megatron-core", "transformers", "webdataset", "numpy")


_METRICS, _VALIDATION = "metrics.jsonl", "validation.jsonl"
_BY_STEP = (_METRICS, _VALIDATION)
"""Files with a line for every step, or for some."""


class RunDirectory:
    """Paths and records of one run. Only rank 0 writes.

    Attributes:
        path: the directory.
        writes: whether this process records anything.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.writes = writes

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def gives(self) -> Path:
        """What the finished run gives to later stages."""
        return self.path / "gives"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of a base stage while it is being trained."""
        return self.path / "tokenizer.json"

    @property
    def parameters(self) -> Path:
        """Every parameter of the model, by part, and whether it trains."""
        return self.path / "parameters.json"

    @property
    def quarantine(self) -> Path:
        """The samples that were left out, and why."""
        return self.path / "quarantine.jsonl"

    @property
    def left_out(self) -> Path:
        """The held-out questions that ended a process, and are not asked any more."""
        return self.path / "evaluation" / "left-out.jsonl"

    @property
    def notes(self) -> Path:
        """Where every rank notes the sample that it decodes."""
        return self.path / "reading"

    @property
    def metrics_file(self) -> Path:
        """What every step was like."""
        return self.path / _METRICS

    @property
    def validation_file(self) -> Path:
        """Held-out losses."""
        return self.path / _VALIDATION

    @property
    def mirrors(self) -> Path:
        """What mirrors hold, and their files."""
        return self.path / "mirrors"

    def evaluation(self, name: str, split: str) -> Path:
        """Record of a split's held-out questions, ``before`` or ``after`` training."""
        return self.path / "evaluation" / f"{name}.{split}.jsonl"

    def pathways(self, name: str, split: str) -> Path:
        """Record of the ways that the tokens of ``evaluation`` took through the experts."""
        return self.path / "evaluation" / f"{name}.{split}.pathways.json"

    @property
    def started(self) -> bool:
        """Whether there is something that other settings or data would contradict."""
        return any(self.checkpoints.glob("step-*")) or self.gives.is_dir()

    def lock(self, seconds: float = 0.0) -> TextIO:
        """Hold the directory until the returned file is closed or this process ends.

        Args:
            seconds: how long to wait for another holder, which may just be dying.

        Raises:
            UserError: if another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / ".lock").open("w", encoding="utf8")
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() > until:
                    file.close()
                    message = f"{self.path} is in use: another process trains this run."
                    raise UserError(message) from error
                time.sleep(0.2)
            else:
                return file

    def forget(self) -> None:
        """Remove what an earlier start under other settings left before its first checkpoint."""
        left = ("tokenizer.json", "events.jsonl", "data.txt", "quarantine.jsonl", *_BY_STEP)
        for name in left:
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path / "evaluation", self.mirrors):
            shutil.rmtree(folder, ignore_errors=True)

    def metrics(self, record: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        self._append(_METRICS, record)

    def validation(self, record: dict[str, Any]) -> None:
        """Append one line to ``validation.jsonl``."""
        self._append(_VALIDATION, record)

    def validations(self) -> list[dict[str, Any]]:
        """The lines of ``validation.jsonl``."""
        path = self.validation_file
        return read_lines(path) if path.is_file() else []

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to ``events.jsonl``: something that happens once, with its time."""
        self._append("events.jsonl", {"time": round(time.time(), 3), "event": kind, **facts})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / name).open("a", encoding="utf8") as file:
                file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop records of steps that a resumed run does again, and a half-written line."""
        for path in (self.path / name for name in _BY_STEP):
            if not self.writes or not path.is_file():
                continue
            kept = [record for record in read_lines(path) if record["step"] <= step]
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf8")
            partial.replace(path)

    def write_version(self) -> None:
        """Record code version, packages and machine."""
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            facts = {**code_version(), **machine()}
            (self.path / "version.json").write_text(json.dumps(facts, indent=1), encoding="utf8")


def given(run: RunDirectory, steps: int | None = None) -> bool:
    """Whether the run has given what it gives.

    Args:
        steps: and was not trained for another number of steps when it did.
    """
    path = run.gives / "manifest.json"
    if not path.is_file() or steps is None:
        return path.is_file()
    try:
        return json.loads(path.read_text(encoding="utf8")).get("steps") in (None, 0, steps)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def code_version() -> dict[str, Any]:
    """Commit of the code (with ``+`` if files differ from it) and package versions."""
    root = Path(__file__).resolve().parents[2]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "packages": versions}
    return {"commit": commit + ("+" if changed else ""), "packages": versions}


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {"python": platform.python_version(), "cpu": model, "cores": os.cpu_count()}
