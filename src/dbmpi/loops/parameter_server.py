"""The parameter server as a library: the paper's two verbs, fetch and push, for the loop of a user's own."""

from __future__ import annotations

import atexit
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import PARAMETERS
from dbmpi.checkpoint.writer import check_names
from dbmpi.config import ServerSection
from dbmpi.errors import KnownToAll, RunFailed, UserError
from dbmpi.index.layout import Layout, Stretch
from dbmpi.loops import arrays as named
from dbmpi.loops import choice
from dbmpi.loops.agreement import agree, planned
from dbmpi.loops.connection import Connection
from dbmpi.loops.service import Service
from dbmpi.mpi import blocking
from dbmpi.mpi.silent_ends import aloud
from dbmpi.mpi.world import aborting, end_all_on_failure, everybody, report_and_abort, together
from dbmpi.paramserver.clip import Clip

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.paramserver.rules import Rule

_CALLED = "all ranks of the communicator to make the ParameterServer"


class ParameterServer:
    """Parameters that shards hold and update by the gradients of all workers (collective to make and to close).

    Workers `push` gradients and `fetch` parameters whenever they like, and never wait for each other.  By default the
    first rank is a shard and all others are workers; one process alone is both.  A rank that is a shard calls
    :meth:`serve`, which returns when all workers have closed.

    As a context manager it is closed at the end of the block.  An exception that leaves the block on one rank ends all
    ranks with its traceback.

    Parameters
    ----------
    comm : MPI.Intracomm or None
        The ranks to use; None for all ranks that were started, or this process alone.
    arrays : dict
        The parameters: named NumPy arrays, float32 or float64, all of one dtype; dicts in it give names such as
        ``layer/weights``.  :meth:`fetch` writes into them.  Names, shapes and dtypes are the same on all ranks; the
        values of the first worker are those that training starts from, and are in all workers' arrays afterwards.
    rule : str or rule
        How shards apply a gradient: the name of a rule, with its settings as further arguments, or an object with
        the methods of :class:`dbmpi.paramserver.rules.Rule`.
    shards : int
        Number of shards.
    colocate : bool
        Put the shards on the first of the workers' ranks, instead of on ranks of their own.  Such a shard serves only
        while its rank is inside a call of this class: the others wait for it meanwhile.
    server : ServerSection, optional
        How gradients and parameters travel, e.g. ``dbmpi.config.ServerSection(consistent=True)``.  With
        ``fetch="shared"`` workers compute on :attr:`parameters`, on one host.
    finite : bool
        Refuse gradients with numbers that are not finite.
    clip_norm : float
        A gradient whose norm, over all arrays together, is larger is scaled down to it before it is pushed; 0 never
        does that.
    resume : str or Path, optional
        A checkpoint that :meth:`save` has written, to go on from: with its parameters, and its state of the rule, on
        any number of workers and shards.  All ranks can read it.
    **settings
        Of a rule by name, as in ``[optimizer]``, e.g. ``learning_rate=0.1``.  Schedules count samples:
        ``schedule="cosine", warmup_samples=1000, decay_samples=50000``; push then says how many there were.

    Attributes
    ----------
    worker : int or None
        Number of this worker, from 0, e.g. for its part of the data; None on a rank that is a shard alone.
    workers : int
        How many there are.
    gradients : dict
        On a worker, arrays in the memory that gradients are pushed from.  Gradients that are computed in them are not
        copied; they may be changed again after :meth:`wait` or :meth:`fetch`, and not be used after :meth:`close`.
        Elsewhere it is empty.
    parameters : dict
        On a worker, with ``fetch="shared"``, the shards' own memory, read-only.  Pushes of others change it at any
        time; :meth:`fetch` copies nothing, but waits for own pushes.  Not to be used after :meth:`close`, which frees
        it.  Otherwise it is empty.

    Raises
    ------
    UserError
        On all ranks, for a mistake in the arguments, or if ranks were given different ones.

    Examples
    --------
    >>> import dbmpi
    >>> import numpy as np
    >>> weights = {"w": np.array([1.0, 2.0])}
    >>> with dbmpi.ParameterServer(None, weights, rule="sgd", learning_rate=0.5) as server:
    ...     if not server.serve():
    ...         for _ in range(2):
    ...             server.fetch()
    ...             server.push({"w": weights["w"] - 4.0})
    >>> weights["w"]
    array([3.25, 3.5 ])
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None,
        arrays: Mapping[str, Any],
        rule: str | Rule = "adagrad",
        *,
        shards: int = 1,
        colocate: bool = False,
        server: ServerSection | None = None,
        finite: bool = True,
        clip_norm: float = 0.0,
        resume: str | Path | None = None,
        **settings: Any,
    ) -> None:
        service = Service.current if comm is None else None
        if comm is None:
            comm = everybody() if service is None else service.connect()
        elif comm.size > 1:
            end_all_on_failure(comm)
        self._finite, self._open = finite, False
        self._clip: Clip | None = None
        own = blocking.duplicate(comm, _CALLED)
        try:
            with together(own, "looking at the arguments"):
                mine = named.flatten(arrays)
                layout, dtype = named.check(mine)
                chosen = choice.choose(rule, settings)
                check_names(layout, (PARAMETERS, *chosen.state_names))
                section = _travel(server, dtype)
                plan = service.plan if service else planned(own.size, shards, colocate)
                if not isinstance(clip_norm, int | float) or not 0 <= clip_norm < math.inf:
                    raise UserError(f"ParameterServer: clip_norm = {clip_norm!r}: expected a number of at least 0")
                checkpoint = None if resume is None else _newest(Path(resume), layout)
            numbers = f"shards = {plan.shards}, colocate = {plan.colocate}, clip_norm = {float(clip_norm)}"
            described, travel = named.described(mine), section.model_dump_json()
            text = json.dumps([described, choice.written(chosen), numbers, travel, str(checkpoint or "")])
            agree(own, text, plan.worker_ranks[0] if service else 0)
            if service is not None:
                with together(own, "reading the rule"):
                    choice.read(choice.written(chosen))
            self._connection = Connection(own, plan, layout, dtype, chosen, section)
        except KnownToAll:
            blocking.free(own)
            raise
        self._connection.begin(list(mine.values()), checkpoint)
        self._alone = own.size == 1
        self._stack = ExitStack()
        self._stack.enter_context(aloud(own))
        self._open = True
        self._arrays = mine
        # Arrays that are not contiguous, and get what was fetched from memory beside them.
        self._beside = {name: np.empty_like(a, order="C") for name, a in mine.items() if not a.flags.c_contiguous}
        self._targets = [self._beside.get(name, array).reshape(-1) for name, array in mine.items()]
        self.gradients, self.parameters = self._connection.gradients, self._connection.parameters
        self.worker, self.workers = plan.worker_of(own.rank), plan.workers
        self._scheduled = choice.follows_schedule(chosen)
        if clip_norm:
            self._clip = Clip(clip_norm, [Stretch(0, 0, layout.size, True)], float)
        if self.worker is not None:
            self._fetch(always=True)
        self._connection.settle()
        self._at_exit = atexit.register(aborting(self.close))

    @property
    def version(self) -> int:
        """Pushes of all workers that the shards had applied when this one last fetched.

        On a rank that is a shard alone, those applied so far.
        """
        self._check_open()
        return self._connection.version

    def serve(self) -> bool:
        """Serve until all workers have closed, if this rank is a shard alone; return whether it was.

        The parameter server is then closed on this rank, too.
        """
        if self._open and self.worker is not None:
            return False
        self.close()
        return True

    def fetch(self) -> None:
        """Write the shards' parameters into the arrays, once they contain this worker's own pushes.

        Others may push meanwhile: parts of the parameters may then be of different versions, as in the paper.

        Raises
        ------
        UserError
            On a rank that is no worker, or after the end.
        RunFailed
            If a shard does not answer within the stall limit.
        """
        self._check_worker("fetch")
        self._fetch()

    def push(self, gradients: Mapping[str, Any] | None = None, *, samples: int = 0, finite: bool | None = None) -> None:
        """Send gradients to the shards; returns before they have been applied.

        Parameters
        ----------
        gradients : dict, optional
            The gradient of every parameter, by the names, and in the shapes and the dtype, of the parameters; by
            default :attr:`gradients`.  It may be changed afterwards, unless it is part of :attr:`gradients`.
        samples : int
            How many the gradients are of, for a schedule of the learning rate; needed only then.
        finite : bool, optional
            Whether to look for numbers that are not finite this time; False where there cannot be any.

        Raises
        ------
        UserError
            If a gradient is missing, does not fit its parameter, or is not finite: nothing is pushed then.
        RunFailed
            If a shard does not take it within the stall limit.
        """
        self._check_worker("push")
        if not isinstance(samples, int | np.integer) or samples < self._scheduled:
            raise UserError(
                f"ParameterServer: push was given samples = {samples!r}: expected how many the gradients are of, "
                "which the schedule of the learning rate counts"
            )
        connection = self._connection
        connection.wait()
        looks = self._finite if finite is None else finite
        named.take(connection.gradients if gradients is None else gradients, connection.gradients, finite=looks)
        if self._clip is not None:
            self._clip(connection.gradient)
        connection.push(int(samples))

    def wait(self) -> None:
        """Wait until the shards have applied this worker's pushes."""
        self._check_worker("wait")
        self._connection.wait()

    def save(self, path: str | Path) -> None:
        """Write a checkpoint: the shards' parameters, once they contain this worker's own pushes, and the rule's state.

        One worker does this, e.g. number 0; the others may push meanwhile.  While a shard hands over its part it
        applies nothing, but the parts of several shards may be of different versions.  The file appears under its name
        when it is whole, in place of an earlier one.

        Parameters
        ----------
        path : str or Path
            Of the file, in the format of a run's checkpoints.

        Raises
        ------
        UserError
            On a rank that is no worker, or after the end.
        RunFailed
            If the file cannot be written, or parameters are not finite; an earlier file stays as it was.
        """
        self._check_worker("save")
        self._connection.save(Path(path))

    def close(self) -> None:
        """Wait for all workers, and write the final parameters into the arrays (collective); again does nothing.

        The final parameters are the same on all workers.  On a rank that is a shard alone this is :meth:`serve`, and
        the arrays stay as they were.
        """
        if not self._open:
            return
        self._open, worker = False, self.worker is not None
        atexit.unregister(self._at_exit)
        self._connection.end(self._targets if worker else None)
        for name, array in self._beside.items() if worker else ():
            np.copyto(self._arrays[name], array)
        self.gradients, self.parameters = {}, {}
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        if self._open and not self._alone and not isinstance(error, KnownToAll):
            try:
                self._stack.__exit__(kind, error, trace)
            except RunFailed as other:  # instead of SystemExit, which leaves no traceback
                error = other
            report_and_abort(error)
        if self._alone:
            self.close()

    def _fetch(self, *, always: bool = False) -> None:
        """Fetch; `always` into the arrays, also where this worker computes on the shards' memory."""
        self._connection.fetch(self._targets, always=always)
        for name, array in self._beside.items():
            np.copyto(self._arrays[name], array)

    def _check_open(self) -> None:
        if not self._open:
            raise UserError("ParameterServer: it is closed: fetch and push before the end of its block")

    def _check_worker(self, what: str) -> None:
        self._check_open()
        if self.worker is None:
            raise UserError(
                f"ParameterServer: {what} is for workers, and this rank is a shard: leave the loop to the others, "
                "e.g. by `if not server.serve():` before it"
            )


def _newest(path: Path, layout: Layout) -> Path:
    """Return the checkpoint at a path, or the newest one in a directory, once it is known to fit."""
    with Checkpoint.open(path) as opened:
        opened.expect(layout)
        return opened.path.absolute()


def _travel(server: ServerSection | None, dtype: np.dtype[Any]) -> ServerSection:
    """Return how gradients and parameters of a `dtype` travel."""
    section = ServerSection() if server is None else server
    if not isinstance(section, ServerSection):
        raise UserError(f"ParameterServer: server is a {type(server).__name__}: expected dbmpi.config.ServerSection")
    for name, only in (("gradients", "whole"), ("overlap", "none"), ("mirror", 0), ("max_staleness", 0)):
        if getattr(section, name) != only:
            raise UserError(f"ParameterServer: server.{name} = {getattr(section, name)!r}: expected {only!r}")
    if section.wire == "bfloat16" and dtype != np.float32:
        raise UserError(f"ParameterServer: server.wire = 'bfloat16' rounds float32, and the arrays are {dtype}")
    if section.fetch == "shared" and section.consistent:
        raise UserError("ParameterServer: server.consistent = True needs copies: expected server.fetch = 'copied'")
    return section
