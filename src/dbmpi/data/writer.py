"""Writing a data file: in blocks, checked, under a temporary name until it is whole."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbmpi import __version__
from dbmpi.checkpoint.new_file import NewFile
from dbmpi.data import hdf5
from dbmpi.data import labels as data_labels
from dbmpi.data.attributes import INPUT_NAMES, TARGET_NAMES
from dbmpi.data.reading import Label
from dbmpi.data.sparse_writer import SparseInputs
from dbmpi.errors import UserError

CHUNK_BYTES = 256 << 10
"""Chunk of the inputs: large enough to read a file quickly from its beginning to its end."""
TARGET_CHUNK_BYTES = 64 << 10
LARGEST_SAMPLE_BYTES = 256 << 20
"""No sample is larger than this (as float32); what declares more is taken for damaged."""

GROUPS = "groups"
"""Dataset beside `inputs` and `targets`: whose each sample is, as a number; its attribute `labels` names them."""
LARGEST_LABELS_BYTES = 60_000
"""Of an attribute: HDF5 allows 64 KiB."""

Where = Callable[[int], str]
"""From a row of the block that is being written to its position in the original file, e.g. ``"line 17"``."""


@dataclass(frozen=True)
class Origin:
    """Where samples come from, for messages and for the attributes of the data file."""

    importer: str
    inputs: Path | str
    """The file of the inputs, or the name of a data set that is not a file."""
    targets: Path | str
    """The file of the targets; often the same."""


@dataclass(frozen=True)
class Shape:
    """What the samples of a new data file look like."""

    inputs: tuple[int, ...]
    classes: int | None = None
    """Number of classes if it is known; otherwise the largest label plus one."""
    target_size: int | None = None
    """Values of a target, or None for classes."""
    scale: float | None = None
    """For integer inputs the factor to be applied; None for float32 inputs."""
    kind: str = "uint8"
    """Type of integer inputs."""
    one_hot: int = 0
    """Length of the vector that each integer stands for; 0: none."""
    sparse: bool = False
    """Whether float32 inputs are stored without their zeros."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the inputs."""
        return np.dtype(np.float32 if self.scale is None else self.kind)

    def __post_init__(self) -> None:
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"the scale {self.scale} was given; expected a number above 0, e.g. {1 / 255:.6g}")
        if self.classes is not None and not 1 <= self.classes <= hdf5.LARGEST_LABEL + 1:
            raise UserError(f"{self.classes} classes were given; expected a number from 1 to {hdf5.LARGEST_LABEL + 1}")


@dataclass(frozen=True)
class Written:
    """A data file that has been written."""

    path: Path
    samples: int
    shape: Shape
    file_bytes: int
    labels: Sequence[Label] | None = None
    """What the classes are called, where they are not just numbers."""

    def __str__(self) -> str:
        kind = f"{self.shape.dtype}" + (f", one-hot of {self.shape.one_hot}" if self.shape.one_hot else "")
        kind += ", sparse" if self.shape.sparse else ""
        size = self.shape.target_size
        targets = f"{self.shape.classes} classes" if size is None else f"{size} value{'s' * (size > 1)} a sample"
        if self.labels is not None:
            targets += f" (labels {data_labels.some(self.labels)})"
        features = " x ".join(str(length) for length in self.shape.inputs)
        return (
            f"{self.path}: {self.samples} samples of {features} ({kind}), {targets}, {self.file_bytes / 2**20:.1f} MiB"
        )


