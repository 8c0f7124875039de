"""A run from its description: open the data, assign the roles, train, checkpoint, evaluate."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.named_arrays import Fill
from dbmpi.checkpoint.run_lock import locked
from dbmpi.config import Run, TopologySection
from dbmpi.data import limits
from dbmpi.data.chunk_slots import share_chunks
from dbmpi.data.numbered_batches import NumberedBatches, Transform
from dbmpi.data.run_data import RunData, Supplied, open_data
from dbmpi.data.stream import Order
from dbmpi.data.unpacked import window_of
from dbmpi.downpour import run as downpour_run
from dbmpi.errors import UserError
from dbmpi.kernels.announce import announced
from dbmpi.machine import capacity, environment
from dbmpi.machine.rank_variables import ranks_on_node
from dbmpi.machine.signals import StopSignal
from dbmpi.monitor.callbacks import TrainingEvent
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.records import Recorder
from dbmpi.mpi import topology, waiting
from dbmpi.mpi.replacement import Replacements
from dbmpi.mpi.silent_ends import aloud
from dbmpi.mpi.topology import Communicators
from dbmpi.mpi.watch import Watch
from dbmpi.mpi.world import end_all_on_failure, together
from dbmpi.network import own
from dbmpi.network.description import Network
from dbmpi.objective import OwnObjective
from dbmpi.paramserver.memory import check_fits
from dbmpi.replica import placement
from dbmpi.replica.own_objective import OwnModel, OwnReplica, try_objective
from dbmpi.replica.precision import precision_notes
from dbmpi.replica.replica import Replica
from dbmpi.replica.thread_count import fitted
from dbmpi.replica.trial import try_layer
from dbmpi.result import FilePath, Result
from dbmpi.runs import continuation
from dbmpi.runs import start as runs_start
from dbmpi.runs.held_out_metric import check_metric
from dbmpi.runs.initial import first_values
from dbmpi.runs.memory_plan import check_memory
from dbmpi.runs.supplied import complete_together
from dbmpi.sandblaster import run as sandblaster_run
from dbmpi.session import DTYPE, Session

_MOST_BATCHES = 2**62
"""Of a run: counts of steps and batches travel and are stored as 64-bit integers."""


def train(
    run: Run,
    comm: MPI.Intracomm | None = None,
    stop: StopSignal | None = None,
    *,
    objective: OwnObjective | None = None,
    initial: Mapping[str, Any] | FilePath | None = None,
    data: Any = None,
    test: Any = None,
    transform: Transform | None = None,
    callbacks: Any = None,
    replacements: Replacements | None = None,
) -> Result:
    """Train the network, or the objective, that `run` describes, on all ranks of `comm` together (collective).

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
    objective : OwnObjective, optional
        What to learn instead of a network, for a run that describes none.
    initial : mapping of str to array, or path, optional
        First values of the parameters by name, the same on all ranks: arrays, e.g. of ``dbmpi.parameters``, or a file
        as ``run.initial`` names one.  A run that resumes goes on from its own checkpoint instead.
    data : array, tuple or function, optional
        What to learn from instead of the file ``data.train``: inputs, or a tuple (inputs, targets) or (inputs, targets,
        weights), with the samples on the first axis, the same on all ranks.  Each is an array of NumPy, which is used
        where it is, or anything with a length and an index, as a memmap or a dataset of h5py.  A function that returns
        these is called once on each node, and its arrays are shared by the ranks of the node.  For an objective of your
        own, inputs may be a dictionary of arrays.
    test : array, tuple or function, optional
        Held-out samples instead of the file ``data.test``, as `data`.
    transform : function, optional
        ``transform(batch, random)`` is called with each batch that is learned from, :class:`dbmpi.objective.Samples`,
        and with a ``numpy.random.Generator`` that follows from the seed and the number of the batch; it returns other
        samples, as many.  Instead of ``data.transform``, the same on all ranks.
    callbacks : object or list of objects, optional
        Objects with some of the methods ``on_step``, ``on_evaluation``, ``on_checkpoint`` and ``on_end``, each of which
        is called with a :class:`dbmpi.monitor.callbacks.TrainingEvent`, and may return True to end the run.

    replacements : Replacements, optional
        Of ranks that die, where the caller calls this function again with new processes in their places.

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

    Arrays instead of files:

    >>> import numpy
    >>> inputs = numpy.random.default_rng(1).normal(size=(500, 2))
    >>> run = dbmpi.Run(
    ...     run={"directory": "runs/arrays"},
    ...     network={"layers": [{"units": 10, "activation": "tanh"}, {"units": 2}]},
    ...     monitor={"progress": "none"},
    ... )
    >>> result = dbmpi.train(run, data=(inputs, inputs[:, 0] > inputs[:, 1]))
    >>> result.samples
    5000
    """
    if not isinstance(run, Run):
        raise UserError(f"train: expected a description of a run, e.g. dbmpi.load('CONFIG.toml'), not {run!r:.80}")
    if comm is None:
        from dbmpi.mpi.world import start

        comm = start()
    elif comm.size > 1:
        end_all_on_failure(comm)
    with aloud(comm), ExitStack() as stack:
        given = Supplied(data, test, transform, objective=objective)
        run, given = complete_together(run, given, initial, callbacks, comm)
        stop = stop or stack.enter_context(StopSignal())
        return continuation.until_kept(
            run, comm, partial(run_once, supplied=given, comm=comm, stop=stop, replacements=replacements)
        )


def run_once(
    run: Run,
    stack: ExitStack,
    *,
    supplied: Supplied,
    comm: MPI.Intracomm,
    stop: StopSignal,
    replacements: Replacements | None = None,
    learn: Callable[[Session, ExitStack], Result] | None = None,
) -> Result:
    """Set up this rank, train, evaluate (collective).

    Parameters
    ----------
    run, supplied
        The description, and what completes it.
    stack
        Closes everything that is opened.
    comm, stop, replacements
        As for :func:`train`.
    learn
        What takes the place of the run's method, on a single rank; the topology is then not that of ranks.
    """
    with together(comm, "planning the topology"):
        plan = topology.plan(TopologySection() if learn else run.topology, comm.size)
    comms = stack.enter_context(Communicators(comm, plan))
    with Watch(comms.world) as watch:
        if replacements is not None:
            watch.replaceable = replacements.begin(run.topology.replacements)
            run = run if replacements.first else continuation.resuming(run)
        session = _session(run, supplied, comms, watch, stop, stack)
        if learn is None:
            learn = sandblaster_run.learn if session.run.optimizer.method == "sandblaster" else downpour_run.learn
        result = learn(session, stack)
        epoch = (session.begin.samples + result.samples) / session.order.samples
        loss, accuracy = (math.nan, None) if result.test is None else (result.test.mean_loss, result.test.accuracy)
        metrics = None if result.test is None else result.test.metrics
        ended = TrainingEvent(result.steps, epoch, result.samples, loss, accuracy, result.checkpoint, metrics=metrics)
        session.callbacks.call("on_end", ended)
        return result


def _session(
    run: Run, supplied: Supplied, comms: Communicators, watch: Watch, stop: StopSignal, stack: ExitStack
) -> Session:
    """Open the data, cut the network, lock the run directory and find the checkpoint to resume from (collective)."""
    comm, plan = comms.world, comms.plan
    data = open_data(run, comm, plan, stack, supplied)
    run, notices = limits.fitted(run, data.samples)
    data = replace(data, notes=data.notes + notices + supplied.notes)
    say = RunProgress(0, run.monitor.progress).message if comm.rank == 0 else None
    compiled = stack.enter_context(announced(say))
    run, order = _order(run, data, comm)
    unpacked = None if data.train is None else data.train.storage.unpacked
    share_chunks(comm, unpacked if unpacked is not None and unpacked.length == order.block else None, stack)
    if run.objective is None:
        network = _network(run, data, comms)
        model: Network | OwnModel = network
        data = replace(data, notes=data.notes + precision_notes(network, comm))
        remark = stack.enter_context(fitted(model.layers, plan.partitions, run.optimizer.batch_size))
    else:
        model, remark = _own_model(run, supplied.objective, comms), ""
    with together(comm, "looking at the data", seconds=waiting.LONG_SECONDS):
        data.validate(fully=comms.worker == 0)
    batches = _batches(run, data, supplied.transform, order, comms)
    if say is not None:
        prepared = environment.prepare()
        say(f"{prepared}{f'; {remark}' if remark else ''}")
        for loss in prepared.losses:
            print(f"dbmpi: slower than it could be: {loss}", file=sys.stderr, flush=True)
    placed = None
    if isinstance(model, Network):
        with together(comm, "placing the layers"):
            placed = placement.from_config(run.placement, model.layers, plan.partitions)
    with together(comm, "locking the run directory", seconds=waiting.LONG_SECONDS):
        if comms.shard == 0:
            stack.enter_context(locked(run.run.directory, partial(print, "dbmpi:", file=sys.stderr, flush=True)))
    replica: Replica | OwnReplica | None = None
    if isinstance(model, OwnModel):
        replica = _own_replica(model, run, data, batches, comms)
    elif comms.worker is not None and placed is not None:
        replica = stack.enter_context(Replica(model, placed, comms.replica))
    size = replica.size if isinstance(replica, Replica) else model.layout.size
    check_memory(run, comms, model.layout.size, size, model.activations if isinstance(model, Network) else ())
    if isinstance(replica, Replica):
        replica.prepare(run.optimizer.batch_size)
    with together(comm, "looking for the metric"):
        check_metric(run, model, data)
    begin, checkpoint, number = runs_start.find(run, comm, plan.replicas, model.layout, order, data.meaning)
    initial: Fill = model.initial
    if checkpoint is None:
        initial, notes = first_values(run, supplied.initial, model, comm, stack)
        data = replace(data, notes=data.notes + notes)
    if isinstance(model, OwnModel):
        begin = runs_start.begin_state(model.state, begin, checkpoint, comm, plan.worker_ranks[0])
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
        model=model,
        placement=placed,
        replica=replica,
        order=order,
        begin=begin,
        checkpoint=checkpoint,
        initial=initial,
        data=data,
        batches=batches,
        callbacks=supplied.callbacks,
        stop=stop,
        recorder=lambda role, number: stack.enter_context(recorder(role, number)),
        watch=watch,
        compiled=compiled,
    )


def _batches(
    run: Run, data: RunData, transform: Transform | None, order: Order, comms: Communicators
) -> NumberedBatches | None:
    """Return what a worker learns from, after trying the user's transform, if there is one (collective)."""
    if run.data.transform is None:
        return None if data.train is None else NumberedBatches(data.train, order)
    batches = None
    with together(comms.world, "trying the transform", seconds=waiting.LONG_SECONDS):
        if data.train is not None:
            found = transform or own.from_directory(run.network.code)(run.data.transform, "data.transform")
            if not callable(found):
                raise UserError(f"data.transform = {run.data.transform!r}: is no function, transform(batch, random)")
            batches = NumberedBatches(data.train, order, found)
            if comms.worker == 0:
                with own.calling("the transform", "it is tried on the first batch"):
                    batches.batch(0)
    return batches


