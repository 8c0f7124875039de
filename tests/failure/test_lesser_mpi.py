"""An MPI that does not let several threads call it, or has no shared memory: slower, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from failure.jobs import Jobs
from parallel import tiny

NOTE = "this MPI does not let several threads call it: nothing is overlapped"


@pytest.mark.parametrize("level", ["serialized", "single"])
def test_without_several_threads_a_run_is_that_of_the_blocking_path(jobs: Jobs, level: str) -> None:
    """One worker: both give the bits of serial learning."""
    settings = ("topology.shards=1", "optimizer.n_push=2")
    results = []
    for overlap, env in (("threads", {"MPI4PY_RC_THREAD_LEVEL": level}), ("none", {})):
        directory = jobs.directory / overlap
        done = jobs(2, f"server.overlap={overlap}", f"run.directory={directory}", *settings, env=env)
        assert done.returncode == 0, done.transcript
        assert done.output.count(NOTE) == (overlap == "threads"), done.transcript
        results.append(tiny.vectors(directory)["parameters"])
    np.testing.assert_array_equal(*results)
