"""The one form of all benchmarks: options, fair timing, what the machine can do, and the report.

A benchmark is run as ``python benchmarks/NAME.py [--quick] [--json]``.  It prints tables for people; with ``--json``
its last line is one JSON object::

    {"benchmark": NAME, "machine": {...}, "targets": [{"what": ..., "value": ..., "target": ..., "ok": ...}, ...]}

Machines are shared and noisy.  What is compared is therefore timed in turn, A B A B, each in a process of its own with
its own settings, and the ratio of the medians is what counts.  A measurement is taken again where the cores were not
wholly ours (see :class:`Cores`).

Only the standard library is imported here, as threads must be settled before NumPy is loaded, and as peers
run in an environment that has PyTorch and nothing of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from machine import describe as machine
from machine import lines, peaks, summary

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

_PATIENCE, _QUICK_PATIENCE = 200.0, 20.0
"""Seconds for which a benchmark waits for cores of its own, altogether; and with ``--quick``."""
_END = "end"
"""Tells a contestant that nothing is left to do."""

Action = Callable[[], Mapping[str, Any]]


def options(description: str | None, **more: str) -> argparse.Namespace:
    """Read the options that every benchmark has, ``quick`` and ``json``, and `more` flags: what each one says."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a look, not a measurement")
    parser.add_argument(
        "--json", action="store_true", help="print machine, results and targets as JSON on the last line"
    )
    for name, says in more.items():
        parser.add_argument(f"--{name}", action="store_true", help=says)
    found = parser.parse_args()
    if found.quick:
        cores.patience = _QUICK_PATIENCE
    return found


def resumable_options(description: str | None, quick: str) -> argparse.Namespace:
    """Read the options of a benchmark of many long runs: those of all, and two more; `quick` says what a look is."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print machine, results and targets as JSON at the end")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: nowhere)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after this time")
    return parser.parse_args()


@dataclass
class Report:
    """What a benchmark found, for people as it comes and for programs at the end."""

    name: str
    as_json: bool
    targets: list[dict[str, Any]] = field(default_factory=list)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table; numbers are shown with three digits."""
        cells = [list(header), *([_shown(value) for value in row] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        print(f"\n{title}")
        for number, row in enumerate(cells):
            first, *others = row
            line = [
                first.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
            ]
            print("  " + "  ".join(line).rstrip())
            if number == 0:
                print("  " + "  ".join("-" * width for width in widths))
        sys.stdout.flush()

    def at_least(self, what: str, value: float, target: float) -> None:
        """Record a target that a value must reach."""
        self._add(what, value, target, value >= target)

    def at_most(self, what: str, value: float, target: float) -> None:
        """Record a target that a value must not exceed."""
        self._add(what, value, target, value <= target)

    def _add(self, what: str, value: float, target: float, ok: bool) -> None:
        self.targets.append({"what": what, "value": round(float(value), 4), "target": target, "ok": bool(ok)})

    def finish(self) -> None:
        """Print the machine with the peaks that it reaches now, the targets, and the JSON object if it is wanted."""
        found = machine() | {"peaks": peaks()}
        self.table("Machine", ("what", "found"), summary(found))
        rows = [(one["what"], one["value"], one["target"], "yes" if one["ok"] else "NO") for one in self.targets]
        if rows:
            self.table("Targets", ("what", "value", "target", "reached"), rows)
        if cores.looks:
            print(f"\nA core was shared with others in {cores.shared} of {cores.looks} looks.")
        if self.as_json:
            print(json.dumps({"benchmark": self.name, "machine": found, "targets": self.targets}), flush=True)


def environment(threads: int, **more: str) -> dict[str, str]:
    """Return the environment of a contestant that may use so many threads."""
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), **more}


