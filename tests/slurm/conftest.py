"""A real Slurm of two virtual nodes for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.lab import SlurmLab, missing_binaries


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """Two nodes of 8 pretended CPUs and 4 pretended GPUs.

    Where Slurm could be installed (as root) but is not, the tests fail; otherwise they are skipped.
    """
    missing = missing_binaries()
    if missing:
        message = f"no {', '.join(missing)}: run tests/slurm/install.sh as root"
        if os.geteuid() == 0:
            pytest.fail(message)
        pytest.skip(message)
    with SlurmLab(tmp_path_factory.mktemp("slurm")) as lab:
        yield lab
