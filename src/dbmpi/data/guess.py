"""What a loss is worth: that of always giving the same answer, the best one there is."""

from __future__ import annotations

import math

import numpy as np

from dbmpi.data.source import Source


def loss_of_guessing(source: Source, loss: str) -> float:
    """Return the mean `loss` of the best answer that ignores the inputs of a `source`; NaN where it has no targets.

    With the frequencies p_c of the classes: ``-sum p_c log p_c`` for softmax, ``sum h(p_c)`` with ``h(p) = -p log p -
    (1 - p) log(1 - p)`` for logistic, and ``1/2 sum p_c (1 - p_c)`` for squared; with values, h of their means, or half
    the sum of their variances.
    """
    if not source.has_targets or loss == "reconstruction":
        return math.nan
    size = source.classes if source.target_size is None else source.target_size
    assert size is not None
    count, sums, squares = 0.0, np.zeros(size), np.zeros(size)
    shift: np.ndarray | None = None
    for targets, weights in source.answers():
        count += float(weights.sum())
        if source.target_size is None:
            sums += np.bincount(targets, weights, minlength=size)
            continue
        values = targets.astype(np.float64)
        shift = values[0].copy() if shift is None else shift  # so that nothing large cancels
        values -= shift
        sums += weights @ values
        squares += weights @ (values * values)
    means = sums / count
    if source.target_size is None:
        if loss == "softmax":
            return float(-(means * _log(means)).sum())
        return float(_entropies(means).sum() if loss == "logistic" else (means * (1 - means)).sum() / 2)
    if loss == "logistic":
        assert shift is not None
        return float(_entropies(means + shift).sum())
    return float(np.maximum(squares / count - means * means, 0).sum() / 2)


def _entropies(means: np.ndarray) -> np.ndarray:
    means = np.clip(means, 0, 1)
    return -(means * _log(means) + (1 - means) * _log(1 - means))  # type: ignore[no-any-return]


def _log(values: np.ndarray) -> np.ndarray:
    """Return the logarithm, and 0 for 0, by which it is multiplied."""
    return np.log(np.where(values > 0, values, 1.0))
