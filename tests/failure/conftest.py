"""What the tests of failures share."""

import shutil
from pathlib import Path

import pytest
from failure.jobs import Jobs
from harness.launching import Launch


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
