"""Delay compensation: a stale gradient is moved towards what it would be at the present parameters.

Zheng et al., "Asynchronous stochastic gradient descent with delay compensation", ICML 2017 (DC-ASGD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.kernels import updates
from dbmpi.paramserver.schedule import Moment

if TYPE_CHECKING:
    from dbmpi.config import OptimizerSection
    from dbmpi.paramserver.rules import Rule

MEAN_SQUARE = "delay_mean_square"
"""Name of the state that adaptive compensation has."""
_FIRST = Moment()
_BLOCK = 1 << 17
"""Elements that are compensated at a time, so that the memory for it is bounded and stays in the cache."""


@dataclass(frozen=True)
class DelayCompensated:
    """A rule that gets compensated gradients.

    A gradient g was computed at parameters v, and is applied to parameters w, which others have changed meanwhile.
    The rule gets::

        g + factor * g * g * (w - v)

    Here ``g * g`` stands for the diagonal of the Hessian (equation 10).  If it is adaptive, the factor is
    ``factor / sqrt(s + 1e-7)`` with a running mean s of ``g * g``, of which the fraction `beta` stays in each update
    (section 5).  Where w and v are equal, g keeps its bits.
    """

    rule: Rule
    factor: float
    beta: float | None = None
    """None for a constant factor."""

    @classmethod
    def from_config(cls, rule: Rule, section: OptimizerSection) -> Rule:
        """Return a rule with the compensation that the ``[optimizer]`` section describes, or as it is without.

        Parameters
        ----------
        rule
            The rule.
        section
            The section.
        """
        if section.delay_compensation == "none":
            return rule
        beta = section.compensation_beta if section.delay_compensation == "adaptive" else None
        return cls(rule, section.compensation_factor, beta)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the arrays in the state."""
        return self.rule.state_names if self.beta is None else (*self.rule.state_names, MEAN_SQUARE)

    def init(self, parameters: np.ndarray) -> dict[str, np.ndarray]:
        """Return the state of the rule for `parameters` (n,), and the mean of squares, if it is adaptive."""
        state = self.rule.init(parameters)
        return state if self.beta is None else {**state, MEAN_SQUARE: np.zeros_like(parameters)}

    def apply(
        self, parameters: np.ndarray, gradient: np.ndarray, state: dict[str, np.ndarray], moment: Moment = _FIRST
    ) -> None:
        """Take one step, in place, by a gradient that is not stale.

        Parameters
        ----------
        parameters, gradient : (n,) arrays
            As for all rules.
        state, moment
            As for all rules.
        """
        self.apply_delayed(parameters, gradient, parameters, state, moment)

    def apply_delayed(
        self,
        parameters: np.ndarray,
        gradient: np.ndarray,
        fetched: np.ndarray,
        state: dict[str, np.ndarray],
        moment: Moment = _FIRST,
    ) -> None:
        """Take one step, in place.

        Parameters
        ----------
        parameters, gradient, fetched : (n,) arrays
            Of one dtype: what is updated, the gradient, and the parameters that this was computed at.  The latter two
            belong to a worker, and stay as they are.
        state
            The arrays of :meth:`init`, (n,) each.
        moment
            When.
        """
        space = np.empty(min(_BLOCK, parameters.size), parameters.dtype)
        for start in range(0, parameters.size, _BLOCK):
            block = slice(start, min(start + _BLOCK, parameters.size))
            w, g, v, out = parameters[block], gradient[block], fetched[block], space[: block.stop - start]
            if self.beta is None:
                updates.compensate(out, g, w, v, self.factor)
            else:
                updates.compensate_adaptively(out, g, w, v, state[MEAN_SQUARE][block], self.factor, self.beta)
            self.rule.apply(w, out, {name: array[block] for name, array in state.items()}, moment)
