"""A run by Downpour: the roles of one rank, put together and driven (paper, section 4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.checkpoint.schema import PARAMETERS
from dbmpi.downpour.algorithm import downpour
from dbmpi.downpour.datapath import Blocking, DataPath, Layerwise, Overlapped
from dbmpi.downpour.lead import Lead
from dbmpi.downpour.room import gradient_size
from dbmpi.downpour.shard import Shard
from dbmpi.downpour.worker import Worker
from dbmpi.errors import RunFailed
from dbmpi.monitor import verdict
from dbmpi.monitor.records import Recorder
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox, Role
from dbmpi.mpi.world import together
from dbmpi.network.description import Network
from dbmpi.objective import Outcome
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.rules import Rule, State, rule
from dbmpi.paramserver.server import Server
from dbmpi.paramserver.store import Store
from dbmpi.replica.arrangement import Arrangement
from dbmpi.replica.arrangement import from_config as arranged
from dbmpi.replica.replica import Replica
from dbmpi.result import Result
from dbmpi.session import DTYPE, Session

_FEWEST_STEPS = 100
"""Fewer, or less than an epoch, may be too few to learn anything."""


def learn(session: Session, stack: ExitStack) -> Result:
    """Play this rank's roles until the run ends (collective)."""
    run, plan, network, replica = session.run, session.plan, session.network, session.replica
    comm, applied_rule, number = session.comms.world, rule(run.optimizer), session.shard
    # Before the lead's clock runs, and before the windows take their memory.
    bandwidth = 0.0 if number is None else bottleneck.copy_bandwidth()
    with together(comm, "planning the shards' memory"):
        arrangement = arranged(run.server, network.layers, network.layout, session.placement, plan.shards)
        size = 0 if replica is None else gradient_size(run.server, replica.parameters.parts)
        store = Store(comm, plan, arrangement.ranges, run.server, DTYPE, size)
    stack.enter_context(store)
    session.compile_kernels()
    shard = lead = worker = None
    with together(comm, "preparing the shards", seconds=waiting.LONG_SECONDS):
        if number is not None:
            recorder, mailbox = session.recorder("shard", number), Mailbox(comm, Role.SHARD)
            held, served = store.ranges[number], store.server(applied_rule)
            _fill(served, arrangement, held, network, session.checkpoint, applied_rule)
            if number == 0:
                lead = _lead(session, store, arrangement, mailbox, recorder, stack)
            every = run.monitor.report_seconds
            shard = Shard(comm, served, held, mailbox, recorder, session.stop, every, bandwidth, lead)
    began = time.monotonic()
    if replica is not None:
        worker = _work(session, replica, store, arrangement, shard)
    if shard is not None:
        shard.serve()
    return _conclude(session, worker, shard, lead, time.monotonic() - began)


def _lead(
    session: Session, store: Store, arrangement: Arrangement, mailbox: Mailbox, recorder: Recorder, stack: ExitStack
) -> Lead:
    """Return what leads the run, with a progress line that has said how it begins."""
    run, data, begin = session.run, session.data, session.begin
    progress = session.progress(stack, store.notes, f", {len(begin.stream):,} batches are left")
    for name in begin.fresh:
        progress.message(f"the checkpoint has no {name!r}: the rule {run.optimizer.rule!r} starts it afresh")
    return Lead(
        session.comms.world,
        run,
        session.plan,
        arrangement,
        begin,
        mailbox=mailbox,
        recorder=recorder,
        progress=progress,
        input_shape=data.input_shape,
        classes=data.classes,
        meaning=data.meaning,
        samples_per_epoch=data.samples,
        batches_per_epoch=session.order.batches_per_epoch,
    )


