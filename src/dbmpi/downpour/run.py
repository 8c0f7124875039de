"""A run by Downpour: the roles of one rank, put together and driven (paper, section 4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.checkpoint.named_arrays import Fill
from dbmpi.checkpoint.restore import Restorable, restore
from dbmpi.config.exchange import too_many_backups
from dbmpi.data.deal import first_share
from dbmpi.downpour.algorithm import downpour
from dbmpi.downpour.assignment import Assignment
from dbmpi.downpour.datapath import DataPath, Flow
from dbmpi.downpour.evaluator import SnapshotEvaluator
from dbmpi.downpour.heartbeat import beating
from dbmpi.downpour.lead import Lead
from dbmpi.downpour.local_steps import walk, walking
from dbmpi.downpour.mirrors import mirror_notes, mirrors_of
from dbmpi.downpour.orders import Orders
from dbmpi.downpour.rescue import rescued
from dbmpi.downpour.round_worker import RoundWorker
from dbmpi.downpour.settlement import HeldReplicas
from dbmpi.downpour.shard import Shard, ShardRole
from dbmpi.downpour.turns import most_overlaps
from dbmpi.downpour.warmstart import Warmstart
from dbmpi.downpour.worker import Worker
from dbmpi.errors import RunFailed, UserError
from dbmpi.index.layout import Stretch
from dbmpi.monitor import verdict
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.worker_log import WorkerLog
from dbmpi.mpi import failures, waiting
from dbmpi.mpi.world import together
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.clip import Clip
from dbmpi.paramserver.rules import Rule, rule
from dbmpi.paramserver.schedule import Moment, Schedule
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
    comm, number, evaluates = session.comms.world, session.comms.shard, plan.evaluates(session.comms.world.rank)
    # Before the lead's clock runs, and before the windows take their memory.
    bandwidth = 0.0 if number is None else bottleneck.copy_bandwidth()
    with together(comm, "planning the shards' memory"):
        for mistake in too_many_backups(run.optimizer, plan.learning):
            raise UserError(mistake)
        applied_rule = rule(run.optimizer, session.order.samples, run.network.code)
        if session.placement is None:
            arrangement = equal(model.layout, plan.shards)
        else:
            arrangement = arranged(run.server, model.layers, model.layout, session.placement, plan.shards)
        flow = Flow.from_config(run.server, run.optimizer, () if replica is None else replica.parameters.parts)
        store = Store(
            comm,
            plan,
            arrangement.ranges,
            run.server,
            DTYPE,
            0 if evaluates else flow.buffer_size,
            compensates=run.optimizer.delay_compensation != "none",
            kept_size=flow.size if run.optimizer.delay_compensation != "none" and not evaluates else 0,
            rounded=run.network.precision == "bfloat16",
            hosts=session.comms.hosts,
        )
    stack.enter_context(store)
    flow = replace(flow, overlap=store.overlap)
    if isinstance(replica, OwnReplica):
        stack.callback(replica.free)
    session.compile_kernels()
    stretches = [] if replica is None else replica.parameters.runs_in(arrangement)
    client = None if replica is None else store.client(stretches, flow.parts)
    if isinstance(replica, Replica) and client is not None and client.rounded is not None:
        assert client.parameters is not None
        replica.keep_rounded(client.parameters, client.rounded)
    pushing = _pushing(session, client)
    shard = lead = None
    with together(comm, "preparing the shards", seconds=waiting.LONG_SECONDS):
        if number is not None:
            served = store.server(applied_rule, rounds=run.in_rounds)
            fill(served, arrangement, store.ranges[number], session.initial, session.checkpoint, applied_rule)
            mirrors = mirrors_of(session, served, store.ranges)
            saver = session.saver(arrangement, stack, _lower(run.optimizer.learning_rate))
            role = ShardRole(
                server=served,
                held=HeldReplicas(
                    served, plan.partitions, np.flatnonzero(pushing[:, number]).tolist(), lead=number == 0
                ),
                saver=saver,
                mirrors=mirrors,
                recorder=session.recorder("shard", number),
                bandwidth=bandwidth,
            )
            if isinstance(saver, LeadSaver):
                notes = (*store.notes, *mirror_notes(run.server.mirror, mirrors))
                progress = _progress(session, stack, notes)
                role.recorder.write(session.started())
                lead = Lead(session, role, saver, progress)
            shard = lead or Shard(session, role)
    session.watch.do_without_workers(plan.shard_ranks)
    session.watch.rescues = session.watch.on and run.server.mirror > 0
    worker = session.comms.worker
    began, log = time.monotonic(), None if worker is None or evaluates else session.log(worker)
    with beating(session, log) as beat, rescued(session.watch, shard):
        if client is not None and evaluates:
            _evaluate(session, client, beat)
        elif client is not None and log is not None:
            _work(session, client, stretches, flow, shard, log, beat)
        if shard is not None:
            shard.serve()
    return _conclude(session, lead, time.monotonic() - began)


def _pushing(session: Session, client: Client | None) -> np.ndarray:
    """Return for each partition of a replica to which shards it pushes, uint8 (partitions, shards) (collective)."""
    plan = session.plan
    pushing = np.zeros((plan.partitions, plan.shards), np.uint8)
    if client is not None and session.comms.worker is not None:
        pushing[session.comms.worker % plan.partitions, client.pushes_to] = 1
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


def _evaluate(session: Session, client: Client, beat: Callable[[], bool]) -> None:
    """Evaluate snapshots until the run ends.

    Parameters
    ----------
    session
        Everything that is known.
    client
        Fetches the snapshots.
    beat
        Called before each batch.
    """
    replica, test, orders = session.replica, session.data.test, _orders(session, beat, released=True)
    assert replica is not None
    assert test is not None
    client.serve = orders.obey
    replica.serve_while_waiting(orders.obey)
    size, partitions = session.order.batch_size, session.comms.replica
    evaluator = SnapshotEvaluator(replica, client, orders, test, size, partitions, session.objective_state)
    evaluator.work(session.watch)


def _orders(session: Session, serve: Callable[[], bool], *, released: bool) -> Orders:
    """Return the connection of this rank, a worker, with the lead.

    Parameters
    ----------
    session
        Everything that is known.
    serve
        Called whenever orders are read.
    released
        Whether this worker may begin at once.
    """
    plan, comm = session.plan, session.comms.world
    replica = plan.replica_of(comm.rank)
    assert replica is not None
    return Orders(
        comm,
        plan.shard_ranks[0],
        session.stop,
        serve,
        partners={*plan.ranks_of(replica)} - {comm.rank},
        dead=lambda: session.watch.dead,
        released=released,
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
    run, plan, begin, data, number = session.run, session.plan, session.begin, session.data, session.comms.worker
    replica, watch = session.replica, session.watch
    assert number is not None
    assert session.batches is not None
    assert replica is not None
    replica_number, in_rounds = number // plan.partitions, run.in_rounds
    serve = (lambda: beat() or shard.poll()) if shard is not None else beat
    warmstart = Warmstart.of(session)
    joins_later = warmstart.joined <= replica_number < plan.learning or (warmstart.batches > 0 and replica_number > 0)
    orders = _orders(session, serve, released=not joins_later)
    orders.stopping = bool(session.judge().verdict)  # an evaluation has ended the run in an earlier session
    client.serve = orders.obey
    shared = warmstart.batches, warmstart.phases
    assignment = Assignment(
        replica=replica_number,
        train=session.batches,
        stream=begin.stream,
        share=() if in_rounds else first_share(begin.stream, replica_number, plan.learning, *shared),
        test=data.test,
        takes_turns=in_rounds or most_overlaps(run.server, run.optimizer) is not None,
        warm_steps=warmstart.batches if replica_number == 0 else 0,
        evaluate_epochs=0.0 if plan.evaluators else run.monitor.evaluate_epochs,
        directory=run.run.directory,
        state=session.objective_state,
        callbacks=session.callbacks,
        most_withheld=0 if flow.by_layers else run.optimizer.most_withheld,
        rolls_back=run.optimizer.roll_back > 0,
        layers=run.network.layer_names or [tensor.name for tensor in session.model.layout.tensors],
        remedy=f"{_lower(run.optimizer.learning_rate)}, or look for extreme values in {run.data.called}",
    )
    kind = RoundWorker if in_rounds else Worker
    worker = kind(assignment, replica, client, orders, log, session.comms.replica, replica.seconds)
    replica.serve_while_waiting(orders.obey)
    clip = Clip(run.optimizer.clip_norm, stretches, worker.team.add_up) if run.optimizer.clip_norm else None
    schedule = Schedule.from_config(run.optimizer, session.order.samples)
    largest, waits = worker.team.largest, worker.stopwatch("push")
    step = begin.done[replica_number] if begin.done else 0
    path: DataPath
    if run.optimizer.walks:
        path = local = walking(session, client, flow, waits, largest, clip)
    else:
        path, local = DataPath(client, flow, waits, clip, largest), None

    def learn_share() -> int:
        if local is not None:
            return walk(replica, local, worker, steps=run.local.steps)
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
    totals = lead.totals
    warning = verdict.warning(
        data.guessing,
        totals.recent.mean_loss,
        lead.test,
        enough=totals.steps >= _FEWEST_STEPS and totals.samples >= data.samples,
        remedy=f"another optimizer.learning_rate ({run.optimizer.learning_rate:g})",
    )
    checkpoint = lead.checkpoint or session.checkpoint
    assert checkpoint is not None or lead.rolls_back
    result = Result(
        totals.steps,
        totals.samples,
        seconds,
        lead.test,
        lead.stopped_by,
        checkpoint or run.run.directory,
        totals.staleness.mean,
        lead.advice,
        warning,
        lead.lost,
        totals.withheld,
        totals.discarded,
        lead.rolls_back,
        lead.ended_by,
    )
    return session.conclude(result, seconds)


def fill(
    server: Restorable,
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
