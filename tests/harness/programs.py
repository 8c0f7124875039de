"""A program under test: started in a session of its own, watched, and ended whole.

Launchers put ranks into process groups of their own, and ranks may start further programs; killing the group of the
launcher leaves them behind.  Every process of a program therefore carries a mark in its environment, by which all of
them are found in ``/proc``.  Where there is no ``/proc``, only the launcher's own group is reached.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from harness.environment import rank_by_environment, timeout_scale

MARK = "DBMPI_TEST_PROGRAM"
_PROC = Path("/proc")
_SEGMENTS = ("mpich_", "sm_segment.", "osc_", "vader_segment.", "ucx_")


class Program:
    """A started program; `argv` is the whole command, launcher included.

    Standard output and error go to the files ``stdout`` and ``stderr`` in `directory`.
    """

    def __init__(
        self, argv: Sequence[str], *, directory: Path, env: Mapping[str, str], cwd: Path | str | None = None
    ) -> None:
        self.argv = [str(part) for part in argv]
        self.stdout_path, self.stderr_path = directory / "stdout", directory / "stderr"
        self._mark = uuid.uuid4().hex
        self.segments: set[Path] = set()
        """Shared memory that an MPI has made for the program; it stays behind when a rank is killed."""
        self._look = 0.0
        # Programs may be nested (tests of this harness run tests): the mark is added to those of the outer ones.
        marked = {**env, MARK: f"{os.environ.get(MARK, '')} {self._mark}".strip()}
        # Where Open MPI keeps the files of a session: a name in /tmp is made of the process id, and mpirun cannot start
        # where one of the same id, perhaps of days ago, was killed before it could tidy up.
        marked["PRTE_MCA_prte_tmpdir_base"] = str(directory)
        self.started = time.monotonic()
        with self.stdout_path.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=marked,
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def stdout(self) -> str:
        """Everything written to standard output so far."""
        return self.stdout_path.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """Everything written to standard error so far."""
        return self.stderr_path.read_text(encoding="utf-8", errors="replace")

    @property
    def returncode(self) -> int | None:
        """Exit code of the command (negative: the signal it died of), or None while it runs."""
        return self.process.poll()

    def wait(self, timeout: float) -> bool:
        """Wait for the command to end; return whether it did within `timeout` seconds."""
        return self.wait_until(lambda: self.returncode is not None, timeout)

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition()` is true, for `timeout` seconds at most; return whether it is."""
        deadline = time.monotonic() + timeout
        while not condition():
            now = time.monotonic()
            if now > deadline:
                return False
            if now > self._look:
                self._note_segments()
            time.sleep(0.02)
        return True

    def processes(self) -> list[int]:
        """Return the ids of all living processes of the program, those of grandchildren included."""
        if not _PROC.is_dir():
            return [] if self.returncode is not None else [self.process.pid]
        mark = self._mark.encode()
        return [pid for pid in _process_ids() if mark in _environment(pid)]

    def ranks(self) -> dict[int, int]:
        """Return the process id of every living rank; a rank's own children do not count."""
        found: dict[int, int] = {}
        for pid in sorted(self.processes(), reverse=True):
            rank = _rank(pid)
            if rank is not None and _rank(_parent(pid)) is None:
                found[rank] = pid
        return dict(sorted(found.items()))

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to the command that was started."""
        self._note_segments()  # the signal may be the rank's end
        os.kill(self.process.pid if rank is None else self.ranks()[rank], number)

    def send(self, pids: Iterable[int], number: int) -> None:
        """Send a signal to processes of the program; one that has ended meanwhile is passed over."""
        _send(set(pids) & set(self.processes()), number)

    def dump_and_end(self) -> None:
        """Let every rank write the stacks of its threads to standard error, then end everything.

        SIGABRT makes Python's fault handler, which the environment variable PYTHONFAULTHANDLER has switched on, write
        the stacks from within the signal: also when the rank hangs in compiled code.  The launcher is halted
        meanwhile, since it would kill the other ranks at the first one's death.
        """
        ranks = set(self.ranks().values())
        others = set(self.processes()) - ranks
        _send(others, signal.SIGSTOP)
        _send(ranks, signal.SIGABRT)
        _send(ranks, signal.SIGCONT)
        self.wait_until(lambda: not ranks & set(self.processes()), 3.0 * timeout_scale())
        _send(others, signal.SIGCONT)
        self.wait_until(lambda: not self.processes(), 1.0)
        self.end()

    def end(self) -> list[str]:
        """Kill whatever is left of the program; return the command lines of what was killed."""
        self._note_segments()
        killed: dict[int, str] = {}
        deadline = time.monotonic() + 10.0
        while left := self.processes():
            killed |= {pid: _command_line(pid) for pid in left if pid not in killed}
            _send(left, signal.SIGKILL)
            if self.process.pid in left:
                self.process.wait(10.0)
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {left} do not die of SIGKILL")
            time.sleep(0.01)
        self.process.wait(10.0)
        for segment in self.segments:
            segment.unlink(missing_ok=True)
        return [line for line in killed.values() if line]

    def _note_segments(self) -> None:
        self._look = time.monotonic() + 0.2
        self.segments.update(*(shared_memory_of(pid) for pid in self.processes()))


def shared_memory_of(pid: int) -> set[Path]:
    """Return the files in ``/dev/shm`` that an MPI has made and this process maps."""
    try:
        lines = (_PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    names = (line.partition("/dev/shm/")[2] for line in lines)
    return {Path("/dev/shm") / name for name in names if name.startswith(_SEGMENTS) and not name.endswith("(deleted)")}


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _process_ids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _environment(pid: int) -> bytes:
    """Return the environment that a process was started with; of a dead or foreign one it is empty."""
    try:
        return (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return b""


def _rank(pid: int) -> int | None:
    pairs = (entry.partition("=") for entry in _environment(pid).decode(errors="replace").split("\0"))
    return rank_by_environment({name: value for name, _, value in pairs})


def _parent(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command_line(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""
