"""The gradients of all virtual replicas, computed by one objective: late, so that few have to be kept.

A gradient that is pushed by itself is computed when the first shard applies it, at the parameters that its replica had
fetched.  Until then only these are kept, which several replicas may share.  A gradient that is added to others is
computed when its step begins, so that only their sum is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dbmpi.config import OptimizerSection
from dbmpi.data.numbered_batches import NumberedBatches
from dbmpi.downpour.datapath import Push
from dbmpi.index.layout import Stretch
from dbmpi.kernels import updates
from dbmpi.kernels.checks import all_finite
from dbmpi.kernels.memory import aligned_empty
from dbmpi.objective import Objective, Outcome
from dbmpi.paramserver.clip import Clip
from dbmpi.paramserver.schedule import Moment, Schedule
from dbmpi.simulation.replica import VirtualReplica


class VirtualGradients:
    """Computes and accrues gradients, as :class:`dbmpi.downpour.datapath.DataPath` does for one real replica.

    Parameters
    ----------
    objective
        Loss and gradient; it is used for all replicas.
    batches
        What they learn from.
    ranges
        The range of the flat vector that each shard holds.
    layers
        For each layer, the range of its parameters.
    section
        How gradients are accrued.
    in_place
        Whether the objective may compute at a version where it is held, and not at a copy.
    computed
        Called with a replica and the outcome of each gradient.

    Attributes
    ----------
    arrays
        Gradients that are, or have been, kept at the same time.
    """

    def __init__(
        self,
        objective: Objective[Any],
        batches: NumberedBatches,
        ranges: Sequence[range],
        layers: Sequence[range],
        section: OptimizerSection,
        *,
        in_place: bool,
        computed: Callable[[VirtualReplica, Outcome], object],
    ) -> None:
        self._objective, self._batches, self._ranges, self._layers = objective, batches, ranges, layers
        self._section, self._computed = section, computed
        self._schedule = Schedule.from_config(section, batches.order.samples)
        self._size = ranges[-1].stop
        whole = [Stretch(0, 0, self._size, pushed=True)]
        self._clip = Clip(section.clip_norm, whole, float) if section.clip_norm else None
        self._joined = None if in_place and len(ranges) == 1 else aligned_empty(self._size)
        self._apart = aligned_empty(self._size) if section.local_rate > 0 and section.n_push > 1 else None
        self._unused: list[np.ndarray] = []
        self.arrays = 0

    def size(self, batch: int) -> int:
        """Return the samples of the batch of that number."""
        return self._batches.order.size(batch)

    def learn(self, replica: VirtualReplica) -> None:
        """Compute the gradient of the step of a `replica`, accrue it, and take a local step where one has an effect."""
        number = replica.batch
        batch = self._batches.batch(number)
        parameters = self._parameters(replica) if replica.walk is None else replica.walk
        if replica.gradient is None:
            replica.gradient = self._take()
        accrued = replica.gradient
        gradient = accrued if self._apart is None else self._apart
        add = self._apart is None and replica.steps > 0
        outcome = self._objective.loss_and_gradient(parameters, batch, gradient, step=number, add=add)
        self._computed(replica, outcome)
        section, order = self._section, self._batches.order
        if section.local_rate and (replica.step + 1) % section.n_fetch:
            if replica.walk is None:
                replica.walk = self._take()
                np.copyto(replica.walk, parameters)
            moment = Moment(samples=order.before(number), pushed=order.size(number))
            updates.sgd(replica.walk, gradient, section.local_rate * self._schedule(moment))
        if self._apart is not None and replica.steps == 0:
            np.copyto(accrued, gradient)
        elif self._apart is not None:
            updates.add(accrued, gradient)
        replica.outcome, replica.steps = replica.outcome.plus(outcome), replica.steps + 1

    def conclude(self, replica: VirtualReplica) -> Push:
        """Return what becomes of all that a `replica` has accrued, and average and clip it if it is pushed."""
        gradient, outcome, steps = replica.gradient, replica.outcome, replica.steps
        assert gradient is not None
        if self._section.accumulate == "mean" and steps > 1:
            updates.scale(gradient, 1 / steps)
        if outcome.are_numbers and self._clip is not None and math.isfinite(self._clip(gradient)):
            return Push(steps, outcome)
        layer = None
        if not all_finite(gradient):
            wrong = (not all_finite(gradient[part.start : part.stop]) for part in self._layers)
            layer = max(number for number, found in enumerate(wrong) if found)
        return Push(steps, outcome, layer is not None or not outcome.are_numbers, layer)

    def drop(self, replica: VirtualReplica) -> None:
        """Forget what a `replica` has accrued."""
        if replica.gradient is not None:
            self._unused.append(replica.gradient)
        replica.gradient, replica.push = None, None
        replica.steps, replica.outcome, replica.samples = 0, Outcome(0, 0.0, 0), 0

    def stop_walking(self, replica: VirtualReplica) -> None:
        """Forget the own parameters of a `replica`."""
        if replica.walk is not None:
            self._unused.append(replica.walk)
        replica.walk = None

    def _parameters(self, replica: VirtualReplica) -> np.ndarray:
        """Return the parameters that a replica has fetched, as one vector."""
        if self._joined is None:
            return replica.held[0].values
        for part, held in zip(self._ranges, replica.held, strict=True):
            self._joined[part.start : part.stop] = held.values
        return self._joined

    def _take(self) -> np.ndarray:
        """Return an array for a gradient."""
        if not self._unused:
            self.arrays += 1
            self._unused.append(aligned_empty(self._size))
        return self._unused.pop()
