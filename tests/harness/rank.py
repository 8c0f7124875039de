"""One rank of a test session under a launcher: it runs the tests in step with the other ranks.

What a rank sees goes line by line into a file of its own, so that it can be read whatever becomes of the rank:
``ready`` after collection, ``start`` and ``finish`` of every test, ``broken`` where it cannot go on, ``end``.
After each test the ranks agree that all have finished it.  A rank that fails therefore does not run ahead of one that
still waits for it; and a test in which somebody waits for ever ends with everybody's stacks, by the supervisor or here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from _pytest.runner import runtestprotocol

from harness import reports
from harness.environment import rank_by_environment, timeout_scale
from harness.programs import shared_memory_of
from harness.selection import seconds_of, size_of

if TYPE_CHECKING:
    from mpi4py import MPI

DIRECTORY = "DBMPI_TEST_DIRECTORY"
"""Environment variable by which the supervisor says where the plan lies and where the ranks report."""
DUMP_SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
"""Makes a rank write its stacks; programs under test use no real-time signal."""
START_SECONDS = 120.0
END_SECONDS = 40.0
AFTER_FAILURE_SECONDS = 10.0
"""Time that the other ranks have to finish a test after one has failed it: they are likely to wait for that one."""
_BEHIND_SUPERVISOR_SECONDS = 15.0
_FOR_STACKS_SECONDS = 2.0
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class RankSession:
    """The plugin of a session on one rank, started by the supervisor or by hand."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._supervised = DIRECTORY in os.environ
        self._rank = rank_by_environment() or 0
        self._tests = 0
        self.comm: MPI.Intracomm
        if self._supervised:
            self._directory = Path(os.environ[DIRECTORY])
            self._stacks = os.open(
                self._directory / f"rank-{self._rank}.stacks", os.O_WRONLY | os.O_CREAT | os.O_APPEND
            )
        else:
            self._stacks = os.dup(2)  # while tests run, pytest keeps what they write to descriptor 2
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._arm(START_SECONDS * timeout_scale())
        self._join()
        self._log = os.open(self._log_path(self._rank), _APPEND)
        config.option.basetemp = str(self._directory / f"tmp-{self._rank}")
        if self._rank != 0:  # one terminal report is enough: the outcomes are merged
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def shared_path(self) -> Path:
        """Return the directory of the running test, which is the same on every rank."""
        path = self._directory / f"shared-{self._tests}"
        path.mkdir(exist_ok=True)
        return path

    def _join(self) -> None:
        """Start MPI, and make sure that it is the world that the launcher meant."""
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD.Dup()
        expected = next((int(os.environ[n]) for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if n in os.environ), None)
        if (expected or self._world.size) != self._world.size or self._world.rank != self._rank:
            sys.exit(
                f"rank {self._rank} of {expected} of the launcher is rank {self._world.rank} of {self._world.size} of "
                "mpi4py's MPI: launcher and mpi4py belong to different MPIs"
            )
        self._pids = self._world.allgather(os.getpid())
        MPI.pickle.__init__(_refused_to_the_library(pickle.dumps), _refused_to_the_library(pickle.loads))
        if not self._supervised:
            own = tempfile.mkdtemp(prefix="dbmpi-tests-") if self._rank == 0 else None
            self._directory = Path(self._world.bcast(own))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, object, object]:
        result = yield
        if self._supervised:
            plan = json.loads((self._directory / "plan.json").read_text(encoding="utf-8"))
            by_id = {item.nodeid: item for item in items}
            missing = [nodeid for nodeid in plan if nodeid not in by_id]
            if missing:
                self._leave(f"rank {self._rank} does not find {missing[0]}")
            items[:] = [by_id[nodeid] for nodeid in plan]
        else:
            other = [item for item in items if size_of(item) != self._world.size]
            items[:] = [item for item in items if size_of(item) == self._world.size]
            config.hook.pytest_deselected(items=other)
        return result

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._leave(f"rank {self._rank} cannot collect the tests:\n{report.longreprtext}")

    def pytest_internalerror(self, excrepr: Any) -> None:
        self._leave(f"pytest failed on rank {self._rank}:\n{excrepr}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        segments = [str(path) for path in shared_memory_of(os.getpid())]
        self._write(event="ready", pid=os.getpid(), segments=segments)
        self._agree(0)
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        self._tests += 1
        self._arm(seconds_of(item))
        self._write(event="start", test=item.nodeid)
        self.comm = self._world.Dup()  # all ranks have just agreed, so that nobody waits here
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        try:
            own = runtestprotocol(item, log=False, nextitem=nextitem)
        except (KeyboardInterrupt, pytest.exit.Exception) as error:
            self._leave(f"rank {self._rank} was stopped in {item.nodeid}: {error!r}")
        failed = any(report.failed for report in own)
        data = [reports.to_data(self._config, report) for report in own]
        self._write(event="finish", test=item.nodeid, failed=failed, reports=data)
        if self._agree(int(failed), own) == 0 and self.comm:
            self.comm.Free()  # after a failure something may still be under way on it: it is left alone
        for report in own if self._supervised else self._merged(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self) -> None:
        self._arm(self._seconds)  # pytest has just disarmed the fault handler

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._arm(END_SECONDS * timeout_scale())
        self._agree(0)
        if self._supervised:
            self._write(event="end")
            session.exitstatus = pytest.ExitCode.OK  # outcomes are in the file; other codes make launchers kill ranks
        elif self._rank == 0:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _arm(self, seconds: float) -> None:
        """Give everything from now on so many seconds; then come the stacks, and a little later the end.

        Neither needs the interpreter: a thread of the fault handler writes, and the alarm is the kernel's.
        """
        self._seconds = seconds
        behind = seconds + (_BEHIND_SUPERVISOR_SECONDS if self._supervised else 0.0)
        self._deadline = time.monotonic() + behind
        faulthandler.dump_traceback_later(behind, file=self._stacks)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, behind + _FOR_STACKS_SECONDS)

    def _agree(self, value: int, own: Sequence[pytest.TestReport] = ()) -> int:
        """Return the sum of all ranks' values when every rank has come here; naps, so that a late rank has the core."""
        mine, total = array("i", [value]), array("i", [0])
        deadline = self._deadline
        if value and not self._supervised:
            deadline = min(deadline, time.monotonic() + AFTER_FAILURE_SECONDS * timeout_scale())
        request = self._world.Iallreduce(mine, total)
        nap = 1e-5
        while not request.Test():
            if time.monotonic() > deadline:
                told = "\n".join(report.longreprtext for report in own if report.failed)
                self._leave(f"rank {self._rank} waits in vain for the other ranks to finish the test\n{told}")
            time.sleep(nap)
            nap = min(2 * nap, 5e-3)
        return total[0]

    def _leave(self, why: str) -> NoReturn:
        """End the whole world, at once and without MPI, after everybody's stacks if there is no supervisor to ask."""
        if self._supervised:
            self._write(event="broken", why=why)
        else:
            os.write(self._stacks, f"{why}\n".encode())
            for pid in self._pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, DUMP_SIGNAL)
            time.sleep(_FOR_STACKS_SECONDS)
        os._exit(3)

    def _log_path(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}.jsonl"

    def _write(self, **event: Any) -> None:
        os.write(self._log, (json.dumps(event) + "\n").encode())

    def _merged(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Return the outcome of a test over all ranks, which have all written theirs."""
        every: dict[int, list[pytest.TestReport]] = {}
        for rank in range(self._world.size):
            lines = self._log_path(rank).read_text(encoding="utf-8").splitlines()
            events = (json.loads(line) for line in reversed(lines))  # the last one may be the start of the next test
            finish = next(event for event in events if (event["event"], event.get("test")) == ("finish", item.nodeid))
            every[rank] = [reports.from_data(self._config, data) for data in finish["reports"]]
        return reports.merge(item, every)


def _refused_to_the_library(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return mpi4py's pickling for tests only: dbmpi sends buffers, and never unpickles what arrives."""

    def guarded(*arguments: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]  # mpi4py itself is compiled and has no frame
        assert caller.partition(".")[0] != "dbmpi", f"{caller} uses a method of mpi4py that pickles"
        return function(*arguments)

    return guarded
