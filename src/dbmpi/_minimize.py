"""Minimise a function of one's own on the ranks of a communicator: the batch methods without a network.

Each rank gives a term of the loss, for instance that of its own samples; what is minimised is the sum.  Vectors lie cut
over the ranks, so that history and vector work are divided among them, and the scalars that a method decides by have
the same bits on all of them.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numba
import numpy as np
from mpi4py import MPI

from dbmpi._arguments import agree, checked, returned
from dbmpi.errors import ToldElsewhere
from dbmpi.index.layout import cut
from dbmpi.kernels.announce import announced, stderr_line
from dbmpi.machine import threads
from dbmpi.machine.signals import StopSignal
from dbmpi.methods import own as methods_own
from dbmpi.methods.descent import POINT, Limits, Progress, TooSteep, prepare
from dbmpi.methods.lbfgs import History
from dbmpi.methods.local_space import LocalSpace
from dbmpi.methods.select import Choice, minimise
from dbmpi.methods.warmup import use_kernels
from dbmpi.methods.whole_space import WholeSpace
from dbmpi.mpi import blocking, pieces, waiting
from dbmpi.mpi.silent_ends import aloud
from dbmpi.mpi.world import end_all_on_failure, everybody, together

if TYPE_CHECKING:
    from dbmpi.methods.own import Method
    from dbmpi.objective import Function

MESSAGES = {
    "gradient": "the gradient is as small as gtol",
    "loss": "the loss decreased by less than ftol",
    "precision": "the loss can no longer be decreased at its own precision",
    "unbounded": "the loss falls without a bound: look for a term with the wrong sign, or add an L2 term",
    "iterations": "the limit of iterations was reached",
    "evaluations": "the limit of evaluations was reached",
    "callback": "the callback asked for the end",
    "signal": "a signal asked for the end",
}
SMALL = 1 << 13
"""Elements of all ranks' gradients together up to which every rank holds vectors whole, and hears of all gradients.

On one rank, L-BFGS takes 0.22 instead of 0.60 ms an iteration with 123 parameters, 0.30 and 0.64 with 1000, 0.83 and
0.93 with 8000, but 1.32 and 1.18 with 16,000 (processor time, Intel Xeon).
"""
_UNKEPT = 2
"""References to an array that nobody has kept: our own, and that of the call that counts them."""
_EVERY = 2.0
"""Seconds between two lines of progress."""


class Minimum(NamedTuple):
    """The result of ``dbmpi.minimize``; the same on every rank, except for `x` with ``parameters="cut"``."""

    x: np.ndarray
    """The solution, of the shape of the start: all parameters, or this rank's part with ``parameters="cut"``."""
    loss: float
    """The sum of all ranks' losses at `x`, including the terms of `l1` and `l2`."""
    largest: float
    """Largest magnitude of the gradient's elements at `x`."""
    iterations: int
    """Iterations of the method."""
    evaluations: int
    """Calls of the objective on each rank."""
    reason: str
    """Why it ended: ``gradient`` or ``loss`` (converged), ``precision``, ``unbounded``, ``iterations``,
    ``evaluations``, ``callback`` or ``signal``."""

    @property
    def converged(self) -> bool:
        """Whether a tolerance was reached."""
        return self.reason in ("gradient", "loss")

    @property
    def message(self) -> str:
        """The reason in words."""
        return MESSAGES[self.reason]


