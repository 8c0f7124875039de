"""What the tests of failures share."""

import pytest
from failure.jobs import Jobs
from harness.launching import Launch


@pytest.fixture
def jobs(tmp_path, launch: Launch) -> Jobs:
    return Jobs(tmp_path, launch)
