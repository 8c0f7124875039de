"""The section of the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dbmpi.config.layers import OWN
from dbmpi.config.values import Count, DatasetName, Section
from dbmpi.errors import UserError


class DataSection(Section):
    """What to learn from: HDF5 files made by ``dbmpi data import`` or by your own program."""

    train: Path | None = None
    """HDF5 file with the training samples; required, unless a program gives arrays to ``dbmpi.train``."""
    test: Path | None = None
    """HDF5 file with the held-out samples, for the accuracy that is reported."""
    memory_mib: Count = 4096
    """A file up to this size (MiB, as float32) is kept in each worker's memory; a larger one is read batch by batch."""
    inputs: DatasetName | Annotated[tuple[DatasetName, ...], Field(min_length=1)] = "inputs"
    """Name of the dataset with the inputs in both files, e.g. ``X`` or ``/entry/data/x``; for an objective of your own
    also several, which it gets as a dictionary."""
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
        return "the data given to dbmpi.train" if self.train is None else str(self.train)

    @property
    def training_file(self) -> Path:
        """The file with the training samples; UserError where there is none."""
        if self.train is None:
            raise UserError("'data.train' is missing: HDF5 file with the training samples")
        return self.train
