"""Arrays that a program gives instead of a data file, and whatever can be indexed like them: used where they are.

Nothing is copied but the rows of a batch.  What the arrays hold is described and checked as the datasets of a file are
(:mod:`dbmpi.data.description`).  Those of h5py have attributes, which count; the others are like datasets without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import h5py
import numpy as np

from dbmpi.data.hdf5 import Dataset
from dbmpi.errors import UserError
from dbmpi.network.own import calling

_EXPECTED = (
    "expected inputs, or a tuple (inputs, targets) or (inputs, targets, weights), each an array or anything with a "
    "length and an index, samples first; or a function that returns these"
)


@dataclass(frozen=True)
class GivenArray(Dataset):
    """An array in the place of a dataset: it has no attributes, and no storage that would have to be checked."""

    values: Any
    """Has a shape, a dtype, and an index that takes a slice or an array of numbers."""
    stored = False
    """There is no file."""
    parts = ()
    """Nothing of HDF5."""
    file_bytes = 0
    """There is no file."""

    def error(self, text: str) -> UserError:
        """Return an error that says `text` of the array."""
        return UserError(f"{self.path}: {self.name!r}{'' if text[0] == ':' else ' '}{text}")

    def damage(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: there is no file."""
        return nullcontext()

    def attribute(self, key: str) -> Any:
        """Return None: there is no attribute `key`."""

    def read(self, selection: Any) -> np.ndarray:
        """Return the values of a `selection`."""
        return np.asarray(self.values[selection])

    def check_storage(self, memory_bytes: int) -> None:
        """Do nothing, whatever `memory_bytes` there may be: the array exists already."""

    @property
    def at_hand(self) -> bool:
        """Whether it is an array of NumPy, of which any rows can be taken at once."""
        return isinstance(self.values, np.ndarray)


class GivenDataset(Dataset):
    """A dataset of a file that the program has open itself, maybe for writing, and maybe in memory."""

    at_hand = False
    """Rows are read in order."""

    def read(self, selection: Any) -> np.ndarray:
        """Return the values of a `selection`; Damaged where the file is damaged, or closed."""
        with self.damage():
            return np.asarray(self.values[selection])

    def check_storage(self, memory_bytes: int) -> None:
        """Do nothing, whatever `memory_bytes` there may be: the program knows its file."""


Given = GivenArray | GivenDataset


class GivenRows:
    """What has a length and gives one sample at a time, as an array of rows; texts are objects of any length.

    Parameters
    ----------
    given
        Has a length and an index.
    called
        For messages.
    """

    def __init__(self, given: Any, called: str) -> None:
        self._given, self._called = given, called
        first = self._row(0)
        self.shape = (len(given), *first.shape)
        self._text = first.dtype.kind in "SU"
        self.dtype = h5py.string_dtype() if self._text else first.dtype

    def __getitem__(self, selection: tuple[slice | np.ndarray]) -> np.ndarray:
        """Return some rows, ``(rows, *sample)``."""
        (rows,) = selection
        numbers = range(self.shape[0])[rows] if isinstance(rows, slice) else rows.tolist()
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for position, number in enumerate(numbers):
            row = self._row(number)
            if row.shape != self.shape[1:] or not self._holds(row.dtype):
                raise UserError(
                    f"{self._called}: sample {number} is {row.dtype} of shape {row.shape}, and the first one "
                    f"{'text' if self._text else self.dtype} of shape {self.shape[1:]}; expected the same for all"
                )
            found[position] = row
        return found

    def _holds(self, dtype: np.dtype[Any]) -> bool:
        """Return whether elements of another sample stay what they are: integers must not wrap around."""
        if self._text:
            return dtype.kind in "SU"
        return np.can_cast(dtype, self.dtype, "safe" if self.dtype.kind in "iub" else "same_kind")

    def _row(self, number: int) -> np.ndarray:
        row = self._given[number]
        if isinstance(row, tuple | dict):
            raise UserError(
                f"{self._called}: sample {number} is a {type(row).__name__}; expected an array or a number: give the "
                "inputs and the targets of all samples apart, as two things that can be indexed"
            )
        return _without_mask(row, f"{self._called}: sample {number}")


class GivenData(NamedTuple):
    """Arrays to learn from or to test on."""

    inputs: tuple[Given, ...]
    """By their names, which are in order."""
    named: bool
    """Whether they were given by names, and are to be handed out by them."""
    targets: Given | None
    weights: Given | None

    @classmethod
    def of(cls, given: Any, called: str) -> GivenData:
        """Take apart what a program gave; the arrays stay where they are.

        Parameters
        ----------
        given
            Inputs, or a tuple of inputs, targets and weights.
        called
            For messages.

        Raises
        ------
        UserError
            If it is no data.
        """
        parts = given if isinstance(given, tuple) else (given,)
        if not 1 <= len(parts) <= 3:
            raise UserError(f"{called}: given a tuple of {len(parts)}; {_EXPECTED}")
        named = isinstance(parts[0], Mapping)
        inputs = parts[0] if named else {"inputs": parts[0]}
        if not inputs or not all(isinstance(name, str) for name in inputs):
            raise UserError(f"{called}: the inputs are a dictionary of {[*inputs]!r:.60}; expected arrays by names")
        targets, weights = (*parts[1:], None, None)[:2]
        return cls(
            tuple(_array(inputs[name], name, called) for name in sorted(inputs)),
            named,
            None if targets is None else _array(targets, "targets", called),
            None if weights is None else _array(weights, "weights", called),
        )

    @property
    def arrays(self) -> tuple[Given, ...]:
        """All there are."""
        return (*self.inputs, *(array for array in (self.targets, self.weights) if array is not None))


def _array(given: Any, name: str, called: str) -> Given:
    """Return what was `given`, in place where it is an array, or what can be indexed like one."""
    where = f"{called}: {name!r}"
    if isinstance(given, h5py.Dataset):
        return GivenDataset(called, name, given)
    with calling(where, "it is taken for an array"):
        if hasattr(given, "__array__") or (isinstance(given, list | tuple) and given and np.isscalar(given[0])):
            array = _without_mask(given, where)
            # Texts of any length, as tables keep them.
            return GivenArray(called, name, np.array(array.tolist()) if array.dtype == object else array)
        indexable = hasattr(given, "__len__") and hasattr(given, "__getitem__")
        if not indexable or isinstance(given, str | bytes | Mapping):
            raise UserError(f"{where} is {type(given).__name__} {given!r:.60}; {_EXPECTED}")
        if not len(given):
            raise UserError(f"{where} is empty; expected at least one sample")
        return GivenArray(called, name, GivenRows(given, where))


def _without_mask(given: Any, where: str) -> np.ndarray:
    """Return what was `given` as an array; UserError where values are masked."""
    if np.ma.is_masked(given):
        raise UserError(
            f"{where} has masked values; expected a value for each: fill them, e.g. array.filled(0), or with NaN if "
            "data.missing is set"
        )
    return np.asarray(given)
