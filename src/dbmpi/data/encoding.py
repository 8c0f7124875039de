"""What is done to inputs when a batch is made of them: standardised, or integers turned into one-hot vectors.

A file keeps inputs as they were measured, and says in attributes of their dataset what a network is to get:
``(value - subtract) / divide``, or for integers 0 ... n - 1 vectors of n numbers, which are 0 but for a 1.  A
checkpoint remembers that, so that the same is done to whatever is given to the network later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbmpi.checkpoint.meaning import Meaning
from dbmpi.data.hdf5 import Dataset
from dbmpi.errors import UserError

MOST_CATEGORIES = 1 << 16


@dataclass(frozen=True)
class Encoding:
    """What is done to inputs; nothing by default."""

    subtract: tuple[float, ...] = ()
    """Subtracted from the inputs: one number, one for each channel (first axis of a sample), or one for each input."""
    divide: tuple[float, ...] = ()
    """What they are divided by after that, as many."""
    one_hot: int = 0
    """Length of the vector that an integer stands for; 0: none."""

    @classmethod
    def of(cls, dataset: Dataset) -> Encoding:
        """Return what the attributes of a `dataset` say.

        Raises
        ------
        UserError
            If they are no finite numbers, or contradict one another.
        """
        subtract, divide = _numbers(dataset, "subtract"), _numbers(dataset, "divide")
        if len(subtract) != len(divide) or 0.0 in divide:
            raise dataset.error(
                f"has {len(subtract)} numbers in the attribute 'subtract' and {len(divide)} in 'divide'; expected as "
                "many, and none to divide by that is 0: make them with 'dbmpi data normalize'"
            )
        length = dataset.number("one_hot", 0)
        if length != int(length) or (length and not 2 <= length <= MOST_CATEGORIES):
            raise dataset.wrong("one_hot", length, f"a whole number from 2 to {MOST_CATEGORIES}")
        return cls(subtract, divide, int(length))

    @classmethod
    def learned(cls, meaning: Meaning | None) -> Encoding:
        """Return what was done to the inputs that a network has learned from, by the `meaning` in its checkpoint."""
        return cls() if meaning is None else cls(meaning.subtract, meaning.divide, meaning.one_hot)

    @property
    def declared(self) -> dict[str, Any]:
        """Fields of :class:`Meaning`, by name."""
        fields = {"subtract": self.subtract, "divide": self.divide, "one_hot": self.one_hot}
        return {name: value for name, value in fields.items() if value}

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a `sample` once it is encoded."""
        return (*sample, self.one_hot) if self.one_hot else sample

    def check(self, called: str, sample: tuple[int, ...]) -> None:
        """Raise UserError, of the data `called` so, unless there are as many numbers as a `sample` needs."""
        fitting = {1, math.prod(sample), sample[0] if sample else 1}
        if self.subtract and len(self.subtract) not in fitting:
            raise UserError(
                f"{called}: is normalised by {len(self.subtract)} numbers, but its samples have shape {sample}; "
                f"expected {' or '.join(map(str, sorted(fitting)))}: normalise it anew with 'dbmpi data normalize'"
            )

    def encoded(self, inputs: np.ndarray, called: str, sample: tuple[int, ...]) -> np.ndarray:
        """Return inputs as a network gets them.

        Parameters
        ----------
        inputs
            float32 ``(features, samples)``; changed in place where that is possible.
        called
            For messages.
        sample
            Shape of a sample before.

        Raises
        ------
        UserError
            If a number is to become a vector and is none of 0 ... `one_hot` - 1.
        """
        if self.subtract:
            subtract, factor = self.moves(sample)
            inputs -= subtract[:, None]
            inputs *= factor[:, None]
        if not self.one_hot:
            return inputs
        features, samples = inputs.shape
        tokens = inputs.astype(np.int64)
        if inputs.size and not (0 <= tokens.min() <= tokens.max() < self.one_hot and (tokens == inputs).all()):
            raise UserError(
                f"{called}: its inputs go from {inputs.min():g} to {inputs.max():g}; expected whole numbers from 0 to "
                f"{self.one_hot - 1}, which stand for one-hot vectors"
            )
        found = np.zeros((features, self.one_hot, samples), np.float32)
        np.put_along_axis(found, tokens[:, None, :], 1, axis=1)
        return found.reshape(-1, samples)

    def standardised(self, rows: np.ndarray) -> np.ndarray:
        """Return `rows` of inputs ``(samples, features ...)`` for a user's own objective; integers stay integers."""
        if not self.subtract:
            return rows
        flat = np.ascontiguousarray(rows.reshape(len(rows), -1).T, np.float32)
        once = Encoding(self.subtract, self.divide)
        return np.ascontiguousarray(once.encoded(flat, "", rows.shape[1:]).T).reshape(rows.shape)

    def moves(self, sample: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return what is subtracted from each input of a `sample`, and by what it is multiplied then, float32."""
        factor = 1 / self._spread(self.divide, sample).astype(np.float64)
        return self._spread(self.subtract, sample), factor.astype(np.float32)

    @staticmethod
    def _spread(numbers: tuple[float, ...], sample: tuple[int, ...]) -> np.ndarray:
        """Return a number for each input."""
        each = np.array(numbers, np.float32)
        return each if each.size == math.prod(sample) else np.repeat(each, math.prod(sample) // each.size)


NO_ENCODING = Encoding()
"""Inputs are used as they are."""


def encoding_of(dataset: Dataset | None, learned: Encoding | None, called: str, sample: tuple[int, ...]) -> Encoding:
    """Return what is done to inputs.

    Parameters
    ----------
    dataset
        The inputs; None where there are several, which are used as they are.
    learned
        What was done to those that a network has learned from; None: as the `dataset` says.
    called
        What messages call the data.
    sample
        Shape of a sample.

    Raises
    ------
    UserError
        If it cannot be done to such samples.
    """
    if dataset is None:
        return NO_ENCODING
    found = Encoding.of(dataset) if learned is None else learned
    found.check(called, sample)
    return found


def _numbers(dataset: Dataset, key: str) -> tuple[float, ...]:
    value = dataset.attribute(key)
    array = np.asarray(() if value is None else value)
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise dataset.wrong(key, value, "finite numbers")
    return tuple(array.reshape(-1).tolist())
