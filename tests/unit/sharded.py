"""Several shards in one process, each on a thread of its own, in lock-step as an Allreduce keeps them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from harness.environment import timeout_scale

from dbmpi.methods.local_space import LocalSpace
from dbmpi.sandblaster.commands import Command, RemoteSpace, execute


class Shards:
    """A coordinator's space over shards that hold a vector called "parameters", cut wherever one likes."""

    def __init__(self, parameters: np.ndarray, cuts: list[int]) -> None:
        borders = [0, *cuts, parameters.size]
        self.ranges = [slice(a, b) for a, b in pairwise(borders)]
        self.count = len(self.ranges)
        self.reductions = 0
        self.commands: list[bytes] = []
        self._barrier = threading.Barrier(self.count, timeout=60 * timeout_scale())
        self._slots: list[np.ndarray] = [np.empty(0)] * self.count
        self._threads = ThreadPoolExecutor(self.count)
        self.spaces = [
            LocalSpace(
                part.stop - part.start,
                parameters.dtype,
                self._reduce(rank),
                rank,
                self.count,
                {"parameters": parameters[part].copy()},
            )
            for rank, part in enumerate(self.ranges)
        ]
        self.space = RemoteSpace(self.submit, ["parameters"])

    def submit(self, command: Command) -> np.ndarray:
        data = command.encode()
        self.commands.append(data)
        decoded = Command.decode(data)
        results = list(self._threads.map(lambda space: execute(space, decoded), self.spaces))
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])
        return results[0]

    def gather(self, name: str) -> np.ndarray:
        return np.concatenate([space.array(name) for space in self.spaces])

    def scatter(self, name: str, values: np.ndarray) -> None:
        for space, part in zip(self.spaces, self.ranges, strict=True):
            space.writable(name)[:] = values[part]

    def evaluate(self, function):
        """Return the evaluation of a function of a whole vector, which returns loss and gradient."""

        def evaluate(point: str, gradient: str) -> float:
            loss, its_gradient = function(self.gather(point).astype(np.float64))
            self.scatter(gradient, its_gradient)
            return loss

        return evaluate

    def close(self) -> None:
        self._threads.shutdown()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reduce(self, rank: int):
        def reduce(values: np.ndarray) -> np.ndarray:
            if rank == 0:
                self.reductions += 1
            self._slots[rank] = values.copy()
            self._barrier.wait()
            # Every shard in an order of its own: an Allreduce does not promise one.
            total = self._slots[rank].copy()
            for distance in range(1, self.count):
                total += self._slots[(rank + distance) % self.count]
            self._barrier.wait()
            return total

        return reduce


def cut_points(size: int, parts: int) -> list[int]:
    """Return where a vector is cut into parts of nearly equal size, not at any round number."""
    return [size * part // parts for part in range(1, parts)]


def local_problem(function, start, dtype=np.float64):
    """Return a space in one process, the evaluation of a function there, and the parameters."""
    parameters = np.array(start, dtype)
    space = LocalSpace(parameters.size, dtype, vectors={"parameters": parameters})

    def evaluate(point: str, gradient: str) -> float:
        loss, its_gradient = function(space.array(point).astype(np.float64))
        space.writable(gradient)[:] = its_gradient
        return float(loss)

    return space, evaluate, parameters
