"""The section of the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dbmpi.config.layers import OWN
from dbmpi.config.values import Count, DatasetName, PossiblePath, Section
from dbmpi.errors import UserError

Files = Path | Annotated[tuple[Path, ...], Field(min_length=1)]
"""A file or a pattern, or several; each with a path within it if wanted."""


class DataParts(Section):
    """Inputs and targets that are in files of their own, e.g. ``{inputs = "x.npy", targets = "data.h5:/y"}``."""

    inputs: Files
    """File with the inputs, and if it holds more, the path within it: ``images.h5:/entry/x``."""
    targets: Files | None = None
    """Likewise the targets."""
    weights: Files | None = None
    """Likewise the weight of each sample, if samples are weighted."""


DataPlace = Files | DataParts
"""Where samples are."""


class DataSection(Section):
    """What to learn from: HDF5 files made by ``dbmpi data import``, by your own program or by others; also NPY, NPZ."""

    train: DataPlace | None = None
    """File with the training samples; required, unless a program gives arrays to ``dbmpi.train``.  Also a list or a
    pattern (``part-*.h5``) of files, a group of one (``all.h5:/train``), or ``{inputs = "x.npy", targets = "y.npy"}``.
    """
    test: DataPlace | None = None
    """Likewise the held-out samples, for the accuracy that is reported."""
    memory_mib: Count = 4096
    """A file up to this size (MiB, as float32) may be kept in each worker's memory."""
    keep: Literal["auto", "memory", "file"] = "auto"
    """``memory``: in each worker's memory; ``file``: rows are read when they are needed; ``auto``: in memory if that is
    64 MiB at most, or rows cannot be read one by one."""
    copy_to: PossiblePath | None = None
    """Directory on each host's own disk, e.g. ``/tmp``, into which files are copied before they are opened; a copy
    that is there already is used."""
    shuffle: Literal["auto", "samples"] | Count = "auto"
    """``samples``: an epoch is a permutation of all samples; a number: of blocks of so many samples that lie together,
    of which some 32 MiB are mixed; ``auto``: of the chunks of a compressed file that is not kept in memory."""
    inputs: DatasetName | Annotated[tuple[DatasetName, ...], Field(min_length=1)] = "inputs"
    """Name of the dataset with the inputs in both files, e.g. ``X``, ``/entry/data/x``, or ``table/column``.  Of
    several, a network gets the features in this order, and an objective of your own a dictionary."""
    targets: DatasetName = "targets"
    """Name of the dataset with the targets."""
    weights: DatasetName | None = None
    """Name of a dataset with a weight for each training sample: the loss that is learned is the weighted mean."""
    channels: Literal["first", "last"] = "first"
    """Where the channels of an image are in the file: ``last`` takes (rows, columns, channels) for (channels, rows,
    columns)."""
    missing: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Value to use where an input is NaN or marked as missing; by default such data are refused."""

    transform: Annotated[str, Field(pattern=f"^{OWN}$", max_length=200)] | None = None
    """``module:function`` of your own that changes every batch that is learned from, e.g. at random (see
    from-python.md); the module is looked for as those of own layers are."""

    @property
    def called(self) -> str:
        """What messages call the training data."""
        if self.train is None:
            return "the data given to dbmpi.train"
        first = self.train.inputs if isinstance(self.train, DataParts) else self.train
        return " ... ".join(str(file) for file in (first[0], first[-1])) if isinstance(first, tuple) else str(first)

    @property
    def training_file(self) -> DataPlace:
        """Where the training samples are; UserError where that is not said."""
        if self.train is None:
            raise UserError("'data.train' is missing: HDF5 file with the training samples")
        return self.train
