"""Rules are values: how a shard turns a gradient into new parameters.

A rule is a pair of functions, ``init`` and ``apply``, and its state is a dict of named arrays as long as the
parameters, so that it is cut, saved and restored like them.  The same rule serves one process and any number of shards.
Where it depends on the course of the run, by a schedule or a bias correction, the shard passes the :class:`Moment`.

A `weight_decay` of d is coupled, as an L2 term of the loss: ``gradient + d * parameters`` is taken for the gradient.
Only with :class:`Adam` it may be decoupled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dbmpi.kernels import moments, updates
from dbmpi.paramserver.compensation import DelayCompensated
from dbmpi.paramserver.own_rule import OwnRule
from dbmpi.paramserver.schedule import Moment, Schedule

if TYPE_CHECKING:
    from dbmpi.config import OptimizerSection

State = dict[str, np.ndarray]

_CONSTANT = Schedule()
_FIRST = Moment()


class Rule(Protocol):
    """An update rule, element by element."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the arrays in the state."""
        ...

    def init(self, parameters: np.ndarray) -> State:
        """Return the state before the first update, for a flat array of parameters."""
        ...

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State, moment: Moment = _FIRST) -> None:
        """Take one step, in place.

        Parameters
        ----------
        parameters, gradient : (n,) arrays
            Of one dtype; the gradient belongs to a worker, and stays as it is.
        state
            The rule's arrays, (n,) each.
        moment
            When: for schedules and bias corrections.
        """
        ...


@dataclass(frozen=True)
class Sgd(Rule):
    """Stochastic gradient descent: ``w <- w - learning_rate * dw``."""

    learning_rate: float
    weight_decay: float = 0.0
    schedule: Schedule = _CONSTANT
    state_names = ()

    def init(self, parameters: np.ndarray) -> State:
        """Return an empty state, for any `parameters`."""
        return {}

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State, moment: Moment = _FIRST) -> None:
        """Update `parameters` by one step along the `gradient` at that `moment`; the `state` is empty."""
        rate = self.learning_rate * self.schedule(moment)
        if self.weight_decay:
            updates.sgd_with_decay(parameters, gradient, rate, self.weight_decay)
        else:
            updates.sgd(parameters, gradient, rate)


