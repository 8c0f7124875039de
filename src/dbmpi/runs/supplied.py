"""What a program gives to a run beside its description: it completes that, and is the same on all ranks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dbmpi.config import ObjectiveSection, Run
from dbmpi.config.layers import OWN
from dbmpi.data.numbered_batches import Transform
from dbmpi.data.run_data import Supplied
from dbmpi.errors import UserError
from dbmpi.machine import threads
from dbmpi.monitor.callbacks import Callbacks
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.objective import OwnObjective
from dbmpi.runs.initial import with_initial
from dbmpi.runs.likeness import check_alike

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpi4py import MPI

    from dbmpi.result import FilePath


def complete_together(
    run: Run, given: Supplied, initial: Mapping[str, Any] | FilePath | None, callbacks: Any, comm: MPI.Intracomm
) -> tuple[Run, Supplied]:
    """Complete the description of a run by what a program gives beside it; return both (collective).

    Parameters
    ----------
    run
        The description.
    given
        Data, transform and objective.
    initial, callbacks
        As for :func:`train`.
    comm
        All ranks.
    """
    with together(comm, "checking what is learned"):
        threads.check_processors()
        run, arrays = with_initial(run, initial)
        given = given._replace(callbacks=Callbacks(callbacks), initial=arrays)
        run = complete(run, given)
    compare(run, given, comm)
    return run, given._replace(notes=check_alike(run, comm))


def complete(run: Run, supplied: Supplied) -> Run:
    """Return the run with names for what is given as an object.

    Parameters
    ----------
    run
        The description.
    supplied
        What is given.

    Raises
    ------
    UserError
        If something is given twice, or not at all.
    """
    run = _with_transform(_with_objective(run, supplied.objective), supplied.transform)
    _check_supplied(run, supplied)
    return run


def _check_supplied(run: Run, supplied: Supplied) -> None:
    """Refuse data that are given twice, or not at all."""
    section = run.data
    for name, given, file in (("data", supplied.train, section.train), ("test", supplied.test, section.test)):
        if given is not None and file is not None:
            setting = "train" if name == "data" else "test"
            raise UserError(f"train: given {name}=, but the run has data.{setting} = {file} already; leave out either")
    if supplied.train is None and section.train is None:
        raise UserError(
            "train: the run has no data to learn from: set data.train to an HDF5 file, or give arrays, train(run, "
            "data=(inputs, targets))"
        )
    if supplied.train is not None and section.weights is not None:
        raise UserError(
            f"train: data.weights = {section.weights!r} names a dataset of a file, but arrays are given; leave it out, "
            "and give data=(inputs, targets, weights)"
        )


def compare(run: Run, supplied: Supplied, comm: MPI.Intracomm) -> None:
    """Refuse what must be the same on all ranks, where it is not that of the first (collective).

    Parameters
    ----------
    run, supplied
        Of this rank.
    comm
        All ranks.
    """
    given = f"{supplied.kinds}, transform is {run.data.transform}"
    first = waiting.broadcast_text(comm, given, 0, "what the first rank was given")
    with together(comm, "comparing what is given"):
        if given != first:
            raise UserError(
                f"train: called differently on different ranks: {given} on rank {comm.rank}, {first} on rank 0"
            )


def _with_objective(run: Run, objective: OwnObjective | None) -> Run:
    """Return the run with a name for an `objective` that is an object; check that there is one thing to learn."""
    if objective is None:
        if not run.network.layers and run.objective is None:
            raise UserError(
                "train: the run describes neither network.layers nor an objective; give one of them, or train(run, "
                "objective=...)"
            )
        return run
    if run.network.layers or run.objective is not None:
        what = "network.layers" if run.network.layers else f"the objective {run.objective.use!r}"  # type: ignore[union-attr]
        raise UserError(f"train: given objective={objective!r:.60}, but the run has {what} already; leave out either")
    kind = objective if isinstance(objective, type) else type(objective)
    return Run(**dict(run) | {"objective": ObjectiveSection(use=_name_of(kind))})


def _with_transform(run: Run, transform: Transform | None) -> Run:
    """Return the run with a name for a `transform` that is a function."""
    if transform is None:
        return run
    if run.data.transform is not None:
        raise UserError(
            f"train: given transform=, but the run has data.transform = {run.data.transform!r} already; leave out "
            "either"
        )
    if not callable(transform):
        raise UserError(f"train: given transform={transform!r:.60}; expected a function, transform(batch, random)")
    return Run(**dict(run) | {"data": run.data.model_copy(update={"transform": _name_of(transform)})})


def _name_of(code: Any) -> str:
    """Return ``module:name`` of a user's class or function, as a configuration would name it."""
    named = code if hasattr(code, "__name__") else type(code)
    names = (f"{named.__module__}:{named.__name__}", f"own:{named.__name__}", "own:unnamed")
    return next(name for name in names if re.fullmatch(OWN, name))
