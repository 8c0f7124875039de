"""Starting a world of ranks: the command for mpirun, its environment, and how to stop it.

An mpirun of another MPI silently starts N worlds of one rank each; :func:`check_world` notices that on the ranks.

What a launcher does with a signal decides whether the run can still write a checkpoint.  Seen with Open MPI 5.0 and
MPICH 5.0:

==================  =====================================================  ==========================================
sent to             Open MPI's mpirun                                      MPICH's mpiexec (hydra)
==================  =====================================================  ==========================================
SIGINT or SIGTERM   ranks: SIGCONT, 0.25 s later SIGTERM, 0.25 s later     is passed on to the ranks, which may take
                    SIGKILL; no setting changes that                       their time; a second SIGINT kills them
SIGUSR1             is passed on to the ranks, which may take their time   the same
SIGUSR2             is passed on to the ranks, which may take their time   kills mpiexec and with it the ranks
SIGKILL             the ranks go on without it                             kills the ranks
==================  =====================================================  ==========================================

So `dbmpi launch` stays as the parent of mpirun, keeps Ctrl-C away from it by a process group of its own, and sends the
signal after which the ranks can finish: SIGUSR2 to the one, SIGTERM to the other.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dbmpi.errors import ToldElsewhere, UserError
from dbmpi.machine import banners, mpi_library, supervision, threads
from dbmpi.machine.endings import UNFINISHED, chooses_fault_tolerance, documented, explained, read_note
from dbmpi.machine.mpi_library import Mpi
from dbmpi.machine.rank_variables import launched
from dbmpi.machine.signals import HEEDED, SAME_WISH

STOP = signal.SIGUSR2
"""What Open MPI's mpirun passes on to the ranks, which heed it as all of `signals.HEEDED`."""

_FORWARDED = ("COLUMNS", "LD_LIBRARY_PATH", "PYTHONPATH", *threads.VARIABLES)
"""Variables (and all ``DBMPI_*``) that ranks on other nodes need as well; hydra passes on everything by itself."""
_STARTS_MPI = {"train", "sweep", "simulate", "bench", "evaluate", "predict"}
"""Commands whose ranks wait for each other when they start."""
_HOST_LOST = (
    "dbmpi launch: mpirun has ended without an error, but the first rank has not come to its end: mpirun ends all "
    "ranks when it loses a host\n"
)


@dataclass(frozen=True)
class LaunchCommand:
    """A command to execute, and environment variables to set for it."""

    argv: tuple[str, ...]
    settings: Mapping[str, str]

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        return " ".join([*(["env", *settings] if settings else []), shlex.join(self.argv)])


def compose(
    mpi: Mpi,
    ranks: int,
    program: Sequence[str],
    *,
    mpi_arguments: Sequence[str] = (),
    environment: Mapping[str, str],
    columns: int | None = None,
    cores: int | None = None,
    user: int | None = None,
    outlive: bool = False,
) -> LaunchCommand:
    """Compose the command that runs a program of this Python on `ranks` ranks; executes nothing.

    Parameters
    ----------
    mpi
        The launcher, and the MPI that it belongs to.
    ranks
        Number of ranks.
    program
        Arguments for Python, e.g. ``("-m", "dbmpi", "train", "CONFIG.toml")``.
    mpi_arguments
        The user's own options for mpirun.
    environment
        Environment variables; those that the user has set stay.
    columns
        Width of the terminal, where the output goes to one: the ranks then draw a progress bar through mpirun's pipe.
    cores
        Cores of this node, to know whether the ranks are more.
    user
        Number of the user, by default that of this process; Open MPI wants root (0) to confirm.
    outlive
        Whether ranks go on where another one has died, if this MPI can and the user has not chosen.
    """
    # A rank cannot judge by itself: Open MPI gives it a terminal of its own, even if mpirun writes to a file.
    settings = {"DBMPI_PROGRESS": "lines"}
    if columns is not None:
        settings = {"DBMPI_PROGRESS": "bar", "COLUMNS": str(columns)}
    options: list[str] = []
    if mpi.is_open_mpi:
        options = ["--oversubscribe"]
        if not any(word.startswith(("--bind-to", "-bind-to")) or "PE=" in word.upper() for word in mpi_arguments):
            options += ["--bind-to", "none"]  # it may be said only once, and PE=N says it too
        if columns is not None and not mpi.version.startswith("Open MPI v4."):  # which does not know it
            options += ["--stream-buffering", "0"]  # else mpirun holds back the bar, a line without an end
        if (
            outlive
            and ranks > 1
            and mpi.has_fault_tolerance
            and not mpi_library.has_adapter()
            and not chooses_fault_tolerance(mpi_arguments, environment)
        ):
            options += ["--with-ft", "ulfm"]
        if (os.getuid() if user is None else user) == 0:
            settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        settings |= mpi_library.openmpi_settings()
        if cores is not None and ranks > cores:
            settings["OMPI_MCA_mpi_yield_when_idle"] = "1"
    settings = {name: value for name, value in settings.items() if name == "COLUMNS" or name not in environment}
    if mpi.is_open_mpi:
        names = [name for name in (*environment, *settings) if name.startswith("DBMPI_") or name in _FORWARDED]
        options += [word for name in sorted(set(names)) for word in ("-x", name)]
    return LaunchCommand((mpi.mpirun, *options, "-n", str(ranks), *mpi_arguments, sys.executable, *program), settings)


