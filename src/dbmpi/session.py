"""One start of a run: what a rank knows of it, how it begins, and how its result reaches every rank."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from mpi4py import MPI

import dbmpi
from dbmpi.checkpoint.account import Account
from dbmpi.checkpoint.judge import Judge
from dbmpi.checkpoint.lead_saver import LeadSaver, unusable
from dbmpi.checkpoint.named_arrays import Fill
from dbmpi.checkpoint.saver import ShardSaver
from dbmpi.checkpoint.schema import CheckpointInfo, library_versions
from dbmpi.config import Run
from dbmpi.data.gather import gather
from dbmpi.data.numbered_batches import NumberedBatches
from dbmpi.data.run_data import RunData, network_notes
from dbmpi.data.stream import Order, Stream
from dbmpi.kernels import updates
from dbmpi.kernels.checks import compile_checks
from dbmpi.machine.rank_variables import batch_job
from dbmpi.machine.signals import StopSignal
from dbmpi.monitor.callbacks import Callbacks
from dbmpi.monitor.progress import RunProgress
from dbmpi.monitor.records import Recorder
from dbmpi.monitor.reports import StartReport
from dbmpi.monitor.worker_log import WorkerLog
from dbmpi.mpi import blocking, failures, pieces, waiting
from dbmpi.mpi.failures import RankLost
from dbmpi.mpi.host_placement import host_map
from dbmpi.mpi.tags import Tag
from dbmpi.mpi.topology import Communicators, Plan
from dbmpi.mpi.watch import Watch
from dbmpi.network.description import Network
from dbmpi.objective import Outcome
from dbmpi.paramserver.rules import rule
from dbmpi.paramserver.wire import compile_wire
from dbmpi.replica.arrangement import Arrangement
from dbmpi.replica.describe import summarise
from dbmpi.replica.own_objective import OwnModel, OwnReplica
from dbmpi.replica.own_state import OwnState
from dbmpi.replica.placement import Placement
from dbmpi.replica.replica import Replica
from dbmpi.replica.warmup import agree_on_products, use_layers
from dbmpi.result import Result

DTYPE = np.dtype(np.float32)
"""Of parameters and gradients."""
_LONGEST_CONFIGURATION = 1 << 18
"""Characters that fit into a line of the records, also where each takes several bytes."""


@dataclass(frozen=True)
class StartingPoint:
    """Where a session begins: at zero, or where the checkpoint was taken that it resumes from."""

    stream: Stream
    """The batches that are left."""
    step: int = 0
    """Steps of all replicas in earlier sessions."""
    samples: int = 0
    """Samples behind these steps."""
    done: tuple[int, ...] = ()
    """Steps of each replica in earlier sessions; empty if they had another number of replicas."""
    fresh: tuple[str, ...] = ()
    """State of the rule that the checkpoint does not have, because it was written under another rule."""
    notices: tuple[str, ...] = ()
    """On the lead: why this checkpoint, and which ones are damaged."""
    begun: int = 0
    """Version at which the checkpoint's state of the rule was begun."""
    earlier: CheckpointInfo | None = None
    """Description of the checkpoint; None at zero."""

    def after(self, batches: int) -> int:
        """Return the position in the stream after so many batches of this session, learned in their order."""
        return min(self.stream.frontier + batches, self.stream.total)

    def resumed(self, epochs: float, kept: str = "") -> str:
        """Return a line on where a run resumes, or that it has nothing left to learn.

        Parameters
        ----------
        epochs
            Of the run.
        kept
            What else was resumed beside the parameters.
        """
        if len(self.stream):
            return f"going on after {self.step:,} steps{kept}"
        return (
            f"already done: all of {epochs:g} epochs was learned in {self.step:,} steps; to go on raise "
            f"optimizer.epochs, e.g. --set optimizer.epochs={2 * epochs:g}"
        )


