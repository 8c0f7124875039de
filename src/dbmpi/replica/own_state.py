"""The state of a user's own objective: named arrays that learning changes, but not by gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.errors import UserError
from dbmpi.mpi import waiting
from dbmpi.replica.own_arrays import flat, shown

if TYPE_CHECKING:
    from mpi4py import MPI


class OwnState:
    """The arrays of an objective's ``state``, which its own code changes in place or replaces.

    Parameters
    ----------
    objective
        The user's.
    called
        What the objective is called in messages.

    Attributes
    ----------
    nbytes
        Of all arrays together; 0 where there is no state.

    Raises
    ------
    UserError
        If it is no dictionary of arrays that can be kept.
    """

    def __init__(self, objective: Any, called: str) -> None:
        self._objective, self._called = objective, called
        found = self._found()
        for name, array in found.items():
            if array.dtype.kind not in "fiub" or not array.dtype.isnative:
                raise UserError(f"{called}: its state {name!r} is an array of {array.dtype}; expected numbers")
            if not array.flags.writeable:
                raise UserError(
                    f"{called}: its state {name!r} is read-only; expected an array that can be given the values of a "
                    "checkpoint"
                )
        self._kinds = {name: (array.dtype, array.shape) for name, array in found.items()}
        self.nbytes = sum(array.nbytes for array in found.values())

    @property
    def description(self) -> list[list[Any]]:
        """Name, dtype and lengths of each array, for a comparison between ranks."""
        return [[name, dtype.str, *shape] for name, (dtype, shape) in self._kinds.items()]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, as they are now: the user's own memory.

        Raises
        ------
        UserError
            If they are not those of the beginning, in number, dtype or shape.
        """
        found = self._found() if self._kinds else {}
        for name in self._kinds | found:
            expected, array = self._kinds.get(name), found.get(name)
            if expected is None or array is None or (array.dtype, array.shape) != expected:
                now = "gone" if array is None else f"an array of {array.dtype} of shape {array.shape}"
                raise UserError(
                    f"{self._called}: its state {name!r} is {now} now; expected the arrays of the beginning, of the "
                    "same dtypes and shapes"
                )
        return found

    def pack(self) -> np.ndarray:
        """Return the bytes of all arrays, one behind the other."""
        packed, arrays = np.empty(self.nbytes, np.uint8), self.arrays
        for name, part in self.unpack(packed).items():
            np.copyto(part, arrays[name])
        return packed

    def unpack(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays whose bytes `packed` holds, by name: views."""
        found, start = {}, 0
        for name, (dtype, shape) in self._kinds.items():
            stop = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            found[name] = packed[start:stop].view(dtype).reshape(shape)
            start = stop
        return found

    def to_store(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays whose bytes `packed` holds, by name, of the types that checkpoints have."""
        return {name: array.view(_stored(array.dtype)) for name, array in self.unpack(packed).items()}

    def restore(self, values: Mapping[str, np.ndarray]) -> None:
        """Write `values`, an array for each, into the user's arrays."""
        for name, array in self.arrays.items():
            np.copyto(array, values[name], casting="unsafe")  # booleans come as uint8

    def expect(self, stored: Mapping[str, Any], path: str) -> None:
        """Raise UserError unless the arrays of a checkpoint are those of this objective.

        Parameters
        ----------
        stored
            By name, with a dtype, uint8 for booleans, and a shape; their values are not looked at.
        path
            Of the checkpoint, for messages.
        """
        for name in self._kinds | dict(stored):
            array, kind = stored.get(name), self._kinds.get(name)
            here = "absent" if array is None else f"{array.dtype} of shape {array.shape}"
            there = "absent" if kind is None else f"{_stored(kind[0])} of shape {kind[1]}"
            if here != there:
                raise UserError(
                    f"{path}: a checkpoint of another objective: the state {name!r} is {here} in the file and {there} "
                    "in the objective"
                )

    def broadcast(self, comm: MPI.Intracomm, root: int) -> None:
        """Let all ranks of `comm` have the state of the rank `root` (collective)."""
        if self.nbytes:
            packed = self.pack()
            waiting.broadcast(comm, packed, root, "the state of the objective")
            self.restore(self.unpack(packed))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo at the end of the block what that changes."""
        before = self.pack()
        try:
            yield
        finally:
            self.restore(self.unpack(before))

    def _found(self) -> dict[str, np.ndarray]:
        given = getattr(self._objective, "state", None)
        found = {} if given is None else dict(flat(given, f"{self._called}: its state"))
        for name, array in found.items():
            if not isinstance(array, np.ndarray):
                raise UserError(
                    f"{self._called}: its state {name!r} is {shown(array)}; expected a NumPy array, e.g. numpy.zeros(3)"
                )
        return found


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of arrays of a `dtype` in checkpoints: HDF5 has no booleans."""
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype
