"""The files of some data, open, and the datasets in them that are inputs, targets and weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from dbmpi.config.data import DataParts, DataPlace
from dbmpi.data import hdf5
from dbmpi.data.hdf5 import Dataset
from dbmpi.data.links import find, holds, home
from dbmpi.data.location import Within, called, files_of
from dbmpi.data.numpy_files import NPY_MAGIC, ZIP_MAGIC, NpzArchive, npy_dataset
from dbmpi.data.reading import Reading
from dbmpi.errors import UserError

BLOCKS_CACHE = 64 << 20
"""Chunk cache (bytes) for reading a compressed file from its beginning to its end."""
_MAGIC = 8
"""Bytes at the beginning of a file that say what it is."""
_LEAST_CACHE = 1 << 20
_SETTINGS = {"inputs": "data.inputs", "targets": "data.targets", "weights": "data.weights"}


@dataclass(frozen=True)
class FileParts:
    """What one file, or one of each kind, contributes."""

    inputs: tuple[Dataset, ...]
    targets: Dataset | None
    weights: Dataset | None


class DataFiles:
    """Files that are open, with their datasets.  Use as a context manager, or call :meth:`close`.

    Parameters
    ----------
    place
        Where they are.
    reading
        How to read them.
    memory_bytes
        Most that a sparse matrix, or the chunk caches, may take.
    required
        Whether there must be targets.

    Raises
    ------
    UserError
        If a file or a dataset is missing, or cannot be read.
    """

    def __init__(self, place: DataPlace, reading: Reading, memory_bytes: int, required: bool) -> None:
        self.place, self.reading, self.required = place, reading, required
        self.called = called(place)
        self._memory_bytes = memory_bytes
        self._open: dict[Path, Any] = {}
        self._cache_bytes = 0
        self.parts: tuple[FileParts, ...] = ()
        try:
            self.parts = self._found()
            if self._compressed():
                self._reopen_with_cache()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; may be called again."""
        for file in self._open.values():
            if isinstance(file, h5py.File):
                file.close()
        self._open.clear()

    def again(self) -> DataFiles:
        """Return the same, opened once more."""
        return DataFiles(self.place, self.reading, self._memory_bytes, self.required)

    @property
    def datasets(self) -> dict[tuple[str, str], Dataset]:
        """All datasets by their path and name."""
        found = {}
        for part in self.parts:
            for dataset in (*part.inputs, part.targets, part.weights):
                if dataset is not None:
                    found[str(dataset.path), dataset.name] = dataset
        return found

    def _found(self) -> tuple[FileParts, ...]:
        if isinstance(self.place, DataParts):
            return self._of_parts(self.place)
        return tuple(self._of_file(within) for within in files_of(self.place))

    def _of_file(self, within: Within) -> FileParts:
        """Return what lies in one file, or in a group of it."""
        reading, file = self.reading, within.file
        self._check_whole(within)
        names = [_joined(within.inside, name) for name in reading.inputs_named]
        answer = _joined(within.inside, reading.targets)
        weighing = None if reading.weights is None else _joined(within.inside, reading.weights)
        left_out = self._homes(within, [name for name in (answer, weighing) if name is not None])
        inputs = tuple(self._dataset(file, name, "inputs", left_out) for name in names)
        targets = None
        if self.required or self._holds(file, answer):
            targets = self._dataset(file, answer, "targets")
        return FileParts(inputs, targets, None if weighing is None else self._dataset(file, weighing, "weights"))

    def _of_parts(self, place: DataParts) -> tuple[FileParts, ...]:
        """Return what lies in files of their own, one of each kind beside the other."""
        reading = self.reading
        if not isinstance(reading.inputs, str):
            raise UserError(
                f"data.inputs = {list(reading.inputs)}: names several datasets, and {self.called} one; name them in "
                "one file, data.train = 'file.h5'"
            )
        found: dict[str, list[Dataset | None]] = {}
        kinds: tuple[tuple[str, Any, str], ...] = (
            ("inputs", place.inputs, reading.inputs),
            ("targets", place.targets, reading.targets),
            ("weights", place.weights, reading.weights or "weights"),
        )
        left_out = frozenset().union(
            *(
                self._homes(each, [each.inside])
                for _, files, _ in kinds[1:]
                if files is not None
                for each in files_of(files)
            )
        )
        for kind, files, name in kinds:
            if files is None:
                continue
            found[kind] = [self._dataset(each.file, each.inside or name, kind, left_out) for each in files_of(files)]
        if self.required and place.targets is None:
            raise UserError(f"{self.called}: has no targets; expected {{inputs = ..., targets = ...}}")
        counts = {kind: len(datasets) for kind, datasets in found.items()}
        if len(set(counts.values())) > 1:
            raise UserError(
                f"{self.called}: "
                + ", ".join(f"{count} files of {kind}" for kind, count in counts.items())
                + "; expected as many of each, in the same order"
            )
        several = range(counts["inputs"])
        none: list[Dataset | None] = [None for _ in several]
        answers, weights = found.get("targets", none), found.get("weights", none)
        if reading.weights is None:
            weights = none
        parts = []
        for number in several:
            inputs = found["inputs"][number]
            assert inputs is not None
            parts.append(FileParts((inputs,), answers[number], weights[number]))
        return tuple(parts)

    def _dataset(self, path: Path, name: str, kind: str, left_out: frozenset[str] = frozenset()) -> Dataset:
        file, setting = self._file(path), _SETTINGS[kind]
        if isinstance(file, NpzArchive):
            return file.find(name, setting)
        if file is None:
            return npy_dataset(path, name)
        return find(path, file, name, setting, leave_out=left_out, memory_bytes=self._memory_bytes)

    def _holds(self, path: Path, name: str) -> bool:
        file = self._file(path)
        if file is None:
            return False
        return file.holds(name) if isinstance(file, NpzArchive) else holds(path, file, name)

    def _homes(self, within: Within, names: list[str]) -> frozenset[str]:
        file = self._file(within.file)
        if not isinstance(file, h5py.File):
            return frozenset()
        return frozenset(found for name in names if (found := home(within.file, file, name)))

    def _check_whole(self, within: Within) -> None:
        """Refuse an array alone where targets are needed."""
        if self._file(within.file) is None and self.required:
            raise UserError(
                f"{within.file}: is one array, without targets; expected two: "
                f'{{inputs = "{within.file.name}", targets = "..."}}'
            )

    def _file(self, path: Path) -> Any:
        """Return a file: of HDF5, an archive of NPZ, or None for an array of NPY."""
        if path not in self._open:
            begin = b""
            with contextlib.suppress(OSError), path.open("rb") as raw:
                begin = raw.read(_MAGIC)
            if begin.startswith(NPY_MAGIC):
                self._open[path] = None
            elif begin.startswith(ZIP_MAGIC):
                self._open[path] = NpzArchive(path, self._memory_bytes)
            else:
                file = hdf5.open_file(path, self._cache_bytes, begin)
                self._open[path] = file
                hdf5.check_version(path, file)
        return self._open[path]

    def _compressed(self) -> bool:
        for dataset in self.datasets.values():
            for part in dataset.parts:
                with part.damage():
                    if part.values.id.get_create_plist().get_nfilters():
                        return True
        return False

    def _reopen_with_cache(self) -> None:
        """Open the files again with a chunk cache, so that a chunk is not unpacked for every row."""
        features = 0
        for dataset in self.datasets.values():
            shape = dataset.values.shape or (0,)
            features += hdf5.product(shape)
        parts = [part for dataset in self.datasets.values() for part in dataset.parts]
        if all(part.scattered for part in parts):  # without HDF5
            return
        whole = BLOCKS_CACHE if features * 4 <= self._memory_bytes else self._memory_bytes // 2
        self.close()
        self._cache_bytes = max(whole // max(len(self.parts), 1), min(_LEAST_CACHE, whole))
        self.parts = self._found()


def _joined(inside: str, name: str) -> str:
    """Return a name within a group of the file; one that begins at the root stays what it is."""
    return f"{inside.rstrip('/')}/{name}" if inside and not name.startswith("/") else name
