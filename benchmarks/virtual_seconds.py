"""Seconds that a run would take on a small cluster, of which `dbmpi simulate` knows the asynchronous half.

A replica has a core, the shard is elsewhere, and messages come with 10 Gbit/s, each as if it were alone, as with enough
shards.  One replica alone has the shard on its own host, where nothing is sent.  What computing takes was measured; it
varies by a fifth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LATENCY, BANDWIDTH = 50e-6, 1.25e9
"""Seconds until a message arrives, and bytes a second."""
VARIATION = 0.2
"""Deviation of a replica's times to compute, over their mean."""


@dataclass(frozen=True)
class Cluster:
    """The times of one network on such a cluster."""

    parameters: int
    compute: float
    """Seconds of a step: loss and gradient of a batch."""
    service: float
    """Seconds of a shard for a push."""
    replicas: int

    @property
    def message(self) -> float:
        """Seconds that parameters or a gradient travel."""
        return LATENCY + 4 * self.parameters / BANDWIDTH if self.replicas > 1 else 0.0

    def settings(self) -> dict[str, Any]:
        """Return the settings of a simulation."""
        compute = f'{{distribution = "lognormal", mean = {self.compute}, deviation = {VARIATION * self.compute:.3g}}}'
        return {
            "topology.replicas": self.replicas,
            "simulation.compute": compute,
            "simulation.network.mean": self.message,
            "simulation.service.mean": self.service,
        }

    def rounds(self, steps: int, needed: int, own_steps: int = 1) -> float:
        """Return the seconds of so many steps of all replicas together, in rounds.

        Parameters
        ----------
        steps
            Steps of all replicas.
        needed
            Pushes that end a round; replicas that come later go on with the next one when they are done.
        own_steps
            Steps of a replica from fetch to push.
        """
        import numpy as np

        spread = math.log(1 + VARIATION**2)
        random = np.random.default_rng(1)
        free, now = np.zeros(self.replicas), 0.0
        for _ in range(math.ceil(steps / (self.replicas * own_steps))):
            size = (self.replicas, own_steps)
            taken = self.compute * random.lognormal(-spread / 2, math.sqrt(spread), size).sum(axis=1)
            free = np.maximum(free, now) + taken + 2 * self.message
            for arrival in np.sort(free)[:needed]:
                now = max(now, arrival) + self.service
        return float(now)

    def alone(self, steps: int, own_steps: int) -> float:
        """Return the seconds of so many steps of all replicas together, of which none waits for another one.

        Parameters
        ----------
        steps, own_steps
            As of :meth:`rounds`.
        """
        return steps / self.replicas * (self.compute + (2 * self.message + self.service) / own_steps)

    def passes(self, steps: int, number: float) -> float:
        """Return the seconds of passes over a batch of all samples, in portions, by Sandblaster.

        Parameters
        ----------
        steps
            Of a pass: portions that take as long as a step.
        number
            Of passes.
        """
        return number * (steps / self.replicas * self.compute + 2 * self.message + self.service)


def at(epochs: list[float], curve: Mapping[float, float]) -> list[float]:
    """Return the seconds at each of these epochs, by those at others."""
    import numpy as np

    known = {0.0: 0.0, **curve}
    return [float(one) for one in np.interp(epochs, list(known), list(known.values()))]
