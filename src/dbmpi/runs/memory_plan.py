"""What a run is about to allocate on each host, compared with what there is, before it allocates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.config import Run
from dbmpi.errors import UserError
from dbmpi.machine import capacity
from dbmpi.mpi import blocking, waiting
from dbmpi.mpi.topology import Communicators
from dbmpi.mpi.world import together
from dbmpi.paramserver.memory import SLOTS
from dbmpi.paramserver.rules import rule

if TYPE_CHECKING:
    from collections.abc import Sequence

_BYTES = 4
"""Of an element: everything that is as long as the parameters is float32."""
_ADVICE = {
    "parameters on shards": "start shards on more hosts",
    "state of the rule on shards": "start shards on more hosts, or choose a rule with less state",
    "vectors of the batch method": "lower sandblaster.memory, or start shards on more hosts",
    "inboxes of shards": "lower server.inbox_mib",
    "parameters of workers": "start fewer replicas on a host, or cut the network over more partitions",
    "gradients of workers": 'set server.gradients = "layers", or start fewer replicas on a host',
    "activations of workers": "lower optimizer.batch_size, or start fewer replicas on a host",
}
"""The parts of a plan, and what makes each smaller."""


def needs(
    run: Run, comms: Communicators, elements: int, own_elements: int, activations: Sequence[int]
) -> dict[str, int]:
    """Return the bytes that this rank is certain to use, by what they are for; what depends on timing is left out.

    Parameters
    ----------
    run
        The description.
    comms
        The role of this rank.
    elements, own_elements
        Of all parameters, and of those of this rank's partition.
    activations
        Numbers in a sample of the inputs, and of each layer's outputs; empty for an objective of the user's own.
    """
    plan, optimizer, server = comms.plan, run.optimizer, run.server
    found = dict.fromkeys(_ADVICE, 0)
    sandblaster = optimizer.method == "sandblaster"
    if comms.shard is not None:
        held = -(-elements // plan.shards) * _BYTES
        found["parameters on shards"] = held
        if sandblaster:
            found["vectors of the batch method"] = 2 * held  # the gradient and a direction; the history grows later
        else:
            found["state of the rule on shards"] = len(rule(optimizer, code=run.network.code).state_names) * held
            away = comms.hosts[list(plan.worker_ranks)] != comms.hosts[comms.world.rank]
            far = plan.workers if server.push == "copied" else int(np.count_nonzero(away))
            chunk = min(server.inbox_mib * 2**20 / (plan.workers * SLOTS), server.chunk_kib * 2**10, held)
            found["inboxes of shards"] = int(far * SLOTS * chunk)
    if comms.worker is not None:
        own = own_elements * _BYTES
        learns = not plan.evaluates(comms.world.rank)
        found["parameters of workers"] = 0 if server.fetch == "shared" and not sandblaster else own
        found["gradients of workers"] = own if learns and (sandblaster or server.gradients == "whole") else 0
        # The inputs are a copy where they are gathered from the data; gradients take turns in two buffers at least.
        numbers = sum(activations) + (2 * max(activations, default=0) if learns else 0)
        found["activations of workers"] = numbers * optimizer.batch_size * _BYTES // plan.partitions
    return found


def check_memory(
    run: Run, comms: Communicators, elements: int, own_elements: int, activations: Sequence[int] = ()
) -> None:
    """Refuse a run that needs more memory on some host than that has, with a table of what it is for (collective).

    Parameters
    ----------
    run, comms, elements, own_elements, activations
        As for :func:`needs`.

    Raises
    ------
    UserError
        On every rank.
    """
    from mpi4py import MPI

    with together(comms.world, "estimating the memory"):  # a rule of the user's own is loaded for it, on shards
        mine = needs(run, comms, elements, own_elements, activations)
    node = blocking.on_this_host(comms.world, "the other ranks to add up their memory")
    what = "the node's other ranks to add up their memory"
    numbers = np.array([list(mine.values()), [value > 0 for value in mine.values()]], np.int64)
    total, ranks = waiting.allreduce(node, numbers, MPI.SUM, what).tolist()
    memory = int(waiting.allreduce(node, np.array([capacity.available()]), MPI.MIN, what)[0])
    first = node.rank == 0
    blocking.free(node)
    with together(comms.world, "adding up the memory"):
        if first and sum(total) > memory:
            table = {name: (nbytes, count) for name, nbytes, count in zip(mine, total, ranks, strict=True) if nbytes}
            raise UserError(_too_much(table, memory, MPI.Get_processor_name()))


def _too_much(table: Mapping[str, tuple[int, int]], memory: int, host: str) -> str:
    """Return the message with the table of bytes and ranks."""
    total = sum(nbytes for nbytes, _ in table.values())
    width = max(map(len, table))
    lines = [
        f"  {name:<{width}}  {capacity.shown(nbytes):>12}  on {count} rank{'s' if count > 1 else ''}"
        for name, (nbytes, count) in table.items()
    ]
    largest = max(table, key=lambda name: table[name][0])
    return "\n".join(
        [
            f"this run needs {capacity.shown(total)} of memory on {host}, which has {capacity.shown(memory)} left:",
            *lines,
            f"{_ADVICE[largest][0].upper()}{_ADVICE[largest][1:]}",
        ]
    )
