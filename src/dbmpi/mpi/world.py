"""MPI's start and end: the only file that names the world.

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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from dbmpi.errors import DIED, EndedByDeath, EndedElsewhere, KnownToAll, RunFailed, Stalled, ToldElsewhere, UserError
from dbmpi.machine import capacity, endings, mpi_library, signals, streams
from dbmpi.mpi import blocking, common_end, failures, load, replacement, silent_ends, waiting
from dbmpi.mpi.reach import check_reach

if TYPE_CHECKING:
    from mpi4py import MPI


_job: MPI.Intracomm | None = None
"""All ranks of this job, where dbmpi has started MPI."""
_exit = os._exit
"""That of the system, also where the ends of a user's code are reported (`silent_ends`)."""
_FOR_THE_LAUNCHER = 0.2
"""Seconds that the launcher is given to read a last message."""
_FOR_THE_ABORT = 10.0
"""Seconds in which the launcher has ended this process after an abort."""
_FOR_THE_END = 5.0
"""Seconds that MPI is given to end where ranks have died: it does not always."""
_FOR_THE_FIRST = 0.5
"""Seconds that the rank with a message is given before another one ends."""


_ALL_RANKS = (
    "all ranks that were started to call dbmpi: each of them must, or those that do must be given as a communicator of "
    "their own; or their hosts do not reach each other, which dbmpi doctor tries under the same launcher"
)


def start(*, ours: bool = False) -> MPI.Intracomm:
    """Start MPI and return a communicator of all ranks that belongs to dbmpi alone (collective).

    From here on an uncaught exception aborts the job instead of leaving the other ranks waiting.

    Parameters
    ----------
    ours
        Whether this is a command of dbmpi, so that no other code uses MPI; then hosts that do not reach each other are
        noticed within a minute.

    Raises
    ------
    UserError
        If the environment shows that several ranks were meant and every one became a world of its own.
    """
    streams.open_closed()
    mpi_library.prepare()
    with suppress(OSError):  # no /dev/shm
        warning = mpi_library.mpich_shortage(os.environ, shutil.disk_usage("/dev/shm").free)
        if warning:
            print(warning, file=sys.stderr, flush=True)
            time.sleep(_FOR_THE_LAUNCHER)  # there may be no other time
    try:
        if failures.tolerated():
            import mpi4py

            mpi4py.rc.finalize = False  # see _end
        MPI = _wait_for_all_ranks_to_start_mpi()
    except (ImportError, RuntimeError) as error:
        raise UserError(mpi_library.explain(str(error))) from None
    from dbmpi.machine.launcher import check_world

    if replacement.joins():
        comm = go_on(replacement.join(MPI.Comm.Get_parent()))
    else:
        check_world(MPI.COMM_WORLD.size)
        if ours:
            try:
                check_reach(MPI.COMM_WORLD)
            except (UserError, EndedElsewhere) as error:
                report_and_abort(error)
        end_all_on_failure(MPI.COMM_WORLD)
        comm = _adopt(blocking.duplicate(MPI.COMM_WORLD, _ALL_RANKS))
        mpi_library.remove_segments(os.environ)
    if comm.rank == 0 and (note := os.environ.get(endings.UNFINISHED)):
        _leave_until_the_end(Path(note))
    if failures.tolerated():
        atexit.register(aborting(_end))
    return comm


