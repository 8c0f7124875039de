"""The errors that dbmpi raises on purpose, and the exit codes that they end a job with."""

from __future__ import annotations

from collections.abc import Iterable

DIED = 75
"""Exit code where a rank's death or silence has ended the run, which may be resumed (EX_TEMPFAIL of sysexits.h)."""


class UserError(ValueError):
    """A mistake of the user: in a file, a setting, a launch line.

    The message says what was given, what was expected and how to fix it.  The command line prints it
    once, on one rank, without a traceback, and ends with exit code 2.
    """


class KnownToAll(UserError):
    """A mistake that every rank knows of: all leave at the same point, and none waits for another."""


class ToldElsewhere(KnownToAll):
    """A mistake of the user that another rank prints."""


class RunFailed(RuntimeError):
    """A run that started well and cannot continue, e.g. because the loss is no longer finite (exit code 1)."""


class DiskFailed(RunFailed):
    """A file could not be written, because of its disk or directory; its earlier version is whole."""


class Damaged(UserError):
    """A file that is torn, or has changed since it was written."""


class EndedByDeath(RunFailed):
    """A run that cannot continue because a rank has died (exit code 75)."""


class Stalled(RunFailed):
    """A run that cannot continue because a rank does not answer, which may be on a host that is gone (exit code 75)."""


class EndedElsewhere(RunFailed):
    """The end of a job that another rank has announced, which has said why.

    Parameters
    ----------
    code
        The exit code of all ranks.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"another rank has ended the job with exit code {code}")
        self.code = code


def suggestion(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Return the hint for an unknown word: the known one that it resembles, or all that are known.

    Parameters
    ----------
    word
        What the user gave.
    known
        What would have been understood.
    otherwise
        The hint where nothing resembles it; by default the list of all.
    """
    from difflib import get_close_matches

    known = list(known)
    near = get_close_matches(word, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(known)}" if otherwise is None else otherwise
