"""Update rules of a user's own: from ``module:function`` in a configuration to a rule that a shard applies.

The function is compiled by Numba and updates its arrays in place::

    function(parameters, gradient, rate, update, STATE..., SETTING=default...)

Its arguments say what state it needs: each one without a default is an array of zeros at first, as long as the
parameters, which is kept under that name in checkpoints.  Those with defaults are numbers, which
``optimizer.settings`` may replace.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np

from dbmpi.errors import UserError
from dbmpi.network import own
from dbmpi.paramserver.schedule import Moment, Schedule

_GIVEN = ("parameters", "gradient", "rate", "update")
_EXPECTED = f"expected a function ({', '.join(_GIVEN)}, then names of its state, then numbers with defaults)"
_FIRST = Moment()


@dataclass(frozen=True)
class OwnRule:
    """A rule that a user has written."""

    where: str
    """The setting that names it, for messages."""
    function: Callable[..., Any]
    """Compiled."""
    state_names: tuple[str, ...]
    settings: Mapping[str, float]
    """Value of each setting, in the order of the function's arguments."""
    learning_rate: float
    schedule: Schedule = field(default_factory=Schedule)

    @classmethod
    def load(
        cls, name: str, settings: Mapping[str, float], learning_rate: float, schedule: Schedule, directory: Path | None
    ) -> OwnRule:
        """Return the rule of this name.

        Parameters
        ----------
        name
            ``module:function``.
        settings
            What replaces defaults of the function.
        learning_rate, schedule
            The function's `rate` is their product.
        directory
            Where the module is looked for first.

        Raises
        ------
        UserError
            If it is not there, cannot be loaded or compiled, does not take the settings, or is no rule.
        """
        where = f"optimizer.rule = {name!r}"
        function = own.member(name, where, directory)
        # (With NUMBA_DISABLE_JIT the decorator returns the function itself.)
        if not callable(function) or not (hasattr(function, "py_func") or numba.config.DISABLE_JIT):  # type: ignore[attr-defined]
            raise UserError(f"{where}: that is a {type(function).__name__}; {_EXPECTED}, compiled by numba.njit")
        states, defaults = _arguments(function, where)
        unknown = sorted(set(settings) - set(defaults))
        if unknown:
            known = f"has only {', '.join(defaults)}" if defaults else "has no setting"
            raise UserError(f"{where}: optimizer.settings.{unknown[0]}: the function {known}")
        made = cls(where, function, states, {**defaults, **settings}, learning_rate, schedule)
        made._try()
        return made

    def init(self, parameters: np.ndarray) -> dict[str, np.ndarray]:
        """Return arrays of zeros, as long as `parameters`."""
        return {name: np.zeros_like(parameters) for name in self.state_names}

    def apply(
        self, parameters: np.ndarray, gradient: np.ndarray, state: dict[str, np.ndarray], moment: Moment = _FIRST
    ) -> None:
        """Take one step, in place, as all rules do.

        Parameters
        ----------
        parameters, gradient : (n,) arrays
            Of one dtype.
        state
            The rule's arrays.
        moment
            When.
        """
        rate = self.learning_rate * self.schedule(moment)
        arrays = (state[name] for name in self.state_names)
        self.function(parameters, gradient, rate, moment.update, *arrays, *self.settings.values())

    def _try(self) -> None:
        """Apply it to a few numbers, which compiles it, and check what it does."""
        values, gradient = np.ones(3, np.float32), np.full(3, 0.5, np.float32)
        state = self.init(values)
        try:
            self.apply(values, gradient, state)
        except Exception as error:
            text = " ".join(str(error).split())
            raise UserError(f"{self.where}: it fails on arrays of 3: {type(error).__name__}: {text:.400}") from error
        if not np.array_equal(gradient, np.full(3, 0.5, np.float32)):
            raise UserError(f"{self.where}: it changes the gradient, which belongs to a worker; keep it in its state")
        if not all(np.isfinite(array).all() for array in (values, *state.values())):
            found = {name: float(array[0]) for name, array in {"parameters": values, **state}.items()}
            raise UserError(f"{self.where}: the first update of parameters 1 by gradients 0.5 gives {found}")


def _arguments(function: Any, where: str) -> tuple[tuple[str, ...], dict[str, float]]:
    """Return the names of a function's state, and its settings with their defaults."""
    signature = inspect.signature(getattr(function, "py_func", function))
    arguments = list(signature.parameters.values())
    names = tuple(argument.name for argument in arguments)
    if names[: len(_GIVEN)] != _GIVEN or any(a.kind is not a.POSITIONAL_OR_KEYWORD for a in arguments):
        raise UserError(f"{where}: it takes {signature}; {_EXPECTED}")
    others = arguments[len(_GIVEN) :]
    states = tuple(a.name for a in others if a.default is a.empty)
    taken = [name for name in states if re.fullmatch(r"[sy]\d+", name)]
    if taken:
        raise UserError(f"{where}: vectors of L-BFGS have names like {taken[0]!r}: call that state something else")
    defaults = {a.name: a.default for a in others if a.default is not a.empty}
    for name, value in defaults.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{where}: the default of {name} is {value!r}; expected a finite number")
    return states, {name: float(value) for name, value in defaults.items()}
