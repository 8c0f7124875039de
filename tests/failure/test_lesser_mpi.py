"""An MPI that does not let several threads call it, or has no shared memory: slower, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from failure.jobs import Jobs
from parallel import tiny

from dbmpi.config import load

NOTE = "this MPI does not let several threads call it: nothing is overlapped"


@pytest.mark.parametrize("level", ["serialized", "single"])
def test_without_several_threads_a_run_is_that_of_the_blocking_path(jobs: Jobs, level: str) -> None:
    """One worker: the bits of serial learning."""
    settings = ("server.overlap=threads", "topology.shards=1", "optimizer.n_push=2")
    done = jobs(2, *settings, env={"MPI4PY_RC_THREAD_LEVEL": level})
    assert done.returncode == 0, done.transcript
    assert done.output.count(NOTE) == 1, done.transcript
    twin = tiny.Twin(load(jobs.directory / "config.toml", settings))
    np.testing.assert_array_equal(tiny.vectors(jobs.run_directory)["parameters"], twin.learn())
