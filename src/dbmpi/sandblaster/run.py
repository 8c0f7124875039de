"""A run by Sandblaster: the roles of one rank, put together and driven.

Every rank is a set of duties that are polled: a shard executes commands, a worker does the next step of its portions.
On the lead's rank the coordinator runs, and polls the others while it waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.data import limits
from dbmpi.errors import UserError
from dbmpi.machine.rank_variables import ranks_on_node
from dbmpi.methods import own
from dbmpi.methods.own import Method
from dbmpi.methods.warmup import use_kernels
from dbmpi.monitor import verdict
from dbmpi.mpi import mailbox as mpi_mailbox
from dbmpi.mpi import waiting
from dbmpi.mpi import window as windows
from dbmpi.mpi.mailbox import Mailbox
from dbmpi.mpi.transport import transport_between
from dbmpi.mpi.window import Window
from dbmpi.mpi.world import together
from dbmpi.replica.arrangement import Arrangement
from dbmpi.replica.own_objective import OwnReplica
from dbmpi.result import Result
from dbmpi.sandblaster.board import MOST_PORTIONS, MOST_REPLICAS
from dbmpi.sandblaster.checkpoints import Keeper
from dbmpi.sandblaster.coordinator import Coordinator
from dbmpi.sandblaster.evaluation import Evaluator
from dbmpi.sandblaster.passes import Passes
from dbmpi.sandblaster.setup import Setup, lay_out
from dbmpi.sandblaster.shard import Shards, ShardSpace
from dbmpi.sandblaster.start import ShardStart, start_shard
from dbmpi.sandblaster.worker import FOR_THE_LEAD, BatchWorker
from dbmpi.session import Session

_FEWEST_ITERATIONS = 10
"""Fewer may be too few to learn anything, unless the method ended by itself."""


def learn(session: Session, stack: ExitStack) -> Result:
    """Play this rank's roles until the run ends, and return its result (collective).

    Parameters
    ----------
    session
        Of this rank.
    stack
        Closes what is opened.
    """
    if isinstance(session.replica, OwnReplica):
        stack.callback(session.replica.free)
    session.compile_kernels(use_kernels)
    plan, comm, number = session.plan, session.comms.world, session.comms.shard
    setup = lay_out(session)
    with together(comm, "planning the batches"):
        _check(session, setup)
    window, notes = _window(session, setup, stack)
    start = coordinator = worker = method = None
    with together(comm, "preparing the shards", seconds=waiting.LONG_SECONDS):
        if number is not None:
            start = start_shard(session, setup, window, number)
            start.space.write_with(session.saver(Arrangement(session.model.layout, setup.ranges), stack))
        if session.comms.worker is not None:
            worker = BatchWorker(
                session, setup, window, session.comms.worker, start.space if start is not None else None
            )
        settings = session.run.sandblaster
        if settings.own and number == 0:
            method = own.load(settings.algorithm, session.run.network.code)
    session.watch.do_without_workers(plan.shard_ranks)
    began = time.monotonic()
    if number == 0:
        assert start is not None
        step = worker.poll if worker is not None else lambda: False
        coordinator = _coordinator(session, setup, window, start, notes, step, method, stack)
        coordinator.run()
    _serve(session, worker, start.space if number and start is not None else None)
    return _conclude(session, coordinator, time.monotonic() - began)


def _window(session: Session, setup: Setup, stack: ExitStack) -> tuple[Window, Sequence[str]]:
    """Return this rank's window, and lines on how data travel (collective)."""
    comm = session.comms.world
    nbytes = setup.nbytes(comm.rank)
    shared = windows.missing(comm, nbytes) <= 0
    memories = session.comms.hosts if shared else np.arange(comm.size)
    with together(comm, "choosing the transport"):
        transport, notes = transport_between(comm, session.run.server.transport, memories)
    window = stack.enter_context(Window.allocate(comm, nbytes, shared=shared, transport=transport))
    if transport == "p2p":
        # Replicas read and change words of one another and of the lead at any time, and messages need an answer.
        stack.enter_context(waiting.serving(partial(_look, window)))
    return window, notes


def _serve(session: Session, worker: BatchWorker | None, space: ShardSpace | None) -> None:
    """Execute commands and compute portions until the run ends; `space` is that of a shard other than the lead's."""
    mailbox = Mailbox(session.comms.world, mpi_mailbox.Role.WORKER)
    told = session.comms.shard == 0  # the coordinator notices signals itself

    def ended() -> bool:
        return (space is None or space.ended) and (worker is None or worker.ended)

    def serve() -> bool:
        nonlocal told
        if session.stop.number and not told:
            told = True
            mailbox.send(0, mpi_mailbox.Role.SHARD, mpi_mailbox.MessageKind.STOP_ASKED, session.stop.number)
        moved = space is not None and space.poll()
        return (worker is not None and worker.poll()) or moved

    waiting.until(ended, "the coordinator's next batch", serve=serve, seconds=FOR_THE_LEAD * waiting.STALL_SECONDS)


