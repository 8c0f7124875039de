"""A run by Sandblaster: the roles of one rank, put together and driven.

Every rank is a set of duties that are polled: a shard executes commands, a worker does the next step of its portions.
On the lead's rank the coordinator runs, and polls the others while it waits.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.config.sections import SandblasterSection
from dbmpi.data import limits
from dbmpi.data.run_data import network_notes
from dbmpi.downpour.session import DTYPE, Session
from dbmpi.errors import EndedByDeath, UserError
from dbmpi.index.layout import pieces
from dbmpi.machine.threads import ranks_on_node
from dbmpi.methods import own
from dbmpi.methods.own import Method
from dbmpi.methods.warm import use_kernels
from dbmpi.monitor import verdict
from dbmpi.monitor.progress import RunProgress
from dbmpi.mpi import blocking, failures, waiting
from dbmpi.mpi import mailbox as mpi_mailbox
from dbmpi.mpi import window as windows
from dbmpi.mpi.failures import RankLost
from dbmpi.mpi.mailbox import Mailbox
from dbmpi.mpi.tags import Tag
from dbmpi.mpi.transport import transport_between
from dbmpi.mpi.window import Window
from dbmpi.mpi.world import together
from dbmpi.objective import Outcome
from dbmpi.replica.arrangement import Arrangement
from dbmpi.result import Result
from dbmpi.sandblaster import shard as sandblaster_shard
from dbmpi.sandblaster.batches import BatchStart, Samples
from dbmpi.sandblaster.board import MOST_PORTIONS, MOST_REPLICAS
from dbmpi.sandblaster.checkpoints import Keeper
from dbmpi.sandblaster.coordinator import Coordinator
from dbmpi.sandblaster.evaluation import Evaluator
from dbmpi.sandblaster.passes import Station
from dbmpi.sandblaster.setup import Setup
from dbmpi.sandblaster.shard import ShardSpace
from dbmpi.sandblaster.state import MethodState, read_state
from dbmpi.sandblaster.worker import FOR_THE_LEAD, BatchWorker

__all__ = ["learn"]

_MAY_CHANGE: dict[str, object] = {
    "gtol": 0.0,
    "ftol": 0.0,
    "line_search": "strong_wolfe",
    "step_length": 1.0,
    "portions_per_push": 1,
    "deterministic": False,
}
"""Settings, set to anything, under which a search goes on from where it stands."""
_FEWEST_ITERATIONS = 10
"""Fewer may be too few to learn anything, unless the method ended by itself."""


def learn(session: Session, stack: ExitStack) -> Result:
    """Play this rank's roles until the run ends (collective)."""
    session.compile_kernels(use_kernels)
    setup = Setup(**vars(session))
    plan, comm = setup.plan, setup.comms.world
    setup.tests, setup.stretches  # noqa: B018 (collective: all ranks ask here)
    with together(comm, "planning the batches"):
        _check(setup)
    nbytes = setup.nbytes(comm.rank)
    shared = windows.missing(comm, nbytes) <= 0
    memories = windows.hosts(comm) if shared else np.arange(comm.size)
    with together(comm, "choosing the transport"):
        transport, notes = transport_between(comm, setup.run.server.transport, memories)
    window = stack.enter_context(Window.allocate(comm, nbytes, shared=shared, transport=transport))
    if transport == "p2p":
        # Replicas read and change words of one another and of the lead at any time, and messages need an answer.
        stack.enter_context(waiting.serving(partial(_look, window)))
    number, worker_number = plan.shard_of(comm.rank), plan.worker_of(comm.rank)
    space = coordinator = worker = None
    with together(comm, "preparing the shards", seconds=waiting.LONG_SECONDS):
        if number is not None:
            space, carried, state = _shard(setup, window, number)
        if worker_number is not None:
            worker = BatchWorker(setup, window, worker_number, space)
        kept = setup.run.sandblaster
        method = own.load(kept.algorithm, setup.run.network.code) if kept.own and number == 0 else None
    shards = {rank: f", which holds shard {shard}," for shard, rank in enumerate(plan.shard_ranks)}
    setup.watch.do_without(set(range(comm.size)) - set(shards), shards)
    began = time.monotonic()
    if number == 0:
        assert space is not None
        step = worker.poll if worker is not None else lambda: False
        coordinator = _coordinator(setup, window, space, carried, state, notes, step, method, stack)
        coordinator.run()
    mailbox = Mailbox(comm, mpi_mailbox.Role.WORKER)
    told = number == 0  # the coordinator has its own ear for signals

    def ended() -> bool:
        return (number in (None, 0) or (space is not None and space.ended)) and (worker is None or worker.ended)

    def serve() -> bool:
        nonlocal told
        if setup.stop.number and not told:
            told = True
            mailbox.send(0, mpi_mailbox.Role.SHARD, mpi_mailbox.MessageKind.STOP_ASKED, setup.stop.number)
        moved = space.poll() if number and space is not None else False
        return (_poll(worker, mailbox) if worker is not None else False) or moved

    waiting.until(ended, "the coordinator's next batch", serve=serve, seconds=FOR_THE_LEAD * waiting.STALL_SECONDS)
    return _conclude(setup, coordinator, time.monotonic() - began)


