"""Trained networks and objectives, used from Python: ``dbmpi.evaluate`` and ``dbmpi.predict``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ValidationError

from dbmpi.config import DataSection, explain
from dbmpi.data.encoding import Encoding
from dbmpi.data.given import GivenData
from dbmpi.data.reading import Reading
from dbmpi.data.source import Source
from dbmpi.errors import UserError
from dbmpi.mpi import waiting
from dbmpi.objective import Outcome, OwnObjective
from dbmpi.result import FilePath, Result, path_of
from dbmpi.runs.inference import Inference
from dbmpi.runs.trained_network import TrainedNetwork

if TYPE_CHECKING:
    from mpi4py import MPI

MEMORY_MIB = 1024
"""A data file up to this size (MiB, as float32) is read at once, a larger one batch by batch."""
_READ_AS = ("inputs", "targets", "channels", "missing")
"""Settings of the training data that hold for other data, too."""
_CALLED = "data"
"""What messages call arrays."""


def evaluate(
    checkpoint: FilePath | Result,
    data: Any,
    comm: MPI.Intracomm | None = None,
    *,
    objective: OwnObjective | None = None,
    partitions: int | None = None,
    batch_size: int = 1024,
    allow_code: Sequence[FilePath] = (),
) -> Outcome:
    """Evaluate a trained network, or objective, on all samples of some data (collective).

    The ranks share the samples.

    Parameters
    ----------
    checkpoint : path or Result
        A checkpoint, the directory of a run (its newest checkpoint), or what ``dbmpi.train`` returned.
    data : path, array, tuple or function
        HDF5 file with inputs and targets, read as the training data were; or a tuple (inputs, targets) of arrays, the
        same on all ranks, or a function that returns it, as for ``dbmpi.train``.
    comm : MPI.Intracomm, optional
        The ranks to use.  By default all ranks that were started, or this process alone.
    objective : OwnObjective, optional
        For the checkpoint of an objective of your own: an object with parameters of the same names and shapes.  Its
        ``state`` gets the values of the checkpoint.  By default the class that the checkpoint names is loaded, from
        `allow_code`.
    partitions : int, optional
        Ranks that compute one replica of a network together.  By default as in training if the ranks are a multiple of
        that, else all.
    batch_size : int, optional
        Samples that are computed together.
    allow_code : sequence of paths, optional
        Files with layers of your own, or the objective, that the checkpoint names; they are run.

    Returns
    -------
    Outcome
        With `samples`, `mean_loss` and `accuracy`, the same on every rank.

    Raises
    ------
    UserError
        On every rank, if checkpoint, data and objective do not fit together.

    Examples
    --------
    >>> import dbmpi
    >>> overrides = ["optimizer.epochs=2", "monitor.progress=none", "run.directory=runs/evaluated"]
    >>> result = dbmpi.train(dbmpi.load("examples/digits.toml", overrides))
    >>> outcome = dbmpi.evaluate(result, "data/digits-test.h5")
    >>> outcome.samples, outcome.correct == result.test.correct
    (359, True)
    """
    with _ready(checkpoint, data, comm, objective, partitions, batch_size, allow_code, targets=True) as ready:
        network, source = ready
        return network.evaluate(source)


def predict(
    checkpoint: FilePath | Result,
    data: Any,
    comm: MPI.Intracomm | None = None,
    *,
    objective: OwnObjective | None = None,
    partitions: int | None = None,
    batch_size: int = 1024,
    allow_code: Sequence[FilePath] = (),
) -> np.ndarray | None:
    """Predict with a trained network, or objective, for all samples of some data (collective).

    Parameters
    ----------
    checkpoint, data, comm, objective, partitions, batch_size, allow_code
        As for ``dbmpi.evaluate``; the data need no targets, and may be just an array of inputs.

    Returns
    -------
    (samples, outputs) array or None
        On the first rank the outputs as float32: probabilities for the losses ``softmax`` and ``logistic``, otherwise
        those of the last layer, or of the objective's ``predict``.  None on the other ranks.

    Raises
    ------
    UserError
        On every rank, if checkpoint, data and objective do not fit together.

    Examples
    --------
    >>> import dbmpi
    >>> overrides = ["optimizer.epochs=2", "monitor.progress=none", "run.directory=runs/predicted"]
    >>> result = dbmpi.train(dbmpi.load("examples/digits.toml", overrides))
    >>> dbmpi.predict(result, "data/digits-test.h5").shape
    (359, 10)
    """
    with _ready(checkpoint, data, comm, objective, partitions, batch_size, allow_code, targets=False) as ready:
        network, source = ready
        units = network.units(source)
        outputs = np.empty((source.samples, units), np.float32) if network.is_first else None
        for first, rows in network.predict(source):
            assert outputs is not None
            outputs[first : first + len(rows)] = rows
        return outputs


@contextmanager
def opened(
    network: Inference,
    data: Path | GivenData,
    *,
    targets: bool,
    check: Callable[[Path], object] = lambda checkpoint: None,
    asked: Mapping[str, Any] | None = None,
) -> Iterator[Source]:
    """Open data on all ranks, and give them once they are known to fit what was trained (collective).

    Notices for the user are printed on standard error.

    Parameters
    ----------
    network
        What was trained.
    data
        The file, or arrays.
    targets
        Whether their targets are needed, if the network has any.
    check
        Called on the first rank with the path of the checkpoint; a UserError that it raises ends all ranks.
    asked
        Settings of ``[data]`` that replace those of the training; None stands for one that was not given.
    """
    trained = network.trained
    say(network, [trained.notice] if trained.notice else ())
    with network.together("opening the data"):
        if network.is_first:
            check(trained.path)
        needed: Literal["required", "optional"] = trained.targets if targets else "optional"
        reading = _reading(trained, asked or {})
        if isinstance(data, Path):
            source = Source.open(data, MEMORY_MIB, needed, reading)
        else:
            source = Source.of_arrays(data._replace(weights=None), _CALLED, needed, reading)
    with source:
        with network.together("looking at the data", waiting.LONG_SECONDS):
            notices = trained.expect(source, targets=targets)
            if network.is_first:
                source.validate(full=True, inputs=True)
        if not source.in_file:
            network.same(source.meaning.digest, f"{_CALLED}: the arrays differ between ranks; give all the same")
        say(network, (*source.notes, *notices))
        yield source


def say(network: Inference, notices: Iterable[str]) -> None:
    """Write lines for the user on standard error, once.

    Parameters
    ----------
    network
        Knows which rank is the first.
    notices
        The lines.
    """
    if network.is_first:
        sys.stderr.writelines(f"dbmpi: {notice}\n" for notice in notices)


@contextmanager
def _ready(
    checkpoint: FilePath | Result,
    data: Any,
    comm: MPI.Intracomm | None,
    objective: OwnObjective | None,
    partitions: int | None,
    batch_size: int,
    allow_code: Sequence[FilePath],
    *,
    targets: bool,
) -> Iterator[tuple[Inference, Source]]:
    """Open checkpoint and data on all ranks of a communicator."""
    from dbmpi.data.shared import is_function, shared_data
    from dbmpi.mpi import silent_ends, world

    with ExitStack() as stack:
        if comm is None:
            comm = _all_ranks()
        elif comm.size > 1:
            world.end_all_on_failure(comm)
        stack.enter_context(silent_ends.aloud(comm))
        with world.together(comm, "reading the arguments"):
            path, in_file = path_of(checkpoint), isinstance(data, str | os.PathLike)
            code = [path_of(each, "allow_code") for each in allow_code]
            for name, number in (("batch_size", batch_size), ("partitions", 1 if partitions is None else partitions)):
                if not isinstance(number, int | np.integer) or number < 1:
                    raise UserError(f"{name}: given {number!r:.80}; expected a whole number of at least 1")
            kind = "a file" if in_file else "a function" if is_function(data) else "arrays"
        given = f"{_CALLED} is {kind}, batch_size {batch_size}, partitions {partitions}"
        first = waiting.broadcast_text(comm, given, 0, "what the first rank was given")
        with world.together(comm, "comparing what is given"):
            if given != first:
                raise UserError(f"ranks were given different things: {given} on rank {comm.rank}; {first} on rank 0")
        network = stack.enter_context(Inference(path, comm, partitions, code, batch_size, objective=objective))
        if in_file:
            yield network, stack.enter_context(opened(network, Path(data), targets=targets))
            return
        arrays, note = shared_data(comm, data, _CALLED, stack)
        say(network, [note] if note else ())
        yield network, stack.enter_context(opened(network, arrays, targets=targets))


@cache
def _all_ranks() -> MPI.Intracomm:
    """Return a communicator of all ranks, the same one every time: an MPI has only some thousand."""
    from dbmpi.mpi import world

    return world.start()


def _reading(network: TrainedNetwork, asked: Mapping[str, Any]) -> Reading:
    """Return how data are to be read: as the training data were, except for what is asked for."""
    trained_on = json.loads(network.info.configuration).get("data", {})
    kept = {key: trained_on[key] for key in _READ_AS if key in trained_on} if isinstance(trained_on, dict) else {}
    given = {key: value for key, value in asked.items() if value is not None}
    try:
        section = DataSection.model_validate({**kept, **given})
    except ValidationError as error:
        raise UserError(explain(error, DataSection, str(network.path))) from None
    labels = None if network.info.meaning is None else network.info.meaning.labels or None
    return Reading.of(section, network.section).held_out(
        network.info.classes or None, labels, Encoding.learned(network.info.meaning)
    )
