"""What there is to say about the precision of a job's products, on all of its ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.kernels import bfloat16
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.network.layer import takes_bfloat16

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.network.description import Network


def ranks_by_engine(comm: MPI.Intracomm | None) -> dict[str, int]:
    """Return how many ranks multiply bfloat16 by each engine that one uses, the same on all ranks (collective).

    Parameters
    ----------
    comm
        The ranks; None for one alone.

    Raises
    ------
    UserError
        On every rank, if the environment of one names an engine that there is not.
    """
    with nullcontext() if comm is None else together(comm, "choosing what multiplies bfloat16"):
        counts = np.array([bfloat16.engine() == name for name in bfloat16.ENGINES], np.int64)
    if comm is not None:
        from mpi4py import MPI

        counts = waiting.allreduce(comm, counts, MPI.SUM, "the other ranks to say how they multiply bfloat16")
    return {name: count for name, count in zip(bfloat16.ENGINES, counts.tolist(), strict=True) if count}


def precision_notes(network: Network, comm: MPI.Intracomm | None) -> tuple[str, ...]:
    """Return lines on products of bfloat16, the same on all ranks (collective); none where the network has none.

    They say that bfloat16 is no faster here, that ranks compute it in different ways, and which of the user's own
    layers stay in float32.

    Parameters
    ----------
    network
        With its precision.
    comm
        The ranks; None for one alone.

    Raises
    ------
    UserError
        On every rank, if the environment of one names an engine that there is not.
    """
    if network.precision == "float32":
        return ()
    used = ranks_by_engine(comm)
    notes = []
    if len(used) > 1:
        ranks = " and ".join(f"{count} by {name}" for name, count in used.items())
        notes.append(
            f"network.precision = {network.precision!r}: this job is mixed: of its {sum(used.values())} ranks, "
            f"{ranks} multiply such numbers; their results agree to rounding"
        )
    elif list(used) == ["float32"]:
        notes.append(
            f"network.precision = {network.precision!r} brings no speed here: numbers are rounded, and multiplied as "
            f"float32 ({bfloat16.reason()})"
        )
    for layer in network.own_layers:
        if not takes_bfloat16(layer):
            notes.append(
                f"network.precision = {network.precision!r}: layer {layer.name!r} is of your own and says nothing of "
                "bfloat16, and so it computes in float32"
            )
    return tuple(notes)
