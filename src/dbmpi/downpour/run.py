"""A run by Downpour: the roles of one rank, put together and driven (paper, section 4.1)."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.checkpoint.named_arrays import Fill
from dbmpi.checkpoint.restore import restore
from dbmpi.checkpoint.retention import kept
from dbmpi.checkpoint.saver import ShardSaver
from dbmpi.checkpoint.schema import CheckpointInfo, library_versions
from dbmpi.downpour.algorithm import downpour
from dbmpi.downpour.checkpoints import CheckpointPlan
from dbmpi.downpour.datapath import DataPath, Flow
from dbmpi.downpour.lead import Lead
from dbmpi.downpour.orders import Orders
from dbmpi.downpour.shard import Shard, ShardRole
from dbmpi.downpour.worker import Assignment, Worker
from dbmpi.errors import RunFailed
from dbmpi.monitor import verdict
from dbmpi.monitor.progress import RunProgress
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.objective import Outcome
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.clip import Clip
from dbmpi.paramserver.rules import Rule, rule
from dbmpi.paramserver.schedule import Moment, Schedule
from dbmpi.paramserver.server import Server
from dbmpi.paramserver.store import Store
from dbmpi.replica.arrangement import Arrangement, equal
from dbmpi.replica.arrangement import from_config as arranged
from dbmpi.replica.own_objective import OwnReplica
from dbmpi.replica.replica import Replica
from dbmpi.result import Result
from dbmpi.session import DTYPE, Session

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
    run, plan, model, replica = session.run, session.plan, session.model, session.replica
    comm, number = session.comms.world, session.shard
    # Before the lead's clock runs, and before the windows take their memory.
    bandwidth = 0.0 if number is None else bottleneck.copy_bandwidth()
    with together(comm, "planning the shards' memory"):
        applied_rule = rule(run.optimizer, session.order.samples, run.network.code)
        if session.placement is None:
            arrangement = equal(model.layout, plan.shards)
        else:
            arrangement = arranged(run.server, model.layers, model.layout, session.placement, plan.shards)
        flow = Flow.from_config(run.server, run.optimizer, () if replica is None else replica.parameters.parts)
        store = Store(comm, plan, arrangement.ranges, run.server, DTYPE, flow.buffer_size)
    stack.enter_context(store)
    if isinstance(replica, OwnReplica):
        stack.callback(replica.free)
    session.compile_kernels()
    shard = lead = worker = None
    with together(comm, "preparing the shards", seconds=waiting.LONG_SECONDS):
        if number is not None:
            served = store.server(applied_rule)
            _fill(served, arrangement, store.ranges[number], session.initial, session.checkpoint, applied_rule)
            saver = _saver(session, arrangement, number)
            stack.callback(saver.close)
            role = ShardRole(
                comm=comm,
                server=served,
                saver=saver,
                recorder=session.recorder("shard", number),
                stop=session.stop,
                report_seconds=run.monitor.report_seconds,
                bandwidth=bandwidth,
            )
            if isinstance(saver, LeadSaver):
                lead = _lead(session, role, saver, _progress(session, stack, store.notes))
            shard = lead or Shard(role)
    began = time.monotonic()
    if replica is not None:
        worker = _work(session, replica, store, arrangement, replace(flow, overlap=store.overlap), shard)
    if shard is not None:
        shard.serve()
    return _conclude(session, worker, shard, lead, time.monotonic() - began)


def _progress(session: Session, stack: ExitStack, notes: tuple[str, ...]) -> RunProgress:
    """Return a progress display that has shown how the run starts, with these notes last."""
    begin, applied = session.begin, session.run.optimizer.rule
    progress = session.progress(stack, notes, f", {len(begin.stream):,} batches are left")
    for name in begin.fresh:
        progress.message(f"the checkpoint has no {name!r}: the rule {applied!r} starts it afresh")
    return progress


def _saver(session: Session, arrangement: Arrangement, number: int) -> ShardSaver:
    """Return what writes the part of a shard of that `number` of checkpoints."""
    run, plan, comm = session.run, session.plan, session.comms.world
    if number:
        return ShardSaver(comm, run.run.directory, number, plan.shards, run.checkpoint.compression)

    def not_finite(step: int) -> RunFailed:
        return RunFailed(
            f"after {step} steps some parameters are NaN or infinite; no checkpoint is written; "
            f"{kept(run.run.directory / 'checkpoints')}; {_lower(run.optimizer.learning_rate)}"
        )

    return LeadSaver(comm, run.run.directory, plan.shard_ranks, arrangement, run.checkpoint, not_finite)


def _lead(session: Session, role: ShardRole, saver: LeadSaver, progress: RunProgress) -> Lead:
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
        begun=role.server.begun,
    )
    checkpoints = CheckpointPlan(
        section=run.checkpoint,
        saver=saver,
        info=info,
        state=session.objective_state,
        account=session.account(),
    )
    return Lead(role, plan, session.begin, session.order, progress, checkpoints, session.callbacks, session.metrics)


def _work(
    session: Session,
    replica: Replica | OwnReplica,
    store: Store,
    arrangement: Arrangement,
    flow: Flow,
    shard: Shard | None,
) -> Worker:
    """Learn until the stream is used up or the run is stopped, and wait for its end."""
    run, plan, begin, data, number = session.run, session.plan, session.begin, session.data, session.worker
    assert number is not None
    assert session.batches is not None
    replica_number = number // plan.partitions
    orders = Orders(
        session.comms.world,
        plan.shard_ranks[0],
        session.stop,
        None if shard is None else shard.poll,
        released=replica_number == 0 or not begin.warmstart,
    )
    stretches = replica.parameters.runs_in(arrangement)
    client = store.client(stretches, flow.parts, orders.obey)
    assignment = Assignment(
        replica=replica_number,
        train=session.batches,
        test=data.test,
        warm_steps=begin.warmstart if replica_number == 0 else 0,
        evaluate_epochs=run.monitor.evaluate_epochs,
        directory=run.run.directory,
        state=session.objective_state,
        callbacks=session.callbacks,
        remedy=f"{_lower(run.optimizer.learning_rate)}, or look for extreme values in {run.data.called}",
    )
    log = session.log(number)
    worker = Worker(assignment, replica, client, orders, log, session.comms.replica, replica.seconds)
    replica.serve_while_waiting(orders.obey)
    clip = Clip(run.optimizer.clip_norm, stretches, worker.add_up) if flow.clipped else None
    schedule = Schedule.from_config(run.optimizer, session.order.samples)
    try:
        downpour(
            replica,
            DataPath(client, flow, worker.stopwatch("push"), clip),
            begin.stream.dealt(replica_number, plan.replicas, begin.warmstart),
            worker,
            n_fetch=run.optimizer.n_fetch,
            n_push=run.optimizer.n_push,
            local_rate=lambda number: (
                run.optimizer.local_rate
                * schedule(Moment(samples=session.order.before(number), pushed=session.order.size(number)))
            ),
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
    """Evaluate the final parameters on all workers together, and return the result on every rank."""
    comm, run, data = session.comms.world, session.run, session.data
    if lead is not None:
        lead.raise_failure()
    stopped_by = np.array([0 if lead is None else lead.stopped_by])
    waiting.broadcast(comm, stopped_by, 0, "the lead to conclude")
    advice = _advice(comm, worker, shard)
    if session.objective_state is not None:  # whichever replica evaluates, the outcome is that of the checkpoint
        session.objective_state.broadcast(comm, session.plan.worker_ranks[0])
    test = None if stopped_by[0] or not data.tested else _test(session, worker, shard)
    if lead is None:
        return session.conclude(None, seconds)
    if test is not None:
        lead.evaluated(test, lead.epoch)
        lead.amend()
        lead.raise_failure()
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
    totals = [total for _, total in mine.sums] or [0.0] * len(session.metrics)
    sums = np.array([mine.samples, mine.loss, max(mine.correct, 0), mine.correct < 0, *totals], np.float64)
    what = "the evaluation of the other workers"
    sums = waiting.allreduce(session.comms.world, sums, MPI.SUM, what, serve=serve)
    samples, loss, correct, unknown, *totals = sums.tolist()
    return Outcome(
        int(samples), loss, -1 if unknown else int(correct), tuple(zip(session.metrics, totals, strict=True))
    )


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
    initial: Fill,
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
    initial
        Writes the initial parameters.
    checkpoint
        Where to read parameters instead; None for a new run.
    applied_rule
        Initialises state that is missing in the checkpoint.
    """
    if checkpoint is None:
        for start, local, length in arrangement.pieces(held):
            initial(start, server.parameters[local : local + length])
        server.begin(None)
        return
    restore(server, applied_rule, checkpoint, list(arrangement.pieces(held)))