@dataclass(frozen=True)
class Ending:
    """How a job has ended."""

    code: int
    """The exit code, as docs/running.md has them."""
    directory: Path | None = None
    """The directory of its run, if that is known."""
    wished: bool = False
    """Whether a signal to the launcher has asked for the end."""


def run(mpi: Mpi, command: LaunchCommand) -> Ending:
    """Run a command that :func:`compose` made until it ends.

    The signals of `signals.HEEDED` ask the ranks to end with a checkpoint; one that comes later ends them at once.
    Those that are ignored already, as SIGHUP is under nohup, stay ignored.

    Parameters
    ----------
    mpi
        The launcher, and the MPI that it belongs to.
    command
        The command.
    """
    ours = "dbmpi" in command.argv  # another program may end with any code
    environment = threads.without_prepared(os.environ) | dict(command.settings)
    with (
        _Relay(mpi) as relay,
        tempfile.TemporaryDirectory(prefix="dbmpi-session-", ignore_cleanup_errors=True) as sessions,
    ):
        if mpi.is_open_mpi:
            # Open MPI names a session's directory after mpirun's process id, and cannot start where one of the same id
            # was killed, perhaps long ago, before it could clean up.
            environment.setdefault("PRTE_MCA_prte_tmpdir_base", sessions)
        note = Path(sessions, "unfinished")
        environment[UNFINISHED] = str(note)
        outputs = banners.Outputs(mpi.is_open_mpi, lambda: bool(relay.asked) or explained(note) is not None)
        try:
            child = subprocess.Popen(
                command.argv,
                env=environment,
                stdin=subprocess.DEVNULL,  # mpirun is not in the terminal's foreground group: reading would stop it
                stdout=outputs.stdout,
                stderr=outputs.stderr,
                pass_fds=outputs.kept,
                process_group=0,
                preexec_fn=_sent_with_our_death(relay.kill),  # noqa: PLW1509 - no threads here
            )
            outputs.start()
            relay.follow(child)
            meets = ours and not _STARTS_MPI.isdisjoint(command.argv)
            code = supervision.wait(child, note, relay.kill) if meets else child.wait()
            unfinished, directory = read_note(note)
            told = explained(note)
        except OSError as error:
            raise UserError(f"{command.argv[0]}: cannot be executed: {error}") from None
        finally:
            outputs.finish()
    code = 128 - code if code < 0 else code
    if relay.ended_by(code):
        return Ending(128 + relay.asked[0], directory, wished=True)
    if code == 0 and unfinished:
        sys.stderr.write(_HOST_LOST)
    if ours and not unfinished and told is not None:
        code = told  # the first rank has come to its end, and what the launcher says of the others does not count
    code = documented(code, bare=ours and not mpi.is_open_mpi, unfinished=unfinished)
    return Ending(code, directory, wished=bool(relay.asked))