def _poll(worker: BatchWorker, mailbox: Mailbox) -> bool:
    """Do the worker's next step; where it fails, let the lead write a checkpoint first."""
    try:
        return worker.poll()
    except Exception as error:
        if not (isinstance(error, (EndedByDeath, RankLost)) or failures.told(error)):
            worker.let_lead_write(mailbox)
        raise


def _look(window: Window) -> bool:
    window.sync()
    return window.busy


def _check(setup: Setup) -> None:
    portions = min(setup.run.sandblaster.batch_portions or setup.order.batches_per_epoch, setup.order.batches_per_epoch)
    if setup.order.batches < portions:
        raise UserError(
            f"optimizer.epochs = {setup.run.optimizer.epochs:g}: that is {setup.order.batches} portions, and a batch "
            f"of Sandblaster has {portions}; set optimizer.epochs to {portions / setup.order.batches_per_epoch:g} or "
            "more, or sandblaster.batch_portions to fewer"
        )
    if setup.run.sandblaster.batch_overlap and portions >= setup.order.batches_per_epoch:
        raise UserError(
            f"sandblaster.batch_portions = {setup.run.sandblaster.batch_portions}: all {setup.order.batches_per_epoch} "
            "portions of an epoch, so that batches have nothing but their overlap; set sandblaster.batch_portions to "
            "fewer, or sandblaster.batch_overlap to 0"
        )
    if setup.capacity > MOST_PORTIONS:
        raise UserError(
            f"optimizer.batch_size = {setup.run.optimizer.batch_size}: that makes {setup.capacity:,} portions, and "
            f"Sandblaster can tell {MOST_PORTIONS:,} apart; set it to more"
        )
    if setup.run.sandblaster.algorithm == "lbfgs" and setup.plan.shard_of(setup.comms.world.rank) is not None:
        elements, shards = max(map(len, setup.ranges)), min(ranks_on_node(os.environ), setup.plan.shards)
        limits.check_history(setup.run.sandblaster.memory, setup.order.batches // portions, elements, shards)
    if setup.plan.replicas > MOST_REPLICAS:
        raise UserError(
            f"{setup.plan.replicas} replicas are more than {MOST_REPLICAS}, which Sandblaster can tell apart"
        )


def _shard(setup: Setup, window: Window, number: int) -> tuple[ShardSpace, list[str], MethodState | None]:
    """Fill a shard; return its space, the names of what it carries along, and where a batch method stood."""
    plan, held, memory = setup.plan, setup.ranges[number], setup.memories[number]
    parameters = window.local[memory.parameters :][: len(held) * DTYPE.itemsize].view(DTYPE)
    vectors = {"parameters": parameters}
    carried: list[str] = []
    state: MethodState | None = None
    version = 0
    method: dict[str, np.ndarray] = {}
    if setup.checkpoint is None:
        setup.network.initial(held.start, parameters)
    else:
        with Checkpoint.open(setup.checkpoint) as checkpoint:
            checkpoint.load("parameters", held.start, parameters)
            version = max(checkpoint.info.shard_versions)
            kept = setup.run.sandblaster
            state = read_state(checkpoint.info.method, checkpoint.vectors, checkpoint.path)
            # The history of another memory, or of parameters that Downpour has changed since, is of no use.
            if kept.algorithm != "lbfgs" or state is None or state.memory != kept.memory:
                state = None
            for name in checkpoint.vectors[1:]:
                of_method = re.fullmatch(r"[sy]\d+|(other )?gradient", name)
                if of_method and (state is None or name not in state.vectors):
                    continue
                target = method if of_method else vectors
                target[name] = np.empty(len(held), DTYPE)
                checkpoint.load(name, held.start, target[name])
                if not of_method:
                    carried.append(name)
            if state is not None and kept.model_copy(update=_MAY_CHANGE) != _settings(checkpoint).model_copy(
                update=_MAY_CHANGE
            ):
                # Another loss or another batch: the history is of use, but not the gradient.
                state = state.model_copy(update={"gradient": "", "position": [], "bounds": {}})
    here = [pieces(runs, setup.ranges)[number] for runs in setup.stretches]
    sources = [
        [
            sandblaster_shard.BundleSource(plan.worker_ranks[worker], setup.bundles(worker), pushed)
            for worker, pushed in enumerate(here, replica * plan.partitions)
        ]
        for replica in range(plan.replicas)
    ]
    space = ShardSpace(setup.comms.world, setup.comms.shards, window, sources, version, vectors)
    for name in state.vectors if state is not None else ():
        space.create(name)
        space.writable(name)[:] = method[name]
    if state is not None:
        space.restore_bounds(state.bounds)
    return space, carried, state


def _settings(checkpoint: Checkpoint) -> SandblasterSection:
    return Run.from_json(checkpoint.info.configuration).sandblaster


def _coordinator(
    setup: Setup,
    window: Window,
    space: ShardSpace,
    carried: list[str],
    state: MethodState | None,
    notes: Sequence[str],
    serve: Callable[[], bool],
    method: Method | None,
    stack: ExitStack,
) -> Coordinator:
    run, plan, begin, order = setup.run, setup.plan, setup.begin, setup.order
    total = round(order.samples * run.optimizer.epochs)
    progress = stack.enter_context(RunProgress(total, run.monitor.progress, epochs=run.optimizer.epochs))
    progress.message(
        f"{plan}; {setup.network.size:,} parameters; {order.samples:,} samples of {setup.data.input_shape}; Sandblaster"
    )
    for note in (*setup.data.notes, *network_notes(run.network, setup.data.input_shape, run.data.channels), *notes):
        progress.message(note)
    for notice in begin.notices:
        progress.warn(notice)
    if begin.step:
        kept = ", with the history of L-BFGS" if state is not None and state.pairs else ""
        progress.message(begin.resumed(run.optimizer.epochs, kept))
    stations = [
        [
            Station(plan.worker_ranks[worker], setup.bundles(worker))
            for worker in range(replica * plan.partitions, (replica + 1) * plan.partitions)
        ]
        for replica in range(plan.replicas)
    ]
    evaluator = Evaluator(
        setup.comms.world,
        plan,
        space,
        setup.board(window),
        window,
        stations,
        ordered=run.sandblaster.deterministic,
        mailbox=Mailbox(setup.comms.world, mpi_mailbox.Role.SHARD),
        stop=setup.stop,
        watch=setup.watch,
        say=progress.message,
        serve=serve,
    )
    samples = Samples(order, setup.tests, setup.data.input_shape, setup.data.classes, setup.data.meaning)
    beginning = BatchStart(begin.stream, begin.step, begin.samples, state)
    keeper = Keeper(
        setup.comms.world,
        run,
        plan,
        Arrangement(setup.network.layout, setup.ranges),
        samples,
        beginning,
        lead=space,
        carried=carried,
        submit=evaluator.submit,
        warn=progress.warn,
        serve=evaluator.serve,
    )
    recorder = setup.recorder("shard", 0)
    return Coordinator(
        run,
        samples,
        beginning,
        evaluator=evaluator,
        keeper=keeper,
        recorder=recorder,
        progress=progress,
        method=method,
    )


def _conclude(setup: Setup, coordinator: Coordinator | None, seconds: float) -> Result:
    """Tell everybody what came out: by messages, as nothing collective goes on where a rank has died.

    Nobody hears it before all have come here, and need nobody's memory any more.
    """
    comm, word = setup.comms.world, np.zeros(1, np.int64)
    if coordinator is not None:
        for rank in range(1, comm.size):
            with suppress(RankLost), failures.partner(comm, rank):
                request = comm.Irecv(word, rank, Tag.CONCLUSION)
                failures.complete(request, comm, rank, f"rank {rank} to come to the end", memory=word)
        learned = (coordinator.steps, coordinator.samples, coordinator.stopped_by)
        enough = coordinator.converged or coordinator.iterations >= _FEWEST_ITERATIONS
        losses = (coordinator.best, enough)
        text = json.dumps([*learned, coordinator.test, str(coordinator.checkpoint), coordinator.lost, *losses])
        data = np.frombuffer(text.encode(), np.uint8)
        for rank in range(1, comm.size):
            with suppress(RankLost), failures.partner(comm, rank):
                request = comm.Isend([data, MPI.BYTE], rank, Tag.CONCLUSION)
                failures.complete(request, comm, rank, f"rank {rank} to hear the conclusion", memory=data)
    else:
        failures.complete(
            comm.Isend(word, 0, Tag.CONCLUSION), comm, 0, "the coordinator to hear of my end", memory=word
        )
        status = MPI.Status()
        waiting.until(lambda: comm.Iprobe(0, Tag.CONCLUSION, status), "the coordinator to conclude")
        data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        with blocking.blocking("the rest of the coordinator's conclusion"):
            comm.Recv([data, MPI.BYTE], 0, Tag.CONCLUSION)
    steps, samples, stopped_by, test, path, lost, best, enough = json.loads(data.tobytes())
    outcome = None if test is None else Outcome(*test)
    warning = verdict.warning(
        setup.data.guessing,
        best,
        outcome,
        enough=enough,
        remedy="another sandblaster.algorithm or sandblaster.line_search",
    )
    return Result(steps, samples, seconds, outcome, stopped_by, Path(path), warning=warning, lost=tuple(lost))
