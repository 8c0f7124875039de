"""Batch methods of a user's own: from ``module:function`` in a configuration to a function that Sandblaster calls."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Protocol

from dbmpi.errors import RunFailed, UserError
from dbmpi.methods.descent import Callback, Evaluate, Limits, Report
from dbmpi.methods.space import Space
from dbmpi.network import own


class Method(Protocol):
    """What a batch method of a user's own is called with; it minimises from the vector "parameters".

    It tells the callback of every iteration, and ends where that returns True.  Before it moves, it keeps the point in
    the vector "previous parameters", as ``space.advance`` does: a signal in mid-evaluation goes back to it.
    """

    def __call__(self, space: Space, evaluate: Evaluate, *, limits: Limits, callback: Callback) -> Report:
        """Return how the run ended."""
        ...


def load(name: str, directory: Path | None) -> Method:
    """Return the function of this `name`, ``module:function``; the module is looked for in the directory first.

    Raises
    ------
    UserError
        If it is not there, cannot be loaded, or cannot be called like a batch method.
    """
    where = f"sandblaster.algorithm = {name!r}"
    return checked(own.member(name, where, directory), where)


def checked(found: Any, where: str) -> Method:
    """Return the function `found` as a method that checks the report it returns; `where` is for messages.

    Raises
    ------
    UserError
        If it cannot be called like a batch method.
    """
    expected = "expected a function (space, evaluate, *, limits, callback)"
    if not callable(found):
        raise UserError(f"{where}: that is a {type(found).__name__}; {expected}")
    try:
        inspect.signature(found).bind(None, None, limits=None, callback=None)
    except TypeError:
        raise UserError(f"{where}: it takes {inspect.signature(found)}; {expected}") from None

    def method(space: Space, evaluate: Evaluate, *, limits: Limits, callback: Callback) -> Report:
        report: Any = found(space, evaluate, limits=limits, callback=callback)
        if not isinstance(report, Report):
            raise RunFailed(f"{where}: it returned {type(report).__name__}; expected dbmpi.methods.descent.Report")
        return report

    return method
