"""The command line: finds the command, and turns errors into messages and exit codes.

Exit codes: 0 done, 2 the user's mistake, 1 a failure; 128 + n after signal n, with a checkpoint; 75 where a death has
ended the run and the same command would resume it.
A command is a module of this package with `SUMMARY`, `add_arguments` and `run`; it imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

import dbmpi
from dbmpi.errors import RunFailed, ToldElsewhere, UserError, suggestion
from dbmpi.machine import early, endings, signals, streams

COMMANDS = (
    *("train", "launch", "submit", "status", "sweep", "watch", "plan", "simulate", "evaluate", "predict", "inspect"),
    *("export", "plot", "report", "bench", "data", "example", "doctor"),
)
COMPUTING = ("train", "sweep", "simulate", "evaluate", "predict", "bench")
"""Those for which threads and caches are chosen before NumPy is loaded."""
_MOMENT = 0.5
"""Seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    Parameters
    ----------
    arguments
        The words after ``dbmpi``; by default those of this process.
    """
    streams.open_closed()
    words = sys.argv[1:] if arguments is None else list(arguments)
    with _untranslated():
        parser = build_parser(words)
        if not words:
            parser.error("no command; e.g. dbmpi train CONFIG.toml, or dbmpi doctor; dbmpi --help lists all")
        parsed, unknown = parser.parse_known_args(words)
        if unknown:
            parser.error(_unknown(parser, words, unknown))
    if parsed.run.__module__.rpartition(".")[2] not in COMPUTING:
        early.leave()
    try:
        code = int(parsed.run(parsed))
        sys.stdout.flush()  # Python itself would be too late to say that it failed
        return code
    except (UserError, RunFailed) as error:
        _say(error)
        return 2 if isinstance(error, UserError) else 1
    except MemoryError as error:
        from dbmpi.machine import capacity

        _say(RunFailed(capacity.explain(error)))
        return 1
    except KeyboardInterrupt as error:
        return 128 + (error.number if isinstance(error, signals.SecondSignal) else signal.SIGINT)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        from dbmpi.monitor.progress import discard

        discard(sys.stdout)  # otherwise Python fails on the rest when it ends
        if error.errno == errno.EPIPE:
            return 0  # the reader of our output, e.g. `head`, has seen enough
        _say(RunFailed(f"{error.filename or 'standard output'}: cannot be written: {error.strerror}"))
        return 1
    except Exception:
        endings.note_message(1)  # Python prints it
        raise


@contextmanager
def _untranslated() -> Iterator[None]:
    """Let argparse look for no translations in the block: each rank would look into four files for each word."""
    before = os.environ.get("LANGUAGE")
    os.environ["LANGUAGE"] = "C"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LANGUAGE"]
        else:
            os.environ["LANGUAGE"] = before


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; only the command that the `words` ask for adds its arguments, so that help comes at once."""
    parser = _Parser(prog="dbmpi", description="DistBelief on MPI: train networks over a sharded parameter server.")
    parser.add_argument("--version", action="version", version=f"dbmpi {dbmpi.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = next((word for word in words if not word.startswith("-")), None)
    for name in COMMANDS:
        module: ModuleType = importlib.import_module(f"dbmpi.cli.{name}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        if name == asked:
            module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose error is a single line, printed once and not by every rank."""

    def error(self, message: str) -> NoReturn:
        if not _is_silent():
            endings.note_message(2)
            hint = "" if "--help" in message else f"; see {self.prog} --help"
            sys.stderr.write(f"{self.prog}: {message}{hint}\n")
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        kind = {"COMMAND": "command", "ACTION": "action"}.get(str(action.metavar), "choice")
        self.error(f"{str(value)!r} is no {kind}; {suggestion(str(value), known)}")


def _unknown(parser: argparse.ArgumentParser, words: Sequence[str], unknown: Sequence[str]) -> str:
    """Say which arguments a command does not have, and which one may have been meant."""
    known: list[str] = []
    for word in words:
        choices = next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})
        if word in choices:
            parser = choices[word]
            known = list(parser._option_string_actions)
    hint = suggestion(unknown[0].partition("=")[0], known, "")
    return f"{parser.prog.removeprefix('dbmpi ')} has no argument {unknown[0]}{hint and '; '}{hint}"


def _say(error: Exception) -> None:
    """Print a message once: on the rank that has the error, or on the first where all have the same."""
    if not _is_silent(error):
        endings.note_message(2 if isinstance(error, UserError) else 1)
        sys.stderr.write(f"dbmpi: {error}\n")
        sys.stderr.flush()


def _is_silent(error: Exception | None = None) -> bool:
    """Return whether another rank prints the error; if so, after a moment, as launchers kill all when one ends."""
    if "dbmpi.mpi.world" in sys.modules:
        silent = isinstance(error, ToldElsewhere)
    else:
        from dbmpi.machine.rank_variables import launched

        silent = launched(os.environ)[2] > 0
    if silent:
        time.sleep(_MOMENT)
    return silent
