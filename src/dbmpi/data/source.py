"""Samples from an HDF5 file, handed out as batches with the sample innermost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from dbmpi.checkpoint.meaning import Meaning, agree
from dbmpi.checkpoint.untrusted import damage
from dbmpi.data import description as data_description
from dbmpi.data import hdf5
from dbmpi.data.attributes import declared
from dbmpi.data.gather import gather, narrow
from dbmpi.data.reading import Label, Reading
from dbmpi.data.rows import Stored
from dbmpi.errors import UserError
from dbmpi.objective import Batch

ROWS_AT_ONCE = 128
"""Rows of one selection: HDF5 slows down more than linearly with the number of scattered rows in a selection."""
ANSWERS_AT_ONCE = 1 << 20
"""Targets of a block that already lie in memory."""
_LOOKED_AT_ROWS, _LOOKED_AT_BYTES = 64, 16 << 20
"""Most that is read of a file to see what its samples are like, however large it is; two rows at least."""


class Source:
    """An open data file.  Use as a context manager, or call :meth:`close`.

    A file that fits the memory budget is read into memory when the first batch is asked for, and closed; uint8 inputs
    stay uint8 there.  From a larger one, the rows of each batch are read when it is asked for.
    """

    def __init__(
        self,
        path: Path,
        file: h5py.File,
        description: data_description.Description,
        memory_bytes: int,
        reading: Reading,
    ) -> None:
        """Take the open `file` at `path` for what the `description` says.

        Parameters
        ----------
        path, file, description
            The file, and what it holds.
        memory_bytes
            A file up to this size, as float32, is kept in memory.
        reading
            How it is read.
        """
        self.path = path
        self._file: h5py.File | None = file
        self._description = description
        self._memory_bytes = memory_bytes
        self._stored_inputs, self._answer, self._weighing = description.inputs, description.targets, description.weights
        self._inputs: np.ndarray | None = None
        self._targets: np.ndarray | None = None
        self._weights: np.ndarray | None = None
        self._codes: np.ndarray | None = None
        """For each class of the file the one that it is taken for; None where they are the same."""
        self._declared: dict[str, Any] = {}
        self._factor = np.float32(description.inputs.factor)
        self._cache_bytes = 0
        self.samples: int = description.samples
        """Number of samples."""
        self.input_shape: tuple[int, ...] = description.input_shape
        """Shape of one sample."""
        self.has_targets: bool = description.targets is not None
        """Whether the file has targets; otherwise only :meth:`inputs` can be asked for."""
        self.names: dict[str, str] = {"inputs": reading.inputs, "targets": reading.targets}
        """What the user calls the datasets: ``inputs``, ``targets``, and if there are any, ``weights``."""
        self.scale: float = description.inputs.meaning.scale
        """Factor on every stored input."""
        self.classes: int | None = None
        """Number of classes, or None where the targets are values or missing."""
        self.target_size: int | None = None
        """Number of values of a target, or None where the targets are classes or missing."""
        self.labels: tuple[Label, ...] | None = None
        """What the classes are called in the user's own data, in their order; None where they are just numbers."""
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
            source._declared = declared(path, description.inputs.dataset.values, answers)
        return source

    def close(self) -> None:
        """Close the file and release the memory; may be called again."""
        self._inputs = self._targets = self._weights = None
        self._close_file()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def resident(self) -> bool:
        """Whether the file fits the memory budget and is kept in memory."""
        return self._description.float32_bytes <= self._memory_bytes

    @property
    def resident_bytes(self) -> int:
        """What the samples take in memory once they are loaded; 0 where they are not kept there."""
        if not self.resident:
            return 0
        each = 1 if self._stored_inputs.bytes_kept else 4
        return self.samples * (self._description.features * each + 4 * (self.target_size or 1))

    @property
    def spare_bytes(self) -> int:
        """What the file, as float32, leaves of the memory budget, in bytes; 0 where it is not kept in memory."""
        return max(self._memory_bytes - self._description.float32_bytes, 0)

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the samples at `indices`, int64 ``(samples,)``, in this order; repeated indices are allowed.

        Where the file has no targets, they are zeros, for a network that ignores them.

        Raises
        ------
        UserError
            If the file cannot be read any more, or a label is not one of the classes.
        """
        targets = self.targets(indices) if self.has_targets else np.zeros(len(indices), np.int32)
        weights = None if self._weighing is None else self._weights_of(indices, targets)
        return Batch(self.inputs(indices), targets, weights)

    def inputs(self, indices: np.ndarray) -> np.ndarray:
        """Return the inputs at `indices` as float32 ``(*features, samples)``, C-contiguous."""
        return self._inputs_at(self._checked(indices))

    def _inputs_at(self, indices: np.ndarray) -> np.ndarray:
        """Return inputs from memory or, where they are not there, from the file."""
        if self._inputs is not None:
            flat = gather(self._inputs, indices, self._factor)
        else:
            rows, positions = self._read_rows(self._stored_inputs, indices)
            flat = gather(self._narrowed(rows), positions, self._factor)
        return flat.reshape(*self.input_shape, len(indices))

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """Return the targets at `indices`: int32 ``(samples,)`` or float32 ``(outputs, samples)``, C-contiguous."""
        if self._answer is None:
            raise UserError(f"{self.path}: has no dataset {self.names['targets']!r}")
        return self._targets_at(self._checked(indices))

    def _targets_at(self, indices: np.ndarray) -> np.ndarray:
        if self._targets is not None:
            rows, positions = self._targets, indices
        else:
            assert self._answer is not None
            rows, positions = self._read_rows(self._answer.stored, indices)
            rows = self._answer.decoded(rows)
        if self.target_size is None:
            labels: np.ndarray = rows[positions]
            return labels if self._codes is None else self._codes[labels]
        return gather(rows, positions, np.float32(1))

    def load(self) -> None:
        """Read the file into memory and close it, if it is resident and has not been read yet."""
        if self._inputs is not None or not self.resident:
            return
        self._check_open()
        stored = self._stored_inputs
        inputs = np.empty((self.samples, self._description.features), np.uint8 if stored.bytes_kept else np.float32)
        for start, rows in stored.blocks():
            inputs[start : start + len(rows)] = self._narrowed(rows)
        if self._answer is not None:
            kind = np.int32 if self.target_size is None else np.float32
            targets = np.empty((self.samples, *self._answer.row_shape), kind)
            for start, rows in self._answer.blocks():
                targets[start : start + len(rows)] = rows
            if self._weighing is not None:
                self._weights = self._weighing.of_slice(slice(0, self.samples), targets)
            self._targets = targets
        self._inputs = inputs
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
        with hdf5.open_file(self.path, self._cache_bytes) as file:
            with damage(self.path, "its structure"):
                stored = [each.reopened(file) for each in (self._stored_inputs, self._answer) if each is not None]
            for each in stored:
                each.scan(full)

    def expect(self, outputs: int, loss: str) -> None:
        """Raise UserError unless a last layer of `outputs` units with this loss fits the targets.

        ``softmax`` needs one output a class; ``logistic`` (one-vs-all) at least that many, or one a value between 0
        and 1; ``squared`` one output a value, or one a class, which is then compared with the one-hot vector of the
        class.
        """
        given = f"the network's last layer has {outputs} outputs"
        if self.target_size is not None:
            if loss not in ("squared", "logistic"):
                raise UserError(
                    f"{self.path}: the targets are {self.target_size} values a sample, but the loss {loss!r} needs "
                    f"classes; use the loss 'squared', 'logistic' for several labels of 0 and 1 a sample, or integer "
                    f"targets of shape (samples,)"
                )
            if outputs != self.target_size:
                hint = "; for classes store them as integers of shape (samples,)" if self.target_size == 1 else ""
                raise UserError(
                    f"{self.path}: the targets are {self.target_size} values a sample, but {given}; "
                    f"set its units to {self.target_size}{hint}"
                )
        elif self.classes is not None and (outputs < self.classes or (outputs > self.classes and loss != "logistic")):
            more = "at least " if loss == "logistic" else ""
            hint = "" if outputs < self.classes else f", or set the attribute 'classes' of {self.names['targets']!r}"
            raise UserError(
                f"{self.path}: the targets are {self.classes} classes, but {given}; the loss {loss!r} needs "
                f"{more}{self.classes}: set its units to {self.classes}{hint}"
            )

    def expect_like(self, train: Source) -> tuple[str, ...]:
        """Raise UserError unless this (test) file's samples suit a network trained on `train`; return notices.

        Classes are from then on those of `train` with the same labels.
        """
        if self.input_shape != train.input_shape:
            raise UserError(
                f"{self.path}: samples have shape {self.input_shape}, but those of {train.path} have "
                f"{train.input_shape}; expected the same"
            )
        if not self.has_targets:
            return self.mean_the_same(train.meaning, 0, learner=str(train.path), targets=False)
        if self.target_size != train.target_size:
            raise UserError(
                f"{self.path}: the targets are {self._kind()}, but those of {train.path} are {train._kind()}; "
                f"expected the same"
            )
        notices = self.mean_the_same(train.meaning, train.classes or 0, learner=str(train.path))
        if self.classes is not None and train.classes is not None and self.classes > train.classes:
            raise UserError(
                f"{self.path}: has {self.classes} classes, but {train.path} only {train.classes}; "
                f"expected no class that is not trained"
            )
        return notices

    @cached_property
    def meaning(self) -> Meaning:
        """Meaning of the samples, with the range of some of the rows."""
        row_bytes = 4 * self._description.features
        count = max(2, min(_LOOKED_AT_ROWS, _LOOKED_AT_BYTES // row_bytes))
        indices = np.unique(np.linspace(0, self.samples - 1, count).astype(np.int64))
        inputs = self._inputs_at(indices)
        digest = hashlib.sha256(f"{self.samples} samples of {self.input_shape}".encode())
        digest.update(inputs.data)
        if self.has_targets:
            digest.update(self._targets_at(indices).data)
        finite = inputs[np.isfinite(inputs)]
        found = {"lowest": float(finite.min(initial=0)), "highest": float(finite.max(initial=0))}
        known = {"scale": self.scale, "labels": self.labels or (), "digest": digest.hexdigest()}
        return Meaning.model_validate({**found, **known, **self._declared})

    def mean_the_same(
        self, learned: Meaning | None, classes: int, *, learner: str, targets: bool = True
    ) -> tuple[str, ...]:
        """Take the classes for those of the same labels that were learned, and return what the user should know.

        Parameters
        ----------
        learned, classes
            What was learned from, and its number of classes.
        learner
            What to call it in messages.
        targets
            Whether the targets are used.

        Raises
        ------
        UserError
            If the samples are other things than those that were learned from.
        """
        targets = targets and self.has_targets
        both = (classes, self.classes) if targets and classes and self.classes else None
        found = agree(learned, self.meaning, learner=learner, file=str(self.path), classes=both, targets=targets)
        self._codes = None if found.codes is None else np.array(found.codes, np.int32)
        return found.notices

    def _kind(self) -> str:
        return f"{self.classes} classes" if self.target_size is None else f"{self.target_size} values a sample"

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        """Return int64 indices of samples, when those are in memory if they are kept there."""
        self.load()
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or (len(indices) and not (indices.min() >= 0 and indices.max() < self.samples)):
            raise IndexError(f"indices must be one-dimensional and lie in 0 ... {self.samples - 1}")
        return indices

    def _check_open(self) -> None:
        if self._file is None:
            raise ValueError(f"{self.path}: the source is closed")

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _narrowed(self, rows: np.ndarray) -> np.ndarray:
        """Return stored rows of inputs as they are kept in memory, ``(samples, features)``."""
        return narrow(self._stored_inputs.decoded(rows).reshape(len(rows), -1))

    def _read_rows(self, stored: Stored, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return stored rows that contain those at `indices`, and where in them each index is."""
        self._check_open()
        wanted, positions = np.unique(indices, return_inverse=True)
        rows = np.empty((len(wanted), *stored.shape[1:]), stored.kind)
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            part = wanted[start : start + ROWS_AT_ONCE]
            rows[start : start + len(part)] = stored.read(part)
        return rows, positions

    def _weights_of(self, indices: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return the weights of samples, float32 ``(samples,)``."""
        assert self._weighing is not None
        indices = self._checked(indices)
        if self._weights is not None:
            kept: np.ndarray = self._weights[indices]
            return kept
        if self._weighing.stored is None:
            return self._weighing.of(None, targets)
        rows, positions = self._read_rows(self._weighing.stored, indices)
        return self._weighing.of(rows[positions], targets)