def _own_replica(
    model: OwnModel, run: Run, data: RunData, batches: NumberedBatches | None, comms: Communicators
) -> OwnReplica | None:
    """Return an instance of the objective on a worker, after trying it; all know the metrics then (collective)."""
    sandblaster = run.optimizer.method == "sandblaster"
    with together(comms.world, "trying the objective", seconds=waiting.LONG_SECONDS):
        if batches is not None and comms.worker == 0:
            held_out = None
            if data.test is not None:
                held_out = data.test.batch(np.arange(min(run.optimizer.batch_size, data.test.samples)))
            changed = try_objective(model, batches.batch(0), held_out, batches.batch(0) if sandblaster else None)
            if changed and sandblaster:
                raise UserError(
                    f"{model.called}: learning changes its state, and with Sandblaster the loss has to follow from the "
                    "parameters alone; keep the state constant (a BatchNorm of PyTorch: give it "
                    'track_running_stats=False), or use optimizer.method = "downpour"'
                )
            if model.draws and run.sandblaster.one_function:
                raise UserError(
                    f"{run.sandblaster.one_function} minimises one function, and {model.called} draws random "
                    "numbers: its loss of the same samples differs from step to step; leave dropout away, or take "
                    "another method"
                )
    found = json.dumps([model.metrics or (), model.draws, model.classifies])
    first = comms.plan.worker_ranks[0]
    names, model.draws, model.classifies = json.loads(waiting.broadcast_text(comms.world, found, first, "the metrics"))
    model.metrics = tuple(names)
    return None if batches is None else OwnReplica(model, tries=True)


