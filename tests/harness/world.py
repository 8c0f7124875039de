"""One start of the launcher that runs many tests, as seen from outside: what its ranks have reported, and its end."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import rank
from harness.environment import command, mpi_environment, timeout_scale
from harness.programs import Program
from harness.reports import Broken, from_data

_TAIL_LINES = 80
_ENDED_SECONDS = 3.0


class World:
    """The ranks of one launcher, running `tests` (node ids) in the session's configuration."""

    def __init__(self, config: pytest.Config, size: int, tests: Sequence[str]) -> None:
        self.size = size
        self.tests = list(tests)
        self.begun = False
        """Whether all ranks have started MPI and collected the tests."""
        self.reports: dict[str, dict[int, list[pytest.TestReport]]] = {test: {} for test in tests}
        """What has been reported so far: by test, by rank."""
        self._config = config
        self._pids: dict[int, int] = {}
        self._ended: set[int] = set()
        self._why: str | None = None
        self._failed_since: dict[str, float] = {}
        self._offsets = [0] * size
        self._directory = Path(tempfile.mkdtemp(prefix="dbmpi-tests-"))
        (self._directory / "plan.json").write_text(json.dumps(self.tests), encoding="utf-8")
        environment = mpi_environment() | {rank.DIRECTORY: str(self._directory), "PYTHONFAULTHANDLER": "1"}
        self._program = Program(
            command(size, [sys.executable, "-m", "pytest", *self._arguments()]),
            directory=self._directory,
            env=environment,
            cwd=config.invocation_params.dir,
        )

    def wait_for_begin(self) -> Broken | None:
        """Wait until all ranks stand before the first test; return what went wrong, if anything."""
        limit = rank.START_SECONDS * timeout_scale()
        broken = self._wait(lambda: len(self._pids) == self.size, limit, "did not start", None)
        self.begun = broken is None
        return broken

    def wait_for(self, test: str, seconds: float) -> Broken | None:
        """Wait until every rank has finished a test; return why not, if one does not."""
        return self._wait(lambda: len(self.reports[test]) == self.size, seconds, "is still running", test)

    def wait_for_end(self) -> Broken | None:
        """Wait until the launcher has ended after the last test; return what went wrong, if anything."""
        limit = rank.END_SECONDS * timeout_scale()
        if not self._program.wait(limit):
            return self._broken(f"the {self.size} ranks do not end within {limit:g} s of the last test", dump=True)
        self._read()
        if self._program.returncode != 0 or len(self._ended) != self.size:
            return self._broken(f"the launcher ended with exit code {self._program.returncode} after the last test")
        return None

    def end(self) -> None:
        """Kill what is left of the world, and remove its files."""
        self._program.end()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _arguments(self) -> list[str]:
        """Return pytest's arguments: the same configuration, and the files in which the tests are."""
        config = self._config
        files = dict.fromkeys(str(config.rootpath / test.partition("::")[0]) for test in self.tests)
        options = [
            "-p",
            "no:cacheprovider",
            "--color=no",
            f"--rootdir={config.rootpath}",
            f"--tb={config.option.tbstyle}",
        ]
        if config.inipath is not None:
            options += ["-c", str(config.inipath)]
        if config.option.showlocals:
            options.append("--showlocals")
        for warning in config.known_args_namespace.pythonwarnings or ():
            options += ["-W", warning]
        return [*options, *("-v" for _ in range(config.option.verbose)), *files]

    def _wait(self, condition: Any, seconds: float, what: str, test: str | None) -> Broken | None:
        """Poll until `condition()`; give up as soon as it cannot come true any more."""
        deadline = time.monotonic() + seconds
        gone_since: float | None = None
        while True:
            ended = self._program.returncode is not None
            self._read()  # after the question: what was written before the end is seen
            if condition():
                return None
            now = time.monotonic()
            if self._why is not None:
                return self._broken(self._why)
            if ended:
                return self._broken(
                    f"the launcher ended with exit code {self._program.returncode}{self._unfinished(test)}"
                )
            gone = [r for r, pid in self._pids.items() if r not in self._ended and not _lives(pid)]
            gone_since = (gone_since or now) if gone else None
            if gone_since is not None and now > gone_since + _ENDED_SECONDS:
                return self._broken(f"rank {gone[0]} of {self.size} is gone, but the launcher goes on", dump=True)
            failed_since = self._failed_since.get(test or "", now)
            patience = rank.AFTER_FAILURE_SECONDS * timeout_scale()
            if now > failed_since + patience:
                headline = f"still waiting {patience:g} s after another rank has failed{self._unfinished(test)}"
                return self._broken(headline, dump=True)
            if now > deadline:
                return self._broken(f"{what} after {seconds:g} s{self._unfinished(test)}", dump=True)
            self._program.wait_until(lambda: False, 0.02)

    def _unfinished(self, test: str | None) -> str:
        """Return who has not finished, for a message."""
        done = self._pids if test is None else self.reports[test]
        missing = [r for r in range(self.size) if r not in done]
        return f": rank {', '.join(map(str, missing))} of {self.size}" if missing else ""

    def _broken(self, headline: str, *, dump: bool = False) -> Broken:
        if dump:
            self._dump()
        stacks = {r: _text(self._directory / f"rank-{r}.stacks") for r in range(self.size)}
        if dump and not all(stacks.values()):
            self._program.dump_and_end()  # it hangs before or after the time in which the harness can dump
        output = "\n".join([*self._program.stdout.splitlines(), *self._program.stderr.splitlines()][-_TAIL_LINES:])
        return Broken(headline, stacks, output)

    def _dump(self) -> None:
        """Ask every rank for its stacks, and wait until they are written, for a while."""
        self._program.send((self._pids or self._program.ranks()).values(), rank.DUMP_SIGNAL)
        paths = [self._directory / f"rank-{r}.stacks" for r in range(self.size)]
        self._program.wait_until(lambda: all(_text(path) for path in paths), 2.0 * timeout_scale())
        before, now = -1, 0
        while before != now:  # until the last line is written, too
            time.sleep(0.2)
            before, now = now, sum(len(_text(path)) for path in paths)

    def _read(self) -> None:
        """Take in what the ranks have written since the last time."""
        for r in range(self.size):
            path = self._directory / f"rank-{r}.jsonl"
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._offsets[r])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offsets[r] += len(line)
                    self._take(r, json.loads(line))

    def _take(self, r: int, event: dict[str, Any]) -> None:
        match event["event"]:
            case "ready":
                self._pids[r] = event["pid"]
                self._program.segments.update(map(Path, event["segments"]))
            case "finish":
                test = event["test"]
                self.reports[test][r] = [from_data(self._config, data) for data in event["reports"]]
                if event["failed"]:
                    self._failed_since.setdefault(test, time.monotonic())
            case "broken":
                self._why = self._why or event["why"]
            case "end":
                self._ended.add(r)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _lives(pid: int) -> bool:
    """Return whether a process exists and has not ended; where that cannot be seen, it is taken for living."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return state not in ("Z", "X")
