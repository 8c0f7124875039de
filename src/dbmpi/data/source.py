"""Samples from an HDF5 file, handed out as batches with the sample innermost."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import h5py
import numpy as np

from dbmpi.data import hdf5, validation
from dbmpi.data.declared import declared
from dbmpi.data.gather import gather, narrow
from dbmpi.data.meaning import Meaning, agree
from dbmpi.errors import UserError
from dbmpi.objective import Batch

ROWS_AT_ONCE = 128
"""Rows of one selection: HDF5 slows down more than linearly with the number of scattered rows in a selection."""
BLOCKS_CACHE = 64 << 20
"""Chunk cache (bytes) for reading a compressed file from its beginning to its end."""
_LOOKED_AT_ROWS, _LOOKED_AT_BYTES = 64, 16 << 20
"""Most that is read of a file to see what its samples are like, however large it is; two rows at least."""


class Source:
    """An open data file.  Use as a context manager, or call :meth:`close`.

    A file that fits the memory budget is read into memory when the first batch is asked for, and closed; uint8 inputs
    stay uint8 there.  From a larger one, the rows of each batch are read when it is asked for.
    """

    def __init__(self, path: Path, file: h5py.File, description: hdf5.Description, memory_bytes: int) -> None:
        """Use :meth:`open`."""
        self.path = path
        self._file: h5py.File | None = file
        self._description = description
        self._memory_bytes = memory_bytes
        self._classes = description.classes
        self._inputs: np.ndarray | None = None
        self._targets: np.ndarray | None = None
        self._codes: np.ndarray | None = None
        """For each class of the file the one that it is taken for; None where they are the same."""
        self._declared: dict[str, Any] = {}
        self._scale = np.float32(description.scale)
        self._cache_bytes = 0

    @classmethod
    def open(cls, path: Path, memory_mib: int, targets: Literal["required", "optional"] = "required") -> Source:
        """Open a data file and check everything but its values (see :meth:`validate`).

        Parameters
        ----------
        path
            HDF5 file as described in ``docs/data.md``.
        memory_mib
            A file up to this size (MiB, as float32) is kept in memory.
        targets
            Whether the file must have targets; to predict, inputs are enough.

        Raises
        ------
        UserError
            If the file is missing, incomplete, or not a data file.
        """
        path = Path(path)
        file = hdf5.open_file(path)
        source = None
        try:
            memory_bytes = memory_mib << 20
            description = hdf5.describe(path, file, memory_bytes, targets == "required")
            source = cls(path, file, description, memory_bytes)
            source._reopen_compressed()
            if description.has_targets and description.target_size is None and description.classes is None:
                source._classes = source._count_classes()
            inputs, targets_there = source._dataset("inputs"), description.has_targets
            answers = source._dataset("targets") if targets_there else None
            source._declared = declared(path, inputs.file, inputs, answers, source._classes)
        except BaseException:
            file.close()
            if source is not None:
                source.close()
            raise
        return source

    def close(self) -> None:
        """Close the file and release the memory; may be called again."""
        self._inputs = self._targets = None
        self._close_file()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._description.samples

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self._description.input_shape

    @property
    def classes(self) -> int | None:
        """Number of classes, or None where the targets are values or missing."""
        return self._classes

    @property
    def target_size(self) -> int | None:
        """Number of values of a target, or None where the targets are classes or missing."""
        return self._description.target_size

    @property
    def labels(self) -> tuple[int, ...] | None:
        """Labels of the original file in the order of the classes, where an importer had to number them."""
        return self._description.labels

    @property
    def has_targets(self) -> bool:
        """Whether the file has targets; otherwise only :meth:`inputs` can be asked for."""
        return self._description.has_targets

    @property
    def resident(self) -> bool:
        """Whether the file fits the memory budget and is kept in memory."""
        return self._description.float32_bytes <= self._memory_bytes

    @property
    def resident_bytes(self) -> int:
        """What the samples take in memory once they are loaded; 0 where they are not kept there."""
        if not self.resident:
            return 0
        stored = 1 if self._declared.get("elements") == "bytes" else 4
        return self.samples * (self._description.features * stored + 4 * (self.target_size or 1))

    @property
    def spare_bytes(self) -> int:
        """What the file, as float32, leaves of the memory budget, in bytes; 0 where it is not kept in memory."""
        return max(self._memory_bytes - self._description.float32_bytes, 0)

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the samples at `indices`, int64 ``(samples,)``, in this order; repeated indices are allowed.

        Where the file has no targets, they are zeros, for a network that does not look at them.

        Raises
        ------
        UserError
            If the file cannot be read any more, or a label is not one of the classes.
        """
        targets = self.targets(indices) if self.has_targets else np.zeros(len(indices), np.int32)
        return Batch(self.inputs(indices), targets)

    def inputs(self, indices: np.ndarray) -> np.ndarray:
        """Return the inputs at `indices` as float32 ``(*features, samples)``, C-contiguous."""
        if self.resident:
            self.load()
        return self._inputs_at(self._checked(indices))

    def _inputs_at(self, indices: np.ndarray) -> np.ndarray:
        """Return inputs from memory or, where they are not there, from the file."""
        if self._inputs is not None:
            flat = gather(self._inputs, indices, self._scale)
        else:
            rows, places = self._read_rows("inputs", indices)
            flat = gather(narrow(rows.reshape(len(rows), -1)), places, self._scale)
        return flat.reshape(*self.input_shape, len(indices))

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """Return the targets at `indices`: int32 ``(samples,)`` or float32 ``(outputs, samples)``, C-contiguous."""
        if not self.has_targets:
            raise UserError(f"{self.path}: has no dataset 'targets'")
        if self.resident:
            self.load()
        return self._targets_at(self._checked(indices))

    def _targets_at(self, indices: np.ndarray) -> np.ndarray:
        if self._targets is not None:
            rows, places = self._targets, indices
        else:
            rows, places = self._read_rows("targets", indices)
            if self.target_size is None:
                self._check_labels(rows)
                rows = rows.astype(np.int32)
        if self.target_size is None:
            labels: np.ndarray = rows[places]
            return labels if self._codes is None else self._codes[labels]
        return gather(narrow(rows), places, np.float32(1))

    def load(self) -> None:
        """Read the file into memory and close it, if it is resident and has not been read yet."""
        if self._inputs is not None or not self.resident:
            return
        dataset = self._dataset("inputs")
        stored = np.uint8 if dataset.dtype == np.uint8 else np.float32
        inputs = np.empty((self.samples, self._description.features), stored)
        for start, rows in hdf5.blocks(self.path, dataset):
            inputs[start : start + len(rows)] = narrow(rows.reshape(len(rows), -1))
        if self.has_targets:
            targets = self._dataset("targets")
            if self.target_size is None:
                labels = np.empty(self.samples, np.int32)
                for start, rows in hdf5.blocks(self.path, targets):
                    self._check_labels(rows)
                    labels[start : start + len(rows)] = rows
                self._targets = labels
            else:
                values = np.empty((self.samples, self.target_size), np.float32)
                for start, rows in hdf5.blocks(self.path, targets):
                    values[start : start + len(rows)] = narrow(rows)
                self._targets = values
        self._inputs = inputs
        self._close_file()

    def validate(self, full: bool) -> None:
        """Scan the values, a block at a time: all of them, or with ``full=False`` only the first block.

        One rank's full scan is enough for a run.

        Raises
        ------
        UserError
            If inputs or values are NaN or infinite (also as float32), or labels are not classes.
        """
        file = hdf5.open_file(self.path, self._cache_bytes)
        try:
            validation.scan_finite(self.path, hdf5.find(self.path, file, "inputs"), full)
            if not self.has_targets:
                return
            targets = hdf5.find(self.path, file, "targets")
            if self.target_size is None:
                validation.scan_labels(self.path, targets, self._classes, full)
            else:
                validation.scan_finite(self.path, targets, full)
        finally:
            file.close()

    def expect(self, outputs: int, loss: str) -> None:
        """Raise UserError unless a last layer of `outputs` units with this loss fits the targets.

        ``softmax`` needs one output a class; ``logistic`` (one-vs-all) at least that many; ``squared`` one output
        a value, or one a class, which is then compared with the class as a one-hot vector.
        """
        given = f"the network's last layer has {outputs} outputs"
        if self.target_size is not None:
            if loss != "squared":
                raise UserError(
                    f"{self.path}: the targets are {self.target_size} values a sample, but the loss {loss!r} needs "
                    f"classes; use the loss 'squared', or integer targets of shape (samples,)"
                )
            if outputs != self.target_size:
                raise UserError(
                    f"{self.path}: the targets are {self.target_size} values a sample, but {given}; "
                    f"set its units to {self.target_size}"
                )
        elif self.classes is not None and (outputs < self.classes or (outputs > self.classes and loss != "logistic")):
            more = "at least " if loss == "logistic" else ""
            hint = "" if outputs < self.classes else ", or set the attribute 'classes' of 'targets'"
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
        """What the samples stand for, with a look at some of the rows."""
        row_bytes = 4 * self._description.features
        count = max(2, min(_LOOKED_AT_ROWS, _LOOKED_AT_BYTES // row_bytes))
        indices = np.unique(np.linspace(0, self.samples - 1, count).astype(np.int64))
        inputs = self._inputs_at(indices)
        digest = hashlib.sha256(f"{self.samples} samples of {self.input_shape}".encode())
        digest.update(inputs.data)
        if self.has_targets:
            digest.update(self._targets_at(indices).data)
        finite = inputs[np.isfinite(inputs)]
        return Meaning(
            scale=self._description.scale,
            lowest=float(finite.min(initial=0)),
            highest=float(finite.max(initial=0)),
            digest=digest.hexdigest(),
            **self._declared,
        )

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
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or (len(indices) and not (indices.min() >= 0 and indices.max() < self.samples)):
            raise IndexError(f"indices must be one-dimensional and lie in 0 ... {self.samples - 1}")
        return indices

    def _dataset(self, name: str) -> h5py.Dataset:
        if self._file is None:
            raise ValueError(f"{self.path}: the source is closed")
        return self._file[name]

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopen_compressed(self) -> None:
        """Open a compressed file again with a chunk cache, so that a chunk is not unpacked for every row."""
        if hdf5.compressed(self._dataset("inputs")):
            self._cache_bytes = BLOCKS_CACHE if self.resident else self._memory_bytes // 2
            self._close_file()
            self._file = hdf5.open_file(self.path, self._cache_bytes)

    def _read_rows(self, name: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows that contain those at `indices`, and where in them each index is."""
        dataset = self._dataset(name)
        wanted, places = np.unique(indices, return_inverse=True)
        rows = np.empty((len(wanted), *dataset.shape[1:]), dataset.dtype)
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            part = wanted[start : start + ROWS_AT_ONCE]
            rows[start : start + len(part)] = hdf5.read(self.path, dataset, part)
        return rows, places

    def _count_classes(self) -> int:
        """Return the largest label plus one, for a file without the attribute `classes`."""
        targets = self._dataset("targets")
        largest = max(int(rows.max()) for _, rows in hdf5.blocks(self.path, targets))
        if largest > hdf5.LARGEST_LABEL:
            raise UserError(
                f"{self.path}: 'targets' holds the label {largest}; expected labels from 0 to the number of classes - 1"
            )
        if largest < 0:
            validation.scan_labels(self.path, targets, None, full=True)
        return largest + 1

    def _check_labels(self, labels: np.ndarray) -> None:
        """Raise UserError for labels out of range: kernels use them as an index without looking."""
        assert self._classes is not None
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self._classes):
            self.validate(full=True)
            raise UserError(f"{self.path}: 'targets' holds labels outside 0 ... {self._classes - 1}")