def minimize(
    objective: Function,
    x: np.ndarray,
    comm: MPI.Intracomm | None = None,
    *,
    parameters: Literal["whole", "cut"] = "whole",
    method: str | Method = "lbfgs",
    memory: int = 10,
    line_search: str = "strong_wolfe",
    l1: float = 0.0,
    l2: float = 0.0,
    gtol: float = Limits.gtol,
    ftol: float = Limits.ftol,
    iterations: int = Limits.iterations,
    evaluations: int = Limits.evaluations,
    callback: Callable[[Progress, np.ndarray], bool | None] | None = None,
    progress: bool = False,
) -> Minimum:
    """Minimise the sum of all ranks' objectives (collective).

    Vectors and the history of L-BFGS are divided among the ranks, unless there are few parameters.  SIGTERM and Ctrl-C
    end the call after the current iteration, with the point reached so far.

    Parameters
    ----------
    objective : callable
        ``objective(x) -> (loss, gradient)``: this rank's term of the loss, a number, and its gradient, an array of the
        shape of `x`.  `x` is read-only and may be kept.  If the loss is not finite, or very large, a shorter step is
        tried.
    x : array_like
        Where to start, of any shape.  All vectors have its dtype, float32 or float64; other numbers become float64.
    comm : MPI.Intracomm, optional
        The ranks to use.  By default all ranks that were started, or this process alone.
    parameters : {"whole", "cut"}
        With ``"whole"`` the objective of each rank takes all parameters, `x` is the same on all ranks, and the
        gradient is that of this rank's term.  With ``"cut"`` each rank has a part of the parameters: `x` is this
        part, and the gradient is that of the sum of all terms with respect to it.  The objective then exchanges
        parameters of other ranks itself.
    method : str or callable
        ``"lbfgs"``, ``"conjugate_gradients"``, ``"gradient_descent"``, or a function
        ``(space, evaluate, *, limits, callback)`` of your own (docs/own-methods.md).
    memory : int
        Number of pairs in the history of L-BFGS.
    line_search : {"strong_wolfe", "backtracking"}
        How the length of a step is found.
    l1, l2 : float
        Add ``l1 * sum |x|`` (OWL-QN; L-BFGS only) and ``l2 / 2 * sum x^2`` to the loss, once, not once per rank.
    gtol : float
        Stop when no element of the gradient is larger in magnitude.  It has the units of the gradient; nothing else
        depends on units.
    ftol : float
        Stop when an iteration decreases the loss by no more than this times the magnitude of the loss.
    iterations, evaluations : int
        Stop after this many iterations; begin none after this many evaluations of the objective.
    callback : callable, optional
        ``callback(progress, x)``, called on all ranks after each iteration; if it returns True on any rank, all stop.
        `progress` has the fields `iteration`, `evaluations`, `loss`, `largest` (of the gradient) and `step`.
    progress : bool
        Whether rank 0 writes a line to standard error every two seconds.

    Returns
    -------
    Minimum
        The solution, its loss, and the reason for stopping.

    Raises
    ------
    UserError
        On all ranks, for a mistake in the arguments or in what the objective returns.
    RunFailed
        On all ranks, if the loss is not finite at the start or all along a direction, or if the gradient is wrong.
    Exception
        An exception of the objective or the callback is raised again on its rank, except that SystemExit becomes
        RunFailed where there are several ranks; the other ranks raise a UserError that names the rank and the cause.

    Examples
    --------
    >>> from dbmpi import minimize
    >>> import numpy as np
    >>> def objective(x):
    ...     difference = x - [1.0, 2.0]
    ...     return difference @ difference, 2 * difference
    >>> found = minimize(objective, np.zeros(2))
    >>> found.x
    array([1., 2.])
    >>> found.message
    'the gradient is as small as gtol'
    """
    if comm is not None and comm.size > 1:
        end_all_on_failure(comm)
    own = blocking.duplicate(everybody() if comm is None else comm, "all ranks of the communicator to call minimize")
    try:
        chosen = (parameters, method, memory, line_search, l1, l2, gtol, ftol, iterations, evaluations)
        with together(own, "looking at the arguments"):
            begin = checked(objective, x, chosen, callback)
        agree(own, begin, chosen, callback is not None)
        by = methods_own.checked(method, "minimize: method") if callable(method) else method
        say = partial(stderr_line, "minimize") if own.rank == 0 else None
        with aloud(own), _fair_threads(), _signals() as stop, announced(say) as compiled:
            problem = _Problem(own, objective, begin, parameters, callback, stop, progress)
            while True:
                unit = problem.unit
                choice = Choice(by, line_search, l1=l1 * unit, l2=l2 * unit)
                limits = Limits(gtol * unit, ftol, iterations, evaluations)
                history = History(problem.space, int(memory)) if method == "lbfgs" else None
                try:
                    report = minimise(
                        problem.space,
                        problem.evaluate,
                        choice,
                        limits=limits,
                        callback=problem.told,
                        history=history,
                    )
                    break
                except TooSteep as steep:  # a gradient of 1e200 has no square: the same loss in larger units
                    if unit != 1:
                        raise
                    problem.unit = 2.0 ** -math.frexp(steep.largest)[1]
            compiled()
            reason = "signal" if report.reason == "callback" and problem.signalled else report.reason
            loss, largest = report.loss / unit, report.largest / unit
            problem.show(loss, largest, report.iterations, f"; {MESSAGES[reason]}")
            return Minimum(problem.point().copy(), loss, largest, report.iterations, problem.evaluations, reason)
    finally:
        blocking.free(own)


