"""Everything that a rank knows about a run when its roles are put together, for both optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dbmpi.config import Run
from dbmpi.data.gather import gather
from dbmpi.data.run_data import RunData
from dbmpi.data.stream import Order
from dbmpi.downpour.lead import StartingPoint
from dbmpi.kernels import updates
from dbmpi.machine.signals import StopSignal
from dbmpi.monitor.records import Recorder
from dbmpi.mpi.failures import Watch
from dbmpi.mpi.topology import Communicators, Plan
from dbmpi.network.description import Network
from dbmpi.paramserver.rules import rule
from dbmpi.replica.placement import Placement
from dbmpi.replica.products import agree_on_products
from dbmpi.replica.replica import Replica
from dbmpi.replica.warmup import first_on_each_node, use_layers

DTYPE = np.dtype(np.float32)
"""Of parameters and gradients."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One start of a run on one rank."""

    run: Run
    plan: Plan
    comms: Communicators
    network: Network
    placement: Placement
    replica: Replica | None
    """This rank's part of a replica, if it is a worker."""
    order: Order
    begin: StartingPoint
    checkpoint: Path | None
    """Where the parameters are stored; None in a new run."""
    data: RunData
    stop: StopSignal
    recorder: Callable[[str, int], Recorder]
    """Makes the recorder of a role of that number."""
    watch: Watch
    compiled: Callable[[], object]
    """To be called when everything is compiled."""

    @property
    def shard(self) -> int | None:
        """Number of the shard that this rank is."""
        return self.plan.shard_of(self.comms.world.rank)

    @property
    def worker(self) -> int | None:
        """Number of the worker that this rank is."""
        return self.plan.worker_of(self.comms.world.rank)

    def compile_kernels(self, *others: Callable[[], object]) -> None:
        """Choose products alike on all ranks, and compile everything on one rank of each node (collective).

        Parameters
        ----------
        others
            Functions that call further compiled functions.
        """
        comm = self.comms.world
        agree_on_products(comm, self.network.layers, self.run.optimizer.batch_size)
        for use in (self._use_kernels, *others):
            first_on_each_node(comm, use)
        self.compiled()

    def _use_kernels(self) -> None:
        """Call everything compiled once, on little data, so that it is compiled or loaded before the clock runs."""
        network, applied_rule = self.network, rule(self.run.optimizer)
        use_layers(network.layers, self.run.optimizer.batch_size, DTYPE)
        values = np.zeros((network.outputs, 1), DTYPE)
        if network.loss is not None:
            network.loss.apply(values, np.zeros(1, np.int32) if self.data.classes else np.zeros_like(values))
        few = np.zeros(1, DTYPE)
        applied_rule.apply(few, few.copy(), applied_rule.init(few))
        updates.sgd(few, few.copy(), 0.1)
        updates.add(few, few.copy())
        for kind in (np.float32, np.uint8):  # of rows; a shard without data may be the one that compiles
            gather(np.zeros((1, 1), kind), np.zeros(1, np.int64), np.float32(1))
