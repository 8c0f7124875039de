"""A run from its description: open the data, place the roles, train, checkpoint, evaluate, end."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mpi4py import MPI

from dbmpi.checkpoint.run_lock import locked
from dbmpi.config import Run
from dbmpi.data import limits
from dbmpi.data.run_data import open_data
from dbmpi.data.stream import Order
from dbmpi.downpour import run as downpour_run
from dbmpi.downpour.session import DTYPE, Session
from dbmpi.errors import UserError
from dbmpi.kernels.announce import announced
from dbmpi.machine import capacity, environment
from dbmpi.machine.signals import StopSignal
from dbmpi.machine.threads import ranks_on_node
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.records import Recorder
from dbmpi.mpi import topology, waiting
from dbmpi.mpi.failures import Watch
from dbmpi.mpi.silent_ends import aloud
from dbmpi.mpi.world import end_all_on_failure, together
from dbmpi.network import own
from dbmpi.network.description import Network
from dbmpi.paramserver.memory import check_fits
from dbmpi.replica import placement
from dbmpi.replica.thread_count import fitted
from dbmpi.replica.trial import try_layer
from dbmpi.replica.whole import make_replica
from dbmpi.result import Result
from dbmpi.runs import start as runs_start
from dbmpi.sandblaster import run as sandblaster_run

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_BATCHES = 2**62
"""Of a run: counts of steps and batches travel and are stored as 64-bit integers."""


def train(run: Run, comm: MPI.Intracomm | None = None, stop: StopSignal | None = None) -> Result:
    """Train the network that `run` describes, on all ranks of `comm` together (collective).

    Checkpoints and records are written to ``run.run.directory``, progress to the standard output of one rank.

    Parameters
    ----------
    run : Run
        The description of the run, the same on all ranks.
    comm : MPI.Intracomm, optional
        The ranks to use.  By default all ranks that were started, or this process alone.
    stop : StopSignal, optional
        Collects the signals that end the run with a checkpoint.  By default SIGINT, SIGTERM and SIGUSR2 do so while
        the function runs.

    Returns
    -------
    Result
        Steps, time, outcome on the test data and the last checkpoint.

    Raises
    ------
    UserError
        On every rank, if any rank finds a mistake in the settings, the data or the launch.
    RunFailed
        If the run cannot continue, for example because the loss is not finite.

    Examples
    --------
    >>> import dbmpi
    >>> overrides = ["optimizer.epochs=2", "monitor.progress=none"]
    >>> run = dbmpi.load("examples/digits.toml", overrides)
    >>> result = dbmpi.train(run)
    >>> result.test.samples
    359
    """
    if not isinstance(run, Run):
        raise UserError(f"train: expected a description of a run, e.g. dbmpi.load('CONFIG.toml'), not {run!r:.80}")
    if comm is None:
        from dbmpi.mpi.world import start

        comm = start()
    elif comm.size > 1:
        end_all_on_failure()
    with aloud(comm), ExitStack() as stack:
        session = _Session(run, comm, stack, stop or stack.enter_context(StopSignal()))
        with session.watch:
            return session.run()


class _Session:
    """One start of a run on one rank; what is opened is closed by the stack."""

    def __init__(self, run: Run, comm: MPI.Intracomm, stack: ExitStack, stop: StopSignal) -> None:
        self._run = run
        self._stop = stop
        self._stack = stack
        with together(comm, "planning the topology"):
            plan = topology.plan(run.topology, comm.size)
        self._plan = plan
        self._comms = stack.enter_context(topology.Communicators(comm, plan))
        self._comm = self._comms.world
        self.watch = Watch(self._comm)
        self._shard_number = plan.shard_of(comm.rank)
        self._worker_number = plan.worker_of(comm.rank)
        self._is_lead = self._shard_number == 0
        self._is_first = comm.rank == 0

    def run(self) -> Result:
        """Set up, train, evaluate."""
        plan = self._plan
        self._data = open_data(self._run, self._comm, plan, self._stack)
        self._run, notices = limits.fitted(self._run, self._data.samples)
        self._data = replace(self._data, notes=self._data.notes + notices)
        run = self._run
        say = RunProgress(0, run.monitor.progress).message if self._is_first else None
        compiled = self._stack.enter_context(announced(say))
        network, order = self._plan_network()
        chosen = fitted(network.layers, plan.partitions, run.optimizer.batch_size)
        self._say_chosen(say, self._stack.enter_context(chosen))
        with together(self._comm, "placing the layers"):
            placed = placement.from_config(run.placement, network.layers, plan.partitions)
        with together(self._comm, "locking the run directory", seconds=waiting.LONG_SECONDS):
            if self._is_lead:
                tell = partial(print, "dbmpi:", file=sys.stderr, flush=True)
                self._stack.enter_context(locked(run.run.directory, tell))
        replica = None
        if self._worker_number is not None:
            replica = self._stack.enter_context(make_replica(network, placed, self._comms.replica))
            replica.prepare(run.optimizer.batch_size)
        begin, checkpoint, number = runs_start.find(
            run, self._comm, plan.replicas, network.layout, order, self._data.meaning
        )
        started = time.time()
        session = Session(
            run=run,
            plan=plan,
            comms=self._comms,
            network=network,
            placement=placed,
            replica=replica,
            order=order,
            begin=begin,
            checkpoint=checkpoint,
            data=self._data,
            stop=self._stop,
            recorder=lambda role, its_number: self._recorder(role, its_number, number, started),
            watch=self.watch,
            compiled=compiled,
        )
        learn = sandblaster_run.learn if run.optimizer.method == "sandblaster" else downpour_run.learn
        return learn(session, self._stack)

    # Setting up

    @staticmethod
    def _say_chosen(say: Callable[[str], object] | None, remark: str) -> None:
        """Say what was chosen for this machine and this network, and what is slower than it could be."""
        if say is None:
            return
        prepared = environment.prepare()
        say(f"{prepared}{f'; {remark}' if remark else ''}")
        for loss in prepared.losses:
            print(f"dbmpi: slower than it could be: {loss}", file=sys.stderr, flush=True)

    def _plan_network(self) -> tuple[Network, Order]:
        """Make the network for the data, and the order of its samples; look at the data and at a user's own layers."""
        run, data = self._run, self._data
        with together(self._comm, "planning the network"):
            network = Network(
                run.network,
                data.input_shape,
                run.run.seed,
                targets=data.targets,
                load=own.from_directory(run.network.code),
            )
            check_fits(network.layout, self._plan.shards, DTYPE.itemsize, capacity.available())
            if self._worker_number is not None:
                limits.check_activations(
                    network.activations,
                    run.optimizer.batch_size,
                    setting="optimizer.batch_size",
                    partitions=self._plan.partitions,
                    workers=min(ranks_on_node(os.environ), self._plan.workers),
                )
            order = Order(data.samples, run.optimizer.batch_size, run.optimizer.epochs, run.run.seed)
            if order.batches > _MOST_BATCHES:
                raise UserError(
                    f"optimizer.epochs = {run.optimizer.epochs:g}: that is {order.batches:.3g} batches of "
                    f"{run.optimizer.batch_size}, more than can be counted; lower optimizer.epochs"
                )
        with together(self._comm, "looking at the data", seconds=waiting.LONG_SECONDS):
            data.validate(network.outputs, run.network.loss, fully=self._worker_number == 0)
        if network.own_layers:
            # The first rank alone: one compilation is enough, and one report.
            with together(self._comm, "trying your own layers", seconds=waiting.LONG_SECONDS):
                for layer in network.own_layers if self._comm.rank == 0 else ():
                    try_layer(layer, DTYPE)
        return network, order

    def _recorder(self, role: str, number: int, session: int, started: float) -> Recorder:
        recorder = Recorder(self._run.run.directory, role, number, session=session, started=started)
        return self._stack.enter_context(recorder)