class Contestant:
    """A program in a process of its own that does one piece of work whenever it is told to.

    The program calls :func:`serve`.  While others work, it waits for its standard input.

    Parameters
    ----------
    command
        The program and its arguments.
    threads
        For how many threads its libraries are set.
    more
        Further environment variables.
    """

    def __init__(self, command: Sequence[str | Path], threads: int = 1, **more: str) -> None:
        self._command = [str(part) for part in command]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(threads, **more),
        )

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a launcher need not pass the end of its input on
            print(_END, file=self._process.stdin, flush=True)
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def do(self, action: str = "step") -> dict[str, Any]:
        """Let it do something once, and return what it tells."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the next line notices
            print(action, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self._command)} ended with exit code {self._process.wait()}")
        return dict(json.loads(answer))


def serve(**actions: Action) -> None:
    """Be a contestant: for each line of standard input do the action that it names, and print its answer."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed must not get between the answers
    for line in sys.stdin:
        if line.strip() == _END:
            break
        print(json.dumps(actions[line.strip()]()), file=answers, flush=True)


def serve_together(comm: Any, **actions: Action) -> None:
    """Be a contestant of several ranks: rank 0 reads and answers, all do what it reads."""
    import numpy as np

    from dbmpi.mpi import waiting

    names = list(actions)
    number = np.zeros(1, np.int64)

    def told(name: str) -> Action:
        def action() -> Mapping[str, Any]:
            number[0] = names.index(name)
            waiting.broadcast(comm, number, 0, "what to do")
            return actions[name]()

        return action

    if comm.rank == 0:
        serve(**{name: told(name) for name in names})
        number[0] = len(names)
        waiting.broadcast(comm, number, 0, "what to do")
        return
    while True:
        waiting.broadcast(comm, number, 0, "what to do")
        if number[0] == len(names):
            return
        actions[names[number[0]]]()


def timed(work: Callable[[], Any]) -> Action:
    """Return an action that does some work and tells its seconds, and those of the processor in all threads.

    Where other programs want the cores, too, the processor's time of one thread is what can be compared.
    """

    def action() -> Mapping[str, Any]:
        start, processor = time.perf_counter(), time.process_time()
        work()
        return {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}

    return action


def repeated(work: Callable[[], Any], least: float = 0.02) -> Action:
    """Return an action as `timed` does, of short work that is repeated for `least` seconds; it tells those of one."""
    work()
    start = time.perf_counter()
    work()
    times = max(1, math.ceil(least / max(time.perf_counter() - start, 1e-6)))
    whole = timed(lambda: [work() for _ in range(times)])
    return lambda: {name: seconds / times for name, seconds in whole().items()}


_LOOP = """
import os, sys, time

def loop():
    start, total = time.perf_counter(), 0
    for number in range(20_000):
        total += number * number
    return time.perf_counter() - start

os.sched_setaffinity(0, {int(sys.argv[1])})
for line in sys.stdin:
    print(min(loop() for _ in range(3)), flush=True)
"""


class Cores:
    """Tells whether the cores are shared with somebody else, by a loop of Python on each.

    Cores of a virtual machine are often halves of real ones, whose other halves work for other machines, or for each
    other.  While they do so, the loop takes nearly twice its time, and what is measured up to 1.7 times: for seconds at
    a time, and with nothing to be seen in the system's own numbers.

    Attributes
    ----------
    looks, shared
        How often it was asked, and how often it found a core that was shared.
    patience
        Seconds that are left to wait for cores of our own, and to take measurements again.
    """

    _SLOWER = 1.4

    def __init__(self) -> None:
        self.looks = self.shared = 0
        self.patience = _PATIENCE
        self._best = float("inf")
        self._loops: list[subprocess.Popen[str]] = []

    def ours(self, together: bool = True) -> bool:
        """Return whether each core is as fast as one has ever been: all at once, or one after the other."""
        if not self._loops:
            for core in _whole_cores():
                command = (sys.executable, "-I", "-S", "-c", _LOOP, str(core))
                self._loops.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        seconds: list[float] = []
        for group in [self._loops] if together else [[loop] for loop in self._loops]:
            for loop in group:
                print(file=loop.stdin, flush=True)
            seconds += [float(loop.stdout.readline()) for loop in group if loop.stdout is not None]
        self._best = min(self._best, *seconds)
        ours = max(seconds) <= self._SLOWER * self._best
        self.looks += 1
        self.shared += not ours
        return ours


