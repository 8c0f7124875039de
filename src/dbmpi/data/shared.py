"""Arrays that a function of the user's makes once on each node, in memory that all ranks of the node share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import h5py
import numpy as np
from mpi4py import MPI

from dbmpi.data.conventions import meaning
from dbmpi.data.given import Given, GivenArray, GivenData, GivenDataset
from dbmpi.errors import UserError
from dbmpi.machine import capacity
from dbmpi.mpi import blocking, failures, waiting
from dbmpi.mpi import window as windows
from dbmpi.mpi.blocking import Collective
from dbmpi.mpi.window import Window, aligned
from dbmpi.mpi.world import together
from dbmpi.network.own import calling


class SharedArrays(Collective):
    """What a function returns that is called on the first rank of each node, seen by all ranks of the node.

    Where the node's ``/dev/shm`` is too small, each rank gets a copy of its own.

    Parameters
    ----------
    comm
        All ranks.
    make
        The user's function; returns what :meth:`GivenData.of` takes.
    called
        What messages call the data.

    Attributes
    ----------
    data
        The arrays.
    note
        A line for the user, if they are not shared.

    Raises
    ------
    UserError
        On every rank, if the function fails, returns no arrays, or they do not fit into the memory.
    """

    def __init__(self, comm: MPI.Intracomm, make: Callable[[], Any], called: str) -> None:
        self._node = blocking.on_this_host(comm, f"the other ranks to call the function of {called}")
        self._window: Window | None = None
        self._open = True
        self.note = ""
        first, arrays, outline = self._node.rank == 0, [], ""
        with together(comm, f"calling the function of {called}", seconds=waiting.LONG_SECONDS):
            if first:
                with calling(called, "its function is called"):
                    given = GivenData.of(make(), called)
                    arrays = [_whole(array) for array in given.arrays]
                described = [[array.name, values.dtype.str, *values.shape] for array, values in _both(given, arrays)]
                parts = (given.named, given.targets is not None, given.weights is not None)
                outline = json.dumps([*parts, described])
        outline = waiting.broadcast_text(self._node, outline, 0, f"the outline of {called}")
        named, has_targets, has_weights, described = json.loads(outline)
        sizes = [math.prod(shape) * np.dtype(kind).itemsize for _, kind, *shape in described]
        memory = self._memory(comm, sum(map(aligned, sizes)), called)
        found, offset = [], 0
        for number, ((name, kind, *shape), size) in enumerate(zip(described, sizes, strict=True)):
            values = memory[offset : offset + size].view(kind).reshape(shape)
            if first:
                values[...] = arrays[number]
            found.append(GivenArray(called, name, values))
            offset += aligned(size)
        arrays.clear()
        if self._window is None:
            waiting.broadcast(self._node, memory, 0, f"the arrays of {called}")
        else:
            self._window.sync()
            waiting.barrier(self._node, f"the arrays of {called}")
            self._window.sync()
        weights = found.pop() if has_weights else None
        targets = found.pop() if has_targets else None
        self.data = GivenData(tuple(found), named, targets, weights)

    def _memory(self, comm: MPI.Intracomm, nbytes: int, called: str) -> np.ndarray:
        """Return memory that the node's ranks share, or as much of this rank's own (collective)."""
        shared = windows.missing(self._node, nbytes if self._node.rank == 0 else 0) <= 0
        copied = np.array([not shared and self._node.size > 1], np.int64)
        if waiting.allreduce(comm, copied, MPI.MAX, "the other nodes to look at /dev/shm")[0]:
            self.note = f"{called}: each rank has a copy of its own where /dev/shm has no {capacity.shown(nbytes)} left"
        copies, available = 1 if shared else self._node.size, capacity.available()
        with together(comm, "planning the memory of the data"):
            if nbytes * copies > available:
                raise UserError(
                    f"{called}: its arrays take {capacity.shown(nbytes * copies)} on this host, but "
                    f"{capacity.shown(available)} of memory are available; give arrays that stay in a file, e.g. "
                    "numpy.load(file, mmap_mode='r'), themselves instead of a function"
                )
        if shared:
            self._window = Window.allocate(self._node, nbytes if self._node.rank == 0 else 0)
            memory = self._window.near(0)
            assert memory is not None
            return memory
        return np.empty(nbytes, np.uint8)

    def free(self) -> None:
        """Free the memory (collective); a second call does nothing."""
        if not self._open or failures.dead(self._node):
            return  # nothing collective is possible once a rank has died
        if self._window is not None:
            self._window.free()
        blocking.free(self._node)
        self._open = False


def shared_data(comm: MPI.Intracomm, given: Any, called: str, stack: ExitStack) -> tuple[GivenData, str]:
    """Return the arrays of what a program gave, and a line for the user (collective where that is a function).

    Parameters
    ----------
    comm
        All ranks.
    given
        Arrays, or a function that returns some.
    called
        What messages call them.
    stack
        Frees what they are kept in.
    """
    if not is_function(given):
        with together(comm, f"looking at {called}"):
            data = GivenData.of(given, called)
        return data, ""
    shared = stack.enter_context(SharedArrays(comm, given, called))
    return shared.data, shared.note


def is_function(given: Any) -> bool:
    """Return whether `given` is to be called for the data, and is no data itself."""
    return callable(given) and not hasattr(given, "__getitem__")


def _whole(array: Given) -> np.ndarray:
    """Return all values of an array."""
    if isinstance(array, GivenDataset) and _says_more(array):
        raise array.error(
            "has attributes, a fill value or a type that say what its numbers stand for, which a function cannot "
            "return; give the dataset itself, which stays in its file, or return its values as they are meant"
        )
    values = array.values
    found = values if isinstance(values, np.ndarray) else values[(slice(None),)]
    if found.dtype == object and h5py.check_string_dtype(values.dtype) is not None:
        found = np.array(found.tolist())
    if found.dtype.kind not in "biufUS":
        raise UserError(f"{array.path}: {array.name!r} is {found.dtype}; expected numbers, or text for labels")
    return np.asarray(found)


def _says_more(dataset: GivenDataset) -> bool:
    """Return whether the values of a `dataset` alone mean something else than the dataset."""
    named = any(dataset.attribute(key) is not None for key in ("classes", "labels"))
    alone = GivenArray(dataset.path, dataset.name, dataset.values)
    enumeration = dataset.values.dtype != np.bool_ and h5py.check_enum_dtype(dataset.values.dtype)
    return named or bool(enumeration) or meaning(dataset, inputs=True) != meaning(alone, inputs=True)


def _both(given: GivenData, arrays: list[np.ndarray]) -> list[tuple[Given, np.ndarray]]:
    return list(zip(given.arrays, arrays, strict=True))
