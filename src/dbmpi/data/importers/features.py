"""Columns of a table as inputs: numbers, gaps in them, and texts that become one-hot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dbmpi.checkpoint.untrusted import attribute, damage
from dbmpi.data import hdf5
from dbmpi.data.attributes import INPUT_NAMES
from dbmpi.data.hdf5 import decoded
from dbmpi.data.writer import DataWriter, Where
from dbmpi.errors import UserError

Gaps = Literal["refuse", "drop", "mean"] | float
"""What to do where a number is missing: refuse the table, leave the line out, or take the mean or a number."""
MOST_CATEGORIES = 1000
"""Of one column: more are names, not categories."""
OTHER = "="
"""Between the name of a column and a category, in the name of an input."""
GAP_WORDS = ("", "na", "n/a", "nan", "null", "none", "nil", "missing", "?", "-", ".")
"""What tables hold, in any case, where there is no value."""
FILL = "fill"
"""Attribute of a data file: the numbers taken where inputs were missing."""


@dataclass
class Features:
    """What becomes of the columns of the inputs.

    Parameters
    ----------
    path
        Of the table, for messages.
    names
        Of the columns.
    one_hot
        Which of them hold categories.
    gaps
        What to do where a number is missing.
    """

    path: Path
    names: Sequence[str]
    one_hot: Sequence[bool]
    gaps: Gaps = "refuse"
    categories: list[dict[str, int]] = field(default_factory=list)
    """Of each column, numbered; empty for numbers."""
    fill: np.ndarray = field(default_factory=lambda: np.empty(0))
    """Number to take where one is missing, float64 ``(columns,)``."""

    def __post_init__(self) -> None:
        self._sums, self._counts = np.zeros(len(self.names)), np.zeros(len(self.names))
        self._fixed = bool(self.categories)
        if not self._fixed:
            self.categories = [{} for _ in self.names]

    @property
    def needs_measuring(self) -> bool:
        """Whether all of the table has to be read before the first sample can be written."""
        return not self._fixed and (any(self.one_hot) or self.gaps == "mean")

    def measure(self, columns: Sequence[np.ndarray]) -> None:
        """Note the categories and means of some rows: `columns` of float64, or of texts."""
        for number, column in enumerate(columns):
            if not self.one_hot[number]:
                there = np.isfinite(column)
                self._sums[number] += column[there].sum()
                self._counts[number] += there.sum()
                continue
            known = self.categories[number]
            for text in dict.fromkeys(column.tolist()):
                known.setdefault(text, len(known))
            if len(known) > MOST_CATEGORIES:
                raise UserError(
                    f"{self.path}: column {self.names[number]!r} holds more than {MOST_CATEGORIES} different texts; "
                    f"expected categories: leave it out with --drop {self.names[number]}"
                )

    def conclude(self) -> None:
        """Bring the categories in order, and compute the means."""
        if not self._fixed:
            self.categories = [{text: code for code, text in enumerate(sorted(known))} for known in self.categories]
            number = self.gaps if isinstance(self.gaps, float) else math.nan
            means = np.divide(self._sums, self._counts, out=np.full(len(self.names), np.nan), where=self._counts > 0)
            self.fill = means if self.gaps == "mean" else np.full(len(self.names), number)

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs."""
        found = []
        for name, known, texts in zip(self.names, self.categories, self.one_hot, strict=True):
            found += [f"{name}{OTHER}{text}" for text in known] if texts else [name]
        return found

    def encoded(self, columns: Sequence[np.ndarray], where: Where) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs, float64 ``(rows, inputs)``, and which rows are kept, bool ``(rows,)``.

        Parameters
        ----------
        columns
            float64 with NaN where a number is missing, or texts.
        where
            Says where a row comes from.

        Raises
        ------
        UserError
            If a number is missing and there is none to take instead, or a category is unknown.
        """
        rows = len(columns[0])
        kept, parts = np.ones(rows, bool), []
        for number, column in enumerate(columns):
            if self.one_hot[number]:
                known = self.categories[number]
                codes = np.array([known.get(text, -1) for text in column.tolist()], np.int64)
                if (codes < 0).any():
                    row = int(np.flatnonzero(codes < 0)[0])
                    raise UserError(
                        f"{self.path}: {where(row)}: {column[row]!r} in column {self.names[number]!r} does not occur "
                        f"in the training file; expected one of {', '.join(map(repr, [*known][:6]))}"
                    )
                parts.append(np.eye(len(known))[codes])
                continue
            missing = np.isnan(column)
            if missing.any():
                if self.gaps == "drop":
                    kept &= ~missing
                elif self.gaps == "refuse" or np.isnan(self.fill[number]):
                    row = int(np.flatnonzero(missing)[0])
                    raise UserError(
                        f"{self.path}: {where(row)}: a value is missing in column {self.names[number]!r}; say --gaps "
                        f"mean, drop or a number, or leave the column out with --drop {self.names[number]}"
                    )
                column = np.where(missing, self.fill[number], column)  # noqa: PLW2901
            parts.append(column[:, None])
        return np.concatenate(parts, axis=1), kept

    def record(self, writer: DataWriter, target_names: Sequence[str]) -> None:
        """Store by a `writer` the names of the inputs, the `target_names`, and what was taken for gaps."""
        writer.name_columns(self.input_names, target_names)
        if not np.isnan(self.fill).all():
            writer.annotate({FILL: self.fill})


def like(path: Path, features: Features) -> Features:
    """Return the features with the categories and the numbers for gaps of the training file at `path`.

    Raises
    ------
    UserError
        If that does not have the same columns.
    """
    with hdf5.open_file(path) as file, damage(path, "what it says of its inputs"):
        dataset = file.get(INPUT_NAMES)
        names = [decoded(name) for name in dataset[()]] if dataset is not None and dataset.size < 1 << 20 else []
        fill = attribute(file, FILL)
    categories: list[dict[str, int]] = []
    expected: list[str] = []
    for name, texts in zip(features.names, features.one_hot, strict=True):
        known = [each[len(name) + 1 :] for each in names if texts and each.startswith(f"{name}{OTHER}")]
        categories.append({text: code for code, text in enumerate(known)})
        expected += [f"{name}{OTHER}{text}" for text in known] if texts else [name]
    if expected != names:
        raise UserError(
            f"{path}: has the inputs {', '.join(names[:6])} ..., but {features.path} has the columns "
            f"{', '.join(features.names[:6])} ...; expected the file of a table with the same columns"
        )
    numbers = np.full(len(features.names), np.nan) if fill is None else np.asarray(fill, np.float64)
    if isinstance(features.gaps, float):
        numbers = np.full(len(features.names), features.gaps)
    gaps: Gaps = "mean" if fill is not None and features.gaps == "refuse" else features.gaps
    return Features(features.path, features.names, features.one_hot, gaps, categories, numbers)


def filled(path: Path) -> bool:
    """Return whether gaps were filled in the data file at `path`."""
    with hdf5.open_file(path) as file, damage(path, "what it says of its inputs"):
        return attribute(file, FILL) is not None
