"""How a run goes on in the same job, after ranks were replaced or numbers went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dbmpi.config import Run
from dbmpi.errors import EndedElsewhere, RunFailed

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.result import Result

_MOST_ROLL_BACKS = 10
"""Of a run, in one job."""


def resuming(run: Run) -> Run:
    """Return the description of a `run` that goes on from its own last checkpoint."""
    return run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "auto"})})


def slower(run: Run) -> Run:
    """Return the description of a `run` that goes on from its own last checkpoint, with lower rates."""
    optimizer = run.optimizer
    rates = {"learning_rate": optimizer.learning_rate, "local_rate": optimizer.local_rate}
    lower = {name: rate * optimizer.roll_back for name, rate in rates.items()}
    return resuming(run).model_copy(update={"optimizer": optimizer.model_copy(update=lower)})


def until_kept(run: Run, comm: MPI.Intracomm, once: Callable[[Run, ExitStack], Result]) -> Result:
    """Run, and run again where a run goes back to its last checkpoint (collective).

    Parameters
    ----------
    run
        The description.
    comm
        All ranks.
    once
        Runs; the stack is closed behind it.
    """
    for _ in range(_MOST_ROLL_BACKS):
        with ExitStack() as opened:
            result = once(run, opened)
        if not result.rolled_back or result.stopped_by:
            return result
        run = slower(run)
        if comm.rank == 0:
            rate = f"optimizer.learning_rate {run.optimizer.learning_rate:g}"
            print(f"dbmpi: back to {result.checkpoint}, with {rate}", file=sys.stderr, flush=True)
    message = f"the run has gone back {_MOST_ROLL_BACKS} times; look for extreme values in {run.data.called}"
    raise RunFailed(message) if comm.rank == 0 else EndedElsewhere(1)
