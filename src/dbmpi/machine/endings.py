"""How a job ended: what the launchers' exit codes mean, and the notes that ranks leave for `dbmpi launch`.

Seen with Open MPI 5.0 and MPICH 5.0: where a rank was killed by signal n, mpirun ends with 128 + n (with fault
tolerance: with what the other ranks end with); where mpirun loses a host, it ends with 0.  mpiexec ends with n and the
numbers of the signals by which it has then killed others, bit by bit: with 15 after 6 (SIGABRT) and 9 (SIGKILL).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dbmpi.errors import DIED

UNFINISHED = "DBMPI_UNFINISHED"
"""Names a file that the first rank keeps while it runs, if it is on the host of `dbmpi launch`."""
_FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"
"""What ``mpirun --with-ft ulfm`` sets for the ranks; under another launcher it may be set by hand."""
_KILLED = {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGQUIT}
"""Signals that end a rank from outside, or by a crash."""
_LAST_SIGNAL = 64


def outlived(environment: Mapping[str, str]) -> bool:
    """Return whether ranks should survive the death of another one.

    Parameters
    ----------
    environment
        Environment variables of a rank.
    """
    return environment.get(_FAULT_TOLERANCE, "").lower() in ("1", "true", "yes", "enabled")


def chooses_fault_tolerance(options: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return whether a user has said if ranks should survive the death of another one, or by what they communicate.

    Open MPI's fault tolerance works with ``pml = ob1``, and brings that along, but not over what a user has set.

    Parameters
    ----------
    options
        The user's own for mpirun.
    environment
        Environment variables.
    """
    if environment.get("OMPI_MCA_pml", "ob1") != "ob1" or "OMPI_MCA_mtl" in environment:
        return True
    chosen = not {"pml", "mtl", "--tune", "mpi_ft_enable"}.isdisjoint(options)
    return chosen or _FAULT_TOLERANCE in environment or any(word.startswith("--with-ft") for word in options)


def documented(code: int, *, bare: bool, unfinished: bool) -> int:
    """Return what a launcher's exit code comes to in the one table of exit codes (docs/running.md).

    Parameters
    ----------
    code
        0 to 255; 128 + n where the launcher itself was killed.
    bare
        Whether n stands for signals, and for nothing that a rank may end with.
    unfinished
        Whether the first rank has left its file behind.
    """
    if code in (0, 255):
        return DIED if unfinished else code
    if bare and 2 < code <= _LAST_SIGNAL:
        return DIED
    return DIED if code - 128 in _KILLED else code


def note_run(directory: Path) -> None:
    """Let `dbmpi launch` know where the run writes, so that it can name the checkpoint if a death ends the run.

    Parameters
    ----------
    directory
        The run directory.
    """
    note = Path(os.environ.get(UNFINISHED, ""))
    with suppress(OSError):  # the first rank is on another host
        if note.is_file():
            note.write_text(str(directory.absolute()))


def note_message(code: int) -> None:
    """Let `dbmpi launch` know that this rank has explained the error, so that it leaves out mpirun's own text.

    Parameters
    ----------
    code
        The exit code with which this rank ends.
    """
    note = os.environ.get(UNFINISHED)
    if note:
        with suppress(OSError, ValueError):  # it is on another host, or somebody else's variable
            _said(Path(note)).write_text(str(code))


def explained(note: Path) -> int | None:
    """Return the exit code of a rank that has called :func:`note_message`, or None.

    Parameters
    ----------
    note
        The file that `UNFINISHED` names.
    """
    with suppress(OSError, ValueError):
        return int(_said(note).read_text())
    return None


def _said(note: Path) -> Path:
    return note.with_name("said")


def read_note(note: Path) -> tuple[bool, Path | None]:
    """Return whether the first rank has left its file behind, and its run directory, if that is known.

    Parameters
    ----------
    note
        The file that `UNFINISHED` names.
    """
    with suppress(OSError, UnicodeDecodeError):
        text = note.read_text()
        return True, Path(text) if text else None
    return False, None