@dataclass(frozen=True)
class Momentum(Rule):
    """Gradient descent with momentum (Polyak 1964), or Nesterov's.

    The velocity v begins at 0, and the rate is not part of it, so that a schedule acts at once::

        v <- momentum * v + dw
        w <- w - learning_rate * v                        or, with nesterov,
        w <- w - learning_rate * (dw + momentum * v)

    The latter is Nesterov's accelerated gradient in the form of Sutskever et al., "On the importance of initialization
    and momentum in deep learning", ICML 2013, written for the point at which the gradient is taken (Bengio et al.,
    "Advances in optimizing recurrent networks", 2013, equation (7)).

    With n for a `momentum_every` above 1, this is delayed Nesterov, without weight decay: Liu, Chhaparia, Douillard et
    al., "Asynchronous local-SGD training for language modeling", 2024, algorithm 3 with c = 0.  Each push moves the
    parameters by its own part of the mean of n; the velocity takes in that mean, and moves them, only with each n-th::

        d <- d + dw
        w <- w - learning_rate * dw / n                                  with each n-th push instead:
        v <- momentum * v + d / n
        w <- w - learning_rate * (dw / n + momentum * v)
        d <- 0
    """

    learning_rate: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Schedule = _CONSTANT
    momentum_every: int = 1

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the arrays in the state."""
        return ("velocity",) if self.momentum_every == 1 else ("velocity", "delayed")

    def init(self, parameters: np.ndarray) -> State:
        """Return a velocity of zeros, as long as `parameters`, and if it is delayed a sum of zeros."""
        return {name: np.zeros_like(parameters) for name in self.state_names}

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State, moment: Moment = _FIRST) -> None:
        """Update the velocity in `state` by the `gradient`, and `parameters` by one step at that `moment`."""
        rate = self.learning_rate * self.schedule(moment)
        velocity, decay, every = state["velocity"], self.weight_decay, self.momentum_every
        if every == 1:
            moments.momentum(parameters, gradient, velocity, rate, self.momentum, self.nesterov, decay)
        else:
            renews, vectors = moment.update % every == 0, (parameters, gradient, velocity, state["delayed"])
            moments.delayed_nesterov(*vectors, rate, self.momentum, 1 / every, renews)


@dataclass(frozen=True)
class Adagrad(Rule):
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
    weight_decay: float = 0.0
    schedule: Schedule = _CONSTANT
    state_names = ("accumulator",)

    def init(self, parameters: np.ndarray) -> State:
        """Return the sums of squared gradients, as long as `parameters`, before the first gradient."""
        return {"accumulator": np.full_like(parameters, self.initial_accumulator)}

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State, moment: Moment = _FIRST) -> None:
        """Add the squared `gradient` to the sums in `state`, and update `parameters` by one step at that `moment`."""
        rate, sums = self.learning_rate * self.schedule(moment), state["accumulator"]
        if self.weight_decay:
            updates.adagrad_with_decay(parameters, gradient, sums, rate, self.epsilon, self.weight_decay)
        else:
            updates.adagrad(parameters, gradient, sums, rate, self.epsilon)


@dataclass(frozen=True)
class RmsProp(Rule):
    """RMSProp (Tieleman and Hinton, Coursera lecture 6.5, 2012), with epsilon outside the root.

    The mean square s begins at 0, and is not corrected for that::

        s <- beta2 * s + (1 - beta2) * dw^2
        w <- w - learning_rate * dw / (sqrt(s) + epsilon)
    """

    learning_rate: float
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = _CONSTANT
    state_names = ("mean_square",)

    def init(self, parameters: np.ndarray) -> State:
        """Return a mean square of zeros, as long as `parameters`."""
        return {"mean_square": np.zeros_like(parameters)}

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State, moment: Moment = _FIRST) -> None:
        """Update the mean square in `state` by the `gradient`, and `parameters` by one step at that `moment`."""
        rate, square = self.learning_rate * self.schedule(moment), state["mean_square"]
        moments.rmsprop(parameters, gradient, square, rate, self.beta2, self.epsilon, self.weight_decay)


@dataclass(frozen=True)
class Adam(Rule):
    """Adam (Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1), or AdamW.

    The moments m and s begin at 0, and the t-th update is corrected for that::

        m <- beta1 * m + (1 - beta1) * dw
        s <- beta2 * s + (1 - beta2) * dw^2
        w <- w - learning_rate * m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + epsilon)

    With `decoupled`, this is AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
    algorithm 2): the gradient is left alone, and the last line begins with ``(1 - learning_rate * weight_decay) * w``
    instead of ``w``.  In both places the learning rate is that of the schedule.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    schedule: Schedule = _CONSTANT
    state_names = ("first_moment", "second_moment")

    def init(self, parameters: np.ndarray) -> State:
        """Return moments of zeros, as long as `parameters`."""
        return {name: np.zeros_like(parameters) for name in self.state_names}

    def apply(self, parameters: np.ndarray, gradient: np.ndarray, state: State, moment: Moment = _FIRST) -> None:
        """Update the moments in `state` by the `gradient`, and `parameters` by one step at that `moment`."""
        rate, decay = self.learning_rate * self.schedule(moment), self.weight_decay
        moments.adam(
            parameters,
            gradient,
            state["first_moment"],
            state["second_moment"],
            rate,
            (self.beta1, self.beta2),
            (1 / (1 - self.beta1**moment.update), 1 / math.sqrt(1 - self.beta2**moment.update)),
            self.epsilon,
            0.0 if self.decoupled else decay,
            1 - rate * decay if self.decoupled else 1.0,
        )


def rule(section: OptimizerSection, samples: float = 1.0, code: Path | None = None) -> Rule:
    """Return the rule that the ``[optimizer]`` section describes.

    Parameters
    ----------
    section
        The section.
    samples
        Those of an epoch, for the schedule; by default an epoch of the section is one sample.
    code
        Directory in which the module of a user's own rule is looked for first.

    Raises
    ------
    UserError
        If a user's own rule cannot be loaded, or is none.
    """
    return DelayCompensated.from_config(_plain(section, samples, code), section)


def _plain(section: OptimizerSection, samples: float, code: Path | None) -> Rule:
    """Return the rule without what is done to gradients before."""
    rate, decay, schedule = section.learning_rate, section.weight_decay, Schedule.from_config(section, samples)
    if section.walks:  # the schedule is that of the replicas' own steps
        schedule = Schedule(by_staleness=schedule.by_staleness)
    match section.rule:
        case "sgd":
            return Sgd(rate, decay, schedule)
        case "momentum":
            return Momentum(
                rate, section.momentum, section.nesterov, decay, schedule, momentum_every=section.momentum_every
            )
        case "adagrad":
            return Adagrad(rate, section.initial_accumulator, section.epsilon, decay, schedule)
        case "rmsprop":
            return RmsProp(rate, section.beta2, section.epsilon, decay, schedule)
        case "adam" | "adamw" as name:
            return Adam(rate, section.beta1, section.beta2, section.epsilon, decay, name == "adamw", schedule)
        case name:
            return OwnRule.load(name, section.settings, rate, schedule, code)
