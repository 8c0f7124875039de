"""A run in virtual time from its description: real training of many replicas, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from dbmpi.config import Run
from dbmpi.config import simulation as settings
from dbmpi.data.numbered_batches import Transform
from dbmpi.data.run_data import Supplied
from dbmpi.errors import UserError
from dbmpi.machine.signals import StopSignal
from dbmpi.mpi.silent_ends import aloud
from dbmpi.mpi.world import start, together
from dbmpi.objective import OwnObjective
from dbmpi.result import FilePath, Result
from dbmpi.runs.continuation import until_kept
from dbmpi.runs.supplied import complete_together
from dbmpi.runs.training import run_once
from dbmpi.simulation.run import learn

if TYPE_CHECKING:
    from mpi4py import MPI


def simulate(
    run: Run,
    stop: StopSignal | None = None,
    *,
    objective: OwnObjective | None = None,
    initial: Mapping[str, Any] | FilePath | None = None,
    data: Any = None,
    test: Any = None,
    transform: Transform | None = None,
    callbacks: Any = None,
    comm: MPI.Intracomm | None = None,
) -> Result:
    """Train with as many replicas and shards as ``run.topology`` says, in virtual time and in this process alone.

    Gradients and updates are real, and they come in the order of replicas and shards that take the times of
    ``run.simulation``.  Checkpoints and records are those of :func:`train`; the seconds in records are virtual.

    Parameters
    ----------
    run : Run
        The description of the run.
    stop : StopSignal, optional
        As for :func:`train`.
    objective, initial, data, test, transform, callbacks : optional
        As for :func:`train`.
    comm : MPI.Intracomm, optional
        This process alone, where several have been started.

    Returns
    -------
    Result
        As of :func:`train`; its `seconds` are virtual.

    Raises
    ------
    UserError
        If the settings or the data have a mistake, or several ranks have been started.
    RunFailed
        If the run cannot continue, for example because the loss is not finite.

    Examples
    --------
    >>> import dbmpi
    >>> overrides = ["topology.replicas=20", "monitor.progress=none", "run.directory=runs/virtual"]
    >>> result = dbmpi.simulate(dbmpi.load("examples/digits.toml", overrides))
    >>> 10 < result.staleness < 20
    True
    """
    if not isinstance(run, Run):
        raise UserError(f"simulate: expected a description of a run, e.g. dbmpi.load('CONFIG.toml'), not {run!r:.80}")
    comm = start() if comm is None else comm
    with aloud(comm), ExitStack() as stack:
        with together(comm, "checking what is simulated"):
            if comm.size > 1:
                raise UserError(
                    f"simulate: {comm.size} ranks were started, and one process computes all replicas: leave the "
                    "launcher out; topology.replicas says how many there are"
                )
            for mistake in settings.mistakes(run):
                raise UserError(mistake)
        run, given = complete_together(
            run, Supplied(data, test, transform, objective=objective), initial, callbacks, comm
        )
        stop = stop or stack.enter_context(StopSignal())
        return until_kept(run, comm, partial(run_once, supplied=given, comm=comm, stop=stop, learn=learn))
