"""L-BFGS with its history on the shards, and the small recursion on scalars (paper, section 4.2).

The two-loop recursion (Nocedal and Wright, algorithm 7.4) is a chain of 4m operations on vectors, each of which waits
for the scalar of the one before.  But its result is a sum of multiples of the 2m + 1 vectors s_i, y_i and g, and the
multiples follow from the dot products among them (Chen, Wang, Zhou: "Large-scale L-BFGS using MapReduce", NIPS 2014).
So an iteration computes the products that are new, with those of the line search, in one pass over the vectors and one
reduction, runs the recursion on numbers, and forms the direction in a second pass.  (A trial that the search rejects
costs a reduction of its own.)

Of the products only those are needed that the recursion meets: ``s_i y_j`` for ``i <= j``, all ``y_i y_j``, and those
of the gradient with everything.  A new pair and a new gradient cost some 4m of them, the 6m of the publication less
all ``s_i s_j`` and half of the ``s_i y_j``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dbmpi.methods.descent import Batches, Callback, Evaluate, Limits, Line, Report, Start, Step, descend
from dbmpi.methods.linesearch import LineSearch, strong_wolfe
from dbmpi.methods.space import Space

CAUTION = 1e-10
"""Cosine of the angle between s and y below which the curvature of a pair is rounding error, or noise."""
LOST_DIGITS = 1e-6
"""A slope that is this small beside the terms of its sum is computed anew."""


def lbfgs(
    space: Space,
    evaluate: Evaluate,
    *,
    memory: int = 10,
    caution: float = CAUTION,
    history_dtype: str | None = None,
    search: LineSearch = strong_wolfe,
    limits: Limits | None = None,
    callback: Callback | None = None,
    batches: Batches | None = None,
    history: History | None = None,
    start: Start | None = None,
) -> Report:
    """Minimise by L-BFGS, from the point in the vector "parameters".

    Parameters
    ----------
    space, evaluate
        Where the vectors are, and what to minimise.
    memory
        Pairs of the history; 0 makes it gradient descent.
    caution
        A pair is learned only if ``y.s > caution |s| |y|``.  (Berahas, Nocedal, Takac 2016, ask for
        ``y.s >= caution |s|^2``, which depends on the units of the loss and of x.)
    history_dtype
        "float32" to keep the history in half the memory of float64 vectors.
    search
        Line search; with the default and its constants the iterates are those of L-BFGS-B without bounds.
    limits, callback, batches
        When to stop; what is called after every iteration; how the samples change.
    history
        The history to go on with, e.g. a restored one; `memory`, `caution` and `history_dtype` are then those of the
        history.
    start
        Where an earlier search was left, if this one is to go on as that would have; with its history.

    Raises
    ------
    RunFailed
        Where the loss is not finite at the start or all along a direction, or the gradient contradicts the loss.
    """
    if history is None:
        history = History(space, memory, caution, history_dtype)
    return descend(space, evaluate, history, search, limits, callback, batches, start)


_ARRAYS = ("slots", "sy", "yy", "sg", "yg", "scalars", "last")
"""Of the state of a history."""


def names_of(slot: int) -> tuple[str, str]:
    """Return the names of the vectors of a slot."""
    return _s(slot), _y(slot)


def check_history(pairs: int, state: Mapping[str, np.ndarray]) -> list[int]:
    """Return the slots in use of the state of a history, the oldest first.

    Raises
    ------
    ValueError
        If it is no state of a history with so many pairs at most.
    """
    if set(state) != set(_ARRAYS):
        raise ValueError(f"this is not the state of a history: it has {', '.join(sorted(state)) or 'nothing'}")
    slots, sy, yy, sg, yg, scalars, last = (np.array(state[name]) for name in _ARRAYS)
    places = range(pairs + 1)
    sound = sy.shape == yy.shape == (pairs + 1, pairs + 1) and last.shape in ((0,), (2,))
    sound = sound and sg.shape == yg.shape == (pairs + 1,) and scalars.shape == (2,)
    sound = sound and slots.ndim == 1 and len(set(slots.tolist())) == len(slots) <= pairs
    sound = sound and all(slot in places and sy[slot, slot] > 0 and yy[slot, slot] > 0 for slot in slots.tolist())
    if not sound or not all(np.isfinite(array).all() for array in (sy, yy, sg, yg, scalars, last)):
        raise ValueError(f"this is not the state of a history of {pairs} pairs, or it is damaged")
    return [int(slot) for slot in slots]


class History:
    """Pairs of steps s and gradient differences y on the shards, and their dot products here.

    The vectors of a pair are named by a slot: s0, y0, s1, y1, ...  There is one slot more than pairs: the direction is
    formed where the next s will be, so that nothing is copied, and the oldest pair goes only when the new one is good.

    Parameters
    ----------
    space
        Where the vectors are.
    memory
        Largest number of pairs.
    caution
        A pair is learned only if ``y.s > caution |s| |y|``.
    dtype
        "float32" or "float64" of the vectors, or None for that of the space.
    """

    def __init__(self, space: Space, memory: int = 10, caution: float = CAUTION, dtype: str | None = None) -> None:
        if memory < 0:
            raise ValueError(f"the history has {memory} pairs: give 0 or more")
        self._space, self.memory, self.caution = space, memory, caution
        for name in [_s(slot) for slot in range(memory + 1)] + [_y(slot) for slot in range(memory + 1) if memory]:
            if name not in space.names:
                space.create(name, dtype)
        self.skipped = 0
        """Pairs that were not good enough."""
        self._slots: list[int] = []
        self._sy = np.zeros((memory + 1, memory + 1))
        self._yy = np.zeros((memory + 1, memory + 1))
        self._sg, self._yg = np.zeros(memory + 1), np.zeros(memory + 1)
        self._square = 0.0
        self._slope = 0.0
        self._candidate: list[int] = []

    @property
    def fresh(self) -> bool:
        """Whether there is no pair."""
        return not self._slots

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Names of the vectors (s, y), the oldest pair first."""
        return tuple((_s(slot), _y(slot)) for slot in self._slots)

    def forget(self) -> None:
        """Unlearn all pairs."""
        self._slots.clear()

    def state(self) -> dict[str, np.ndarray]:
        """Return the numbers that are to be saved with the vectors of `pairs`."""
        scalars = np.array([self._square, self._slope])
        return {
            "slots": np.array(self._slots, np.int64),
            "sy": self._sy.copy(),
            "yy": self._yy.copy(),
            "sg": self._sg.copy(),
            "yg": self._yg.copy(),
            "scalars": scalars,
            "last": np.zeros(0),  # of earlier versions
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on with a state whose vectors are in place already.

        Raises
        ------
        ValueError
            If it is no state of a history with as many pairs.
        """
        self._slots = check_history(self.memory, state)
        sy, yy, sg, yg, scalars = (np.array(state[name]) for name in _ARRAYS[1:-1])
        self._sy[:], self._yy[:], self._sg[:], self._yg[:] = sy, yy, sg, yg
        self._square, self._slope = scalars.tolist()

    def measure(self, gradient: str, square: float) -> None:
        """Compute the products of the vector `gradient`, whose square is `square`, with the history."""
        self._square = square
        rows = [name for slot in self._slots for name in (_s(slot), _y(slot))]
        if rows:
            products = self._space.dots([(gradient, name) for name in rows])
            self._sg[self._slots], self._yg[self._slots] = products[::2], products[1::2]

    def choose(self, gradient: str) -> Line:
        """Form the direction ``-H g`` in the free slot, for the vector `gradient`."""
        name = _s(self._free())
        if not self._slots:
            self._space.combine(name, [(-1.0, gradient)])
            self._slope = -self._square
            return Line(name, self._slope, None)
        chosen = np.ix_(self._slots, self._slots)
        of_s, of_y, of_g = coefficients(
            self._sy[chosen], self._yy[chosen], self._sg[self._slots], self._yg[self._slots]
        )
        terms = [(float(of_g), gradient)]
        terms += [(float(c), _s(slot)) for c, slot in zip(of_s, self._slots, strict=True)]
        terms += [(float(c), _y(slot)) for c, slot in zip(of_y, self._slots, strict=True)]
        self._space.combine(name, terms)
        parts = np.concatenate([[of_g * self._square], of_s * self._sg[self._slots], of_y * self._yg[self._slots]])
        slope = float(parts.sum())
        if not abs(slope) > LOST_DIGITS * np.abs(parts).sum():
            slope = float(self._space.dots([(name, gradient)])[0])
        self._slope = slope
        return Line(name, slope, 1.0)

    def products(self, gradient: str, after: str, before: str) -> list[tuple[str, str]]:
        """Form the next y, ``after - before``, and name the products of it and of `gradient` with the next history."""
        if not self.memory:
            return []
        new = self._free()
        self._space.combine(_y(new), [(1.0, after), (-1.0, before)])
        full = len(self._slots) == self.memory
        self._candidate = [*self._slots[full:], new]
        rows = [_s(slot) for slot in self._candidate], [_y(slot) for slot in self._candidate]
        return [(vector, name) for vector in (_y(new), gradient) for row in rows for name in row]

    def learn(self, step: Step, gradient: str) -> None:
        """Make a pair of the step, which led to `gradient`, and the difference of the gradients."""
        self._square = step.gradient_square
        if not self.memory:
            return
        slots, new = self._candidate, self._candidate[-1]
        s_y, y_y, s_g, y_g = np.reshape(step.products, (4, len(slots)))
        if step.length != 1:  # so far it was the direction
            self._space.scale(_s(new), step.length)
            s_y[-1] *= step.length
            s_g[-1] *= step.length
        curvature, square = s_y[-1], step.length**2 * step.direction_square
        if not curvature > self.caution * np.sqrt(square) * np.sqrt(y_y[-1]):
            self.skipped += 1
            self.measure(gradient, step.gradient_square)
            return
        self._slots = slots
        self._sy[slots, new] = s_y
        self._yy[slots, new] = self._yy[new, slots] = y_y
        self._sg[slots], self._yg[slots] = s_g, y_g

    def _free(self) -> int:
        return next(slot for slot in range(self.memory + 1) if slot not in self._slots)


def coefficients(
    sy: np.ndarray, yy: np.ndarray, sg: np.ndarray, yg: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the direction ``-H g`` as multiples of the s_i, the y_i and g: Nocedal and Wright, algorithm 7.4.

    Parameters
    ----------
    sy : (m, m) array
        ``s_i y_j`` for ``i <= j``, the oldest pair first; what is below the diagonal does not matter.
    yy : (m, m) array
        ``y_i y_j``.
    sg, yg : (m,) arrays
        ``s_i g`` and ``y_i g``.

    Returns
    -------
    (m,) array, (m,) array, float
        The multiples of s, y and g.
    """
    pairs = len(sg)
    alpha = np.zeros(pairs)
    beta = np.zeros(pairs)
    for i in reversed(range(pairs)):
        # q = g - sum of alpha_j y_j over the later pairs j;  alpha_i = s_i q / s_i y_i
        alpha[i] = (sg[i] - sy[i, i + 1 :] @ alpha[i + 1 :]) / sy[i, i]
    gamma = sy[-1, -1] / yy[-1, -1]
    for i in range(pairs):
        # r = gamma (g - sum of alpha_j y_j) + sum of (alpha_j - beta_j) s_j over the earlier pairs j;
        # beta_i = y_i r / s_i y_i
        beta[i] = (gamma * (yg[i] - yy[i] @ alpha) + sy[:i, i] @ (alpha - beta)[:i]) / sy[i, i]
    return beta - alpha, gamma * alpha, -gamma


def _s(slot: int) -> str:
    return f"s{slot}"


def _y(slot: int) -> str:
    return f"y{slot}"
