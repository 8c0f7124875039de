"""Data for runs inside a test's world."""

from __future__ import annotations

from pathlib import Path

import pytest
from parallel import tiny

from dbmpi.mpi import waiting


@pytest.fixture
def place(comm, shared_path) -> Path:
    """A directory with the tiny data, the same on all ranks."""
    if comm.rank == 0:
        tiny.write_data(shared_path)
    waiting.barrier(comm, "the data")
    return shared_path