class _Problem:
    """The vectors on this rank, and evaluations in which all ranks take part."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        objective: Function,
        begin: np.ndarray,
        parameters: str,
        callback: Callable[[Progress, np.ndarray], bool | None] | None,
        stop: StopSignal,
        progress: bool,
    ) -> None:
        self._comm, self._objective, self._callback, self._stop = comm, objective, callback, stop
        whole = parameters == "whole"
        self._small = whole and begin.size * comm.size <= SMALL
        self._cut = whole and comm.size > 1 and not self._small
        """Whether the vectors lie cut, although the objective sees them whole."""
        self._shown_x = np.empty(0, begin.dtype)
        """Owns the memory of what was handed out last."""
        self._size = begin.size
        self.unit = 1.0
        """Factor of the loss and its gradient as the method sees them."""
        if self._cut:
            ranges = cut(begin.size, comm.size)
            self._counts = [len(held) for held in ranges]
            mine = ranges[comm.rank]
            part = begin.reshape(-1)[mine.start : mine.stop].copy()
        else:
            part = begin.reshape(-1)
        self._shape, self._dtype = begin.shape, begin.dtype
        self.evaluations, self.signalled = 0, False
        self.space = (
            WholeSpace(part.size, begin.dtype)
            if self._small
            else LocalSpace(part.size, begin.dtype, partial(_added, comm), comm.rank, comm.size)
        )
        prepare(self.space, POINT)
        self.space.writable(POINT)[:] = part
        self._said = np.zeros((comm.size, 3))
        self._progress = progress and comm.rank == 0
        self._began = self._shown = time.monotonic()
        if self._progress:
            total = f"{begin.size} parameters" if parameters == "whole" else "parameters cut over the ranks"
            self._say(f"{total}; ranks: {comm.size}, threads for vectors on each: {numba.get_num_threads()}")
            if comm.size > 1:
                self._say(threads.prepare().line)
        if comm.size > 1:
            blocking.first_on_each_node(comm, partial(use_kernels, begin.dtype.name))

    def point(self, name: str = POINT) -> np.ndarray:
        """Return what the objective is to see of a vector, not to be written (collective).

        It stays as it is as long as somebody keeps it, or a view of it: only what nobody has kept is written anew.
        """
        part = self.space.array(name)
        if sys.getrefcount(self._shown_x) > _UNKEPT or self._shown_x.size != self._size:
            self._shown_x = np.empty(self._size, self._dtype)
        if self._cut:
            request = pieces.iallgatherv(self._comm, part, self._shown_x, self._counts)
            waiting.complete(request, "the other ranks' parameters")
        else:
            np.copyto(self._shown_x, part)
        view = self._shown_x.reshape(self._shape)
        view.flags.writeable = False
        return view

    def evaluate(self, point: str, gradient: str) -> float:
        """Add up all ranks' losses and gradients."""
        x = self.point(point)
        self.evaluations += 1
        its_gradient = np.empty(0)
        with self._shared("objective", self._size if self._small else 0) as mine:
            mine[1], its_gradient = returned(self._objective(x), self._shape, self._dtype)
            if self._small:
                mine[3:] = its_gradient.reshape(-1)
        del x  # which is not ours to keep
        losses, self.signalled = self._said[:, 1], bool(self._said[:, 2].any())
        own = self.space.writable(gradient)
        if self.unit != 1:
            losses, its_gradient = self.unit * losses, self.unit * its_gradient
        if self._small:
            rows = self.unit * self._said[:, 3:]
            for row in rows[1:]:
                rows[0] += row
            own[:] = rows[0]
        elif not self._cut:
            own[:] = its_gradient.reshape(-1)
        else:
            sent = np.ascontiguousarray(its_gradient, self._dtype).reshape(-1)
            request = pieces.ireduce_scatter(self._comm, sent, own, self._counts)
            waiting.complete(request, "the other ranks' gradients")
        # In the order of ranks, and rounded once: an Allreduce promises neither.
        try:
            return math.fsum(losses) if np.isfinite(losses).all() else float(np.sum(losses))
        except OverflowError:
            return math.inf

    def told(self, progress: Progress) -> bool:
        """Hear of an iteration; return whether anybody asks for the end."""
        if self.unit != 1:
            loss, largest, square, decrease = (
                value / self.unit for value in (progress.loss, progress.largest, progress.square, progress.decrease)
            )
            square /= self.unit
            progress = progress._replace(loss=loss, largest=largest, square=square, decrease=decrease)
        self.show(progress.loss, progress.largest, progress.iteration)
        if self._callback is None:
            return self.signalled
        x = self.point()
        with self._shared("callback") as mine:
            mine[1] = bool(self._callback(progress, x))
        return self.signalled or bool(self._said[:, 1].any())

    def show(self, loss: float, largest: float, iteration: int, ended: str = "") -> None:
        """Write a line where it is time for one."""
        now = time.monotonic()
        if self._progress and (ended or now - self._shown >= _EVERY):
            self._shown = now
            line = f"iteration {iteration}, {self.evaluations} evaluations, {now - self._began:.1f} s: loss {loss:.9g}"
            self._say(f"{line}, gradient {largest:.3g}{ended}")

    def _say(self, line: str) -> None:
        with suppress(OSError):  # the reader of our output may be gone
            print(f"minimize: {line}", file=sys.stderr, flush=True)

    @contextmanager
    def _shared(self, what: str, more: int = 0) -> Iterator[np.ndarray]:
        """Let all ranks hear a number, and `more`, that this one says in the block, or that it fails there.

        What they all have said is then in `_said`, a row for each rank: failed, number, signalled, and `more` numbers.
        """
        mine, failure = np.zeros(3 + more), None
        try:
            yield mine
        except BaseException as error:  # whatever it is, the other ranks wait for this one
            failure = error
            mine[0] = 1
        mine[2] = self._stop.number != 0
        self._said = np.empty((self._comm.size, mine.size))
        waiting.complete(self._comm.Iallgather(mine, self._said), f"the {what} of the other ranks")
        failed = np.flatnonzero(self._said[:, 0])
        if not failed.size:
            return
        first = int(failed[0])
        text = f"the {what} failed on rank {first}: {type(failure).__name__}: {failure}"
        text = waiting.broadcast_text(self._comm, text, first, f"why the {what} failed")
        if first == self._comm.rank:
            assert failure is not None
            raise failure
        raise ToldElsewhere(text) from failure


def _added(comm: MPI.Intracomm, values: np.ndarray) -> np.ndarray:
    return waiting.allreduce(comm, values, MPI.SUM, "the other ranks' sums")


def _signals() -> AbstractContextManager[StopSignal]:
    main = threading.current_thread() is threading.main_thread()  # no other thread may catch signals
    return StopSignal() if main else nullcontext(StopSignal())


@contextmanager
def _fair_threads() -> Iterator[None]:
    """Let kernels use this rank's share of the cores: NumPy, and Numba's settings with it, may be older than dbmpi."""
    before, node = numba.get_num_threads(), threads.prepare().node
    if "NUMBA_NUM_THREADS" not in os.environ:
        numba.set_num_threads(max(1, min(before, node.mine, node.cores // node.ranks)))
    try:
        yield
    finally:
        numba.set_num_threads(before)
