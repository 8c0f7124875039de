"""A user's own program on the ranks of `dbmpi launch`: finding it, and starting it on each rank.

``python -m dbmpi.machine.own_program PROGRAM ...`` runs on each rank.  It settles threads, BLAS kernel and kernel cache
as dbmpi's own commands do, on the rank's node, and then becomes the program.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from dbmpi.errors import UserError, suggestion

_PYTHONS = ("python", "python3")
_MOMENT = 0.5
"""Seconds before a rank other than the first ends, as launchers kill all when one ends."""


def resolve(words: Sequence[str], commands: Collection[str]) -> list[str]:
    """Return the command to execute for a user's words.

    ``python`` and ``dbmpi`` without a folder are this Python and its dbmpi, a ``FILE.py`` that cannot be executed by
    itself is run by this Python, and everything else is looked up as a shell does.

    Parameters
    ----------
    words
        A program and its arguments.
    commands
        Commands of dbmpi, for the hint if the first word looks like a misspelt one.

    Raises
    ------
    UserError
        If there is no such program, or it may not be executed.
    """
    name, *arguments = words
    if name == "dbmpi":
        return [sys.executable, "-m", "dbmpi", *arguments]
    if name in _PYTHONS:
        if arguments and not arguments[0].startswith("-") and not Path(arguments[0]).exists():
            raise UserError(f"launch: {name} {arguments[0]}: no such file in {Path.cwd()}")
        return [sys.executable, *arguments]
    path = Path(name)
    if path.suffix == ".py" and path.is_file() and not (os.sep in name and os.access(path, os.X_OK)):
        return [sys.executable, *words]
    found = shutil.which(name)
    if found is not None:
        return [name if os.sep in name else found, *arguments]
    if path.is_dir():
        raise UserError(f"launch: {name} is a directory; expected a program, or one of dbmpi's commands")
    if os.sep in name and path.exists():
        raise UserError(
            f"launch: {name} is not executable: chmod +x {name}, or name its interpreter, e.g. python {name}"
        )
    others = f"to run the file that is here, write ./{name}" if path.is_file() else None
    hint = suggestion(name, commands, others or f"dbmpi's own commands are {', '.join(commands)}")
    raise UserError(f"launch: {name}: no such program; {hint}")


def main(words: Sequence[str]) -> int:
    """Prepare this process, and become the program; return only if that fails.

    Parameters
    ----------
    words
        The program, as :func:`resolve` returns it, and its arguments.
    """
    from dbmpi.machine import endings, environment, mpi_library
    from dbmpi.machine.rank_variables import launched

    mpi_library.prepare()
    environment.prepare()
    sys.stdout.flush()
    try:
        os.execvp(words[0], list(words))  # noqa: S606 - no shell is wanted
    except OSError as error:
        if launched(os.environ)[2] > 0:
            time.sleep(_MOMENT)
        else:
            endings.note_message(2)
            no_script = error.errno == errno.ENOEXEC
            hint = "; the first line of a script names its interpreter, e.g. #!/bin/sh" if no_script else ""
            print(f"dbmpi: launch: {words[0]} cannot be executed: {error.strerror}{hint}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