def _order(run: Run, data: RunData, comm: MPI.Intracomm) -> tuple[Run, Order]:
    """Return the order of the samples, and the run with the name of that order (collective)."""
    optimizer, shuffle = run.optimizer, run.data.shuffle
    if shuffle == "auto":
        shuffle = data.blocks.length or "samples"
        run = run.model_copy(update={"data": run.data.model_copy(update={"shuffle": shuffle})})
    block = 0 if shuffle == "samples" else shuffle
    with together(comm, "planning the batches"):
        window = window_of(block, data.blocks.features) if block else 1
        order = Order(data.samples, optimizer.batch_size, optimizer.epochs, run.run.seed, block, window)
        if order.batches > _MOST_BATCHES:
            raise UserError(
                f"optimizer.epochs = {optimizer.epochs:g}: that is more than can be counted in batches of "
                f"{optimizer.batch_size}; lower optimizer.epochs"
            )
    return run, order


def _network(run: Run, data: RunData, comms: Communicators) -> Network:
    """Make the network for the data; check their targets and a user's own layers (collective)."""
    section, comm, plan = run.network, comms.world, comms.plan
    with together(comm, "planning the network"):
        load = own.from_directory(section.code)
        network = Network(section, data.input_shape, run.run.seed, targets=data.targets, load=load)
        check_fits(network.layout, plan.shards, DTYPE.itemsize, capacity.available())
        if comms.worker is not None:
            limits.check_activations(
                network.activations,
                run.optimizer.batch_size,
                setting="optimizer.batch_size",
                partitions=plan.partitions,
                workers=min(ranks_on_node(os.environ), plan.workers),
            )
        data.expect(network.outputs, section.loss)
    if network.own_layers:
        # The first rank alone: one compilation is enough, and one report.
        with together(comm, "trying your own layers", seconds=waiting.LONG_SECONDS):
            for layer in network.own_layers if comm.rank == 0 else ():
                try_layer(layer, DTYPE, rounded=network.rounds(layer))
    return network


def _own_model(run: Run, objective: OwnObjective | None, comms: Communicators) -> OwnModel:
    """Make the model of an objective of the user's own, whose parameters must be alike on all ranks (collective)."""
    section, comm = run.objective, comms.world
    assert section is not None
    with together(comm, "preparing the objective", seconds=waiting.LONG_SECONDS):
        if objective is None:
            objective = own.make_objective(section, own.from_directory(run.network.code))
        model = OwnModel(objective, run.run.seed, f"the objective {section.use!r}")
        check_fits(model.layout, comms.plan.shards, DTYPE.itemsize, capacity.available())
    tensors = ([tensor.name, *tensor.shape] for tensor in model.layout.tensors)
    mine = json.dumps([section.use, *tensors, *model.state.description])
    first = waiting.broadcast_text(comm, mine, 0, "the names of the parameters")
    with together(comm, "comparing the parameters"):
        if mine != first:
            both = zip(json.loads(mine), json.loads(first), strict=False)
            here, there = next((pair for pair in both if pair[0] != pair[1]), ("all of these", "more or fewer"))
            raise UserError(f"{model.called}: it differs between ranks: {here} on rank {comm.rank}, {there} on rank 0")
    return model
