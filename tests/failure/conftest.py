"""What the tests of failures share."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from failure.jobs import Jobs
from failure.survival import needs_fault_tolerance
from harness.launching import Launch

__all__ = ["needs_fault_tolerance"]


@pytest.fixture
def jobs(tmp_path, launch: Launch) -> Jobs:
    return Jobs(tmp_path, launch)


@pytest.fixture(scope="session")
def first_run(tmp_path_factory) -> Path:
    """The directory of a run that has come to its end."""
    with Launch(tmp_path_factory.mktemp("launch")) as launch:
        jobs = Jobs(tmp_path_factory.mktemp("first"), launch)
        done = jobs(None)
    assert done.returncode == 0, done.transcript
    return jobs.run_directory


@pytest.fixture
def trained(jobs: Jobs, first_run: Path) -> Jobs:
    """Jobs of which one has come to its end."""
    shutil.copytree(first_run, jobs.run_directory, symlinks=True)
    return jobs


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first variants of each test here only: one takes seconds, and `make test-failures` runs all."""
    most = int(os.environ.get("DBMPI_TEST_VARIANTS", "2"))
    here, seen = Path(__file__).parent, Counter[str]()
    kept, left_out = [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        if here in item.path.parents:
            seen[name] += 1
        (kept if seen[name] <= most else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
