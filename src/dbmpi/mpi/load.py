"""Loading mpi4py's MPI, or a message of one sentence why there is none."""

from __future__ import annotations

import os
import sys

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
        from mpi4py import MPI  # noqa: F401 - for its effect
    except (ImportError, RuntimeError) as error:
        sys.excepthook = _one_sentence
        raise UserError(explain(str(error))) from None


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
