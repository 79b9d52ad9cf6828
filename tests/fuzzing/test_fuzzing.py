"""A short turn of the fuzzer, and that it notices what must not be."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzzing import outcome as outcomes
from tests.fuzzing.campaign import Campaign
from tests.fuzzing.outcome import outcome
from tests.fuzzing.readers import READERS
from unimoe_mcore.config.errors import UserError

FILES = 150


def test_what_is_right_is_read(tmp_path: Path) -> None:
    for name, reader in READERS.items():
        reader.make(tmp_path / name)
        found = outcome(reader.read, tmp_path / name, tmp_path / "words")
        assert found.kind == "read", (name, found.words)


def test_what_is_spoilt_is_read_or_refused(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, 0, list(READERS))
    kinds = set()
    for _ in range(FILES):
        name, found, folder = campaign.next()
        assert found.good, (name, found.kind, folder, found.words)
        kinds.add(found.kind)
        if found.kind == "refused":
            assert "\n" not in found.words
    assert kinds == {"read", "refused"}


def _refuse(folder: Path) -> None:
    raise UserError("It is damaged.")


def _crash(folder: Path) -> None:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def _take(folder: Path) -> None:
    bytes(1 << 30)


@pytest.mark.parametrize(
    ("reader", "kind"),
    [
        (_refuse, "refused"),
        (_crash, "crashed"),
        (_take, "memory"),
        (lambda _: time.sleep(60), "hung"),
        (lambda _: {}["a"], "failed"),
        (lambda _: None, "read"),
    ],
)
def test_what_must_not_be_is_noticed(
    reader: Callable[[Path], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "SECONDS", 1.0)
    assert outcome(reader, tmp_path, tmp_path / "words").kind == kind
