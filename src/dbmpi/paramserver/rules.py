"""Rules are values: how a shard turns a gradient into new parameters.

A rule is a pair of functions, ``init`` and ``apply``, and its state is a dict of named arrays as long as the
parameters, so that it is cut, saved and restored like them.  The same rule serves one process and any number of shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dbmpi.kernels import updates

if TYPE_CHECKING:
    from dbmpi.config import OptimizerSection

State = dict[str, np.ndarray]


class Rule(Protocol):
    """An update rule, element by element."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the arrays in the state."""
        ...

    def init(self, parameters: np.ndarray) -> State:
        """Return the state before the first update, for a flat array of parameters."""
        ...

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State) -> None:
        """Update `parameters` and `state` in place by a `gradient`; all arrays are flat and equally long."""
        ...


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent: ``w <- w - learning_rate * dw``."""

    learning_rate: float
    state_names = ()

    def init(self, parameters: np.ndarray) -> State:
        """Return an empty state, for any `parameters`."""
        return {}

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State) -> None:
        """Update `parameters` by one step along the `gradient`; the `state` is empty."""
        updates.sgd(parameters, gradient, self.learning_rate)


@dataclass(frozen=True)
class Adagrad:
    """Adagrad as the paper states it (section 4.1), computed wholly on the shard.

    Per parameter i at its K-th update::

        eta_{i,K} = learning_rate / (sqrt(initial_accumulator + sum_{j=1..K} dw_{i,j}^2) + epsilon)
        w_i      <- w_i - eta_{i,K} * dw_{i,K}

    The sum includes the current gradient.  The paper has neither `initial_accumulator` nor `epsilon`; with 0 and
    1e-10, the defaults, the first step is its ``learning_rate * sign(dw)``, and 0 where the gradient is 0 (the
    paper's formula is 0/0 there), also with an `epsilon` of 0.  Gradients may have any size that float32 holds;
    :mod:`dbmpi.kernels.updates` explains how their squares are stored.
    """

    learning_rate: float
    initial_accumulator: float = 0.0
    epsilon: float = 1e-10
    state_names = ("accumulator",)

    def init(self, parameters: np.ndarray) -> State:
        """Return the sums of squared gradients, as long as `parameters`, before the first gradient."""
        return {"accumulator": np.full_like(parameters, self.initial_accumulator)}

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State) -> None:
        """Add the squared `gradient` to the sums in `state`, and update `parameters` by one step."""
        updates.adagrad(parameters, gradient, state["accumulator"], self.learning_rate, self.epsilon)


def rule(section: OptimizerSection) -> Rule:
    """Return the rule that the ``[optimizer]`` section describes."""
    if section.rule == "sgd":
        return Sgd(section.learning_rate)
    return Adagrad(section.learning_rate, section.initial_accumulator, section.epsilon)