def _whole_cores() -> list[int]:
    """Return one processor of each core that this process may use: loops on both halves would slow each other down."""
    first: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        halves = "".join(lines(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"))
        first.setdefault(halves or str(core), core)
    return list(first.values())


cores = Cores()
"""Those of this machine."""


def in_turn(rounds: int, *, together: bool = True, **work: Callable[[], Any]) -> dict[str, list[Any]]:
    """Measure several things in turn, A B A B, after one round that does not count.

    It waits until the cores are ours, and takes a measurement again where a core was shared just after it; with the
    patience of `Cores` for all of them together.  What takes more than a second is not taken again: somebody may
    have come and gone in between.

    Parameters
    ----------
    rounds
        Measurements of each.
    together
        Whether the cores are to be ours all at once, as work on several needs them.
    work
        What measures.
    """
    values: dict[str, list[Any]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, measure in work.items():
            value = undisturbed(measure, together)
            if number > 0:
                values[name].append(value)
    return values


def undisturbed(measure: Callable[[], Any], together: bool = True) -> Any:
    """Measure once the cores are ours, and again where they have not been, as :func:`in_turn` does."""
    while True:
        began = time.monotonic()
        while not cores.ours(together) and time.monotonic() - began < cores.patience:
            time.sleep(0.05)
        start = time.monotonic()
        value = measure()
        end = time.monotonic()
        cores.patience -= start - began
        if end - start > 1 or cores.patience <= 0 or cores.ours(together):
            return value
        cores.patience -= end - start


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Return the quartiles for people, in the unit of the values."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"{low:.3g} to {high:.3g}"


def peers_python() -> Path:
    """Return the Python of the peers' environment; ends the program where it has not been made."""
    if not PEERS_PYTHON.exists():
        sys.exit("The peers need an environment with PyTorch: make bench-peers")
    return PEERS_PYTHON


def on_ranks(ranks: int, *program: str) -> tuple[str, ...]:
    """Return the command that runs a program of this Python under the MPI of its environment."""
    mpirun = Path(sys.executable).parent / "mpirun"
    options: tuple[str, ...] = ()
    if "Open MPI" in subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=True).stdout:
        options = ("--oversubscribe", "--bind-to", "none", "--allow-run-as-root")
    return (str(mpirun), *options, "-n", str(ranks), sys.executable, *program)


def free_port() -> int:
    """Return the number of a TCP port of this host that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def prepare_runtime() -> None:
    """Settle threads, BLAS kernel and the cache of compiled code as every run does; before NumPy is imported."""
    from dbmpi.machine import environment

    print(environment.prepare(), file=sys.stderr)


def fma_peak() -> Callable[[], Mapping[str, Any]]:
    """Return an action that measures the float32 multiply-add peak of one core, in operations a second."""
    from dbmpi.kernels.peaks import multiply_add_peak

    return lambda: {"flops": multiply_add_peak()}


def bfloat16_peak() -> Callable[[], Mapping[str, Any]]:
    """Return an action that measures the peak of one core on bfloat16 numbers, in operations a second."""
    from dbmpi.kernels import bfloat16

    return lambda: {"flops": bfloat16.peak()}


def copy_bandwidth(mebibytes: int = 256) -> Callable[[], Mapping[str, Any]]:
    """Return an action that measures how fast one core copies memory, in bytes read and written a second."""
    import numpy as np

    source = np.ones(mebibytes << 20, np.uint8)
    target = np.zeros_like(source)

    def action() -> Mapping[str, Any]:
        start = time.perf_counter()
        np.copyto(target, source)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "bytes": 2 * source.nbytes / seconds}

    return action


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
