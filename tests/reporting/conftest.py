"""Pictures take most of a report's time: tests that do not look at them leave them out."""

from __future__ import annotations

import pytest

from tests.reporting.made_up import DRAWN
from unimoe_mcore.reporting import figures
from unimoe_mcore.reporting.document import Figure


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DRAWN:
        monkeypatch.setattr(figures, name, lambda *_: Figure([]))
