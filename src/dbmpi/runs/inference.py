"""Evaluating a trained network and predicting with it: alone, or on ranks that cut it and share the samples.

The ranks are replicas of so many partitions.  Batches are dealt to the replicas in turn, and every partition holds just
its part of the parameters, read from the checkpoint run by run.  The cut need not be that of the run that trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.data import limits
from dbmpi.data.source import Source
from dbmpi.errors import UserError
from dbmpi.kernels.announce import announced, stderr_line
from dbmpi.machine.rank_variables import ranks_on_node
from dbmpi.mpi import blocking, pieces, waiting
from dbmpi.mpi.blocking import Collective
from dbmpi.mpi.tags import Tag
from dbmpi.objective import Outcome, OwnObjective
from dbmpi.replica import placement, thread_count
from dbmpi.replica.own_objective import OwnModel, OwnReplica
from dbmpi.replica.precision import ranks_by_engine
from dbmpi.replica.replica import Replica
from dbmpi.replica.warmup import agree_on_products, use_layers
from dbmpi.runs import trained_network

if TYPE_CHECKING:
    from mpi4py import MPI


class Inference(Collective):
    """The network of a checkpoint on all ranks of a communicator (all methods are collective).

    Parameters
    ----------
    path
        A checkpoint, or the directory of a run.
    comm
        The ranks; None for this process alone.
    partitions
        Ranks that compute one replica together; by default as many as in training if the ranks are a multiple of
        that, and otherwise all: then none holds more than it had to.
    code
        Files from which classes of a user's own layers may be loaded.
    batch_size
        Samples that are computed together.
    objective
        A user's own, for the checkpoint of one; None: made from the class that the checkpoint names.  Its state gets
        the values of the checkpoint, and its ``close`` is called at the end.

    Raises
    ------
    UserError
        If there is no such checkpoint, it cannot be used, or ranks and partitions do not fit.
    """

    def __init__(
        self,
        path: Path,
        comm: MPI.Intracomm | None = None,
        partitions: int | None = None,
        code: Sequence[Path] = (),
        batch_size: int = 1024,
        *,
        objective: OwnObjective | None = None,
    ) -> None:
        self._batch_size = batch_size
        self._stack = ExitStack()
        if comm is not None:
            comm = blocking.duplicate(comm, "the other ranks to evaluate or predict")
            self._stack.callback(blocking.free, comm)
        self._comm = comm
        self._replica_comm: MPI.Intracomm | None = None
        rank, ranks = (0, 1) if comm is None else (comm.rank, comm.size)
        self.is_first = rank == 0
        """Whether this rank is the one that speaks and writes."""
        # The first rank decides which checkpoint is the latest, as another one may appear any time.
        with self.together("opening the checkpoint"):
            if self.is_first:
                self.trained = trained_network.load(path, code, objective)
        if comm is not None:
            path = Path(
                waiting.broadcast_text(comm, str(self.trained.path) if self.is_first else "", 0, "the checkpoint")
            )
            with self.together("opening the checkpoint on all ranks"):
                if not self.is_first:
                    self.trained = trained_network.load(path, code, objective)
        network = self.trained.network
        placed = None
        with self.together("placing the layers"):
            self.partitions = _partitions(ranks, partitions, self.trained.info.partitions)
            if isinstance(network, OwnModel):
                if self.partitions > 1:
                    raise UserError(
                        f"partitions = {self.partitions}: {network.called} is computed by one rank; leave it out"
                    )
            elif self.partitions == self.trained.info.partitions:
                placed = placement.from_config(self.trained.placement, network.layers, self.partitions)
            else:
                placed = placement.automatic(network.layers, self.partitions)
        self.replicas = ranks // self.partitions
        self._number, self._partition = divmod(rank, self.partitions)
        if comm is not None:
            self._replica_comm = blocking.split(comm, self._number, self._partition, "the other ranks to form replicas")
            self._stack.callback(blocking.free, self._replica_comm)
        say = partial(stderr_line, "dbmpi") if self.is_first else None
        self._compiled = self._stack.enter_context(announced(say))
        if isinstance(network, OwnModel):
            own = OwnReplica(network)
            self._replica: Replica | OwnReplica = own
            self._stack.callback(own.free)
        else:
            assert placed is not None
            self._replica = self._stack.enter_context(Replica(network, placed, self._replica_comm))
        with self.together("reading the parameters", waiting.LONG_SECONDS):
            self._parameters = self.trained.parameters(self._replica.parameters.runs)

    def evaluate(self, source: Source, shown: Callable[[int], object] | None = None) -> Outcome:
        """Return the outcome of all samples, the same on every rank.

        Batches are added up in their order, so that the sum does not depend on which replica computed them.

        Parameters
        ----------
        source
            The samples.
        shown
            Called with the number of samples that were just done.
        """
        batches = self.batches(source)
        outcomes: dict[int, Outcome] = {}
        with self.together("evaluating", waiting.LONG_SECONDS):
            for number in range(self._number, len(batches), self.replicas):
                batch = source.batch(batches[number])
                outcome = self._replica.evaluate(self._parameters, batch, changed=False)
                self._compiled()
                if self._partition == 0:
                    outcomes[number] = outcome
                if shown is not None:
                    shown(len(batches[number]) * self.replicas)
        names = self._metrics(outcomes)
        found = np.zeros((len(batches), 4 + len(names)))
        for number, one in outcomes.items():
            sums = dict(one.sums)
            found[number] = (one.samples, one.loss, max(one.correct, 0), one.correct < 0, *(sums[n] for n in names))
        found = self._added_up(found, "the other replicas")
        total = Outcome(0, 0.0, 0)
        for samples, loss, correct, no_classes, *values in found.tolist():
            named = tuple(zip(names, values, strict=True))
            total = total.plus(Outcome(int(samples), loss, -1 if no_classes else int(correct), named))
        return total

    def _metrics(self, outcomes: Mapping[int, Outcome]) -> tuple[str, ...]:
        """Return the names of the metrics, which are the same on all ranks."""
        mine = [[name for name, _ in outcome.sums] for outcome in outcomes.values()]
        if self._comm is None:
            return tuple(mine[0])
        first = waiting.broadcast_text(self._comm, json.dumps(mine[0] if self.is_first else []), 0, "the metrics")
        names = tuple(json.loads(first))
        with self.together("comparing the metrics"):
            if any({*others} != {*names} for others in mine):
                raise UserError(f"the objective's metrics differ between ranks: {mine[0]} here, {[*names]} on rank 0")
        return names

    def predict(self, source: Source) -> Iterator[tuple[int, np.ndarray]]:
        """Yield predictions on the first rank, batch by batch in order, and nothing on the others.

        Every rank has to exhaust the iterator.

        Parameters
        ----------
        source
            The samples.

        Yields
        ------
        int, (samples, outputs) array
            The number of the first sample, and the predictions as float32.
        """
        units, batches = self.units(source), self.batches(source)
        for first in range(0, len(batches), self.replicas):
            number = first + self._number
            mine = None
            with self.together("predicting", waiting.LONG_SECONDS):
                if number < len(batches):
                    inputs = source.inputs(batches[number])
                    outputs = self._replica.outputs(self._parameters, inputs, changed=False)
                    if self._partition == 0:
                        self._check_width(len(outputs), units)
                        if self.trained.network.loss is not None:
                            self.trained.network.loss.predict(outputs)
                        mine = np.ascontiguousarray(outputs.T, np.float32)
                    self._compiled()
            if not self.is_first:
                if mine is not None:
                    assert self._comm is not None
                    request = pieces.isend(self._comm, mine, 0, Tag.PREDICTIONS)
                    waiting.complete(request, "the rank that writes", seconds=waiting.LONG_SECONDS)
                continue
            for other, indices in enumerate(batches[first : first + self.replicas]):
                rows = mine
                if other > 0:
                    assert self._comm is not None
                    rows = np.empty((len(indices), units), np.float32)
                    request = pieces.irecv(self._comm, rows, other * self.partitions, Tag.PREDICTIONS)
                    waiting.complete(request, "the outputs of the other replicas", seconds=waiting.LONG_SECONDS)
                assert rows is not None
                yield int(indices[0]), rows

    def visit(
        self,
        source: Source,
        batches: Sequence[np.ndarray],
        numbers: range,
        take: Callable[[int, np.ndarray], object],
    ) -> None:
        """Predict some batches, each of them on the replica that it is dealt to.

        Parameters
        ----------
        source
            The samples.
        batches
            What :meth:`batches` has returned.
        numbers
            Which of them.
        take
            Called on the first partition of that replica with a batch's number and its predictions, (outputs, samples).
        """
        with self.together("predicting", waiting.LONG_SECONDS):
            for number in numbers[self._number :: self.replicas]:
                inputs = source.inputs(batches[number])
                outputs = self._replica.outputs(self._parameters, inputs, changed=False)
                self._compiled()
                if self._partition == 0:
                    if self.trained.network.loss is not None:
                        self.trained.network.loss.predict(outputs)
                    take(number, np.asarray(outputs, np.float32))

    def units(self, source: Source) -> int:
        """Return the number of outputs: for an objective of the user's own, of the first sample of this `source`."""
        if not isinstance(self._replica, OwnReplica):
            return self.trained.units
        with self.together("trying to predict"):
            return len(self._replica.outputs(self._parameters, source.inputs(np.zeros(1, np.int64))))

    def _check_width(self, found: int, units: int) -> None:
        """Refuse a batch with another number of outputs than the first sample, as only a user's own code has."""
        if isinstance(self.trained.network, OwnModel) and found != units:
            raise UserError(
                f"{self.trained.network.called}: predict returned rows of {found} outputs for one batch and of {units} "
                "for a single sample; expected the same number for every sample, however many there are"
            )

    def broken_parameters(self) -> tuple[str, ...]:
        """Return the names of the tensors that hold NaN or infinite numbers, the same on every rank."""
        layout = self.trained.network.layout
        broken = np.zeros(len(layout.tensors), np.int64)
        numbers = {tensor.name: number for number, tensor in enumerate(layout.tensors)}
        for run in self._replica.parameters.runs:
            position = run.local
            for tensor, first, last in layout.pieces(run.start, run.start + run.length):
                part = self._parameters[position : position + last - first]
                broken[numbers[tensor.name]] |= not np.isfinite(part).all()
                position += last - first
        broken = self._added_up(broken, "the parameters of the other ranks")
        return tuple(tensor.name for tensor, found in zip(layout.tensors, broken, strict=True) if found)

    def same(self, text: str, otherwise: str) -> None:
        """Raise UserError on all ranks unless all give the same text.

        Parameters
        ----------
        text
            That of this rank.
        otherwise
            The message.
        """
        if self._comm is None:
            return
        first = waiting.broadcast_text(self._comm, text, 0, "what the first rank has")
        with self.together("comparing what the ranks have"):
            if text != first:
                raise UserError(otherwise)

    def total(self, number: int) -> int:
        """Return the sum of the numbers that the ranks give.

        Parameters
        ----------
        number
            That of this rank.
        """
        return int(self._added_up(np.array([number]), "the other ranks")[0])

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of arrays, each rank's `values`, which have the same shape everywhere."""
        return self._added_up(values, "the results of the other ranks")

    def gathered(self, values: np.ndarray) -> np.ndarray:
        """Return the arrays of all ranks, one behind the other.

        Parameters
        ----------
        values : (any,) array
            Those of this rank, int64.
        """
        if self._comm is None:
            return values
        sizes = np.zeros(self._comm.size + 1, np.int64)
        sizes[self._comm.rank + 1] = values.size
        ends = np.cumsum(self.sum(sizes))
        whole = np.zeros(int(ends[-1]), np.int64)
        whole[ends[self._comm.rank] : ends[self._comm.rank + 1]] = values
        return self.sum(whole)

    def together(self, what: str, seconds: float | None = None) -> AbstractContextManager[None]:
        """Make a mistake of the user that one rank finds an error on all (collective).

        Parameters
        ----------
        what
            What the block does, for the message of ranks that wait.
        seconds
            Limit on that wait; by default :func:`dbmpi.mpi.world.together`'s.
        """
        if self._comm is None:
            return nullcontext()
        from dbmpi.mpi.world import together

        return together(self._comm, what, seconds=seconds)

    def free(self) -> None:
        """Close the checkpoint and free what was made; without effect the second time."""
        self._stack.close()
        self.trained.close()

    def _added_up(self, values: np.ndarray, what: str) -> np.ndarray:
        """Return the sum of the values of all ranks."""
        if self._comm is None:
            return values
        from mpi4py import MPI

        return waiting.allreduce(self._comm, values, MPI.SUM, what, seconds=waiting.LONG_SECONDS)

    def batches(self, source: Source) -> list[np.ndarray]:
        """Return the samples of each batch of a `source`, once they are known to fit and what they need is compiled."""
        trained, size = self.trained, min(self._batch_size, source.samples)
        batches = [np.arange(start, min(start + size, source.samples)) for start in range(0, source.samples, size)]
        if isinstance(trained.network, OwnModel):
            return batches
        with self.together("planning the batches"):
            limits.check_activations(
                trained.network.activations,
                size,
                setting="batch_size",
                partitions=self.partitions,
                workers=1 if self._comm is None else ranks_on_node(os.environ),
                learning=False,
            )
        self._stack.enter_context(thread_count.fitted(trained.network.layers, self.partitions, size))
        if self._comm is not None:
            network = trained.network
            if network.precision != "float32":
                ranks_by_engine(self._comm)
            agree_on_products(self._comm, network.layers, size)
            blocking.first_on_each_node(self._comm, lambda: use_layers(network, size, backward=False))
        return batches


def _partitions(ranks: int, asked: int | None, trained_with: int) -> int:
    """Return how many ranks compute one replica."""
    if asked is None:
        return trained_with if trained_with and ranks % trained_with == 0 else ranks
    if ranks % asked:
        fitting = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
        raise UserError(
            f"partitions = {asked}: {ranks} rank{'s' if ranks > 1 else ''} cannot be replicas of {asked} each; start "
            f"a multiple of {asked} ranks, or use one of {fitting}"
        )
    return asked