class _Relay:
    """Passes on signals to the launcher: the first asks the ranks to end, and a later one ends them at once."""

    def __init__(self, mpi: Mpi) -> None:
        self.kill = signal.SIGTERM if mpi.is_open_mpi else signal.SIGKILL
        self.asked: list[int] = []
        self._end = STOP if mpi.is_open_mpi else signal.SIGTERM
        self._killed = self._sent = False
        self._since = 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Relay:
        heeded = [number for number in HEEDED if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._heed) for number in heeded}
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def follow(self, child: subprocess.Popen[bytes]) -> None:
        """Pass on to this launcher from now on, and also what came before."""
        self._child = child
        if self.asked:
            self._send()

    def ended_by(self, code: int) -> bool:
        """Return whether a launcher with this exit code has ended because of a signal that was passed on.

        The ranks know of the stop by the signal that reached them; our caller, by the one that was sent to us.  Ranks
        that were not ready to end have died of it; hydra then gives the bare number of the signal.
        """
        return bool(self.asked) and (self._killed or code in (self._end, 128 + self._end))

    def _heed(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        first = len(self.asked) == 1
        if first:
            self._since = time.monotonic()
        if not (number == signal.SIGXCPU == self.asked[0]):  # the system repeats it for each further second
            self._killed = self._killed or time.monotonic() - self._since > SAME_WISH
        self._send()
        if first:
            with suppress(OSError):  # nobody may be there to read it
                os.write(
                    2, b"dbmpi launch: asked the ranks to end with a checkpoint; a second signal ends them at once\n"
                )

    def _send(self) -> None:
        """Ask the launcher once to end its ranks; end them whenever that is asked for."""
        if self._child is not None and (self._killed or not self._sent):
            self._sent = True
            self._child.send_signal(self.kill if self._killed else self._end)


def check_world(size: int, environment: Mapping[str, str] | None = None, *, library: str | None = None) -> None:
    """Raise an error if several ranks were started but each became a world of its own.

    Parameters
    ----------
    size
        Number of ranks of the world.
    environment
        By default that of this process.
    library
        Version text of the MPI library, for the message; by default that of this process.

    Raises
    ------
    UserError
        With the fix; on ranks other than the first as `ToldElsewhere`.  ``DBMPI_ALONE=1`` turns the check off.
    """
    environment = os.environ if environment is None else environment
    if size > 1 or environment.get("DBMPI_ALONE", "") not in ("", "0"):
        return
    meant, by, rank = launched(environment)
    if meant <= 1:
        return
    if rank > 0:
        raise ToldElsewhere("the first rank reports that every rank is a world of its own")
    library = _library_version() if library is None else library
    if by == "srun":
        kind = mpi_library.srun_plugin(library)
        fix = f"try srun --mpi={kind} (srun --mpi=list shows what there is), or dbmpi launch in place of srun"
    else:
        fix = f"use the launcher of the same MPI: dbmpi launch -n {meant} -- train CONFIG.toml"
    raise UserError(
        f"{by} started {meant} ranks, but each of them is a world of its own"
        f"{f' under {library}' if library else ''}: {fix}; if that is meant, set DBMPI_ALONE=1"
    )


def check_launcher(library: str, environment: Mapping[str, str]) -> None:
    """Raise an error if this MPI cannot be started by the launcher that has started this process.

    Parameters
    ----------
    library
        Version text of the MPI library; MPICH's says how it was configured.
    environment
        Environment variables of the rank.

    Raises
    ------
    UserError
        With the fix; on ranks other than the first as `ToldElsewhere`.
    """
    ranks, by, rank = launched(environment)
    text = library.lower()
    if ranks <= 1 or "OMPI_COMM_WORLD_SIZE" not in environment or "mpich configure:" not in text or "pmix" in text:
        return
    if rank > 0:
        raise ToldElsewhere("the first rank reports that the launcher is of another MPI")
    raise UserError(
        f"{by} started {ranks} ranks, but the MPI of this Python is {mpi_library.first_line(library)}, which it cannot "
        f"start: use the launcher of the same MPI: dbmpi launch -n {ranks} -- train CONFIG.toml"
    )


def _library_version() -> str:
    module = sys.modules.get("mpi4py.MPI")
    return "" if module is None else mpi_library.first_line(str(module.Get_library_version()))


def _sent_with_our_death(number: signal.Signals) -> Callable[[], object] | None:
    """Return what a child calls before it executes, so that no ranks are left behind even if this process is killed."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None  # not Linux
    return lambda: prctl(1, int(number))  # PR_SET_PDEATHSIG
