"""Sets for the tests of this folder: one that a server of the test's own publishes."""

from pathlib import Path

import pytest

from data_pipeline.reading import transfer
from tests.data_pipeline.published import write_set
from tests.server import Server


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A set of ``published.SHARDS`` shards; nobody may change it."""
    return write_set(tmp_path_factory.mktemp("published") / "bucket" / "set")


@pytest.fixture
def server(published, monkeypatch):
    """A server of it, at ``<url>/bucket/set``; fetching does not pause for long."""
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.01)
    with Server(published.parent.parent) as server:
        yield server
