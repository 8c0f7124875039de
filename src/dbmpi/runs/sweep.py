"""Several runs on one world of ranks: it is cut into blocks, each of which trains one run after the other.

The blocks have nothing in common but a counter, from which each draws its next run, and messages to rank 0 on what has
become of them.  A run that fails on one rank ends on all ranks of its block, which look for the notice in every wait,
and on no other.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from dbmpi.config import Run
from dbmpi.errors import DIED, EndedByDeath, EndedElsewhere, KnownToAll, RunFailed, ToldElsewhere, UserError
from dbmpi.machine.signals import StopSignal
from dbmpi.mpi import blocking, common_end, failures, topology, waiting
from dbmpi.mpi.failures import RankLost
from dbmpi.mpi.tags import Tag
from dbmpi.mpi.window import Window
from dbmpi.mpi.window import hosts as window_hosts
from dbmpi.mpi.world import together
from dbmpi.result import Result
from dbmpi.runs.training import train

_abandoned: list[BaseException] = []
"""Why runs have failed: their frames hold arrays to which another rank's transfer may still be on its way."""


@dataclass(frozen=True)
class SweptRun:
    """What has become of one run."""

    number: int
    """Of the run, from 0."""
    status: str
    """``done``, ``stopped`` by a signal, ``failed``, or ``not run``."""
    error: str = ""
    """Why it has failed."""
    seconds: float = 0.0
    """From its start to its end, in seconds."""
    steps: int = 0
    """Of all its replicas."""
    samples: int = 0
    """That it has learned from."""
    loss: float | None = None
    """On the test data."""
    accuracy: float | None = None
    """On the test data, from 0 to 1."""
    metrics: tuple[tuple[str, float], ...] = ()
    """Of the objective, on the test data."""
    checkpoint: str = ""
    """The last one."""


def ranks_of(run: Run, ranks: int) -> int:
    """Return how many of so many `ranks` a `run` takes: all, unless its topology says how many it needs."""
    section = run.topology
    fixed = section.replicas is not None and section.shards is not None
    return topology.plan(section, min(ranks, _needed(run)) if fixed else ranks).world


def _needed(run: Run) -> int:
    """Return the ranks that a topology asks for, whose numbers of shards and replicas are given."""
    section = run.topology
    workers = ((section.replicas or 1) + section.spares + section.evaluators) * (section.partitions or 1)
    return workers + (0 if section.colocate else section.shards or 1)