def go_on(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Go on with the ranks of `comm`, of which some are new processes in the places of dead ones (collective)."""
    common_end.JOB.forget()
    end_all_on_failure(comm)
    return _adopt(comm)


def _adopt(comm: MPI.Intracomm) -> MPI.Intracomm:
    global _job  # noqa: PLW0603 - a process belongs to one job
    _job = comm
    return comm


@cache
def everybody() -> MPI.Intracomm:
    """Start MPI (see :func:`start`) in the first call, and return the communicator of this call in all later ones."""
    return start()


def _wait_for_all_ranks_to_start_mpi() -> ModuleType:
    """Return ``mpi4py.MPI``, which starts MPI when it is loaded first: with all ranks, and without end.

    Nothing in Python runs meanwhile, so that only Python's fault handler can end a wait in vain.  It prints just the
    name of the function, hence the name of this one.
    """
    if "mpi4py.MPI" not in sys.modules:
        faulthandler.dump_traceback_later(waiting.STALL_SECONDS, exit=True)
    try:
        MPI = load.start_mpi()
    finally:
        faulthandler.cancel_dump_traceback_later()
    signals.reinstall()
    return MPI


def end_all_on_failure(comm: MPI.Intracomm) -> None:
    """Let an uncaught exception end all ranks of `comm`, which may wait for this one inside MPI (collective)."""
    if sys.excepthook is not _abort_hook:
        sys.excepthook = _abort_hook
        if failures.tolerated():
            atexit.register(aborting(common_end.JOB.part))
    common_end.JOB.join(comm, _ALL_RANKS)


def _leave_until_the_end(note: Path) -> None:
    """Keep a file until this process ends by itself, if the launcher is on this host."""
    with suppress(OSError):  # it is on another one
        note.touch()
        atexit.register(note.unlink, missing_ok=True)


@contextmanager
def ranks() -> Iterator[MPI.Intracomm]:
    """Start MPI for the block (see :func:`start`), and end all ranks where an exception of this one alone leaves it."""
    try:
        comm = start(ours=True)
    except UserError:
        raise
    except Exception as error:
        if "mpi4py.MPI" not in sys.modules:
            raise  # nor does any other rank get further
        report_and_abort(error)
    try:
        with silent_ends.aloud(comm):
            yield comm
    except KnownToAll:
        raise
    except BaseException as error:  # of any kind: the other ranks wait for this one
        report_and_abort(error)


def report_and_abort(error: BaseException) -> NoReturn:
    """Print an `error` of this rank, with a traceback unless its message is enough, and end all ranks.

    Never returns: it raises SystemExit where this process is the only rank.
    """
    from mpi4py import MPI

    job = _job or MPI.COMM_WORLD
    rank, size = job.rank, job.size
    text, code = "", 1
    if isinstance(error, KeyboardInterrupt):
        code = 128 + (error.number if isinstance(error, signals.SecondSignal) else signal.SIGINT)
        if size > 1:
            text = f"dbmpi: rank {rank} was interrupted ({signal.Signals(code - 128).name}) and ends the job\n"
            # A Ctrl-C may have reached all ranks: one of them reports it.
            time.sleep(_FOR_THE_FIRST if rank else 0.0)
            text = "" if _is_told() else text
    elif isinstance(error, EndedElsewhere):
        code = error.code
        time.sleep(_FOR_THE_FIRST)  # that rank has something to print, and some launchers end all when one ends
    elif isinstance(error, UserError):
        text, code = f"dbmpi: {error}\n", 2
    elif failures.reports_death(error):
        lost = failures.dead(job)
        code = DIED
        if rank == min({*range(size)}.difference(lost)) and not _is_told():
            ranks = f"ranks {', '.join(map(str, lost))} have" if len(lost) != 1 else f"rank {lost[0]} has"
            ranks = ranks if lost else "a rank has"
            text = f"dbmpi: {ranks} died, and the others cannot go on\n"
    elif isinstance(error, MemoryError):
        text = f"dbmpi: {f'rank {rank}: ' if size > 1 else ''}{capacity.explain(error)}\n"
    elif isinstance(error, RunFailed):
        died = isinstance(error, (EndedByDeath, failures.RankLost))
        code = DIED if died or isinstance(error, Stalled) else 1
        text = f"dbmpi: {f'rank {rank}: ' if size > 1 else ''}{error}\n" if str(error) else ""
        text = "" if died and _is_told() else text
    else:
        whose = f"rank {rank} failed and ends the job" if size > 1 else "failed"
        text = f"dbmpi: {whose}:\n{''.join(traceback.format_exception(error))}"
    if text:
        endings.note_message(code)
    with suppress(OSError):  # the reader of our output may be gone
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
    if size == 1:
        raise SystemExit(code)
    if not (isinstance(error, EndedElsewhere) or common_end.JOB.announce(code)):
        # MPICH's launcher passes on a rank's output with a delay, and drops the rest at an abort.
        time.sleep(_FOR_THE_LAUNCHER)
        # It waits for the launcher, without end where this host is cut off from that, and no Python runs meanwhile.
        faulthandler.dump_traceback_later(_FOR_THE_ABORT, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        job.Abort(code)
    _exit(code)  # MPICH's Abort may return before the launcher has killed this rank


def _is_told() -> bool:
    """Return whether another rank has ended the job, and said why."""
    try:
        return common_end.JOB.check(now=True)
    except EndedElsewhere:
        return True


def aborting(call: Callable[[], object]) -> Callable[[], None]:
    """Return a function that does the same and ends all ranks if it fails, for the end of a process.

    An exception would be printed and ignored there.  A fork of this process does nothing at its end.

    Parameters
    ----------
    call
        What to do.
    """
    process = os.getpid()

    def do() -> None:
        if os.getpid() != process:
            return
        try:
            call()
        except BaseException as error:
            report_and_abort(error)

    return do


def abort_from_thread(error: Exception) -> NoReturn:
    """Report an `error` and end all ranks while another thread is blocked in MPI, which may allow no second call."""
    from mpi4py import MPI

    if MPI.Query_thread() == MPI.THREAD_MULTIPLE and (_job or MPI.COMM_WORLD).size > 1:
        report_and_abort(error)
    code = DIED if isinstance(error, (EndedByDeath, Stalled)) else 1
    endings.note_message(code)
    with suppress(OSError):
        sys.stderr.write(f"dbmpi: {error}\n")
        sys.stderr.flush()
    os._exit(code)


def _end() -> None:
    """End MPI where ranks may have died: its end may fail then, and processes end without it.

    Open MPI kills all that are left when a rank ends with an exit code other than 0, so the others wait for the first
    rank, which has most to print.
    """
    from mpi4py import MPI

    assert _job is not None
    if MPI.Is_finalized():
        return
    sys.stdout.flush()
    common_end.JOB.part()
    if not failures.dead(_job):
        MPI.Finalize()
    else:
        failures.depart(_job)


def leave(code: int, elder: Collection[int]) -> NoReturn:
    """End this process, whose job has replaced ranks that have died (collective).

    Open MPI 5.0 takes a process that was started later for a crash if it leaves out MPI's end; and this does not return
    before the elder ones are gone.  It damages the memory, at times so that it crashes itself: it is the last call, and
    has nothing to say.

    Parameters
    ----------
    code
        The exit code.
    elder
        Ranks whose processes were started before this one.
    """
    from mpi4py import MPI

    assert _job is not None
    sys.stdout.flush()
    sys.stderr.flush()
    failures.depart(_job)
    if _job.rank == 0 and (note := os.environ.get(endings.UNFINISHED)):
        endings.note_message(code)  # whatever the launcher says of how the others leave
        Path(note).unlink(missing_ok=True)
    if elder:
        failures.outlive(_job, elder, _FOR_THE_END)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        faulthandler.dump_traceback_later(_FOR_THE_END, exit=True)
        MPI.Finalize()
    _exit(code)


def _abort_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # The rank that has the message ends all; if another one did, it could come first.
    if not isinstance(error, ToldElsewhere):
        report_and_abort(error)


@contextmanager
def together(comm: MPI.Comm, what: str, *, seconds: float | None = None) -> Iterator[None]:
    """Turn a user's mistake that one rank has noticed into an error on all ranks (collective).

    If any rank raises UserError inside the block, every rank leaves it with one: the lowest such rank with its own,
    to be printed, as a KnownToAll, all others with ToldElsewhere.  Any other exception is raised at once, and the other
    ranks do not learn of it.

    Parameters
    ----------
    comm
        The ranks.
    what
        What the block does, for the message if a rank does not arrive.
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
