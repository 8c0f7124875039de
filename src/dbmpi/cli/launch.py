"""``dbmpi launch``: start a command or any program on several ranks with the mpirun that belongs to this Python."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SUMMARY = "start a command or your own program on several ranks, with the mpirun of this Python's MPI"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.usage = "dbmpi launch [-h] -n N [--mpi-args ARGS] [--mpirun PATH] [--dry-run] -- COMMAND ..."
    parser.add_argument("-n", type=int, required=True, metavar="N", dest="ranks", help="number of ranks")
    parser.add_argument(
        "--mpi-args",
        default="",
        metavar="ARGS",
        help="further options for mpirun, e.g. --mpi-args='--hostfile hosts.txt'",
    )
    parser.add_argument("--mpirun", metavar="PATH", help="the launcher to use (default: found by itself)")
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of executing it")
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        help="what to run: a command of dbmpi, e.g. train CONFIG.toml, or any program, e.g. python mine.py or ./mine",
    )


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks as these `arguments` say, wait for their end, and return the exit code of docs/running.md."""
    from dbmpi.errors import UserError
    from dbmpi.machine import launcher, mpi_library, own_program, threads
    from dbmpi.machine.rank_variables import launched

    command = list(arguments.command)
    if command and command[0] == "--":
        del command[0]
    if not command:
        raise UserError("launch: nothing to run; expected e.g.  dbmpi launch -n 4 -- train CONFIG.toml")
    if arguments.ranks < 1:
        raise UserError(f"launch -n {arguments.ranks}: expected at least 1 rank")
    ranks, by, _ = launched(os.environ)
    if ranks > 1:
        words = " ".join(command)
        raise UserError(f"launch was itself started {ranks} times by {by}: either of the two is enough (dbmpi {words})")
    try:
        mpi_arguments = shlex.split(arguments.mpi_args)
    except ValueError as error:
        raise UserError(f"--mpi-args {arguments.mpi_args!r}: {error}") from None

    from dbmpi.cli.main import COMMANDS

    if command[0] in COMMANDS or command[0].startswith("-"):
        program = ["-m", "dbmpi", *command]
    else:
        program = ["-m", "dbmpi.machine.own_program", *own_program.resolve(command, COMMANDS)]
    mpi = mpi_library.find_mpi(arguments.mpirun)
    columns = os.get_terminal_size(sys.stdout.fileno()).columns or 80 if sys.stdout.isatty() else None
    composed = launcher.compose(
        mpi,
        arguments.ranks,
        program,
        mpi_arguments=mpi_arguments,
        environment=threads.without_prepared(os.environ),
        columns=columns,
        cores=threads.this_node(os.environ).cores,
    )
    if arguments.dry_run:
        print(composed)
        return 0
    return launcher.run(mpi, composed, lambda directory: _say_how_to_resume(arguments, command, directory))


def _say_how_to_resume(arguments: argparse.Namespace, command: Sequence[str], directory: Path | None) -> None:
    """Print, where a rank's death has ended a run, the command that resumes it, and from which checkpoint."""
    from dbmpi.checkpoint.reader import Checkpoint
    from dbmpi.errors import UserError

    found = None
    if directory is not None:
        with suppress(UserError), Checkpoint.open(directory) as checkpoint:
            found = checkpoint.path
    again = ["dbmpi", "launch", "-n", str(arguments.ranks)]
    again += [f"--mpi-args={arguments.mpi_args}"] if arguments.mpi_args else []
    again += [f"--mpirun={arguments.mpirun}"] if arguments.mpirun else []
    again += ["--", *command]
    resume = "checkpoint.resume=auto"
    trains = command[0] == "train"
    if trains and resume not in command and (found is not None or directory is None):
        again += ["--set", resume]
    if found is not None:
        how = "" if trains else "with checkpoint.resume = 'auto' "
        what = f"the newest whole checkpoint is {os.path.relpath(found)}; {how}this goes on from it"
    elif directory is not None:
        what = f"there is no whole checkpoint in {os.path.relpath(directory)}; this begins anew"
    else:
        what = "this goes on from the newest whole checkpoint, if there is one" if trains else "this begins anew"
    sys.stderr.write(f"dbmpi launch: a rank has died, and the run with it; {what}: {shlex.join(again)}\n")
