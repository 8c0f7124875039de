"""Signals that ask a run to end; the standard library alone, so that they are noted from the first moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from dbmpi.machine import processes

HEEDED = tuple(
    signal.Signals(number)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
)
"""Signals by which schedulers, launchers and users end a run, on any rank or on `dbmpi launch`."""

_FLAGS, _EXITING = 6, 4
"""Position of the flags in the fields of `processes.stat`, and Linux's PF_EXITING in them."""


SAME_WISH = 1.0
"""Seconds after a signal in which further ones add nothing: launchers and schedulers may send theirs twice."""


class SecondSignal(KeyboardInterrupt):
    """The end that is wanted at once, without a checkpoint.

    Parameters
    ----------
    number
        Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class StopSignal:
    """Notes signals instead of dying, so that the run can end with a checkpoint; a second one is final.

    All of `HEEDED` ask for the end, unless they are ignored already, as SIGHUP is under nohup.  Open MPI's mpirun
    relays SIGUSR1 and SIGUSR2 to its ranks and lets them take their time, while after SIGTERM it kills them within a
    second.

    MPICH's launcher sends SIGUSR1 to all ranks of its own accord when one has died and the others are to live
    (``-disable-auto-cleanup``): so that one is ignored where a rank of this host has ended.

    Attributes
    ----------
    number
        Of the first signal; 0 without any.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, object] = {}
        self._neighbours: set[int] = set()

    def __enter__(self) -> StopSignal:
        self._neighbours = _of_the_same_hydra()
        for number in HEEDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def hear(self, number: int) -> None:
        """Take note that another rank has got signal `number`; one to this rank is then the second."""
        if not self.number:
            self.number, self._since = number, time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1 and self._neighbours - _of_the_same_hydra():
            return
        if number == signal.SIGXCPU == self.number:
            return  # the system repeats it for each further second
        if self.number and time.monotonic() - self._since > SAME_WISH:
            raise SecondSignal(number)
        self.hear(number)


def reinstall() -> None:
    """Put Python's handlers back where a library that has been loaded has set its own: UCX takes SIGHUP for itself."""
    if threading.current_thread() is threading.main_thread():  # no other thread may
        for number in HEEDED:
            handler = signal.getsignal(number)
            if callable(handler):
                signal.signal(number, handler)


def _of_the_same_hydra() -> set[int]:
    """Return the ids of the living processes that the same daemon of MPICH's launcher has started on this host."""
    parent = os.getppid()
    if not processes.stat(parent)[0].startswith("hydra"):
        return set()
    return {child for child in processes.children(parent) if _stays(child)}


def _stays(process: int) -> bool:
    """Return whether a process runs and is not about to end: its connections close before it is gone."""
    fields = processes.stat(process)[1]
    return bool(fields) and fields[0] not in "ZX" and not int(fields[_FLAGS]) & _EXITING
