"""Samples from an HDF5 file or from arrays, handed out as batches: for networks with the sample innermost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from dbmpi.checkpoint.untrusted import damage
from dbmpi.data import description as data_description
from dbmpi.data import hdf5
from dbmpi.data.attributes import declared, elements
from dbmpi.data.comparison import Comparable
from dbmpi.data.gather import gather, narrow
from dbmpi.data.given import GivenData, GivenRows
from dbmpi.data.reading import Reading
from dbmpi.data.rows import Stored
from dbmpi.errors import UserError
from dbmpi.objective import Batch, Samples

ROWS_AT_ONCE = 128
"""Rows of one selection: HDF5 slows down more than linearly with the number of scattered rows in a selection."""
ANSWERS_AT_ONCE = 1 << 20
"""Targets of a block that already lie in memory."""
_ANY_BYTES = 2**62
"""Size of arrays that a program has already."""


class Source(Comparable):
    """An open data file, or arrays in its place.  Use as a context manager, or call :meth:`close`.

    A file that fits the memory budget is read into memory when the first batch is asked for, and closed; uint8 inputs
    stay uint8 there.  From a larger one, the rows of each batch are read when it is asked for.  Arrays are used where
    they are.

    Parameters
    ----------
    path
        The file, or what the user calls the data.
    file
        Open; None where there is none.
    description
        What the data hold.
    memory_bytes
        A file up to this size, as float32, is kept in memory.
    reading
        How they are read.
    """

    def __init__(
        self,
        path: Path | str,
        file: h5py.File | None,
        description: data_description.Description,
        memory_bytes: int,
        reading: Reading,
    ) -> None:
        self.path, self.in_file = path, file is not None
        self._file = file
        self._description = description
        self._memory_bytes = memory_bytes
        self._own = reading.own
        self._stored_inputs, self._answer, self._weighing = description.inputs, description.targets, description.weights
        self._inputs: list[np.ndarray | None] = [None] * len(description.inputs)
        """What is in memory, (samples, features) each."""
        self._targets: np.ndarray | None = None
        self._weights: np.ndarray | None = None
        self._loaded = False
        self._declared = {}
        self._cache_bytes = 0
        self.samples = description.samples
        self.input_shape = description.input_shape
        self.has_targets = description.targets is not None
        shown = ", ".join(reading.inputs_named) if file is not None else "inputs"
        self.names = {"inputs": shown, "targets": reading.targets}
        self.scale = description.inputs[0].meaning.scale
        self.notes: tuple[str, ...] = description.notes
        """What was taken for what, where the user may not expect it; lines to show."""
        if self._answer is not None:
            self.classes, self.target_size = self._answer.classes, self._answer.size
            self.labels = self._answer.labels
        if reading.weights is not None:
            self.names["weights"] = reading.weights

    @classmethod
    def open(
        cls,
        path: Path,
        memory_mib: int,
        targets: Literal["required", "optional"] = "required",
        reading: Reading | None = None,
    ) -> Source:
        """Open a data file and check everything but its values (see :meth:`validate`).

        Parameters
        ----------
        path
            HDF5 file as described in ``docs/data-format.md``.
        memory_mib
            A file up to this size (MiB, as float32) is kept in memory.
        targets
            Whether the file must have targets; to predict, inputs are enough.
        reading
            How to read it; by default the format of ``docs/data-format.md``.

        Raises
        ------
        UserError
            If the file is missing, incomplete, or not a data file.
        """
        path, reading, memory_bytes = Path(path), Reading() if reading is None else reading, memory_mib << 20
        with data_description.opened(path, reading, memory_bytes) as (file, cache_bytes):
            description = data_description.describe(path, file, memory_bytes, reading, targets == "required")
            source = cls(path, file, description, memory_bytes, reading)
            source._cache_bytes = cache_bytes
            answers = None if description.targets is None else description.targets.stored.dataset.values
            source._declared = declared(path, description.inputs[0].dataset.values, answers)
            source._declare_names()
        return source

    @classmethod
    def of_arrays(
        cls, given: GivenData, called: str, targets: Literal["required", "optional"], reading: Reading
    ) -> Source:
        """Take arrays that a program has given for what a file would hold; raises UserError as :meth:`open` does.

        Parameters
        ----------
        given
            The arrays.
        called
            What the user calls them.
        targets
            Whether they must have targets.
        reading
            How to take them.
        """
        if targets == "required" and given.targets is None:
            raise UserError(f"{called}: has no targets; give a tuple, (inputs, targets)")
        description = data_description.described(
            given.inputs, given.targets, given.weights, reading, _ANY_BYTES, named=given.named
        )
        source = cls(called, None, description, _ANY_BYTES, reading)
        source._declared = {"elements": elements(given.inputs[0].values)}
        source._declare_names()
        return source

    def _declare_names(self) -> None:
        """Note what several inputs are called, so that others are not taken for them."""
        if self._description.named:
            self._declared["input_names"] = tuple(stored.name for stored in self._stored_inputs)

    def close(self) -> None:
        """Close the file and release the memory; may be called again."""
        self._inputs = [None] * len(self._inputs)
        self._targets = self._weights = None
        self._close_file()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def resident(self) -> bool:
        """Whether the samples are in memory: a file that fits the budget, or arrays of NumPy."""
        small = self._description.float32_bytes <= self._memory_bytes
        return small and all(stored.dataset.at_hand for stored in self._stored_inputs)

    @property
    def in_advance(self) -> bool:
        """Whether a thread may read batches in advance: from files, but not by a user's own code."""
        others = (self._answer, self._weighing)
        read = (*self._stored_inputs, *(other.stored for other in others if other is not None))
        return not self.resident and not any(s is not None and isinstance(s.dataset.values, GivenRows) for s in read)

    @property
    def resident_bytes(self) -> int:
        """What the samples take in memory once they are loaded; 0 where they are not kept there."""
        if not (self.resident and self.in_file):
            return 0
        each = sum(math.prod(stored.shape[1:]) * stored.kept.itemsize for stored in self._stored_inputs)
        answers = 4 if self._answer is None else (self.target_size or 1) * self._answer.kept.itemsize
        return self.samples * (each + answers)

    @property
    def spare_bytes(self) -> int:
        """What the file, as float32, leaves of the memory budget for batches that are kept, in bytes.

        0 where it is not kept in memory, and where code of the user's own gets the batches, which may change them.
        """
        return max(self._memory_bytes - self._description.float32_bytes, 0) if self.in_file and not self._own else 0

    def batch(self, indices: np.ndarray) -> Any:
        """Return the samples at `indices`, int64 ``(samples,)``, in this order; repeated indices are allowed.

        They are a :class:`Batch`, or :class:`Samples` where an objective of the user's own takes them.  Where there are
        no targets, they are zeros, for what ignores them.

        Raises
        ------
        UserError
            If the file cannot be read any more, or a label is not one of the classes.
        """
        indices = self._checked(indices)
        targets = self._targets_at(indices, self._own) if self.has_targets else np.zeros(len(indices), np.int32)
        weights = None if self._weighing is None else self._weights_of(indices, targets)
        inputs = self._inputs_at(indices)
        return Samples(inputs, targets, weights) if self._own else Batch(inputs, targets, weights)

    def inputs(self, indices: np.ndarray) -> Any:
        """Return the inputs at `indices` as those of a :meth:`batch`, C-contiguous."""
        return self._inputs_at(self._checked(indices))

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """Return the targets at `indices` as those of a :meth:`batch`, C-contiguous."""
        if self._answer is None:
            raise UserError(f"{self.path}: has no dataset {self.names['targets']!r}")
        return self._targets_at(self._checked(indices), self._own)

    def load(self) -> None:
        """Read the file into memory and close it, if it is resident and has not been read yet."""
        if self._loaded or not self.resident:
            return
        self._loaded = True
        if not self.in_file:
            self._inputs = [None if self._own else _in_place(stored) for stored in self._stored_inputs]
            return
        self._check_open()
        for number, stored in enumerate(self._stored_inputs):
            inputs = np.empty((self.samples, math.prod(stored.shape[1:])), stored.kept)
            for start, rows in stored.blocks():
                inputs[start : start + len(rows)] = _narrowed(stored, rows)
            self._inputs[number] = inputs
        if self._answer is not None:
            targets = np.empty((self.samples, *self._answer.row_shape), self._answer.kept)
            for start, rows in self._answer.blocks():
                targets[start : start + len(rows)] = rows
            self._targets = targets
        if self._weighing is not None:
            self._weights = self._weighing.of_slice(slice(0, self.samples), self._targets)
        self._close_file()

    def answers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield targets and weights of all samples in blocks: int32 ``(samples,)`` or float32 ``(samples, outputs)``.

        The weights, float32, are 1 where all samples count alike.
        """
        if self._targets is not None:
            weights = np.ones(self.samples, np.float32) if self._weights is None else self._weights
            for start in range(0, self.samples, ANSWERS_AT_ONCE):
                part = slice(start, start + ANSWERS_AT_ONCE)
                yield self._targets[part], weights[part]
            return
        self._check_open()
        assert self._answer is not None
        for start, targets in self._answer.blocks():
            weights = np.ones(len(targets), np.float32)
            if self._weighing is not None:
                weights = self._weighing.of_slice(slice(start, start + len(targets)), targets)
            yield targets, weights

    def validate(self, full: bool) -> None:
        """Scan the values, a block at a time: all of them, or with ``full=False`` only the first block.

        One rank's full scan is enough for a run.

        Raises
        ------
        UserError
            If inputs or values are missing, NaN or infinite (also as float32), or labels are not classes.
        """
        scanned = [each for each in (*self._stored_inputs, self._answer) if each is not None]
        if not self.in_file:
            for each in scanned:
                each.scan(full)
            return
        with hdf5.open_file(Path(self.path), self._cache_bytes) as file:
            with damage(Path(self.path), "its structure"):
                scanned = [each.reopened(file) for each in scanned]
            for each in scanned:
                each.scan(full)

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        """Return int64 indices of samples, when those are in memory if they are kept there."""
        self.load()
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or (len(indices) and not (indices.min() >= 0 and indices.max() < self.samples)):
            raise IndexError(f"indices must be one-dimensional and lie in 0 ... {self.samples - 1}")
        return indices

    def _check_open(self) -> None:
        if self.in_file and self._file is None:
            raise ValueError(f"{self.path}: the source is closed")

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _inputs_at(self, indices: np.ndarray) -> Any:
        """Return inputs for a network, or for an objective of the user's own."""
        if not self._own:
            flat = _innermost(*self._rows_of(0, indices), self._stored_inputs[0])
            return flat.reshape(*self.input_shape, len(indices))
        found = {}
        for number, stored in enumerate(self._stored_inputs):
            found[stored.name] = _taken(*self._rows_of(number, indices)).reshape(len(indices), *stored.shape[1:])
        return found if self._description.named else found[self._stored_inputs[0].name]

    def _shown(self, indices: np.ndarray) -> list[np.ndarray]:
        found = []
        for number, stored in enumerate(self._stored_inputs):
            rows = self._rows_of(number, indices)
            found.append(np.ascontiguousarray(_taken(*rows).T, np.float32) if self._own else _innermost(*rows, stored))
        return found

    def _targets_at(self, indices: np.ndarray, first: bool) -> np.ndarray:
        rows: np.ndarray | None
        positions: np.ndarray | None
        rows, positions = self._targets, indices
        if rows is None:
            assert self._answer is not None
            stored, positions = self._read_rows(self._answer.stored, indices)
            rows = self._answer.decoded(stored)
        if self.target_size is None:
            labels = _taken(rows, positions)
            return labels if self._codes is None else self._codes[labels]
        if not self._own:
            return _innermost(rows, positions)
        assert self._answer is not None
        found = _taken(rows, positions)
        return found.reshape(len(indices), *self._answer.own_shape) if first else found.T.astype(np.float32, order="C")

    def _rows_of(self, number: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return rows (n, features) of one of the inputs, and where in them each index is: as `_read_rows`."""
        kept = self._inputs[number]
        if kept is not None:
            return kept, indices
        stored = self._stored_inputs[number]
        rows, positions = self._read_rows(stored, indices)
        return _narrowed(stored, rows), positions

    def _read_rows(self, stored: Stored, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return stored rows that contain those at `indices`, and where in them each index is; None: in this order."""
        self._check_open()
        if not self.in_file and stored.dataset.at_hand:
            return stored.read(indices), None
        wanted, positions = np.unique(indices, return_inverse=True)
        rows = np.empty((len(wanted), *stored.shape[1:]), stored.kind)
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            part = wanted[start : start + ROWS_AT_ONCE]
            rows[start : start + len(part)] = stored.read(part)
        return rows, positions

    def _weights_of(self, indices: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return the weights of samples, float32 ``(samples,)``."""
        assert self._weighing is not None
        if self._weights is not None:
            kept: np.ndarray = self._weights[indices]
            return kept
        if self._weighing.stored is None:
            return self._weighing.of(None, targets)
        rows, positions = self._read_rows(self._weighing.stored, indices)
        return self._weighing.of(_taken(rows, positions), targets)


def _narrowed(stored: Stored, rows: np.ndarray) -> np.ndarray:
    """Return stored rows of inputs as they are kept in memory, ``(samples, features)``."""
    decoded = np.ascontiguousarray(stored.decoded(rows).reshape(len(rows), -1))
    return decoded if stored.as_stored else narrow(decoded)


def _taken(rows: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
    """Return the rows at some positions, or as they are."""
    found: np.ndarray = rows if positions is None else rows[positions]
    return found


def _innermost(rows: np.ndarray, positions: np.ndarray | None, stored: Stored | None = None) -> np.ndarray:
    """Return rows (n, features) as (features, samples), times the factor that is left of what is stored."""
    factor = 1.0 if stored is None else stored.factor
    return gather(rows, np.arange(len(rows)) if positions is None else positions, np.float32(factor))


def _in_place(stored: Stored) -> np.ndarray | None:
    """Return a given array as the rows (samples, features) that kernels read, where it is as they take it."""
    values = stored.dataset.values
    flags = values.flags
    if values.dtype not in (np.uint8, np.float32) or not (flags.c_contiguous and flags.aligned and flags.writeable):
        return None
    if stored.shape != values.shape or stored.kept != values.dtype:
        return None
    flat: np.ndarray = np.asarray(values).reshape(len(values), -1)
    return flat