def _look(window: Window) -> bool:
    window.sync()
    return window.busy


def _check(session: Session, setup: Setup) -> None:
    run, order = session.run, session.order
    if session.plan.spares:
        raise UserError(
            f"topology.spares = {session.plan.spares}: replicas of Sandblaster draw portions as they come, and go on "
            "where another one has died; leave it out, so that all of them compute from the beginning"
        )
    if session.plan.evaluators:
        raise UserError(
            f"topology.evaluators = {session.plan.evaluators} is for Downpour: leave it out, as all replicas of "
            "Sandblaster evaluate between two iterations, each a part"
        )
    portions = min(run.sandblaster.batch_portions or order.batches_per_epoch, order.batches_per_epoch)
    if order.batches < portions:
        raise UserError(
            f"optimizer.epochs = {run.optimizer.epochs:g} gives {order.batches} portions, but one Sandblaster batch "
            f"needs {portions}; set optimizer.epochs to {portions / order.batches_per_epoch:g} or more, or "
            "sandblaster.batch_portions to fewer"
        )
    if run.sandblaster.batch_overlap and portions >= order.batches_per_epoch:
        raise UserError(
            f"sandblaster.batch_portions = {run.sandblaster.batch_portions} takes all {order.batches_per_epoch} "
            "portions of an epoch, so that batches would be nothing but their overlap; set sandblaster.batch_portions "
            "to fewer, or sandblaster.batch_overlap to 0"
        )
    if setup.capacity > MOST_PORTIONS:
        raise UserError(
            f"optimizer.batch_size = {run.optimizer.batch_size} makes {setup.capacity:,} portions, and Sandblaster "
            f"can count {MOST_PORTIONS:,}; set it to more"
        )
    if run.sandblaster.algorithm == "lbfgs" and session.comms.shard is not None:
        elements, shards = max(map(len, setup.ranges)), min(ranks_on_node(os.environ), session.plan.shards)
        limits.check_history(run.sandblaster.memory, order.batches // portions, elements, shards)
    if session.plan.replicas > MOST_REPLICAS:
        raise UserError(
            f"the run has {session.plan.replicas} replicas, and Sandblaster can count {MOST_REPLICAS}; set "
            "topology.replicas to fewer, or topology.partitions to more"
        )


def _coordinator(
    session: Session,
    setup: Setup,
    window: Window,
    start: ShardStart,
    notes: Sequence[str],
    serve: Callable[[], bool],
    method: Method | None,
    stack: ExitStack,
) -> Coordinator:
    """Return the coordinator of the run.

    Parameters
    ----------
    session, setup, window
        The run, and this rank's window.
    start
        The lead's shard.
    notes
        Lines to show.
    serve
        Does the next step of the worker on this rank.
    method
        The user's own, if there is one.
    stack
        Closes the progress.
    """
    state = start.state
    kept = ", with the history of L-BFGS" if state is not None and state.pairs else ""
    progress = session.progress(stack, notes, kept)
    bundles = [setup.bundles_of(replica) for replica in range(session.plan.replicas)]
    shards = Shards(session.comms.world, session.plan, start.space)
    saver = start.space.saver
    assert isinstance(saver, LeadSaver)

    def serve_and_write() -> bool:
        served = serve()
        return (keeper is not None and keeper.poll()) or served

    keeper: Keeper | None = None
    evaluator = Evaluator(
        session,
        shards,
        Passes(setup.board(window), bundles, metrics=session.metrics),
        say=progress.message,
        serve=serve_and_write,
    )
    recorder = session.recorder("shard", 0)
    recorder.write(session.started())
    keeper = Keeper(
        session, state, shards, saver, recorder, carried=start.carried, warn=progress.warn, serve=evaluator.serve
    )
    return Coordinator(
        session,
        state,
        setup.tests,
        evaluator=evaluator,
        keeper=keeper,
        recorder=recorder,
        progress=progress,
        method=method,
    )


def _conclude(session: Session, coordinator: Coordinator | None, seconds: float) -> Result:
    """Return the result on every rank."""
    if coordinator is None:
        return session.conclude(None, seconds)
    warning = verdict.warning(
        session.data.guessing,
        coordinator.best,
        coordinator.test,
        enough=coordinator.converged or coordinator.iterations >= _FEWEST_ITERATIONS,
        remedy="another sandblaster.algorithm or sandblaster.line_search",
    )
    assert coordinator.checkpoint is not None
    result = Result(
        coordinator.steps,
        coordinator.samples,
        seconds,
        coordinator.test,
        coordinator.stopped_by,
        coordinator.checkpoint,
        warning=warning,
        lost=tuple(coordinator.lost),
        ended=coordinator.ended_by,
    )
    return session.conclude(result, seconds)
