"""``dbmpi launch``: start a command or any program on several ranks with the mpirun that belongs to this Python."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.errors import DIED
from dbmpi.machine import hosts, processes

if TYPE_CHECKING:
    from dbmpi.machine.hosts import Hosts
    from dbmpi.machine.launcher import Ending, LaunchCommand

    _Composer = Callable[[int, Sequence[str], Sequence[str]], LaunchCommand]

SUMMARY = "start a command or your own program on several ranks, with the mpirun of this Python's MPI"

_RESUME = "checkpoint.resume=auto"
_ENDED = "dbmpi launch: a rank has died or does not answer"
_TO_ANSWER = 10.0
"""Seconds in which a host must have started a program; the connection to one that is gone may take minutes to fail."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its `parser`."""
    parser.usage = (
        "dbmpi launch [-h] -n N [--mpi-args ARGS] [--mpirun PATH] [--no-fault-tolerance] [--restarts N] [--dry-run] "
        "-- COMMAND ..."
    )
    parser.add_argument("-n", type=int, required=True, metavar="N", dest="ranks", help="number of ranks")
    parser.add_argument(
        "--mpi-args",
        default="",
        metavar="ARGS",
        help="further options for mpirun, e.g. --mpi-args='--hostfile hosts.txt'",
    )
    parser.add_argument("--mpirun", metavar="PATH", help="the launcher to use (default: found by itself)")
    parser.add_argument(
        "--no-fault-tolerance",
        action="store_true",
        help="let any rank's death end the job, also where the MPI can let a training go on (Open MPI 5)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="after a death has ended the run, start it again from its newest checkpoint, on the hosts that still "
        "answer, up to N times (default: 0)",
    )
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

    command = _checked(arguments)
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

    def compose(ranks: int, program: Sequence[str], options: Sequence[str]) -> LaunchCommand:
        return launcher.compose(
            mpi,
            ranks,
            program,
            mpi_arguments=options,
            environment=threads.without_prepared(os.environ),
            columns=columns,
            cores=threads.this_node(os.environ).cores,
            outlive=command[0] == "train" and not arguments.no_fault_tolerance,
        )

    if arguments.dry_run:
        print(compose(arguments.ranks, program, mpi_arguments))
        return 0
    ending = launcher.run(mpi, compose(arguments.ranks, program, mpi_arguments))
    directory = ending.directory
    if arguments.restarts and _died(ending):
        known = hosts.named(mpi_arguments)
        resuming = [*program, "--set", _RESUME] if command[0] == "train" and _RESUME not in command else program
        with tempfile.TemporaryDirectory(prefix="dbmpi-hosts-") as folder:
            for left in reversed(range(arguments.restarts)):
                ranks, options, where = _place(arguments.ranks, mpi_arguments, known, compose, Path(folder))
                _say_restart(directory, where, left)
                ending = launcher.run(mpi, compose(ranks, resuming, options))
                directory = ending.directory or directory  # not known of one that has died early
                if not _died(ending):
                    break
    if _died(ending):
        _say_how_to_resume(arguments, command, directory)
    return ending.code


def _checked(arguments: argparse.Namespace) -> list[str]:
    """Return the command of these `arguments`, which make sense."""
    from dbmpi.errors import UserError
    from dbmpi.machine.rank_variables import launched

    command = list(arguments.command)
    if command and command[0] == "--":
        del command[0]
    if not command:
        raise UserError("launch: nothing to run; expected e.g.  dbmpi launch -n 4 -- train CONFIG.toml")
    for name, number, least in (("-n", arguments.ranks, 1), ("--restarts", arguments.restarts, 0)):
        if number < least:
            raise UserError(f"launch {name} {number}: expected at least {least}")
    ranks, by, _ = launched(os.environ)
    if ranks > 1:
        words = " ".join(command)
        raise UserError(f"launch was itself started {ranks} times by {by}: either of the two is enough (dbmpi {words})")
    return command


def _died(ending: Ending) -> bool:
    """Return whether a death or a silence has ended the job, and no signal that was sent to it."""
    return ending.code == DIED and not ending.wished


def _place(
    ranks: int, options: list[str], known: Hosts | None, compose: _Composer, folder: Path
) -> tuple[int, list[str], str]:
    """Return ranks and options for mpirun where hosts may be gone, and words on those that are.

    Parameters
    ----------
    ranks, options
        As the user has given them.
    known
        The hosts among the options, if there are any.
    compose
        Composes a command for mpirun from ranks, program and options.
    folder
        For host files.
    """
    if known is None:
        return ranks, options, ""

    def answers(name: str) -> bool:
        command = compose(1, ["-c", ""], known.only([name], folder / name))
        done = processes.ask(command.argv, {**os.environ, **command.settings}, seconds=_TO_ANSWER)
        return done is not None and done.returncode == 0

    alive = hosts.answering(known, answers)
    gone = dict.fromkeys(host.name for host in known.hosts if host.name not in alive)
    if not gone:
        return ranks, options, ""
    ranks = known.ranks(ranks, alive)
    return ranks, known.only(alive, folder / "left"), f" on {ranks} ranks, as {', '.join(gone)} does not answer"


def _say_restart(directory: Path | None, where: str, left: int) -> None:
    """Print that a run that a lost rank has ended is started again, and from which checkpoint."""
    found = _newest(directory)
    if found is not None:
        what = f"it goes on from {os.path.relpath(found)}"
    elif directory is not None:
        what = "it begins anew, as there is no whole checkpoint yet"
    else:
        what = "it goes on from the newest whole checkpoint, if there is one"
    sys.stderr.write(f"{_ENDED}; started again{where}, {what} (restarts left: {left})\n")
    sys.stderr.flush()


def _newest(directory: Path | None) -> Path | None:
    """Return the newest whole checkpoint of a run directory, if that is known and there is one."""
    from dbmpi.checkpoint.reader import Checkpoint
    from dbmpi.errors import UserError

    if directory is not None:
        with suppress(UserError), Checkpoint.open(directory) as checkpoint:
            return checkpoint.path
    return None


def _say_how_to_resume(arguments: argparse.Namespace, command: Sequence[str], directory: Path | None) -> None:
    """Print, where a rank's death has ended a run, the command that resumes it, and from which checkpoint."""
    found = _newest(directory)
    again = ["dbmpi", "launch", "-n", str(arguments.ranks)]
    again += [f"--mpi-args={arguments.mpi_args}"] if arguments.mpi_args else []
    again += [f"--mpirun={arguments.mpirun}"] if arguments.mpirun else []
    again += ["--no-fault-tolerance"] if arguments.no_fault_tolerance else []
    again += [f"--restarts={arguments.restarts}"] if arguments.restarts else []
    again += ["--", *command]
    trains = command[0] == "train"
    if trains and _RESUME not in command and (found is not None or directory is None):
        again += ["--set", _RESUME]
    if found is not None:
        how = "" if trains else "with checkpoint.resume = 'auto' "
        what = f"the newest whole checkpoint is {os.path.relpath(found)}; {how}this goes on from it"
    elif directory is not None:
        what = f"there is no whole checkpoint in {os.path.relpath(directory)}; this begins anew"
    else:
        what = "this goes on from the newest whole checkpoint, if there is one" if trains else "this begins anew"
    sys.stderr.write(f"{_ENDED}; {what}: {shlex.join(again)}\n")