def _work(session: Session, replica: Replica, store: Store, arrangement: Arrangement, shard: Shard | None) -> Worker:
    """Train as a worker; return when the lead has ended training."""
    run, plan, begin, data, number = session.run, session.plan, session.begin, session.data, session.worker
    assert number is not None
    assert data.train is not None
    serve: Callable[[], bool] | None = None if shard is None else shard.poll
    place = number // plan.partitions
    client = store.client(replica.parameters.runs_in(arrangement), serve)
    worker = Worker(
        run,
        place,
        objective=replica,
        client=client,
        mailbox=Mailbox(session.comms.world, Role.WORKER),
        lead=plan.shard_ranks[0],
        order=session.order,
        train=data.train,
        test=data.test,
        log=session.log(number),
        stop=session.stop,
        serve=serve,
        released=place == 0 or not begin.warmstart,
        warm_steps=begin.warmstart if place == 0 else 0,
        partitions=session.comms.replica,
    )
    replica.serve_while_waiting(worker.obey)
    path = _data_path(session, replica, store, client, worker)
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
    except RunFailed:  # a loss that is not finite, or a rank that cannot be waited for: there is nothing good to keep
        raise
    except Exception:
        worker.give_up()
        raise
    worker.finish()
    return worker


def _data_path(session: Session, replica: Replica, store: Store, client: Client, worker: Worker) -> DataPath:
    """Return how the loop comes by parameters and gets rid of gradients."""
    run, parts = session.run, replica.parameters.parts
    apart = run.optimizer.local_rate > 0 and run.optimizer.n_push > 1
    if run.server.gradients == "layers":
        pushing = worker.stopwatch("push")
        return Layerwise(client, replica.size, DTYPE, parts, worker.obey, overlap=store.overlap, pushing=pushing)
    if store.overlap:
        return Overlapped(client, replica.size, DTYPE, parts, worker.obey, apart=apart)
    return Blocking(client, replica.size, DTYPE, apart=apart)


def _conclude(
    session: Session, worker: Worker | None, shard: Shard | None, lead: Lead | None, seconds: float
) -> Result:
    """Evaluate the final parameters on all workers together, and return the result on every rank."""
    comm, run, data = session.comms.world, session.run, session.data
    stopped_by = np.array([0 if lead is None else lead.stopped_by])
    waiting.broadcast(comm, stopped_by, 0, "the lead to conclude")
    advice = _advice(comm, worker, shard)
    test = None if stopped_by[0] or run.data.test is None else _test(session, worker, shard)
    if lead is None:
        return session.conclude(None, seconds)
    if test is not None:
        lead.evaluated(test, lead.epoch)
    warning = verdict.warning(
        data.guessing,
        lead.recent.mean_loss,
        test,
        enough=lead.steps >= _FEWEST_STEPS and lead.samples >= data.samples,
        remedy=f"another optimizer.learning_rate ({run.optimizer.learning_rate:g})",
    )
    assert lead.checkpoint is not None
    result = Result(
        lead.steps, lead.samples, seconds, test, lead.stopped_by, lead.checkpoint, lead.staleness.mean, advice, warning
    )
    return session.conclude(result, seconds)


def _test(session: Session, worker: Worker | None, shard: Shard | None) -> Outcome:
    """Return the outcome on the held-out samples, of which each replica evaluates a share (collective)."""
    mine, plan = Outcome(0, 0.0, 0), session.plan
    if worker is not None and session.data.test is not None:
        replica, partition = divmod(session.worker or 0, plan.partitions)
        outcome = worker.evaluate(session.data.test, replica, plan.replicas)
        mine = mine if partition else outcome  # the first partition counts it
    serve = worker.obey if worker is not None else shard.poll if shard is not None else None
    sums = np.array([mine.samples, mine.loss, max(mine.correct, 0), mine.correct < 0], np.float64)
    what = "the evaluation of the other workers"
    samples, loss, correct, unknown = waiting.allreduce(session.comms.world, sums, MPI.SUM, what, serve=serve).tolist()
    return Outcome(int(samples), loss, -1 if unknown else int(correct))


def _advice(comm: MPI.Intracomm, worker: Worker | None, shard: Shard | None) -> str:
    """Say whether the shards were what the workers waited for (collective)."""
    applying = np.array([0.0 if shard is None else shard.applying])
    times = np.zeros(2) if worker is None else np.array([worker.log.waited, worker.log.spent])
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
        To be filled; it serves from now on.
    arrangement, held
        The order of the shards' vector, and the range of it that is this shard's.
    network
        Makes fresh parameters.
    checkpoint
        Holds others, if there are any.
    applied_rule
        Makes the state that a checkpoint lacks.
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
    # Cut otherwise, the shards have no versions of their own to go on from.
    server.begin(state, max(versions))
