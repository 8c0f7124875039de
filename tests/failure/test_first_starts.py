"""The first start on a machine compiles kernels, and says so, whatever the command; later ones have nothing to say."""

from __future__ import annotations

import sys

import pytest
from failure.jobs import Jobs

COMPILING = "compiling kernels for this processor"
MINIMIZE = """
import numba, numpy
from dbmpi import minimize

@numba.njit
def mine(x):
    return (x * x).sum(), 2 * x

print(minimize(mine, numpy.ones(3)).converged)
"""


@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize("command", ["evaluate", "predict", "minimize"])
def test_what_compiles_is_said_once_and_only_where_it_is_compiled(trained: Jobs, command: str, n: int | None) -> None:
    (trained.directory / "mine.py").write_text(MINIMIZE)
    argv = {
        "evaluate": ["-m", "dbmpi", "evaluate", "run", "--data", "test.h5"],
        "predict": ["-m", "dbmpi", "predict", "run", "--data", "test.h5", "--out", "out.h5", "--force"],
        "minimize": ["mine.py"],
    }[command]
    env = {"NUMBA_CACHE_DIR": str(trained.directory / "cache")}
    for times in (1, 0):
        done = trained.launch(n, [sys.executable, *argv], env=env, cwd=trained.directory)
        assert done.returncode == 0, done.transcript
        assert done.stderr.count(COMPILING) == times, done.transcript
        assert COMPILING not in done.stdout, done.transcript
