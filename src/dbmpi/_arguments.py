"""The arguments of `dbmpi.minimize`: checked on each rank, and compared over all."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
from mpi4py import MPI

from dbmpi.errors import UserError
from dbmpi.methods import own
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together

METHODS = ("lbfgs", "conjugate_gradients", "gradient_descent")
LINE_SEARCHES = ("strong_wolfe", "backtracking")


def checked(objective: Any, x: Any, chosen: tuple[Any, ...], callback: object) -> np.ndarray:
    """Return a copy of the start, once all arguments of :func:`dbmpi.minimize` have been checked.

    Parameters
    ----------
    objective, x, callback
        As given.
    chosen
        The arguments between them, in their order.
    """
    parameters, method, memory, line_search, l1, l2, gtol, ftol, iterations, evaluations = chosen
    names: dict[str, tuple[Any, tuple[str, ...]]] = {
        "parameters": (parameters, ("whole", "cut")),
        "line_search": (line_search, LINE_SEARCHES),
    }
    if callable(method):
        own.checked(method, "minimize: method")
    else:
        names["method"] = (method, METHODS)
    for name, (given, known) in names.items():
        if given not in known:
            raise UserError(f"minimize: {name} = {given!r}: expected one of {', '.join(map(repr, known))}")
    numbers = {"l1": l1, "l2": l2, "gtol": gtol, "ftol": ftol, "memory": memory}
    for name, number in (numbers | {"iterations": iterations, "evaluations": evaluations}).items():
        sound = isinstance(number, (int, float, np.integer, np.floating)) and 0 <= number < math.inf
        if not sound or (name == "memory" and int(number) != number):
            raise UserError(f"minimize: {name} = {number!r}: expected a number that is 0 or more")
    if l1 and method != "lbfgs":
        raise UserError(f"minimize: l1 = {l1:g} needs method = 'lbfgs', not {method!r}")
    for name, it, form in (("objective", objective, "(x)"), ("callback", callback, "(progress, x)")):
        if not callable(it) and (name == "objective" or it is not None):
            raise UserError(f"minimize: {name} is a {type(it).__name__}: expected a function {form}")
    begin = np.asarray(x)
    if begin.dtype not in (np.float32, np.float64):
        if begin.dtype.kind not in "fiu":
            raise UserError(f"minimize: x has the dtype {begin.dtype}: expected float32 or float64")
        begin = begin.astype(np.float64)
    if not np.isfinite(begin).all():
        raise UserError("minimize: x has elements that are not finite: expected a point where the loss is finite")
    return begin.copy(order="C")


def agree(comm: MPI.Intracomm, begin: np.ndarray, chosen: tuple[Any, ...], calls: bool) -> None:
    """Raise UserError on all ranks if they were not given the same (collective).

    Parameters
    ----------
    comm
        The ranks.
    begin
        The start, as checked.
    chosen
        As in `checked`.
    calls
        Whether there is a callback.
    """
    parameters, method, *others = chosen
    name = method if isinstance(method, str) else getattr(method, "__qualname__", "")
    whole = parameters == "whole"
    given: dict[str, bytes | memoryview] = {
        "the same settings": f"{parameters} {name} {others} {calls}".encode(),
        "a start of the same dtype": str(begin.dtype).encode(),
        "a start of the same shape": str(begin.shape).encode() if whole else b"",
        "the same start": begin.data if whole else b"",
    }
    sums = np.zeros((comm.size, len(given)))
    sums[comm.rank] = [zlib.crc32(it) for it in given.values()]
    sums = waiting.allreduce(comm, sums, MPI.SUM, "the other ranks' arguments")
    with together(comm, "comparing the arguments"):
        for what, column in zip(given, sums.T.tolist(), strict=True):
            for other, value in enumerate(column):
                if value != column[0]:
                    hint = ": broadcast it, or seed all ranks alike" if what == "the same start" else ""
                    raise UserError(f"minimize: ranks 0 and {other} were not given {what}{hint}")


def returned(result: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[float, np.ndarray]:
    """Return loss and gradient as an objective has returned them; raise UserError if they are none.

    Parameters
    ----------
    result
        What the objective returned.
    shape, dtype
        Those of x.
    """
    expected = "minimize: the objective must return (loss, gradient)"
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise UserError(f"{expected}, not {type(result).__name__}")
    loss, gradient = np.asarray(result[0]), np.asarray(result[1])
    if loss.size != 1 or loss.dtype.kind not in "fiu":
        raise UserError(f"{expected}: its loss is no number but has shape {loss.shape} and dtype {loss.dtype}")
    if gradient.shape != shape or gradient.dtype.kind not in "fiu":
        raise UserError(
            f"{expected}: its gradient has shape {gradient.shape} and dtype {gradient.dtype}, where x has "
            f"{shape} and {dtype}"
        )
    return float(loss.reshape(())), gradient
