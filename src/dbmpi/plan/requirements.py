"""The memory that each role of a rank needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.paramserver.memory import SLOTS, SMALLEST_CHUNK

if TYPE_CHECKING:
    from dbmpi.plan.candidates import Candidates
    from dbmpi.plan.constants import MachineConstants
    from dbmpi.plan.demands import Demands

_ITEM = 4
"""Bytes of a number in memory."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes, for each of some ways to use a cluster."""

    worker: np.ndarray
    """Of a worker."""
    shard: np.ndarray
    """Of a shard."""
    node: np.ndarray
    """Of the fullest node."""
    inbox: np.ndarray
    """Of the inbox of a shard, at least: more than configured where many workers are to have room in it."""


def memory_needs(
    demands: Demands,
    constants: MachineConstants,
    ways: Candidates,
    parameters: np.ndarray,
    activations: np.ndarray,
    held: np.ndarray,
) -> MemoryNeeds:
    """Return the memory of ranks.

    A worker has its parameters and a gradient, with overlap two of each (or only the gradient of its largest layer, and
    no parameters, where the configuration says so), activations, and samples.  A shard has its parameters, the rule's
    state, and an inbox where workers are on other nodes.

    Parameters
    ----------
    demands, constants
        Of the configuration, and of the machine.
    ways
        How the cluster is used.
    parameters, activations
        For each way, those of the worker that has most: numbers, and numbers for a sample.
    held
        For each way, elements of the shard that holds most.
    """
    copies = (2 if demands.overlap else 1) * demands.fetch_copies
    gradients = (2 if demands.overlap else 1) if demands.whole_gradients else 0.5
    worker = constants.rank_bytes + demands.data
    worker = worker + _ITEM * ((copies + gradients) * parameters + activations * demands.samples)
    least = ways.workers * SLOTS * float(SMALLEST_CHUNK)
    inbox = np.maximum(demands.inbox, least)
    used = np.where(ways.nodes > 1, np.minimum(inbox, ways.workers * SLOTS * demands.chunk), 0.0)
    rounded = demands.wire_bytes / _ITEM % 1  # shards keep the parameters in bfloat16, too
    shard = constants.rank_bytes + _ITEM * (1 + demands.states + rounded) * held + used
    shards_of_node = np.minimum(np.ceil(ways.shards / ways.nodes), ways.ranks_of_node)
    node = shards_of_node * shard + (ways.ranks_of_node - shards_of_node) * worker
    alone = ways.nodes == 1
    node = np.where(alone, ways.shards * shard + ways.workers * worker, node)
    return MemoryNeeds(worker, shard, node, inbox)
