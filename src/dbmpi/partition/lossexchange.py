"""The loss over outputs that are cut by units: every worker takes all outputs of its share of the samples.

Turning the cut from units to samples moves each output once and leaves no work to be done twice; a sample's loss is
computed just as in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.network.losses import Loss
from dbmpi.paramserver.layout import cut
from dbmpi.partition.boxes import Box
from dbmpi.runtime import waiting

if TYPE_CHECKING:
    from mpi4py import MPI


class LossExchange:
    """Turns the cut of the last layer's outputs, from units to samples and back, over the workers of a replica."""

    def __init__(self, comm: MPI.Intracomm, owned: Sequence[Box]) -> None:
        self._comm = comm
        self.serve: Callable[[], bool] | None = None
        self._owned = owned
        self._units = sum(box.size for box in owned)
        self._starts = [box.starts[0] for box in owned]

    def apply(self, loss: Loss, values: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        """Return loss and correct samples of all samples, the same on every worker.

        `values`, this worker's outputs (units, samples), become its part of the gradient of the mean loss.
        """
        from mpi4py import MPI

        samples = values.shape[1]
        shares = cut(samples, self._comm.size)
        mine = shares[self._comm.rank]
        whole = self._turn(values, shares)
        sums = np.zeros(3)
        if len(mine):
            part = np.ascontiguousarray(targets[..., mine.start : mine.stop])
            value, correct = loss.apply(whole, part)
            sums[:] = (value, max(correct, 0), correct < 0)
            # The kernel divides by the samples it sees.
            whole *= whole.dtype.type(len(mine) / samples)
        self._turn_back(whole, values, shares)
        total = waiting.allreduce(self._comm, sums, MPI.SUM, "the loss of the other partitions", serve=self.serve)
        return float(total[0]), -1 if total[2] else int(total[1])

    def _turn(self, values: np.ndarray, shares: tuple[range, ...]) -> np.ndarray:
        """Return all units (units, share) of this worker's share of the samples."""
        from mpi4py import MPI

        out = np.concatenate([values[:, share.start : share.stop].reshape(-1) for share in shares])
        mine = len(shares[self._comm.rank])
        whole = np.empty((self._units, mine), values.dtype)
        sends = [values.shape[0] * len(share) for share in shares]
        receives = [box.size * mine for box in self._owned]
        kind = MPI._typedict[values.dtype.char]
        request = self._comm.Ialltoallv(
            [out, (sends, _starts(sends)), kind], [whole, (receives, [start * mine for start in self._starts]), kind]
        )
        waiting.complete(request, "the outputs of the other partitions", serve=self.serve)
        return whole

    def _turn_back(self, whole: np.ndarray, values: np.ndarray, shares: tuple[range, ...]) -> None:
        """Hand every worker the rows of its units."""
        from mpi4py import MPI

        mine = len(shares[self._comm.rank])
        back = np.empty(values.size, values.dtype)
        sends = [box.size * mine for box in self._owned]
        receives = [values.shape[0] * len(share) for share in shares]
        kind = MPI._typedict[values.dtype.char]
        request = self._comm.Ialltoallv(
            [whole, (sends, [start * mine for start in self._starts]), kind],
            [back, (receives, _starts(receives)), kind],
        )
        waiting.complete(request, "the gradient of the other partitions", serve=self.serve)
        for share, start, count in zip(shares, _starts(receives), receives, strict=True):
            values[:, share.start : share.stop] = back[start : start + count].reshape(values.shape[0], len(share))


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:place]) for place in range(len(counts))]
