"""Samples from an HDF5 file or from arrays, handed out as batches: for networks with the sample innermost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dbmpi.config.data import DataPlace
from dbmpi.data import description as data_description
from dbmpi.data import hdf5
from dbmpi.data.attributes import declared, elements
from dbmpi.data.comparison import Comparable
from dbmpi.data.encoding import encoding_of
from dbmpi.data.gather import innermost, taken
from dbmpi.data.given import GivenData
from dbmpi.data.opened import DataFiles
from dbmpi.data.reading import Reading
from dbmpi.data.rows import Stored, in_place, narrowed
from dbmpi.data.storage import SMALL, Storage
from dbmpi.errors import UserError
from dbmpi.objective import Batch, Samples

ROWS_AT_ONCE = 128
"""Rows of one selection: HDF5 slows down more than linearly with the number of scattered rows."""
ANSWERS_AT_ONCE = 1 << 20
"""Targets of a block that already lie in memory."""
_ANY_BYTES = 2**62  # of arrays that a program has already


class Source(Comparable):
    """An open data file, or arrays in its place.  Use as a context manager, or call :meth:`close`.

    A file that fits the memory budget is read into memory when the first batch is asked for, and closed; integers of
    8 and 16 bits stay what they are.  From a larger one, the rows of each batch are read when it is asked for.  Arrays
    are used where they are.

    Parameters
    ----------
    path
        The file, or what the user calls the data.
    files
        Open; None where there are none.
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
        files: DataFiles | None,
        description: data_description.Description,
        memory_bytes: int,
        reading: Reading,
    ) -> None:
        self.path, self.in_file = path, files is not None
        self._files, self._open = files, True
        self._description = description
        self.reading, self._own = reading, reading.own
        self.storage = Storage(description, memory_bytes, reading, in_file=self.in_file)
        self._stored_inputs, self._answer, self._weighing = description.inputs, description.targets, description.weights
        self._inputs: list[np.ndarray | None] = [None] * len(description.inputs)
        """What is in memory, (samples, features) each."""
        self._targets: np.ndarray | None = None
        self._weights: np.ndarray | None = None
        self._loaded = False
        self._declared = {}
        self.samples = description.samples
        only = None if description.named else description.inputs[0].dataset
        self.encoding = encoding_of(only, reading.encoding, str(path), description.input_shape)
        self.input_shape = description.input_shape if self._own else self.encoding.shape(description.input_shape)
        self.has_targets = description.targets is not None
        shown = ", ".join(reading.inputs_named) if files is not None else "inputs"
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
        place: DataPlace,
        memory_mib: int,
        targets: Literal["required", "optional"] = "required",
        reading: Reading | None = None,
        *,
        keep: bool = True,
    ) -> Source:
        """Open a data file and check everything but its values (see :meth:`validate`).

        Parameters
        ----------
        place
            HDF5 file as described in ``docs/data-format.md``, or several, or one of NumPy.
        memory_mib
            A file up to this size (MiB, as float32) is kept in memory.
        targets
            Whether the file must have targets; to predict, inputs are enough.
        reading
            How to read it; by default the format of ``docs/data-format.md``.
        keep
            Whether a small file is kept in memory.

        Raises
        ------
        UserError
            If the file is missing, incomplete, or not a data file.
        """
        place = Path(place) if isinstance(place, str) else place
        reading, memory_bytes = Reading() if reading is None else reading, memory_mib << 20
        files = DataFiles(place, reading, memory_bytes, targets == "required")
        try:
            description = data_description.describe(files, memory_bytes)
            source = cls(Path(files.called), files, description, memory_bytes if keep else 0, reading)
            answers = None if description.targets is None else description.targets.stored.dataset
            source._declared = declared(files.called, description.inputs[0].dataset, answers)
            source._declare_names()
        except BaseException:
            files.close()
            raise
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
        """Note what several inputs are called, so that others are not taken for them, and what is done to them."""
        self._declared.update(self.encoding.declared)
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
    def place(self) -> DataPlace | None:
        """Where the files are; None for arrays."""
        return self._files.place if self._files else None

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The inputs as they are stored."""
        return self._stored_inputs

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
        """Return the inputs at `indices` as those of a :meth:`batch`."""
        return self._inputs_at(self._checked(indices))

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """Return the targets at `indices` as those of a :meth:`batch`, C-contiguous."""
        if self._answer is None:
            raise UserError(f"{self.path}: has no dataset {self.names['targets']!r}")
        return self._targets_at(self._checked(indices), self._own)

    def load(self) -> None:
        """Read the file into memory and close it, if it is resident and has not been read yet."""
        if self._loaded:
            return
        self._loaded = True
        if not self.storage.resident:
            if self.in_file:
                self._load_answers(SMALL)
            return
        if not self.in_file:
            self._inputs = [None if self._own else in_place(stored) for stored in self._stored_inputs]
            return
        self._check_open()
        for number, stored in enumerate(self._stored_inputs):
            inputs = np.empty((self.samples, math.prod(stored.shape[1:])), stored.kept)
            for start, rows in stored.blocks():
                inputs[start : start + len(rows)] = narrowed(stored, rows)
            self._inputs[number] = inputs
        self._load_answers(_ANY_BYTES)
        self._close_file()

    def _load_answers(self, most: int) -> None:
        """Read targets and weights into memory, if they take so many bytes at most."""
        if self._answer is not None:
            if self.samples * (self.target_size or 1) * self._answer.kept.itemsize > most:
                return
            targets = np.empty((self.samples, *self._answer.row_shape), self._answer.kept)
            for start, rows in self._answer.blocks():
                targets[start : start + len(rows)] = rows
            self._targets = targets
        if self._weighing is not None:
            self._weights = self._weighing.of_slice(slice(0, self.samples), self._targets)

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

    def validate(self, full: bool, *, inputs: bool = False) -> None:
        """Scan the values, a block at a time: all of them, or with ``full=False`` only the first block.

        One rank's full scan is enough for a run.  Inputs that stay in a file are checked in batches, and here if
        `inputs` asks for that.

        Raises
        ------
        UserError
            If inputs or values are missing, NaN or infinite (also as float32), or labels are not classes.
        """
        scanned: list[tuple[Any, bool]] = []
        all_inputs = full and (inputs or self.storage.resident or not self.in_file)
        scanned += [(each, all_inputs) for each in self._stored_inputs]
        scanned += [] if self._answer is None else [(self._answer, full)]
        if not self.in_file:
            for each, whole in scanned:
                each.scan(whole)
            return
        assert self._files is not None
        with self._files.again() as files:
            datasets = files.datasets
            for each, whole in scanned:
                each.reopened(datasets).scan(whole)

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        """Return int64 indices of samples, when those are in memory if they are kept there."""
        self.load()
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or (len(indices) and indices.view(np.uint64).max() >= self.samples):
            raise IndexError(f"indices must be one-dimensional and lie in 0 ... {self.samples - 1}")
        return indices

    def _check_open(self) -> None:
        if self.in_file and not self._open:
            raise ValueError(f"{self.path}: the source is closed")

    def _close_file(self) -> None:
        self._open = False
        if self._files is not None:
            self._files.close()

    def _inputs_at(self, indices: np.ndarray) -> Any:
        """Return inputs for a network, or for an objective of the user's own."""
        if not self._own:
            return self._encoded(0, *self._rows_of(0, indices)).reshape(*self.input_shape, len(indices))
        found = {}
        for number, stored in enumerate(self._stored_inputs):
            rows = taken(*self._rows_of(number, indices)).reshape(len(indices), *stored.shape[1:])
            found[stored.name] = self.encoding.standardised(rows)
        return found if self._description.named else found[self._stored_inputs[0].name]

    def _shown(self, indices: np.ndarray) -> list[np.ndarray]:
        found = []
        for number, stored in enumerate(self._stored_inputs):
            if self._own:
                kept = taken(*self._rows_of(number, indices))
                rows = self.encoding.standardised(kept.reshape(-1, *stored.shape[1:])).reshape(kept.shape)
                found.append(np.ascontiguousarray(rows.T, np.float32))
            else:
                found.append(self._encoded(number, *self._rows_of(number, indices)))
        return found

    def _encoded(self, number: int, rows: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
        """Return the rows at some positions as a network gets them, float32 ``(features, samples)``."""
        stored = self._stored_inputs[number]
        flat = innermost(rows, positions, stored.factor)
        return self.encoding.encoded(flat, str(self.path), stored.shape[1:]) if self.encoding.declared else flat

    def _targets_at(self, indices: np.ndarray, first: bool) -> np.ndarray:
        rows: np.ndarray | None
        positions: np.ndarray | None
        rows, positions = self._targets, indices
        if rows is None:
            assert self._answer is not None
            stored, positions = self._read_rows(self._answer.stored, indices)
            rows = self._answer.decoded(stored)
        if self.target_size is None:
            labels = taken(rows, positions)
            return labels if self._codes is None else self._codes[labels]
        if not self._own:
            return innermost(rows, positions)
        assert self._answer is not None
        found = taken(rows, positions)
        return found.reshape(len(indices), *self._answer.own_shape) if first else found.T.astype(np.float32, order="C")

    def _rows_of(self, number: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return rows (n, features) of one of the inputs, and where in them each index is: as `_read_rows`."""
        kept = self._inputs[number]
        if kept is not None:
            return kept, indices
        stored = self._stored_inputs[number]
        rows, positions = self._read_rows(stored, indices)
        found = narrowed(stored, rows)
        if self.in_file and not self.storage.resident:
            self._check_values(stored, found, indices, positions)
        return found, positions

    def _check_values(
        self, stored: Stored, rows: np.ndarray, indices: np.ndarray, positions: np.ndarray | None
    ) -> None:
        """Refuse rows that hold NaN, infinity, or a number too large for float32."""
        wrong = hdf5.not_finite(rows)
        if len(wrong):
            sample = indices[wrong[0] if positions is None else np.flatnonzero(positions == wrong[0])[0]]
            raise stored.error(
                f": sample {sample} lacks a value, or holds NaN, infinity or a number too large for float32; expected "
                "finite numbers (data.missing is taken instead of NaN, if it is set)"
            )

    def _read_rows(self, stored: Stored, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return stored rows that contain those at `indices`, and where in them each index is; None: in this order."""
        self._check_open()
        if stored.any_order if self.in_file else stored.dataset.at_hand:
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
        return self._weighing.of(taken(rows, positions), targets)
