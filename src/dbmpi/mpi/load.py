"""Loading mpi4py's MPI, or a message of one sentence why there is none."""

from __future__ import annotations

import os
import sys
from types import ModuleType

from dbmpi.errors import UserError
from dbmpi.machine.mpi_library import explain


def load() -> None:
    """Load mpi4py's MPI, which starts MPI.

    Raises
    ------
    UserError
        If there is none; a script that does not catch it ends with its one sentence and exit code 2.
    """
    try:
        start_mpi()
    except (ImportError, RuntimeError) as error:
        sys.excepthook = _one_sentence
        raise UserError(explain(str(error))) from None


def start_mpi() -> ModuleType:
    """Return ``mpi4py.MPI``, which has started MPI.

    Raises
    ------
    UserError
        If MPI would end this process with a stack of its own functions: an MPICH under another MPI's launcher.
    """
    if "mpi4py.MPI" not in sys.modules and "OMPI_COMM_WORLD_SIZE" in os.environ:
        import mpi4py

        from dbmpi.machine.launcher import check_launcher

        before = mpi4py.rc.initialize, mpi4py.rc.finalize
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = before[0] if before[1] is None else before[1]
        from mpi4py import MPI

        check_launcher(MPI.Get_library_version(), os.environ)
        if before[0] and not MPI.Is_initialized():
            MPI.Init_thread(getattr(MPI, f"THREAD_{mpi4py.rc.thread_level.upper()}"))
    from mpi4py import MPI

    return MPI


def _one_sentence(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """End a script whose MPI is missing with the sentence that says so, from one rank where a launcher started many."""
    if not isinstance(error, UserError):
        sys.__excepthook__(kind, error, error.__traceback__)
        return
    from dbmpi.machine.rank_variables import launched

    if launched(os.environ)[2] == 0:
        print(f"dbmpi: {error}", file=sys.stderr, flush=True)
    if not hasattr(sys, "ps1"):  # an interactive Python continues
        raise SystemExit(2)
