"""How the outcome of an evaluation comes into a checkpoint that was written before it, as the last one of a run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dbmpi.checkpoint import checksums, consistency, retention, run_lock, schema
from dbmpi.checkpoint.account import Account
from dbmpi.checkpoint.annotations import annotate
from dbmpi.checkpoint.new_file import ARRAYS, NewFile
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.writer import write_measures
from dbmpi.errors import DiskFailed, UserError


def amend(path: Path, account: Account, keep: int, warn: Callable[[str], None]) -> None:
    """Replace a checkpoint by a copy with the last evaluation in it, at one stroke; a failure costs only that.

    Parameters
    ----------
    path
        The checkpoint, the last one of a run.
    account
        Knows the outcome of the evaluation.
    keep
        How many checkpoints stay in the directory; the best may be another one now.
    warn
        Shows a line to the user.

    Raises
    ------
    RunFailed
        If another run has taken the directory over.
    """
    try:
        with Checkpoint.open(path) as checkpoint:
            layout, info = checkpoint.layout, replace(checkpoint.info, **account.test())
        consistency.check(info)
        with NewFile(path, ARRAYS, with_checksums=True, copy_of=path) as file:
            with file.writing():
                for group in (schema.TEST, f"{checksums.GROUP}/{schema.TEST}"):
                    if group in file.hdf5:
                        del file.hdf5[group]
            write_measures(file, info, f"{schema.TEST}/")
            with file.writing():
                annotate(file.hdf5, layout, info)
            file.commit(lambda: run_lock.confirm(path.parent.parent))
        retention.retain(path, retention.whole(path.parent), keep)
    except (DiskFailed, UserError, OSError, consistency.Contradiction) as error:
        warn(f"the checkpoint does not have the evaluation at the end: {error}")