class DataWriter:
    """A data file in the making, used as a context manager.

    The file appears under its name, whole and on disk, when the context ends without an exception; otherwise nothing
    is left of it.

    Parameters
    ----------
    out
        Name of the data file.
    shape
        What the samples look like.
    origin
        Where they come from.
    force
        Replace an existing file.

    Raises
    ------
    UserError
        If the file exists, cannot be written, or samples are not acceptable.
    """

    written: Written
    """There when the file is whole."""

    def __init__(self, out: Path, shape: Shape, origin: Origin, force: bool = False) -> None:
        self.out = out
        self.shape = shape
        self.origin = origin
        self.samples = 0
        self._force = force
        self._largest_label = -1
        self._digests = [hashlib.sha256(), hashlib.sha256()]
        """Of all inputs and of all targets, as they are stored."""
        self._least_label = hdf5.LARGEST_LABEL
        self._labels: Sequence[Label] | None = None
        self._groups: h5py.Dataset | None = None
        self._group_codes: dict[str, int] = {}
        self._negative = ""
        """Where the first label below 0 is."""

    @property
    def block_rows(self) -> int:
        """Rows of a block of reasonable size; a whole number of chunks."""
        rows = max(1, hdf5.BLOCK_BYTES // (math.prod(self.shape.inputs) * 4))
        return max(rows - rows % self._chunk_rows, 1)

    def __enter__(self) -> DataWriter:
        check_writable(self.out, self._force, (self.origin.inputs, self.origin.targets))
        check_sample_size(self.origin.inputs, self.shape.inputs)
        self._new = NewFile(self.out, {}, failure=lambda text, _: UserError(text))
        with self._new.writing():
            self._inputs: Any = None
            if self.shape.sparse:
                self._inputs = SparseInputs(self._new.hdf5, "inputs", math.prod(self.shape.inputs))
            else:
                self._inputs = self._create("inputs", self.shape.inputs, self.shape.dtype)
            if self.shape.scale is not None:
                self._inputs.attrs["scale"] = self.shape.scale
            if self.shape.one_hot:
                self._inputs.attrs["one_hot"] = self.shape.one_hot
            size = self.shape.target_size
            self._targets = self._create(
                "targets", () if size is None else (size,), np.dtype(np.int32 if size is None else np.float32)
            )
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        with self._new:
            if error is None:
                self._finish()

    def append(
        self, inputs: np.ndarray, targets: np.ndarray, where: Where | None = None, groups: Sequence[str] | None = None
    ) -> None:
        """Write the next samples.

        Parameters
        ----------
        inputs
            uint8 or floating ``(samples, *features)``.
        targets
            Integers ``(samples,)`` or floating ``(samples, outputs)``.
        where
            Says where a row comes from; by default "sample" and its number.
        groups
            Whose each sample is, e.g. the speaker: for all samples of a file or for none.
        """
        where = where or (lambda row: f"sample {self.samples + row}")
        self._check_finite(self.origin.inputs, "inputs", inputs, where)
        if self.shape.target_size is None:
            self._check_labels(targets, where)
        else:
            self._check_finite(self.origin.targets, "targets", targets, where)
        start, self.samples = self.samples, self.samples + len(inputs)
        with self._new.writing():
            pairs = (self._inputs, inputs), (self._targets, targets)
            for (dataset, rows), digest in zip(pairs, self._digests, strict=True):
                stored = np.ascontiguousarray(rows, dataset.dtype)
                dataset.resize(self.samples, axis=0)
                dataset[start:] = stored
                digest.update(stored.data)
            if groups is not None:
                self._append_groups(groups, start)

    def _append_groups(self, groups: Sequence[str], start: int) -> None:
        if self._groups is None:
            self._groups = self._create(GROUPS, (), np.dtype(np.int32))
        codes = [self._group_codes.setdefault(group, len(self._group_codes)) for group in groups]
        self._groups.resize(self.samples, axis=0)
        self._groups[start:] = codes

    def describe_inputs(self, attributes: Mapping[str, object]) -> None:
        """Store attributes of the inputs."""
        with self._new.writing():
            self._inputs.attrs.update(attributes)

    def number_labels(self, labels: Sequence[Label], codes: np.ndarray) -> None:
        """Replace every class c written so far by ``codes[c]``, and record which `labels` the classes stand for."""
        self._renumber(lambda classes: codes[classes])
        self._record(labels)
        self._largest_label = max(int(codes.max(initial=-1)), len(labels) - 1)

    def name_columns(self, inputs: Sequence[str], targets: Sequence[str] = ()) -> None:
        """Store the names of the `inputs`, and of the values of the `targets`."""
        with self._new.writing():
            self._name(INPUT_NAMES, inputs)
            self._name(TARGET_NAMES, targets)

    def _name(self, dataset: str, names: Sequence[str]) -> None:
        texts = [name.encode() for name in names]
        if texts:
            kind = h5py.string_dtype("utf-8", max(1, *map(len, texts)))
            self._new.hdf5.create_dataset(dataset, data=np.array(texts, kind), dtype=kind)

    def annotate(self, attributes: Mapping[str, object]) -> None:
        """Store attributes of the file beside those that every importer writes."""
        with self._new.writing():
            self._new.hdf5.attrs.update(attributes)

    @property
    def _chunk_rows(self) -> int:
        return max(1, CHUNK_BYTES // (math.prod(self.shape.inputs) * self.shape.dtype.itemsize))

    def _create(self, name: str, rest: tuple[int, ...], kind: np.dtype[Any]) -> h5py.Dataset:
        rows = self._chunk_rows if name == "inputs" else max(1, TARGET_CHUNK_BYTES // (4 * math.prod(rest)))
        return self._new.hdf5.create_dataset(name, (0, *rest), kind, maxshape=(None, *rest), chunks=(rows, *rest))

    def _check_finite(self, source: Path | str, name: str, rows: np.ndarray, where: Where) -> None:
        wrong = hdf5.not_finite(rows)
        if len(wrong):
            raise UserError(
                f"{source}: {where(int(wrong[0]))}: the {name} hold NaN, infinity or a number too large for float32; "
                f"expected finite numbers"
            )

    def _check_labels(self, labels: np.ndarray, where: Where) -> None:
        if not len(labels):
            return
        largest = hdf5.LARGEST_LABEL if self.shape.classes is None else self.shape.classes - 1
        # Without a number of classes, -1 may be one of two labels: that is seen at the end.
        least = -1 if self.shape.classes is None else 0
        wrong = np.flatnonzero((labels < least) | (labels > largest))
        if len(wrong):
            row = int(wrong[0])
            raise UserError(
                f"{self.origin.targets}: {where(row)}: the label {labels[row]} is not a class; expected whole numbers "
                f"from 0 to {largest}"
            )
        lowest = int(labels.min())
        if lowest < 0 and not self._negative:
            self._negative = where(int(labels.argmin()))
        self._least_label = min(self._least_label, lowest)
        self._largest_label = max(self._largest_label, int(labels.max()))

    def _number_raw_labels(self) -> None:
        """Give labels that do not begin at 0 the numbers of classes."""
        distinct: set[int] = set()
        with self._new.writing():
            for start in range(0, self.samples, hdf5.BLOCK_BYTES // 4):
                distinct.update(np.unique(self._targets[start : start + hdf5.BLOCK_BYTES // 4]).tolist())
        if len(distinct) > data_labels.MOST_LABELS:
            raise UserError(
                f"{self.origin.targets}: holds {len(distinct)} different labels from {min(distinct)}; expected "
                f"classes; number them from 0"
            )
        try:
            labels = data_labels.numbered(sorted(distinct))
        except ValueError:
            raise UserError(
                f"{self.origin.targets}: {self._negative}: the label -1 is not a class; expected whole numbers from 0; "
                f"if it marks samples without a label, leave them out"
            ) from None
        if labels is not None:
            self._renumber(data_labels.Numbering(labels).codes)
            self._record(labels)
            self._largest_label = len(labels) - 1

    def _renumber(self, classes: Callable[[np.ndarray], np.ndarray]) -> None:
        self._digests[1] = hashlib.sha256()
        with self._new.writing():
            for start in range(0, self.samples, hdf5.BLOCK_BYTES // 4):
                rows = slice(start, start + hdf5.BLOCK_BYTES // 4)
                numbered = classes(self._targets[rows]).astype(self._targets.dtype, copy=False)
                self._targets[rows] = numbered
                self._digests[1].update(numbered.data)

    def _record(self, labels: Sequence[Label]) -> None:
        widest = max((len(label.encode()) if isinstance(label, str) else 8 for label in labels), default=0)
        if len(labels) * widest > LARGEST_LABELS_BYTES:
            raise UserError(
                f"{self.origin.targets}: its {len(labels)} labels take more than {LARGEST_LABELS_BYTES} bytes, which "
                f"cannot be kept; number the classes from 0"
            )
        self._labels = labels

    def _finish(self) -> None:
        if self.samples == 0:
            raise UserError(f"{self.origin.inputs}: holds no samples; expected at least one")
        shape = self.shape
        if shape.target_size is None and shape.classes is None and self._labels is None and self._least_label != 0:
            self._number_raw_labels()
        with self._new.writing():
            if shape.target_size is None:
                classes = shape.classes or self._largest_label + 1
                shape = replace(shape, classes=classes)
                self._targets.attrs["classes"] = classes
                if self._labels is not None:
                    text = isinstance(self._labels[0], str)
                    encoded = [str(label).encode() for label in self._labels] if text else self._labels
                    self._targets.attrs["labels"] = np.array(encoded, None if text else np.int64)
            names = [name.encode() for name in self._group_codes]
            if self._groups is not None and len(names) * max(map(len, names)) <= LARGEST_LABELS_BYTES:
                self._groups.attrs["labels"] = np.array(names)
            sources = dict.fromkeys(Path(source).name for source in (self.origin.inputs, self.origin.targets))
            self._new.hdf5.attrs.update(
                format=hdf5.FORMAT,
                format_version=hdf5.FORMAT_VERSION,
                importer=self.origin.importer,
                importer_version=__version__,
                digest=f"sha256:{self._digest()}",
            )
            self._new.hdf5.attrs.create("sources", list(sources), dtype=h5py.string_dtype())
        # Another program may have written the file in the meantime.
        self._new.commit(lambda: check_writable(self.out, self._force))
        self.written = Written(self.out, self.samples, shape, self.out.stat().st_size, self._labels)

    def _digest(self) -> str:
        parts = [digest.hexdigest() for digest in self._digests]
        return hashlib.sha256(f"{self.shape.inputs} {' '.join(parts)}".encode()).hexdigest()


def check_writable(out: Path, force: bool, sources: Sequence[Path | str] = ()) -> None:
    """Raise UserError if a data file `out` cannot be written, is one of the `sources`, or exists, unless by `force`."""
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}; make it first")
    if out.is_dir():
        raise UserError(f"{out}: is a directory; expected the name of a file to write")
    if out.exists():
        for source in sources:
            if isinstance(source, Path) and source.exists() and out.samefile(source):
                raise UserError(f"{out}: is the file to be imported; give another name with --out")
        if not force:
            raise UserError(f"{out}: exists already; remove it, give another name, or say --force to replace it")


def check_sample_size(source: Path | str, input_shape: tuple[int, ...]) -> None:
    """Raise UserError if one sample of `input_shape`, from `source`, is impossibly large, or empty."""
    features = math.prod(input_shape)
    if features < 1:
        raise UserError(f"{source}: samples of shape {input_shape} have no inputs; expected at least one")
    if features * 4 > LARGEST_SAMPLE_BYTES:
        raise UserError(
            f"{source}: one sample of shape {input_shape} would take {features * 4 / 2**20:.0f} MiB; expected at most "
            f"{LARGEST_SAMPLE_BYTES >> 20} MiB"
        )
