"""A run by Downpour: the roles of one rank, put together and driven (paper, section 4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from dbmpi.data.deal import first_share
from dbmpi.downpour.algorithm import downpour
from dbmpi.downpour.assignment import Assignment
from dbmpi.downpour.checkpoints import CheckpointPlan
from dbmpi.downpour.datapath import DataPath, Flow
from dbmpi.downpour.heartbeat import Heartbeat
from dbmpi.downpour.lead import Lead
from dbmpi.downpour.orders import Orders
from dbmpi.downpour.settlement import HeldReplicas
from dbmpi.downpour.shard import Shard, ShardRole
from dbmpi.downpour.worker import Worker
from dbmpi.errors import RunFailed
from dbmpi.index.layout import Stretch
from dbmpi.monitor import verdict
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.worker_log import WorkerLog
from dbmpi.mpi import failures, waiting
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.mpi.world import together
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.clip import Clip
from dbmpi.paramserver.rules import Rule, rule
from dbmpi.paramserver.schedule import Moment, Schedule
from dbmpi.paramserver.server import Server
from dbmpi.paramserver.store import Store
from dbmpi.replica.arrangement import Arrangement, equal
from dbmpi.replica.arrangement import from_config as arranged
from dbmpi.replica.own_objective import OwnReplica
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
    flow = replace(flow, overlap=store.overlap)
    if isinstance(replica, OwnReplica):
        stack.callback(replica.free)
    session.compile_kernels()
    stretches = [] if replica is None else replica.parameters.runs_in(arrangement)
    client = None if replica is None else store.client(stretches, flow.parts)
    pushing = _pushing(session, client)
    shard = lead = None
    with together(comm, "preparing the shards", seconds=waiting.LONG_SECONDS):
        if number is not None:
            served = store.server(applied_rule)
            _fill(served, arrangement, store.ranges[number], session.initial, session.checkpoint, applied_rule)
            saver = _saver(session, arrangement, number)
            stack.callback(saver.close)
            role = ShardRole(
                comm=comm,
                server=served,
                held=HeldReplicas(
                    served, plan.partitions, np.flatnonzero(pushing[:, number]).tolist(), lead=number == 0
                ),
                saver=saver,
                recorder=session.recorder("shard", number),
                stop=session.stop,
                monitor=run.monitor,
                bandwidth=bandwidth,
            )
            if isinstance(saver, LeadSaver):
                lead = _lead(session, role, saver, _progress(session, stack, store.notes))
            shard = lead or Shard(role)
    shards = {rank: f", which holds shard {shard}," for shard, rank in enumerate(plan.shard_ranks)}
    session.watch.do_without(set(range(comm.size)) - set(shards), shards)
    began, log = time.monotonic(), None if session.worker is None else session.log(session.worker)
    with _heartbeat(session, log) as beat:
        if client is not None and log is not None:
            _work(session, client, stretches, flow, shard, log, beat)
        if shard is not None:
            shard.serve()
    return _conclude(session, lead, time.monotonic() - began)


@contextmanager
def _heartbeat(session: Session, log: WorkerLog | None) -> Iterator[Callable[[], bool]]:
    """Let this rank show in the block that it makes progress; yield what to call before each step of a worker.

    Parameters
    ----------
    session
        Says how long it may make none.
    log
        Of the worker on this rank, if it is one.
    """
    comm, seconds = session.comms.world, session.run.monitor.stall_timeout
    if not seconds:
        yield bool  # which is False
        return
    mailbox = Mailbox(comm, Role.WORKER)
    roles = [] if session.shard is None else [f"shard {session.shard}"]
    if session.worker is not None:
        replica, partition = divmod(session.worker, session.plan.partitions)
        roles.append(f"partition {partition} of replica {replica}")

    def send() -> None:
        mailbox.send(session.plan.shard_ranks[0], Role.SHARD, MessageKind.BEAT)

    def where() -> str:
        if log is None:
            return "serving"
        return f"in step {log.steps + 1} ({log.stopwatch.activity or 'between two phases'})"

    heartbeat = Heartbeat(seconds, send, f"rank {comm.rank} ({', '.join(roles)})", where)
    with heartbeat, waiting.serving(heartbeat.beat):
        yield heartbeat.beat


def _pushing(session: Session, client: Client | None) -> np.ndarray:
    """Return for each partition of a replica to which shards it pushes, uint8 (partitions, shards) (collective)."""
    plan = session.plan
    pushing = np.zeros((plan.partitions, plan.shards), np.uint8)
    if client is not None and session.worker is not None:
        pushing[session.worker % plan.partitions, client.pushes_to] = 1
    what = "the other ranks to say which shards they push to"
    bits = waiting.allreduce(session.comms.world, np.packbits(pushing, axis=1), MPI.BOR, what)
    return np.unpackbits(bits, axis=1, count=plan.shards)


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
    checkpoints = CheckpointPlan(
        section=session.run.checkpoint,
        saver=saver,
        info=partial(session.checkpoint_info(), begun=role.server.begun),
        state=session.objective_state,
        account=session.account(),
    )
    return Lead(
        role,
        session.plan,
        session.begin,
        session.order,
        progress,
        checkpoints,
        session.callbacks,
        session.watch,
        session.metrics,
        tested=session.data.tested,
    )


def _work(
    session: Session,
    client: Client,
    stretches: Sequence[Stretch],
    flow: Flow,
    shard: Shard | None,
    log: WorkerLog,
    beat: Callable[[], bool],
) -> None:
    """Learn until the stream is used up or the run is stopped, and wait for its end.

    Parameters
    ----------
    session
        Everything that is known.
    client, stretches, flow
        How gradients leave, and which they are.
    shard
        That on this rank, if it has one.
    log
        Of this worker.
    beat
        Called before each step.
    """
    run, plan, begin, data, number = session.run, session.plan, session.begin, session.data, session.worker
    replica, watch = session.replica, session.watch
    assert number is not None
    assert session.batches is not None
    assert replica is not None
    replica_number, partition = divmod(number, plan.partitions)
    first = number - partition
    orders = Orders(
        session.comms.world,
        plan.shard_ranks[0],
        session.stop,
        (lambda: beat() or shard.poll()) if shard is not None else beat,
        partners={*plan.worker_ranks[first : first + plan.partitions]} - {session.comms.world.rank},
        dead=lambda: watch.dead,
        released=replica_number == 0 or not begin.warmstart,
    )
    client.serve = orders.obey
    assignment = Assignment(
        replica=replica_number,
        train=session.batches,
        stream=begin.stream,
        share=first_share(begin.stream, replica_number, plan.learning, begin.warmstart),
        test=data.test,
        warm_steps=begin.warmstart if replica_number == 0 else 0,
        evaluate_epochs=run.monitor.evaluate_epochs,
        directory=run.run.directory,
        state=session.objective_state,
        callbacks=session.callbacks,
        most_withheld=0 if flow.by_layers else run.optimizer.most_withheld,
        rolls_back=run.optimizer.roll_back > 0,
        layers=run.network.layer_names or [tensor.name for tensor in session.model.layout.tensors],
        remedy=f"{_lower(run.optimizer.learning_rate)}, or look for extreme values in {run.data.called}",
    )
    worker = Worker(assignment, replica, client, orders, log, session.comms.replica, replica.seconds)
    replica.serve_while_waiting(orders.obey)
    clip = Clip(run.optimizer.clip_norm, stretches, worker.add_up) if run.optimizer.clip_norm else None
    schedule = Schedule.from_config(run.optimizer, session.order.samples)
    path = DataPath(client, flow, worker.stopwatch("push"), clip, worker.largest)
    step = begin.done[replica_number] if begin.done else 0

    def learn_share() -> int:
        return downpour(
            replica,
            path,
            worker,
            n_fetch=run.optimizer.n_fetch,
            n_push=run.optimizer.n_push,
            local_rate=lambda number: (
                run.optimizer.local_rate
                * schedule(Moment(samples=session.order.before(number), pushed=session.order.size(number)))
            ),
            first_step=step,
        )

    try:
        more = True
        while more:
            with _giving_up(worker):
                step += learn_share()
            more = worker.finish()
    except Exception:  # in whatever step of the exchange the loss of a partition was noticed
        watch.check(now=True)
        if not orders.lost:
            raise
        worker.leave()
    finally:
        path.close()


@contextmanager
def _giving_up(worker: Worker) -> Iterator[None]:
    """Where the block fails, let the lead write a last checkpoint before that ends the run."""
    try:
        yield
    except RunFailed:  # numbers that are not finite, or a rank that cannot be waited for: there is nothing good to keep
        raise
    except Exception as error:
        if not failures.reports_death(error):
            worker.give_up()
        raise


def _lower(learning_rate: float) -> str:
    return f"lower optimizer.learning_rate ({learning_rate:g})"


def _conclude(session: Session, lead: Lead | None, seconds: float) -> Result:
    """Return the result on every rank (collective among those that are left)."""
    run, data = session.run, session.data
    if session.objective_state is not None:  # whichever replica has evaluated, it is that of the checkpoint
        session.share_state(None if lead is None else lead.objective_state)
    if lead is None:
        return session.conclude(None, seconds)
    lead.raise_failure()
    warning = verdict.warning(
        data.guessing,
        lead.recent.mean_loss,
        lead.test,
        enough=lead.steps >= _FEWEST_STEPS and lead.samples >= data.samples,
        remedy=f"another optimizer.learning_rate ({run.optimizer.learning_rate:g})",
    )
    checkpoint = lead.checkpoint or session.checkpoint
    assert checkpoint is not None or lead.rolls_back
    result = Result(
        lead.steps,
        lead.samples,
        seconds,
        lead.test,
        lead.stopped_by,
        checkpoint or run.run.directory,
        lead.staleness.mean,
        lead.advice,
        warning,
        lead.lost,
        lead.withheld,
        lead.rolls_back,
    )
    return session.conclude(result, seconds)


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
