"""Work in a thread, of which the thread that started it sees the progress and the end without waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")
_LAST_WAIT = 5.0
"""Seconds for which the end of abandoned work is awaited: that of one write to the disk."""


class Abandoned(Exception):
    """The work is no longer wanted."""


class Background(Generic[Result]):
    """A function that runs in a thread.

    Parameters
    ----------
    work
        The function.  It calls its argument now and then, which notes progress, and raises when the work is abandoned.
    """

    def __init__(self, work: Callable[[Callable[[], None]], Result]) -> None:
        self._work = work
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._steps = self._seen = 0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the function has ended."""
        return not self._thread.is_alive()

    def moved(self) -> bool:
        """Return whether there was progress since the last call."""
        before, self._seen = self._seen, self._steps
        return self._seen != before

    def result(self) -> Result:
        """Return what the function has returned, or raise what it has raised; only when it is `done`."""
        assert self.done
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def abandon(self) -> None:
        """Let the function end at its next step; wait for that, but not for long."""
        self._abandoned = True
        self._thread.join(_LAST_WAIT)

    def _run(self) -> None:
        try:
            self._result = self._work(self._step)
        except BaseException as error:  # for the other thread
            self._error = error

    def _step(self) -> None:
        self._steps += 1
        if self._abandoned:
            raise Abandoned