def ranks_each(runs: Sequence[Run], ranks: int, wanted: int | None = None) -> int:
    """Return how many ranks a block has.

    Parameters
    ----------
    runs
        The descriptions.
    ranks
        That were started.
    wanted
        What the user wants; by default as many as the topologies need, or else as let most runs go on at a time.

    Raises
    ------
    UserError
        If there are not so many, or a run does not fit.
    """
    if wanted is None:
        fixed = [_needed(run) for run in runs if run.topology.replicas is not None and run.topology.shards is not None]
        wanted = max(fixed) if fixed else max(1, ranks // len(runs))
    if wanted > ranks:
        raise UserError(
            f"a run of this sweep takes {wanted} ranks, but {ranks} were started: start {wanted} or a multiple "
            "of that, or let each run take fewer, --ranks N"
        )
    for run in runs:
        ranks_of(run, wanted)
    return wanted


class _Tickets:
    """A counter in the memory of rank 0, from which blocks draw the numbers of their further runs (collective)."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._window = Window.allocate(comm, 8, transport="p2p")

    def serve(self) -> bool:
        """Help others to draw, where they are on another host; called in every wait."""
        self._window.sync()
        return self._window.busy

    def draw(self) -> int:
        """Return the next number."""
        while True:
            number = self._window.load(0, 0)
            if self._window.compare_and_swap(0, 0, number, number + 1) == number:
                return number

    def free(self) -> None:
        """Give the memory back (collective)."""
        self._window.free()


class SweepBlocks:
    """The runs of one world, from the view of one rank (collective to make and to run).

    Parameters
    ----------
    runs
        The descriptions, the same on all ranks; each has a directory of its own.
    comm
        All ranks.
    each
        Ranks of a block; those that are left over do nothing.
    stop
        Collects the signals that end all runs with a checkpoint.
    say
        Called on some rank with what has become of each run, when it has ended.

    Attributes
    ----------
    blocks
        How many runs go on at a time.
    """

    def __init__(
        self, runs: Sequence[Run], comm: MPI.Intracomm, each: int, stop: StopSignal, say: Callable[[SweptRun], object]
    ) -> None:
        self._runs, self._stop, self._say = runs, stop, say
        self._comm = blocking.duplicate(comm, "all ranks to begin the sweep")
        self.blocks = min(comm.size // each, len(runs))
        # The ranks of a host one after the other; rank 0 is always the first.
        order = np.lexsort((np.arange(comm.size), window_hosts(self._comm)))
        position = int(np.flatnonzero(order == comm.rank)[0])
        block = position // each
        color = block if block < self.blocks else MPI.UNDEFINED
        self._block = blocking.split(self._comm, color, position, "all ranks to be cut into blocks")
        self._first: int | None = block
        """The number of the first run, which does not depend on which block is faster."""
        self._tickets = _Tickets(self._comm)
        self._sent: list[tuple[MPI.Request, np.ndarray]] = []

    def run(self) -> list[SweptRun]:
        """Train all runs; return on rank 0 what has become of each, in their order, and nothing elsewhere."""
        with waiting.serving(self._tickets.serve):
            while self._block != MPI.COMM_NULL and self._go_on():
                pass
            return self._collect()

    def conclude(self, code: int) -> int:
        """Return on all ranks the exit code that rank 0 gives (collective)."""
        word, comm = np.array([code], np.int64), self._comm
        if comm.rank:
            waiting.until(self._is_told, "the other blocks to finish", serve=self._tickets.serve, seconds=math.inf)
            comm.Recv(word, 0, Tag.FINISHED)
            return int(word[0])
        for rank in {*range(1, comm.size)}.difference(failures.dead(comm)):
            with suppress(RankLost), failures.partner(comm, rank):
                request = comm.Isend(word, rank, Tag.FINISHED)
                failures.complete(request, comm, rank, f"rank {rank} to end", memory=word)
        return code

    def _draw(self) -> int:
        """Return the number of the next run of this block."""
        first, self._first = self._first, None
        return self.blocks + self._tickets.draw() if first is None else first

    def _go_on(self) -> bool:
        """Train the next run of this block; return False where there is none, or the block has lost a rank."""
        word = np.zeros(1, np.int64)
        if self._block.rank == 0:
            word[0] = -1 if self._stop.number else self._draw()
        waiting.broadcast(self._block, word, 0, "the number of the next run")
        number = int(word[0])
        if not 0 <= number < len(self._runs):
            return False
        run = self._runs[number]
        needed = ranks_of(run, self._block.size)
        color = 0 if self._block.rank < needed else MPI.UNDEFINED
        comm = blocking.split(self._block, color, self._block.rank, "the ranks of the next run")
        failed, end = False, None
        if comm != MPI.COMM_NULL:
            with common_end.of_a_part(comm) as end:
                failed = self._train(number, run, comm, end)
        if failures.dead(self._block):
            return False
        votes = np.array([failed], np.int64)
        what = "the other ranks to leave a run"
        failed = bool(waiting.allreduce(self._block, votes, MPI.MAX, what, seconds=math.inf)[0])
        if not failed and end is not None:
            end.free()
            blocking.free(comm)
        return True

    def _train(self, number: int, run: Run, comm: MPI.Intracomm, end: common_end.CommonEnd) -> bool:
        """Train one run, and report what has become of it; return whether it has failed on one rank alone."""
        began = time.monotonic()
        try:
            result = train(run, comm, self._stop)
        except KeyboardInterrupt:
            raise
        except KnownToAll as error:
            if not isinstance(error, ToldElsewhere):
                self._report(SweptRun(number, "failed", str(error), time.monotonic() - began))
            return False
        except BaseException as error:
            _abandoned.append(error)
            if not isinstance(error, EndedElsewhere):
                with suppress(EndedElsewhere):  # another one was faster
                    end.announce(DIED if isinstance(error, EndedByDeath) else 1)
                self._report(SweptRun(number, "failed", _told(error), time.monotonic() - began))
            return True
        if comm.rank == 0:
            self._report(_ended(number, result, time.monotonic() - began))
        return False

    def _report(self, swept: SweptRun) -> None:
        """Tell the user and rank 0 what has become of a run."""
        self._say(swept)
        data = np.frombuffer(json.dumps(asdict(swept)).encode(), np.uint8).copy()
        with suppress(RankLost), failures.partner(self._comm, 0):
            self._sent.append((self._comm.Isend([data, MPI.BYTE], 0, Tag.SWEPT_RUN), data))

    def _collect(self) -> list[SweptRun]:
        """Wait until all ranks have finished; return on rank 0 what they have reported."""
        word, comm = np.array([len(self._sent)], np.int64), self._comm
        if comm.rank:
            for request, data in self._sent:
                failures.complete(request, comm, 0, "rank 0 to hear what has become of a run", memory=data)
            failures.complete(comm.Isend(word, 0, Tag.FINISHED), comm, 0, "rank 0 to hear of the end", memory=word)
            return []
        found: dict[int, SweptRun] = {}
        expected, heard = {0: len(self._sent)}, dict.fromkeys(range(comm.size), 0)

        def all_finished() -> bool:
            status = MPI.Status()
            while failures.probe(comm, Tag.SWEPT_RUN, status):
                data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                comm.Recv([data, MPI.BYTE], status.source, Tag.SWEPT_RUN)
                heard[status.source] += 1
                swept = SweptRun(**json.loads(data.tobytes()))
                if swept.number not in found or found[swept.number].status != "failed":
                    found[swept.number] = swept
            while failures.probe(comm, Tag.FINISHED, status):
                comm.Recv(word, status.source, Tag.FINISHED)
                expected[status.source] = int(word[0])
            lost = failures.dead(comm)
            return all(heard[rank] == expected.get(rank) or rank in lost for rank in heard)

        waiting.until(all_finished, "the other blocks to finish", seconds=math.inf)
        return [found.get(number, SweptRun(number, "not run")) for number in range(len(self._runs))]

    def _is_told(self) -> bool:
        if 0 in failures.dead(self._comm):
            raise EndedByDeath("rank 0 has died, which collects what has become of the runs")
        return failures.probe(self._comm, Tag.FINISHED)

    def free(self) -> None:
        """Give back what the sweep itself has opened (collective); nothing where ranks have died."""
        if failures.dead(self._comm):
            return
        self._tickets.free()
        for comm in (self._block, self._comm):
            if comm != MPI.COMM_NULL:
                blocking.free(comm)


def check_runs(runs: Sequence[Run], comm: MPI.Intracomm, wanted: int | None) -> int:
    """Return how many ranks a block has, once all runs fit (collective).

    Parameters
    ----------
    runs, wanted
        As for :func:`ranks_each`.
    comm
        All ranks.

    Raises
    ------
    UserError
        On every rank, where :func:`ranks_each` raises it.
    """
    with together(comm, "planning the blocks"):
        return ranks_each(runs, comm.size, wanted)
    raise AssertionError("a mistake leaves the block by an exception")


def _ended(number: int, result: Result, seconds: float) -> SweptRun:
    status = "stopped" if result.stopped_by else "done"
    found: dict[str, Any] = {}
    if (test := result.test) is not None:
        found = {
            "loss": test.mean_loss if math.isfinite(test.mean_loss) else None,
            "accuracy": test.accuracy,
            "metrics": tuple((name, mean) for name, mean in test.metrics.items() if math.isfinite(mean)),
        }
        if not test.are_numbers:
            status, found["error"] = "failed", result.warning or "the loss on the test data is not a number"
    return SweptRun(
        number,
        status,
        seconds=seconds,
        steps=result.steps,
        samples=result.samples,
        checkpoint=str(result.checkpoint),
        **found,
    )


def _told(error: BaseException) -> str:
    """Return why a run has failed, for people; of a failure that dbmpi has not foreseen, the traceback is printed."""
    if isinstance(error, (RunFailed, UserError)):
        return str(error) or "a rank has failed"
    sys.stderr.write(f"dbmpi: a run of the sweep has failed:\n{''.join(traceback.format_exception(error))}")
    sys.stderr.flush()
    return f"{type(error).__name__}: {error}"
