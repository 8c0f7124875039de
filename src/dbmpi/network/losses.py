"""The loss on top of a network: from the last layer's outputs to a number, a gradient and predictions."""

from __future__ import annotations

from typing import Literal

import numpy as np

from dbmpi.errors import UserError
from dbmpi.kernels import losses

Targets = Literal["classes", "values"]


class Loss:
    """One of the losses of a configuration, for classes or for values.

    Parameters
    ----------
    name : "softmax", "logistic" or "squared"
    targets : "classes" or "values"

    Raises
    ------
    UserError
        If the loss is not defined for such targets.
    """

    def __init__(self, name: str, targets: Targets) -> None:
        if name == "softmax" and targets == "values":
            raise UserError(
                "network.loss = 'softmax' needs classes, but the data have values as targets; use 'logistic' for "
                "several labels of 0 and 1 a sample, or 'squared' for other values"
            )
        self.name, self.targets = name, targets

    def apply(self, values: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, int]:
        """Return the sum of the losses and the number of correct samples (-1 for values).

        Parameters
        ----------
        values : (outputs, samples) array
            Outputs of the last layer; becomes the gradient of the mean loss.
        targets : array
            int32 (samples,) of classes, or (outputs, samples) of the dtype of `values`.
        weights : (samples,) array, optional
            Factor of each sample's loss, of the dtype of `values`; it does not change the count of correct samples.
        """
        if weights is None:
            weights = np.ones(values.shape[1], values.dtype)
        if self.targets == "classes":
            by_classes = {
                "softmax": losses.softmax_cross_entropy,
                "logistic": losses.logistic_classes,
                "squared": losses.squared_classes,
            }
            loss, correct = by_classes[self.name](values, targets, weights)
            return float(loss), int(correct)
        by_values = {"logistic": losses.logistic_values, "squared": losses.squared_values}
        return float(by_values[self.name](values, targets, weights)), -1

    @property
    def predicts(self) -> tuple[str, str]:
        """What :meth:`predict` gives: in a word, and in a sentence for people."""
        if self.name == "softmax":
            return "probabilities", "probability of each class; those of a sample add up to 1 (softmax)"
        if self.name == "logistic":
            what = "class" if self.targets == "classes" else "value"
            return "independent probabilities", f"probability of each {what} for itself (logistic function)"
        if self.targets == "classes":
            return "scores", "score of each class, 1 for it and 0 for the others as learned; no probability"
        return "values", "estimate of each value of the target"

    def predict(self, values: np.ndarray) -> None:
        """Turn `values`, the last layer's outputs (outputs, samples), into predictions in place.

        Predictions are probabilities; with the loss ``squared``, the outputs themselves.

        All probabilities of a sample are NaN where one of its outputs is, or the largest one is infinite.
        """
        if self.name not in ("softmax", "logistic"):
            return
        broken = ~np.isfinite(values.max(axis=0))
        if self.name == "softmax":
            losses.softmax(values)
        else:
            losses.logistic(values)
        values[:, broken] = np.nan
