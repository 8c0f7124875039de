"""One parameter server of a user's own loop, as each of its ranks has it: a shard, a worker's connection, or both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.account import whereabouts
from dbmpi.checkpoint.restore import restore
from dbmpi.checkpoint.schema import PARAMETERS, CheckpointInfo, library_versions
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.config import ServerSection
from dbmpi.errors import KnownToAll, UserError
from dbmpi.index.layout import Layout, cut
from dbmpi.kernels.announce import announced, stderr_line
from dbmpi.kernels.checks import compile_checks
from dbmpi.loops import choice
from dbmpi.loops.snapshot import Handover, save
from dbmpi.mpi import blocking, pieces, waiting
from dbmpi.mpi.tags import Tag
from dbmpi.mpi.topology import Plan
from dbmpi.mpi.watch import Watch
from dbmpi.mpi.world import together
from dbmpi.paramserver.rules import Rule
from dbmpi.paramserver.schedule import Moment
from dbmpi.paramserver.store import Store
from dbmpi.paramserver.wire import compile_wire

ADVICE = "Start the program again, from the last checkpoint that it has saved (resume=...)"
"""After the death of a rank."""
_END = "all workers to close the parameter server"


class Connection:
    """Shards and workers of one parameter server (collective to make and to end).

    Parameters
    ----------
    comm
        All ranks, a communicator of dbmpi's own; it is freed at the end.
    plan
        The role of each.
    layout, dtype
        Of the parameters.
    rule
        Applied by the shards.
    section
        How gradients and parameters travel.

    Raises
    ------
    UserError
        On all ranks, if the rule's state cannot be kept, or the memory is too small.  `comm` is not freed then.

    Attributes
    ----------
    server, client
        Those of this rank's roles, or None.
    gradients
        On a worker, where each gradient is pushed from, by name: views of memory that is gone after :meth:`end`.
    parameters
        On a worker that computes on the shards' own memory, each parameter there, by name; likewise.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        plan: Plan,
        layout: Layout,
        dtype: np.dtype[Any],
        rule: Rule,
        section: ServerSection,
    ) -> None:
        self._comm, self._plan, self._layout, self._dtype, self._rule = comm, plan, layout, dtype, rule
        self._stack = ExitStack()
        self._stack.enter_context(Watch(comm, ADVICE))
        say = partial(stderr_line, "dbmpi") if comm.rank == 0 else None
        try:
            mistakes: list[str] = []
            with announced(say) as compiled:
                blocking.first_on_each_node(comm, lambda: mistakes.append(_use_kernels(rule, dtype)))
                compiled()
            with together(comm, "trying the rule"):
                if mistakes[0]:
                    raise UserError(f"ParameterServer: the rule {type(rule).__name__}: {mistakes[0]}")
            with together(comm, "planning the shards' memory"):
                self._store = Store(comm, plan, cut(layout.size, plan.shards), section, dtype, layout.size)
        except KnownToAll:
            self._stack.close()
            raise
        for note in self._store.notes if say else ():
            stderr_line("dbmpi", note)
        shard, worker = plan.shard_of(comm.rank), plan.worker_of(comm.rank)
        self.server = None if shard is None else self._store.server(rule)
        self._handover = None if self.server is None else Handover(comm, self.server)
        self.client, self.gradients, self.parameters = None, {}, {}
        if worker is not None:
            starts = [layout.offsets[tensor.name] for tensor in layout.tensors]
            ranges = [range(start, start + t.size) for start, t in zip(starts, layout.tensors, strict=True)]
            self.client = self._store.client(serve=self.poll, fetched=ranges)
            self.gradients = layout.views(self.client.gradients[0])
            if self.client.parameters is not None:
                shown = self.client.parameters.view()
                shown.flags.writeable = False
                self.parameters = layout.views(shown)

    def begin(self, initial: Sequence[np.ndarray] | None, checkpoint: Path | None) -> None:
        """Fill the shards with a checkpoint, or with the first worker's parameters (collective).

        Parameters
        ----------
        initial
            On the workers, the parameters in the order of the layout; None elsewhere.
        checkpoint
            One of this layout, or None.

        Raises
        ------
        UserError
            On all ranks, if the checkpoint cannot be read; everything has been given back then.
        """
        if checkpoint is not None:
            try:
                with together(self._comm, "reading the checkpoint", seconds=waiting.LONG_SECONDS):
                    if self.server is not None:
                        held = self._store.ranges[self._plan.shard_of(self._comm.rank) or 0]
                        restore(self.server, self._rule, checkpoint, [(held.start, 0, len(held))])
            except KnownToAll:
                self.free()
                raise
            return
        comm, source = self._comm, self._plan.worker_ranks[0]
        operations = []
        if comm.rank == source:
            assert self.client is not None
            assert initial is not None
            vector = self.client.gradients[0]  # which is not used yet
            for place, array in zip(self.gradients.values(), initial, strict=True):
                np.copyto(place, array)
            for held, rank in zip(self._store.ranges, self._plan.shard_ranks, strict=True):
                part = vector[held.start : held.stop]
                if rank == source:
                    assert self.server is not None
                    np.copyto(self.server.parameters, part)
                elif part.size:
                    operations.append(pieces.isend(comm, part, rank, Tag.INITIAL))
        elif self.server is not None and self.server.parameters.size:
            operations.append(pieces.irecv(comm, self.server.parameters, source, Tag.INITIAL))
        waiting.complete(pieces.Several(operations), "the initial parameters", serve=self.poll)
        if self.server is not None:
            self.server.begin(None)
        self._meet("the other ranks to have the initial parameters", waiting.STALL_SECONDS)

    def settle(self) -> None:
        """Serve until all workers have their first parameters (collective)."""
        self._meet("the other ranks to fetch their first parameters", waiting.STALL_SECONDS)

    def fetch(self, targets: Sequence[np.ndarray], *, always: bool = False) -> None:
        """Fill flat arrays, one for each tensor, with the shards' parameters, once own pushes have been applied.

        Parameters
        ----------
        targets
            The arrays.
        always
            Fill them also where this worker computes on :attr:`parameters`, and never with rounded ones.
        """
        client = self.client
        assert client is not None
        own = targets if client.parameters is None else [client.parameters] * len(targets)
        client.fetch(*own, exact=always)
        if always and self.parameters:
            for target, values in zip(targets, self.parameters.values(), strict=True):
                np.copyto(target, values.reshape(-1))

    @property
    def gradient(self) -> np.ndarray:
        """The memory of all :attr:`gradients` as one vector."""
        assert self.client is not None
        return self.client.gradients[0]

    def push(self, samples: int) -> None:
        """Push what is in :attr:`gradients`, which must not change before the next call of :meth:`wait` or `fetch`.

        Parameters
        ----------
        samples
            Those behind the gradient.
        """
        assert self.client is not None
        self.client.samples = samples
        self.client.push(self.gradient)
        self.client.drain(self.poll)

    def wait(self) -> None:
        """Wait until the shards have applied what this worker has pushed."""
        assert self.client is not None
        self.client.wait()

    def save(self, path: Path) -> None:
        """Write a checkpoint that contains this worker's own pushes.

        Parameters
        ----------
        path
            Of the file.
        """
        assert self.client is not None
        self.client.push_kept()
        self.wait()
        plan, vectors = self._plan, (PARAMETERS, *sorted(self._rule.state_names))
        shards = list(zip(plan.shard_ranks, self._store.ranges, strict=True))
        with CheckpointWriter(path, self._layout, vectors, self._dtype) as writer:
            counts = save(self._comm, shards, self.server, writer, vectors, self.poll)
            versions, samples, begun = zip(*counts, strict=True)
            rule, settings = json.loads(choice.written(self._rule))
            writer.commit(
                CheckpointInfo(
                    configuration=json.dumps({"loop": {"rule": rule, "settings": settings}}),
                    step=max(versions),
                    samples=max(samples),
                    shard_versions=versions,
                    shards=plan.shards,
                    replicas=plan.workers,
                    partitions=1,
                    input_shape=(),
                    classes=0,
                    frontier=0,
                    total=0,
                    begun=max(begun),
                    libraries=library_versions(MPI.Get_library_version()),
                    **whereabouts(),
                )
            )

    @property
    def version(self) -> int:
        """Pushes that all shards had applied when this worker last fetched; on a shard alone, those applied by now."""
        if self.client is None:
            assert self.server is not None
            return self.server.version
        held = self._store.ranges
        return min(version for version, part in zip(self.client.versions, held, strict=True) if part)

    def poll(self) -> bool:
        """Apply what has arrived for this rank's shard; return whether there was anything."""
        self._store.window.sync()
        if self.server is None or self._handover is None:
            return False
        handed_over = self._handover.poll()
        return self.server.poll() if handed_over is None else handed_over

    def end(self, targets: Sequence[np.ndarray] | None) -> None:
        """Serve until all workers have come here, and give everything back (collective).

        Parameters
        ----------
        targets
            On a worker, the arrays to fill with the final parameters.
        """
        if self.client is not None:
            self.client.wait()
            self.client.push_kept()
        self._meet(_END)
        if self.client is not None and targets is not None:
            self.fetch(targets, always=True)
        self._meet(_END)
        self.free()

    def ending(self) -> Iterator[bool]:
        """Yield, on a shard alone, whether all workers have closed; each time without waiting."""
        for _ in range(2):
            request = self._comm.Ibarrier()
            while not request.Test():
                yield False
        yield True

    def free(self) -> None:
        """Give everything back, after the end (collective)."""
        self.client, self.gradients, self.parameters = None, {}, {}
        self.server = self._handover = None
        self._store.free()
        blocking.free(self._comm)
        self._stack.close()

    def _meet(self, what: str, seconds: float = waiting.LONG_SECONDS) -> None:
        try:
            waiting.complete(self._comm.Ibarrier(), what, serve=self.poll, seconds=seconds)
        except Exception as error:  # of MPI, if a rank has died: the watch reports which one
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise


def _use_kernels(rule: Rule, dtype: np.dtype[Any]) -> str:
    """Call everything compiled once; return what is wrong with the state of the rule, if anything is."""
    few = np.zeros(2, dtype)
    state = rule.init(few)
    mistake = choice.mistake_in_state(rule, state, few)
    if not mistake:
        rule.apply(few, few.copy(), state, Moment())
        mistake = choice.mistake_in_state(rule, state, few)  # which may be other arrays now
    compile_checks(dtype)
    compile_wire()
    return mistake
