"""Programs under the launcher, for tests of failures: run, sabotaged, and never left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from harness.environment import command, mpi_environment, plain_environment, timeout_scale
from harness.programs import Program

PATIENCE = 5.0
"""Seconds in which the processes of a program must be gone when its command has ended."""


@dataclass(frozen=True)
class Completed:
    """A program that has ended by itself."""

    argv: tuple[str, ...]
    returncode: int
    """Exit code; negative: the signal that ended the command."""
    stdout: str
    stderr: str
    seconds: float
    left: tuple[str, ...]
    """Command lines of processes that were still there when the command had ended, and have been killed."""

    @property
    def output(self) -> str:
        """Standard output, then standard error."""
        return self.stdout + self.stderr

    @property
    def transcript(self) -> str:
        """What happened, for the message of an assertion: ``assert done.returncode == 2, done.transcript``."""
        return f"{' '.join(self.argv)}\nexit code {self.returncode} after {self.seconds:.1f} s\n{self.output}"


class Launch:
    """Starts programs; ends all of them when it is left.

    Examples
    --------
    >>> done = launch(3, [sys.executable, "program.py"], timeout=30)
    >>> assert done.returncode == 2, done.transcript
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started = 0
        self._open = ExitStack()

    def __call__(
        self,
        n: int | None,
        argv: Sequence[str | Path],
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Completed:
        """Run `argv` (the whole command of a rank) on `n` ranks, or without a launcher if `n` is None.

        A program that does not end within `timeout` seconds fails the test, with its output and its ranks' stacks.
        """
        return self.finish(self.start(n, argv, env, cwd), timeout)

    def start(
        self,
        n: int | None,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Program:
        """Start `argv` as :meth:`__call__` does and return at once; the program can then be looked at and signalled."""
        self._started += 1
        directory = self._directory / str(self._started)
        directory.mkdir()
        plain = [str(part) for part in argv]
        program = Program(
            plain if n is None else command(n, plain),
            directory=directory,
            env={
                **(plain_environment() if n is None else mpi_environment()),
                "PYTHONFAULTHANDLER": "1",
                "PYTHONUNBUFFERED": "1",
                **(env or {}),
            },
            cwd=cwd or directory,
        )
        self._open.callback(program.end)
        return program

    def finish(self, program: Program, timeout: float) -> Completed:
        """Wait for a started program to end; fail the test if it does not within `timeout` seconds from now."""
        __tracebackhide__ = True
        limit = timeout * timeout_scale()
        if not program.wait(limit):
            program.dump_and_end()
            pytest.fail(f"still running after {limit:g} s: {' '.join(program.argv)}\n{program.stdout}{program.stderr}")
        seconds = program.seconds
        program.wait_until(lambda: not program.processes(), PATIENCE * timeout_scale())
        left = tuple(program.end())
        assert program.returncode is not None
        return Completed(tuple(program.argv), program.returncode, program.stdout, program.stderr, seconds, left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
