"""A run by Downpour: the roles of one rank, put together and driven (paper, section 4.1)."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import PARAMETERS, CheckpointInfo, library_versions
from dbmpi.data.run_data import network_notes
from dbmpi.downpour.algorithm import downpour
from dbmpi.downpour.datapath import DataPath, Flow
from dbmpi.downpour.lead import CheckpointPlan, Lead
from dbmpi.downpour.orders import Orders
from dbmpi.downpour.session import DTYPE, Session
from dbmpi.downpour.shard import Shard, ShardRole
from dbmpi.downpour.worker import Assignment, Worker
from dbmpi.errors import RunFailed
from dbmpi.monitor import verdict
from dbmpi.monitor.progress import RunProgress
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.network.description import Network
from dbmpi.objective import Outcome
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.rules import Rule, State, rule
from dbmpi.paramserver.server import Server
from dbmpi.paramserver.store import Store
from dbmpi.replica.arrangement import Arrangement
from dbmpi.replica.arrangement import from_config as arranged
from dbmpi.replica.describe import summarise
from dbmpi.replica.replica import Replica
from dbmpi.result import Result

_FEWEST_STEPS = 100
"""Fewer, or less than an epoch, may be too few to learn anything."""


def learn(session: Session, stack: ExitStack) -> Result:
    """Play this rank's roles until the run ends (collective).

    Parameters
    ----------
    session
        Everything that is known when the roles are put together.
    stack
        Closes what is opened here when the run has ended.
    """
    run, plan, network, replica = session.run, session.plan, session.network, session.replica
    comm, applied_rule, number = session.comms.world, rule(run.optimizer), session.shard
    # Before the lead's clock runs, and before the windows take their memory.
    bandwidth = 0.0 if number is None else bottleneck.copy_bandwidth()
    with together(comm, "planning the shards' memory"):
        arrangement = arranged(run.server, network.layers, network.layout, session.placement, plan.shards)
        flow = Flow.from_config(run.server, run.optimizer, () if replica is None else replica.parameters.parts)
        store = Store(comm, plan, arrangement.ranges, run.server, DTYPE, flow.buffer_size)
    stack.enter_context(store)
    session.compile_kernels()
    shard = lead = worker = None
    with together(comm, "preparing the shards", seconds=waiting.LONG_SECONDS):
        if number is not None:
            served = store.server(applied_rule)
            _fill(served, arrangement, store.ranges[number], network, session.checkpoint, applied_rule)
            role = ShardRole(
                comm=comm,
                server=served,
                recorder=session.recorder("shard", number),
                stop=session.stop,
                report_seconds=run.monitor.report_seconds,
                bandwidth=bandwidth,
            )
            lead = _lead(session, role, arrangement, _progress(session, stack, store.notes)) if number == 0 else None
            shard = lead or Shard(role)
    began = time.monotonic()
    if replica is not None:
        worker = _work(session, replica, store, arrangement, replace(flow, overlap=store.overlap), shard)
    if shard is not None:
        shard.serve()
    return _conclude(session, worker, shard, lead, time.monotonic() - began)


def _progress(session: Session, stack: ExitStack, notes: tuple[str, ...]) -> RunProgress:
    """Return a progress display that has shown how the run starts, with these notes last."""
    run, network, data, begin = session.run, session.network, session.data, session.begin
    total = round(data.samples * run.optimizer.epochs)
    progress = RunProgress(total, run.monitor.progress, epochs=run.optimizer.epochs)
    stack.enter_context(progress)
    size = f"{network.layout.size:,} parameters; {data.samples:,} samples of {data.input_shape}"
    progress.message(f"{session.plan}; {size}")
    if session.plan.partitions > 1:
        progress.message(summarise(network.layers, session.placement, run.optimizer.batch_size))
    for notice in begin.notices:
        progress.warn(notice)
    if begin.step:
        left = f", {len(begin.stream):,} batches are left"
        progress.message(begin.resumed(run.optimizer.epochs, left))
    for note in (*data.notes, *network_notes(run.network, data.input_shape, run.data.channels), *notes):
        progress.message(note)
    for name in begin.fresh:
        progress.message(f"the checkpoint has no {name!r}: the rule {run.optimizer.rule!r} starts it afresh")
    return progress


def _lead(session: Session, role: ShardRole, arrangement: Arrangement, progress: RunProgress) -> Lead:
    """Return the lead of the run."""
    run, plan, data = session.run, session.plan, session.data
    info = partial(
        CheckpointInfo,
        configuration=run.to_json(),
        shards=plan.shards,
        replicas=plan.replicas,
        partitions=plan.partitions,
        input_shape=data.input_shape,
        classes=data.classes,
        meaning=data.meaning,
        libraries=library_versions(MPI.Get_library_version()),
    )
    checkpoints = CheckpointPlan(
        section=run.checkpoint,
        directory=run.run.directory,
        arrangement=arrangement,
        info=info,
        remedy=_lower(run.optimizer.learning_rate),
    )
    return Lead(role, plan, session.begin, session.order, progress, checkpoints)


def _work(
    session: Session, replica: Replica, store: Store, arrangement: Arrangement, flow: Flow, shard: Shard | None
) -> Worker:
    """Learn until the stream is used up or the run is stopped, and wait for its end."""
    run, plan, begin, data, number = session.run, session.plan, session.begin, session.data, session.worker
    assert number is not None
    assert data.train is not None
    replica_number = number // plan.partitions
    orders = Orders(
        session.comms.world,
        plan.shard_ranks[0],
        session.stop,
        None if shard is None else shard.poll,
        released=replica_number == 0 or not begin.warmstart,
    )
    client = store.client(replica.parameters.runs_in(arrangement), flow.parts, orders.obey)
    assignment = Assignment(
        replica=replica_number,
        order=session.order,
        train=data.train,
        test=data.test,
        warm_steps=begin.warmstart if replica_number == 0 else 0,
        monitor=run.monitor,
        directory=run.run.directory,
        remedy=f"{_lower(run.optimizer.learning_rate)}, or look for extreme values in {run.data.train}",
    )
    recorder = session.recorder("worker", number)
    worker = Worker(assignment, replica, client, orders, recorder, session.comms.replica, replica.seconds)
    replica.serve_while_waiting(orders.obey)
    try:
        downpour(
            replica,
            DataPath(client, flow, worker.stopwatch("push")),
            begin.stream.dealt(replica_number, plan.replicas, begin.warmstart),
            worker,
            n_fetch=run.optimizer.n_fetch,
            n_push=run.optimizer.n_push,
            local_rate=run.optimizer.local_rate,
            first_step=begin.done[replica_number] if begin.done else 0,
        )
    except RunFailed:  # a loss that is not finite, or a rank that cannot be waited for: there is nothing good to keep
        raise
    except Exception:
        worker.give_up()
        raise
    worker.finish()
    return worker


def _lower(learning_rate: float) -> str:
    return f"lower optimizer.learning_rate ({learning_rate:g})"


def _conclude(
    session: Session, worker: Worker | None, shard: Shard | None, lead: Lead | None, seconds: float
) -> Result:
    """Evaluate the final parameters on all workers together, and tell everybody what came out."""
    comm, run, plan, data = session.comms.world, session.run, session.plan, session.data
    numbers = np.zeros(5)
    path = ""
    if lead is not None:
        numbers[:] = (lead.steps, lead.samples, lead.stopped_by, lead.staleness.mean, lead.recent.mean_loss)
        path = str(lead.checkpoint)
    waiting.broadcast(comm, numbers, 0, "the lead to conclude")
    path = waiting.broadcast_text(comm, path, 0, "the lead to conclude")
    steps, samples, stopped_by = (int(number) for number in numbers[:3])
    advice = _advice(comm, worker, shard)
    test = None
    if not stopped_by and run.data.test is not None:
        mine = Outcome(0, 0.0, 0)
        if worker is not None and data.test is not None:
            place, partition = divmod(session.worker or 0, plan.partitions)
            mine = worker.evaluate(data.test, place, plan.replicas)
            if partition > 0:
                mine = Outcome(0, 0.0, 0)  # the first partition counts it
        serve = worker.obey if worker is not None else shard.poll if shard is not None else None
        sums = np.array([mine.samples, mine.loss, max(mine.correct, 0), mine.correct < 0], np.float64)
        total = waiting.allreduce(comm, sums, MPI.SUM, "the evaluation of the other workers", serve=serve)
        test = Outcome(int(total[0]), float(total[1]), -1 if total[3] else int(total[2]))
        if lead is not None:
            lead.evaluated(test, lead.epoch)
    warning = verdict.warning(
        data.guessing,
        float(numbers[4]),
        test,
        enough=steps >= _FEWEST_STEPS and samples >= data.samples,
        remedy=f"another optimizer.learning_rate ({run.optimizer.learning_rate:g})",
    )
    return Result(steps, samples, seconds, test, stopped_by, Path(path), float(numbers[3]), advice, warning)


def _advice(comm: MPI.Intracomm, worker: Worker | None, shard: Shard | None) -> str:
    """Say whether the shards were what the workers waited for (collective)."""
    applying = np.array([0.0 if shard is None else shard.applying])
    times = np.zeros(2) if worker is None else np.array([worker.waited, worker.spent])
    what = "the other ranks to say what they waited for"
    busiest = waiting.allreduce(comm, applying, MPI.MAX, what)
    waited, spent = waiting.allreduce(comm, times, MPI.SUM, what)
    line: str = bottleneck.advice(float(busiest[0]), float(waited / max(spent, 1e-9)))
    return line


def _fill(
    server: Server,
    arrangement: Arrangement,
    held: range,
    network: Network,
    checkpoint: Path | None,
    applied_rule: Rule,
) -> None:
    """Give a shard its first parameters and state.

    Parameters
    ----------
    server
        To be filled; it is ready to serve afterwards.
    arrangement, held
        The order of the shards' vector, and this shard's range of it.
    network
        Computes the initial parameters.
    checkpoint
        Where to read parameters instead; None for a new run.
    applied_rule
        Initialises state that is missing in the checkpoint.
    """
    if checkpoint is None:
        for start, local, length in arrangement.pieces(held):
            network.initial(start, server.parameters[local : local + length])
        server.begin(None)
        return
    with Checkpoint.open(checkpoint) as opened:
        state: State = applied_rule.init(server.parameters)
        for name, values in {PARAMETERS: server.parameters, **state}.items():
            for start, local, length in arrangement.pieces(held) if name in opened.vectors else ():
                opened.load(name, start, values[local : local + length])
        versions = opened.info.shard_versions
    # The shards of the checkpoint may have been others, so none has a version of its own.
    server.begin(state, max(versions))
