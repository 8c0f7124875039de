"""What the ranks of a parameter server have in common: their roles, and the same arguments."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dbmpi.errors import UserError
from dbmpi.loops.arrays import difference
from dbmpi.mpi import waiting
from dbmpi.mpi.topology import Plan
from dbmpi.mpi.world import together

if TYPE_CHECKING:
    from mpi4py import MPI


def planned(ranks: int, shards: Any, colocate: bool) -> Plan:
    """Return the role of each rank.

    Parameters
    ----------
    ranks
        How many there are.
    shards, colocate
        As for `ParameterServer`.

    Raises
    ------
    UserError
        If there are too few ranks.
    """
    if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1:
        raise UserError(f"ParameterServer: shards = {shards!r}: expected a whole number of at least 1")
    if ranks == 1:
        return Plan(1, 1, colocate=True)
    most = ranks if colocate else ranks - 1
    if shards > most:
        raise UserError(
            f"ParameterServer: shards = {shards}, and {ranks} ranks were started: expected at most {most}"
            + ("" if colocate else ", so that a worker is left, or colocate=True")
        )
    return Plan(shards, ranks if colocate else ranks - shards, colocate=colocate)


def agree(comm: MPI.Intracomm, text: str, root: int) -> str:
    """Return the root's description of a parameter server, once all ranks that have one have the same (collective).

    Parameters
    ----------
    comm
        The ranks.
    text
        This rank's description; empty on one that takes the root's.
    root
        The rank to compare with.

    Raises
    ------
    UserError
        On all ranks, if two differ.
    """
    theirs = waiting.broadcast_text(comm, text, root, "the arguments of the other ranks")
    with together(comm, "comparing the arguments"):
        if text and text != theirs:
            own, other = json.loads(text), json.loads(theirs)
            problem = difference(own[0], other[0], comm.rank, root)
            parts = "rule", "roles", "server", "checkpoint"
            for what, given, expected in zip(parts, own[1:], other[1:], strict=True):
                if not problem and given != expected:
                    problem = f"the {what} on rank {comm.rank}: {given}; on rank {root}: {expected}"
            raise UserError(f"ParameterServer: {problem}; expected the same on all ranks")
    return theirs
