"""A data file that says by what its inputs are normalised when they are used: its own means and deviations."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import h5py
import numpy as np

from dbmpi.checkpoint.new_file import NewFile
from dbmpi.data.location import split
from dbmpi.data.source import Source
from dbmpi.data.survey import Seen, Survey
from dbmpi.data.writer import check_writable
from dbmpi.errors import UserError

By = Literal["input", "channel", "all"]
MOST_NUMBERS = 15_000
"""Of an attribute: HDF5 allows 64 KiB."""


class Normalization(NamedTuple):
    """What the inputs of a file are normalised by."""

    by: By
    subtract: np.ndarray
    divide: np.ndarray
    constant: int
    """Of these, how many belong to inputs that never vary, which are not divided."""


def measured(source: Source, by: By | None, seen: Seen = lambda done, total: None) -> Normalization:
    """Return means and deviations of the samples to learn from.

    Parameters
    ----------
    source
        These samples alone: those that are tested on must not tell what they are like.
    by
        Whether each input has its own, each channel (first axis of a sample), or all have the same; by default each
        input of samples of one axis, each channel of those of three, and otherwise all.
    seen
        Told how many samples have been read, and of how many.

    Raises
    ------
    UserError
        If inputs are missing, stand for something else than numbers, or there are too many of them.
    """
    shape = source.parts[0].shape[1:]
    if source.encoding.one_hot:
        raise UserError(f"{source.path}: its inputs stand for one-hot vectors; these are not normalised")
    if by is None:
        by = "input" if len(shape) < 2 else "channel" if len(shape) == 3 else "all"
    survey = Survey.of(source, seen)
    if survey.missing:
        raise UserError(
            f"{source.path}: {survey.missing:,} inputs are missing, NaN or infinite; say --missing and the number to "
            "take instead, which data.missing must then be in the configuration, too"
        )
    groups = {"input": survey.moments.mean.size, "channel": shape[0] if shape else 1, "all": 1}[by]
    if groups > MOST_NUMBERS:
        raise UserError(
            f"{source.path}: has {groups:,} inputs; expected at most {MOST_NUMBERS:,} to be normalised each by its own "
            "mean: say --by channel or --by all"
        )
    moments = survey.moments.together(groups)
    constant = moments.deviation == 0
    return Normalization(
        by,
        moments.mean.astype(np.float32),
        np.where(constant, 1.0, moments.deviation).astype(np.float32),
        int(constant.sum()),
    )


def write(path: Path, dataset: str, found: Normalization, out: Path, force: bool) -> None:
    """Write a copy of a data file whose inputs say by what they are normalised; the copy may take its place.

    Parameters
    ----------
    path, dataset
        The file, and the path of its inputs.
    found
        What they are normalised by.
    out
        The copy, which appears when it is whole; `path` to replace the file.
    force
        Replace another file.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    if out != path:
        check_writable(out, force, (path,))
    with NewFile(out, {}, copy_of=path, failure=lambda text, _: UserError(text)) as new:
        with new.writing():
            inputs = new.hdf5[dataset]
            for key, values in (("subtract", found.subtract), ("divide", found.divide)):
                if key in inputs.attrs:
                    del inputs.attrs[key]
                inputs.attrs[key] = values
            inputs.attrs["normalised_by"] = found.by
        new.commit()


def inputs_in_file(source: Source) -> tuple[Path, str]:
    """Return the file and the path of the dataset whose attributes say what is done to the inputs of a `source`.

    Raises
    ------
    UserError
        If they are not one dataset of one HDF5 file.
    """
    dataset = source.parts[0].dataset
    place = source.place
    if not (dataset.stored and isinstance(dataset.values, h5py.Dataset) and isinstance(place, Path)):
        raise UserError(
            f"{source.path}: its inputs are not one dataset of one HDF5 file, whose attributes say what they are "
            "normalised by; import them first, or split the file: 'dbmpi data split' writes such files"
        )
    return split(place).file, str(dataset.values.name)