@dataclass(frozen=True, kw_only=True)
class Session:
    """One start of a run on one rank."""

    run: Run
    plan: Plan
    comms: Communicators
    model: Network | OwnModel
    placement: Placement | None
    """How a network is cut; None for an objective of the user's own."""
    replica: Replica | OwnReplica | None
    """This rank's part of one, if it is a worker."""
    order: Order
    begin: StartingPoint
    checkpoint: Path | None
    """Where the parameters are; None if they are fresh."""
    initial: Fill
    """Writes fresh parameters: ``initial(start, out)`` those at ``start ... start + len(out)``."""
    data: RunData
    batches: NumberedBatches | None
    """What workers learn from."""
    callbacks: Callbacks
    """The user's own."""
    stop: StopSignal
    recorder: Callable[[str, int], Recorder]
    """Makes the recorder of a role of that number."""
    watch: Watch
    compiled: Callable[[], object]
    """To be called when everything is compiled."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured of held-out samples beside the loss."""
        return (self.model.metrics or ()) if isinstance(self.model, OwnModel) else ()

    @property
    def draws(self) -> bool:
        """Whether losses that are learned from also depend on what is drawn at random."""
        return self.run.draws or (isinstance(self.model, OwnModel) and self.model.draws)

    def checkpoint_info(self) -> Callable[..., CheckpointInfo]:
        """Return a function that describes a checkpoint; it takes what is not the same in all of a run's."""
        return partial(
            CheckpointInfo,
            configuration=self.run.to_json(),
            shards=self.plan.shards,
            replicas=self.plan.replicas,
            partitions=self.plan.partitions,
            input_shape=self.data.input_shape,
            classes=self.data.classes,
            meaning=self.data.meaning,
            libraries=library_versions(MPI.Get_library_version()),
        )

    def account(self) -> Account:
        """Return what checkpoints say of this run, with the time that begins now."""
        data = self.run.data
        name = "arrays given from Python" if data.train is None else Path(data.called).name
        return Account(self.begin.earlier, name, self.data.samples)

    def judge(self) -> Judge:
        """Return what compares the evaluations of this session with those before, as it is when the session begins."""
        return Judge(self.run.monitor, self.begin.earlier)

    @property
    def objective_state(self) -> OwnState | None:
        """What an objective of the user's own has beside its parameters."""
        return self.model.state if isinstance(self.model, OwnModel) else None

    def log(self, worker: int) -> WorkerLog:
        """Return the log of a worker, which is this rank."""
        replica, partition = divmod(worker, self.plan.partitions)
        monitor = self.run.monitor
        return WorkerLog(
            self.recorder("worker", worker),
            monitor.report_seconds,
            replica=replica,
            partition=partition,
            partitions=self.plan.partitions,
            traced=monitor.timeline_seconds,
        )

    def saver(self, arrangement: Arrangement, stack: ExitStack, advice: str = "") -> ShardSaver:
        """Return what writes the part of this rank's shard of checkpoints, and on the lead the whole of them.

        Parameters
        ----------
        arrangement
            Which shard holds what.
        stack
            Closes it.
        advice
            What to do where parameters are not finite.
        """
        run, comm, plan, number = self.run, self.comms.world, self.plan, self.comms.shard
        directory = run.run.directory
        if number:
            saver = ShardSaver(comm, directory, number, plan.shards, run.checkpoint.compression)
        else:
            failed = partial(unusable, directory, advice=advice)
            saver = LeadSaver(comm, directory, plan.shard_ranks, arrangement, run.checkpoint, failed)
        stack.callback(saver.close)
        return saver

    def started(self) -> StartReport:
        """Return what the records say about the start of this session."""
        plan, configuration = self.plan, self.run.to_json()
        return StartReport(
            version=dbmpi.__version__,
            method=self.run.optimizer.method,
            ranks=self.comms.world.size,
            shards=plan.shards,
            replicas=plan.replicas,
            partitions=plan.partitions,
            parameters=self.model.layout.size,
            samples=self.data.samples,
            samples_before=self.begin.samples,
            epochs=self.run.optimizer.epochs,
            configuration=configuration if len(configuration) < _LONGEST_CONFIGURATION else "",
            evaluators=plan.evaluators,
            job=batch_job(os.environ),
        )

    def compile_kernels(self, *others: Callable[[], object]) -> None:
        """Choose products alike on all ranks, and compile everything on one rank of each node (collective).

        Parameters
        ----------
        others
            Functions that call what else is compiled.
        """
        comm = self.comms.world
        agree_on_products(comm, self.model.layers, self.run.optimizer.batch_size)
        for use in (self._use_kernels, *others):
            blocking.first_on_each_node(comm, use)
        self.compiled()

    def progress(self, stack: ExitStack, notes: Sequence[str], kept: str = "") -> RunProgress:
        """Return the progress of the run, after lines that say how it begins.

        Parameters
        ----------
        stack
            Closes it.
        notes
            Further lines.
        kept
            What a resumed run has beside the parameters.
        """
        run, data, begin = self.run, self.data, self.begin
        total = round(data.samples * run.optimizer.epochs)
        progress = stack.enter_context(RunProgress(total, run.monitor.progress, epochs=run.optimizer.epochs))
        size = f"{self.model.layout.size:,} parameters; {data.samples:,} samples of {data.input_shape}"
        method = "; Sandblaster" if run.optimizer.method == "sandblaster" else ""
        progress.message(f"{self.plan}; {size}{method}")
        comms = self.comms
        if comms.host_names:
            for line in host_map(self.plan, comms.order, comms.hosts, comms.host_names):
                progress.message(line)
        if self.placement is not None and self.plan.partitions > 1:
            progress.message(summarise(self.model.layers, self.placement, run.optimizer.batch_size))
        for notice in begin.notices:
            progress.warn(notice)
        if run.topology.replacements and not self.watch.on:
            progress.warn("topology.replacements: this MPI ends all ranks when one dies; only Open MPI 5 replaces them")
        if begin.step:
            progress.message(begin.resumed(run.optimizer.epochs, kept))
        if verdict := self.judge().verdict:
            progress.message(f"already done: {verdict}; to go on, change that setting")
        for note in (*data.notes, *network_notes(run.network, data.input_shape, run.data.channels), *notes):
            progress.message(note)
        return progress

    def share_state(self, packed: np.ndarray | None) -> None:
        """Let all ranks that are left have the state of the objective that the lead has.

        Parameters
        ----------
        packed
            Its bytes on the lead; None elsewhere.
        """
        state, comm = self.objective_state, self.comms.world
        if state is None or not state.nbytes:
            return
        what = "the state of the objective"
        if packed is None:
            packed = np.empty(state.nbytes, np.uint8)
            waiting.complete(pieces.irecv(comm, packed, 0, Tag.OBJECTIVE_STATE), what)
        else:
            for rank in range(1, comm.size):
                with suppress(RankLost), failures.partner(comm, rank):
                    request = pieces.isend(comm, packed, rank, Tag.OBJECTIVE_STATE)
                    failures.complete(request, comm, rank, f"rank {rank} to take {what}", memory=packed)
        state.restore(state.unpack(packed))

    def conclude(self, result: Result | None, seconds: float) -> Result:
        """Send the result from the lead to every rank, and return it there (collective).

        Point to point, because collectives fail once a rank has died; and only after all living ranks have called
        this, when none needs the memory of another any more.

        Parameters
        ----------
        result
            On the lead; None elsewhere.
        seconds
            Those of this rank.
        """
        comm, word = self.comms.world, np.zeros(1, np.int64)
        if result is not None:
            for rank in range(1, comm.size):
                with suppress(RankLost), failures.partner(comm, rank):
                    request = comm.Irecv(word, rank, Tag.CONCLUSION)
                    failures.complete(request, comm, rank, f"rank {rank} to finish", memory=word)
            told = asdict(result) | {"checkpoint": str(result.checkpoint)}
            data = np.frombuffer(json.dumps(told).encode(), np.uint8)
            for rank in range(1, comm.size):
                with suppress(RankLost), failures.partner(comm, rank):
                    request = comm.Isend([data, MPI.BYTE], rank, Tag.CONCLUSION)
                    failures.complete(request, comm, rank, f"rank {rank} to take the result", memory=data)
        else:
            request = comm.Isend(word, 0, Tag.CONCLUSION)
            failures.complete(request, comm, 0, "the lead to learn that this rank has finished", memory=word)
            status = MPI.Status()
            waiting.until(
                lambda: comm.Iprobe(0, Tag.CONCLUSION, status), "the lead to conclude", seconds=waiting.LONG_SECONDS
            )
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            with blocking.blocking("the rest of the result"):
                comm.Recv([data, MPI.BYTE], 0, Tag.CONCLUSION)
        fields = json.loads(data.tobytes())
        test = None
        if fields["test"] is not None:
            samples, loss, correct, sums = fields["test"]
            test = Outcome(samples, loss, correct, tuple((name, total) for name, total in sums))
        checkpoint, lost = Path(fields["checkpoint"]), tuple(fields["lost"])
        return Result(**fields | {"seconds": seconds, "test": test, "checkpoint": checkpoint, "lost": lost})

    def _use_kernels(self) -> None:
        """Call everything compiled once, on little data, so that it is compiled or loaded before the clock runs."""
        model, optimizer = self.model, self.run.optimizer
        if isinstance(model, Network):
            use_layers(model, optimizer.batch_size)
        values = np.zeros((model.outputs, 1), DTYPE)
        if model.loss is not None:
            model.loss.apply(values, np.zeros(1, np.int32) if self.data.classes else np.zeros_like(values))
        few = np.zeros(1, DTYPE)
        compile_checks(DTYPE)
        if optimizer.method == "downpour":
            if self.run.server.wire == "bfloat16":
                compile_wire()
            used = [rule(optimizer, code=self.run.network.code)]
            used += [rule(self.run.local.inner(optimizer))] if optimizer.walks else []
            for one in used:
                one.apply(few, few.copy(), one.init(few))
        updates.sgd(few, few.copy(), 0.1)
        updates.add(few, few.copy())
        if optimizer.clip_norm or optimizer.accumulate == "mean" or self.run.in_rounds:
            updates.scale(few, updates.sum_of_squares(few))
        for kind in (np.float32, np.uint8):  # of rows; a shard without data may be the one that compiles
            gather(np.zeros((1, 1), kind), np.zeros(1, np.int64), np.float32(1))
