"""A run from its description: open the data, place the roles, train, checkpoint, evaluate, end."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from dbmpi import batchrun, beginning, topology
from dbmpi.config import Run
from dbmpi.data.stream import Order
from dbmpi.errors import RunFailed, UserError
from dbmpi.monitor.progress import Progress
from dbmpi.monitor.records import Recorder
from dbmpi.network import own
from dbmpi.network.network import Network
from dbmpi.objective import Outcome
from dbmpi.optim.datapath import Blocking, DataPath, Layerwise, Overlapped
from dbmpi.optim.downpour import downpour
from dbmpi.optim.lead import Begin, Lead
from dbmpi.optim.room import gradient_size
from dbmpi.optim.shard import Shard
from dbmpi.optim.worker import Worker
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.memory import check_room
from dbmpi.paramserver.rules import Rule, rule
from dbmpi.paramserver.store import Store
from dbmpi.partition import placement
from dbmpi.partition.arrangement import Arrangement
from dbmpi.partition.arrangement import described as arranged
from dbmpi.partition.describe import summarise
from dbmpi.partition.placement import Placement
from dbmpi.partition.products import agree_on_products
from dbmpi.partition.replica import Replica
from dbmpi.partition.trial import try_layer
from dbmpi.partition.warmup import first_on_each_node, use_layers
from dbmpi.result import Result
from dbmpi.rundata import LOADING_SECONDS, RunData, open_data
from dbmpi.runtime import waiting
from dbmpi.runtime.failures import Watch
from dbmpi.runtime.orders import Mailbox, Role
from dbmpi.runtime.signals import StopSignal
from dbmpi.runtime.world import together

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPE = np.dtype(np.float32)
"""Of parameters and gradients."""
_MOST_BATCHES = 2**62
"""Of a run: counts of steps and batches travel and are stored as 64-bit integers."""


def train(run: Run, comm: MPI.Intracomm | None = None, stop: StopSignal | None = None) -> Result:
    """Train the network that `run` describes, on all ranks of `comm` together (collective).

    Parameters
    ----------
    run
        The description of the run.
    comm
        The ranks to use; by default all that were started, or this process alone.
    stop
        Notes the signals that end the run with a checkpoint; by default only while it runs.

    Raises
    ------
    UserError
        On every rank, if one of them finds a mistake in what was given.
    RunFailed
        If the run cannot go on, e.g. because the loss is not finite.
    """
    if comm is None:
        from dbmpi.runtime.world import start

        comm = start()
    with ExitStack() as stack:
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

    def run(self) -> Result:
        """Set up, train, evaluate."""
        run, plan = self._run, self._plan
        self._data = open_data(run, self._comm, plan, self._stack)
        network, order = self._plan_network()
        with together(self._comm, "placing the layers"):
            placed = placement.described(run.placement, network.layers, plan.partitions)
        applied_rule = rule(run.optimizer)
        replica = None
        if self._worker_number is not None:
            replica = self._stack.enter_context(network.replica(placed, self._comms.replica))
            replica.prepare(run.optimizer.batch_size)
        if run.optimizer.method == "sandblaster":
            return self._sandblast(network, replica, order)
        # Before the lead's clock runs, and before the windows take their memory.
        bandwidth = 0.0 if self._shard_number is None else bottleneck.copy_bandwidth()
        with together(self._comm, "planning the shards' memory"):
            arrangement = arranged(run.server, network.layers, network.layout, placed, plan.shards)
            size = 0 if replica is None else gradient_size(run.server, replica.parameters.parts)
            store = Store(self._comm, plan, arrangement.ranges, run.server, DTYPE, size)
        self._stack.enter_context(store)
        begin, checkpoint, session = beginning.find(run, self._comm, self._plan.replicas, network.layout, order)
        batch_size = run.optimizer.batch_size
        agree_on_products(self._comm, network.layers, batch_size)
        first_on_each_node(self._comm, lambda: _use_kernels(network, applied_rule, self._data, batch_size))
        stop = self._stop

        number = self._shard_number
        started = time.time()
        shard = lead = None
        with together(self._comm, "preparing the shards", seconds=LOADING_SECONDS):
            if number is not None:
                recorder = self._recorder("shard", number, session, started)
                held = store.ranges[number]
                served = store.server(applied_rule)
                beginning.fill(served, arrangement, held, network, checkpoint, applied_rule)
                mailbox = Mailbox(self._comm, Role.SHARD)
                if self._is_lead:
                    lead = self._lead(network, arrangement, placed, store, begin, mailbox, recorder, order)
                every = run.monitor.report_seconds
                shard = Shard(self._comm, served, held, mailbox, recorder, stop, every, bandwidth, lead)

        began = time.monotonic()
        worker = None
        if replica is not None:
            worker = self._work(replica, arrangement, store, begin, order, session, started, stop, shard)
        if shard is not None:
            shard.serve()
        seconds = time.monotonic() - began
        return self._conclude(worker, shard, lead, seconds)

    # Setting up

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
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            check_room(network.layout, self._plan.shards, DTYPE.itemsize, memory)
            order = Order(data.samples, run.optimizer.batch_size, run.optimizer.epochs, run.run.seed)
            if order.batches > _MOST_BATCHES:
                raise UserError(
                    f"optimizer.epochs = {run.optimizer.epochs:g}: that is {order.batches:.3g} batches of "
                    f"{run.optimizer.batch_size}, more than can be counted; lower optimizer.epochs"
                )
        with together(self._comm, "looking at the data", seconds=LOADING_SECONDS):
            data.validate(network.outputs, run.network.loss, fully=self._worker_number == 0)
        if network.own_layers:
            # The first rank alone: one compilation is enough, and one report.
            with together(self._comm, "trying your own layers", seconds=LOADING_SECONDS):
                for layer in network.own_layers if self._comm.rank == 0 else ():
                    try_layer(layer, DTYPE)
        return network, order

    def _recorder(self, role: str, number: int, session: int, started: float) -> Recorder:
        recorder = Recorder(self._run.run.directory, role, number, session=session, started=started)
        return self._stack.enter_context(recorder)

    def _lead(
        self,
        network: Network,
        arrangement: Arrangement,
        placed: Placement,
        store: Store,
        begin: Begin,
        mailbox: Mailbox,
        recorder: Recorder,
        order: Order,
    ) -> Lead:
        run, layout = self._run, network.layout
        data = self._data
        total = round(data.samples * run.optimizer.epochs)
        progress = Progress(total, run.monitor.progress, epochs=run.optimizer.epochs)
        self._stack.enter_context(progress)
        progress.message(f"{self._plan}; {layout.size:,} parameters; {data.samples:,} samples of {data.input_shape}")
        if placed.partitions > 1:
            progress.message(summarise(network.layers, placed, run.optimizer.batch_size))
        if begin.step:
            progress.message(f"going on after {begin.step:,} steps, {len(begin.stream):,} batches are left")
        for note in store.notes:
            progress.message(note)
        for name in begin.fresh:
            progress.message(f"the checkpoint has no {name!r}: the rule {run.optimizer.rule!r} starts it afresh")
        return Lead(
            self._comm,
            run,
            self._plan,
            arrangement,
            begin,
            mailbox=mailbox,
            recorder=recorder,
            progress=progress,
            input_shape=data.input_shape,
            classes=data.classes,
            samples_per_epoch=data.samples,
            batches_per_epoch=order.batches_per_epoch,
        )

    # Training

    def _work(
        self,
        replica: Replica,
        arrangement: Arrangement,
        store: Store,
        begin: Begin,
        order: Order,
        session: int,
        started: float,
        stop: StopSignal,
        shard: Shard | None,
    ) -> Worker:
        """Train as a worker; return when the lead has ended training."""
        run, plan, number = self._run, self._plan, self._worker_number
        assert number is not None
        assert self._data.train is not None
        serve: Callable[[], bool] | None = None if shard is None else shard.poll
        place = number // plan.partitions
        client = store.client(replica.parameters.runs_in(arrangement), serve)
        worker = Worker(
            run,
            place,
            objective=replica,
            client=client,
            mailbox=Mailbox(self._comm, Role.WORKER),
            lead=plan.shard_ranks[0],
            order=order,
            train=self._data.train,
            test=self._data.test,
            recorder=self._recorder("worker", number, session, started),
            stop=stop,
            serve=serve,
            released=place == 0 or not begin.warmstart,
            warm_steps=begin.warmstart if place == 0 else 0,
            partitions=self._comms.replica,
        )
        replica.serve_while_waiting(worker.obey)
        path: DataPath
        apart = run.optimizer.local_rate > 0 and run.optimizer.n_push > 1
        parts = replica.parameters.parts
        if run.server.gradients == "layers":
            pushing = worker.stopwatch("push")
            path = Layerwise(client, replica.size, DTYPE, parts, worker.obey, overlap=store.overlap, pushing=pushing)
        elif store.overlap:
            path = Overlapped(client, replica.size, DTYPE, parts, worker.obey, apart=apart)
        else:
            path = Blocking(client, replica.size, DTYPE, apart=apart)
        try:
            downpour(
                replica,
                path,
                begin.stream.dealt(place, plan.replicas, begin.warmstart),
                worker,
                n_fetch=run.optimizer.n_fetch,
                n_push=run.optimizer.n_push,
                local_rate=run.optimizer.local_rate,
                first_step=begin.done[place] if begin.done else 0,
            )
        except RunFailed:  # a loss that is not finite, or nobody to wait for: there is nothing good to be kept
            raise
        except Exception:
            worker.give_up()
            raise
        worker.finish()
        return worker

    def _sandblast(self, network: Network, replica: Replica | None, order: Order) -> Result:
        """Learn by Sandblaster instead of Downpour."""
        run = self._run
        begin, checkpoint, session = beginning.find(run, self._comm, self._plan.replicas, network.layout, order)
        batch_size, applied_rule = run.optimizer.batch_size, rule(run.optimizer)
        agree_on_products(self._comm, network.layers, batch_size)
        first_on_each_node(self._comm, lambda: _use_kernels(network, applied_rule, self._data, batch_size))
        first_on_each_node(self._comm, batchrun.use_kernels)
        started = time.time()
        setup = batchrun.Setup(
            run,
            self._plan,
            self._comms,
            network,
            replica,
            order,
            begin,
            checkpoint,
            self._data,
            self._stop,
            lambda role, number: self._recorder(role, number, session, started),
            self.watch,
        )
        return batchrun.learn(setup, self._stack)

    def _conclude(self, worker: Worker | None, shard: Shard | None, lead: Lead | None, seconds: float) -> Result:
        """Evaluate the final parameters on all workers together, and tell everybody what came out."""
        numbers = np.zeros(4)
        path = ""
        if lead is not None:
            numbers[:] = (lead.steps, lead.samples, lead.stopped_by, lead.staleness.mean)
            path = str(lead.checkpoint)
        waiting.broadcast(self._comm, numbers, 0, "the lead to conclude")
        path = waiting.broadcast_text(self._comm, path, 0, "the lead to conclude")
        steps, samples, stopped_by = (int(number) for number in numbers[:3])
        advice = self._advice(worker, shard)
        test = None
        if not stopped_by and self._run.data.test is not None:
            mine = Outcome(0, 0.0, 0)
            if worker is not None and self._data.test is not None:
                place, partition = divmod(self._worker_number or 0, self._plan.partitions)
                mine = worker.evaluate(self._data.test, place, self._plan.replicas)
                if partition > 0:
                    mine = Outcome(0, 0.0, 0)  # the first partition counts it
            serve = worker.obey if worker is not None else shard.poll if shard is not None else None
            sums = np.array([mine.samples, mine.loss, max(mine.correct, 0), mine.correct < 0], np.float64)
            total = waiting.allreduce(self._comm, sums, MPI.SUM, "the evaluation of the other workers", serve=serve)
            test = Outcome(int(total[0]), float(total[1]), -1 if total[3] else int(total[2]))
            if lead is not None:
                lead.evaluated(test, lead.epoch)
        return Result(steps, samples, seconds, test, stopped_by, Path(path), float(numbers[3]), advice)

    def _advice(self, worker: Worker | None, shard: Shard | None) -> str:
        """Say whether the shards were what the workers waited for (collective)."""
        applying = np.array([0.0 if shard is None else shard.applying])
        times = np.zeros(2) if worker is None else np.array([worker.waited, worker.spent])
        what = "the other ranks to say what they waited for"
        busiest = waiting.allreduce(self._comm, applying, MPI.MAX, what)
        waited, spent = waiting.allreduce(self._comm, times, MPI.SUM, what)
        line: str = bottleneck.advice(float(busiest[0]), float(waited / max(spent, 1e-9)))
        return line


def _use_kernels(network: Network, applied_rule: Rule, data: RunData, samples: int) -> None:
    """Call everything compiled once, on little data, so that it is compiled or loaded before the clock runs."""
    from dbmpi.kernels import updates

    use_layers(network.layers, samples, DTYPE)
    values = np.zeros((network.outputs, 1), DTYPE)
    if network.loss is not None:
        network.loss.apply(values, np.zeros(1, np.int32) if data.classes else np.zeros_like(values))
    few = np.zeros(1, DTYPE)
    applied_rule.apply(few, few.copy(), applied_rule.init(few))
    updates.sgd(few, few.copy(), 0.1)
    updates.add(few, few.copy())
