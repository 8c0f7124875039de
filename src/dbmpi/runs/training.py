"""A run from its description: open the data, assign the roles, train, checkpoint, evaluate."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from mpi4py import MPI

from dbmpi.checkpoint.run_lock import locked
from dbmpi.config import Run
from dbmpi.data import limits
from dbmpi.data.run_data import RunData, open_data
from dbmpi.data.stream import Order
from dbmpi.downpour import run as downpour_run
from dbmpi.errors import UserError
from dbmpi.kernels.announce import announced
from dbmpi.machine import capacity, environment
from dbmpi.machine.rank_variables import ranks_on_node
from dbmpi.machine.signals import StopSignal
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
from dbmpi.replica.replica import Replica
from dbmpi.replica.thread_count import fitted
from dbmpi.replica.trial import try_layer
from dbmpi.result import Result
from dbmpi.runs import start as runs_start
from dbmpi.sandblaster import run as sandblaster_run
from dbmpi.session import DTYPE, Session

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
        return _run(run, comm, stack, stop or stack.enter_context(StopSignal()))


def _run(run: Run, comm: MPI.Intracomm, stack: ExitStack, stop: StopSignal) -> Result:
    """Set up this rank, train, evaluate (collective); the stack closes everything that is opened."""
    with together(comm, "planning the topology"):
        plan = topology.plan(run.topology, comm.size)
    comms = stack.enter_context(topology.Communicators(comm, plan))
    with Watch(comms.world) as watch:
        session = _session(run, plan, comms, watch, stop, stack)
        learn = sandblaster_run.learn if session.run.optimizer.method == "sandblaster" else downpour_run.learn
        return learn(session, stack)


def _session(
    run: Run, plan: topology.Plan, comms: topology.Communicators, watch: Watch, stop: StopSignal, stack: ExitStack
) -> Session:
    """Open the data, cut the network, lock the run directory and find the checkpoint to resume from (collective)."""
    comm = comms.world
    data = open_data(run, comm, plan, stack)
    run, notices = limits.fitted(run, data.samples)
    data = replace(data, notes=data.notes + notices)
    say = RunProgress(0, run.monitor.progress).message if comm.rank == 0 else None
    compiled = stack.enter_context(announced(say))
    network, order = _plan_network(run, data, comm, plan)
    remark = stack.enter_context(fitted(network.layers, plan.partitions, run.optimizer.batch_size))
    if say is not None:
        prepared = environment.prepare()
        say(f"{prepared}{f'; {remark}' if remark else ''}")
        for loss in prepared.losses:
            print(f"dbmpi: slower than it could be: {loss}", file=sys.stderr, flush=True)
    with together(comm, "placing the layers"):
        placed = placement.from_config(run.placement, network.layers, plan.partitions)
    with together(comm, "locking the run directory", seconds=waiting.LONG_SECONDS):
        if plan.shard_of(comm.rank) == 0:
            stack.enter_context(locked(run.run.directory, partial(print, "dbmpi:", file=sys.stderr, flush=True)))
    replica = None
    if plan.worker_of(comm.rank) is not None:
        replica = stack.enter_context(Replica(network, placed, comms.replica))
        replica.prepare(run.optimizer.batch_size)
    begin, checkpoint, number = runs_start.find(run, comm, plan.replicas, network.layout, order, data.meaning)
    recorder = partial(
        Recorder,
        run.run.directory,
        session=number,
        started=time.time(),
        steps_before=begin.step,
        steps_per_epoch=order.batches_per_epoch,
    )
    return Session(
        run=run,
        plan=plan,
        comms=comms,
        network=network,
        placement=placed,
        replica=replica,
        order=order,
        begin=begin,
        checkpoint=checkpoint,
        data=data,
        stop=stop,
        recorder=lambda role, number: stack.enter_context(recorder(role, number)),
        watch=watch,
        compiled=compiled,
    )


def _plan_network(run: Run, data: RunData, comm: MPI.Intracomm, plan: topology.Plan) -> tuple[Network, Order]:
    """Make the network for the data, and the order of its samples; check the data and a user's own layers."""
    section, optimizer, seed, worker = run.network, run.optimizer, run.run.seed, plan.worker_of(comm.rank)
    with together(comm, "planning the network"):
        load = own.from_directory(section.code)
        network = Network(section, data.input_shape, seed, targets=data.targets, load=load)
        check_fits(network.layout, plan.shards, DTYPE.itemsize, capacity.available())
        if worker is not None:
            limits.check_activations(
                network.activations,
                optimizer.batch_size,
                setting="optimizer.batch_size",
                partitions=plan.partitions,
                workers=min(ranks_on_node(os.environ), plan.workers),
            )
        order = Order(data.samples, optimizer.batch_size, optimizer.epochs, seed)
        if order.batches > _MOST_BATCHES:
            raise UserError(
                f"optimizer.epochs = {optimizer.epochs:g}: that is {order.batches:.3g} batches of "
                f"{optimizer.batch_size}, more than can be counted; lower optimizer.epochs"
            )
    with together(comm, "looking at the data", seconds=waiting.LONG_SECONDS):
        data.validate(network.outputs, section.loss, fully=worker == 0)
    if network.own_layers:
        # The first rank alone: one compilation is enough, and one report.
        with together(comm, "trying your own layers", seconds=waiting.LONG_SECONDS):
            for layer in network.own_layers if comm.rank == 0 else ():
                try_layer(layer, DTYPE)
    return network, order
