"""Line searches: how far to go along a direction, decided on scalars alone.

A search is a generator.  It yields the step to try, is sent the loss ``phi(step)`` and the slope ``phi'(step)`` there,
and returns the trial that it accepts.  It knows no vectors and no ranks: its caller evaluates the trials, and
every rank that is sent the same numbers takes the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import NamedTuple


class Trial(NamedTuple):
    """A step that was tried."""

    step: float
    loss: float
    slope: float
    """Derivative of the loss by the step."""

    @property
    def finite(self) -> bool:
        """Whether loss and slope are numbers to go by."""
        return math.isfinite(self.loss) and math.isfinite(self.slope)


Search = Generator[float, tuple[float, float], Trial]
LineSearch = Callable[[float, float, float], Search]
"""``search(loss, slope, first_step)`` for the loss and the (negative) slope at step 0."""


class LineSearchFailed(RuntimeError):
    """No step was found that is good enough; the `message` says why, after these `trials`."""

    def __init__(self, message: str, trials: Sequence[Trial]) -> None:
        super().__init__(message)
        self.trials = tuple(trials)
        """All that is known, step 0 first."""


SHRINK = 0.1
"""Factor on the step after a loss that is not finite."""
SHRINKS = 12
"""Trials in a row whose loss is not finite, after which a search ends; smaller steps hardly move a point."""
FURTHEST = 1e10
"""Longest step, as a multiple of the first one."""
WALL = 2.0**40
"""A loss that rises by so many times what the slope promises is as good as infinite: nothing follows from its size."""
ROUNDING = 2.0**-50
"""Relative change of a loss that is its own rounding error."""
FLAT = 1e-3
"""Relative change of a loss that is no rounding error, with whatever precision it was computed."""


def named(name: str, step_length: float) -> LineSearch:
    """Return the search of a configuration's name; `step_length` is for a fixed step."""
    searches: dict[str, LineSearch] = {
        "strong_wolfe": strong_wolfe,
        "backtracking": backtracking,
        "fixed": partial(fixed, factor=step_length),
    }
    return searches[name]


def fixed(loss: float, slope: float, first: float, *, factor: float = 1.0) -> Search:
    """Take one step, whatever it gives, for losses that change with a batch; shrink it where the loss is not finite.

    Parameters
    ----------
    loss, slope, first
        As for every line search.
    factor
        Multiple of `first` to take.
    """
    given = taken = factor * first
    known = [Trial(0.0, loss, slope)]
    for _ in range(SHRINKS):
        trial = Trial(taken, *(yield taken))
        if trial.finite:
            return trial
        known.append(trial)
        taken *= SHRINK
    raise LineSearchFailed(f"the loss is not finite from the fixed step {given:g} down to {known[-1].step:g}", known)


def backtracking(loss: float, slope: float, first: float, *, decrease: float = 1e-4, trials: int = 30) -> Search:
    """Shrink the step until the loss decreases enough (Armijo): Nocedal and Wright, algorithm 3.1.

    The next step is where a parabola through what is known has its minimum (their equation 3.58), but at least
    a tenth and at most half of the last one.

    Parameters
    ----------
    loss, slope, first
        As for every line search.
    decrease
        The loss must decrease by this fraction of what the slope promises.
    trials
        Largest number of trials.
    """
    known = [Trial(0.0, loss, slope)]
    step = first
    for _ in range(trials):
        trial = Trial(step, *(yield step))
        known.append(trial)
        if beyond(trial, known[0]):  # the next direction needs the gradient, too
            if len(known) > SHRINKS and all(beyond(other, known[0]) for other in known[1:]):
                break
            step *= SHRINK
        elif (trial.loss < loss and trial.loss <= loss + decrease * step * slope) or level(trial, loss, slope):
            return trial
        else:
            # phi(0), phi'(0) and phi(a): the minimum is at -phi'(0) a^2 / (2 (phi(a) - phi(0) - phi'(0) a))
            lowest = -slope * step**2 / (2 * (trial.loss - loss - slope * step))
            step = min(max(lowest, 0.1 * step), 0.5 * step)
    raise LineSearchFailed(f"no decrease of the loss down to a step of {known[-1].step:g}", known)


def strong_wolfe(  # noqa: PLR0912
    loss: float,
    slope: float,
    first: float,
    *,
    decrease: float = 1e-3,
    curvature: float = 0.9,
    width: float = 0.1,
    furthest: float = FURTHEST,
    trials: int = 20,
) -> Search:
    """Find a step that satisfies the strong Wolfe conditions, by the algorithm of More and Thuente.

    ``phi(a) <= phi(0) + decrease * a * phi'(0)`` and ``|phi'(a)| <= curvature * |phi'(0)|``: J. J. More and
    D. J. Thuente, "Line search algorithms with guaranteed sufficient decrease", ACM TOMS 20(3), 1994.  It keeps an
    interval, at whose end `low` the loss is lowest, and finds the next trial by cubic and quadratic interpolation.
    The defaults are those of L-BFGS-B (Zhu, Byrd, Lu, Nocedal, ACM TOMS 23(4), 1997), as are the factors 1.1, 4, 0.66.

    Parameters
    ----------
    loss, slope, first
        As for every line search.
    decrease, curvature
        The two constants, ``0 < decrease < curvature < 1``.
    width
        The search ends with the best step so far when the interval is as narrow as this fraction of the step.
    furthest
        Largest step, as a multiple of the first one.
    trials
        Largest number of trials with a finite loss.
    """
    start = Trial(0.0, loss, slope)
    known, finite = [start], 0
    low = high = start
    bracketed, first_stage = False, True
    largest = furthest * first
    span, last_span = largest, 2 * largest
    step, lowest, highest = first, 0.0, 5 * first

    def sufficient(trial: Trial) -> bool:
        # A step so small that the loss stays the same to its last digit is none.
        return trial.loss < loss and trial.loss <= loss + decrease * trial.step * slope

    while finite < trials and (finite or len(known) <= SHRINKS) and len(known) <= 3 * trials:
        trial = Trial(step, *(yield step))
        known.append(trial)
        if beyond(trial, start):
            # Somewhere between the best step and this one the loss ceases to be defined.
            largest = min(largest, (low.step + step) / 2)
            step = low.step + SHRINK * (step - low.step)
            if step == low.step:
                break
            continue
        finite += 1
        if level(trial, loss, slope, curvature) or (sufficient(trial) and abs(trial.slope) <= -curvature * slope):
            return trial
        if step >= largest and sufficient(trial) and trial.slope <= decrease * slope:
            return trial
        if sufficient(trial) and trial.slope >= 0:
            first_stage = False
        if first_stage and trial.loss <= low.loss and not sufficient(trial):
            # Section 3: until a step has decreased the loss enough, interpolate phi(a) - decrease a phi'(0) instead.
            tilt = decrease * slope
            low, high, step, bracketed = _next(
                _tilted(low, tilt), _tilted(high, tilt), _tilted(trial, tilt), bracketed, lowest, highest
            )
            low, high = _tilted(low, -tilt), _tilted(high, -tilt)
        else:
            low, high, step, bracketed = _next(low, high, trial, bracketed, lowest, highest)
        if bracketed:
            if abs(high.step - low.step) >= 0.66 * last_span:
                step = low.step + 0.5 * (high.step - low.step)
            span, last_span = abs(high.step - low.step), span
            lowest, highest = min(low.step, high.step), max(low.step, high.step)
            if not lowest < step < highest or highest - lowest <= width * highest:
                break
        else:
            lowest, highest = step + 1.1 * (step - low.step), step + 4 * (step - low.step)
        step = min(step, largest)
    best = min(known, key=lambda trial: trial.loss if trial.finite else math.inf)
    if best is not start and sufficient(best):
        return best
    if not finite:
        raise LineSearchFailed(f"the loss is not finite down to a step of {known[-1].step:g}", known)
    raise LineSearchFailed(f"no step between 0 and {known[1].step:g} decreases the loss enough", known)


def level(trial: Trial, loss: float, slope: float, curvature: float = 0.9) -> bool:
    """Return whether the loss is the same but for its rounding error, and a step has led on: it is less steep there.

    The "approximate Wolfe condition" near a minimum: W. W. Hager and H. Zhang, SIAM J. Optim. 16(1), 2005.

    Parameters
    ----------
    trial
        That led there.
    loss, slope
        Where the line begins.
    curvature
        The slope must be at most this fraction of `slope` in magnitude.
    """
    return abs(trial.loss - loss) <= ROUNDING * abs(loss) and abs(trial.slope) <= -curvature * slope


def beyond(trial: Trial, start: Trial) -> bool:
    """Return whether a trial lies outside of where the loss is defined: nothing can be interpolated from it.

    Objectives mark this by infinity or by a large number.  From a rise of the loss by R times what the slope at the
    start promises, a parabola has its minimum at the fraction 1 / 2R of the way; beyond `WALL` that moves few points.
    """
    return not trial.finite or trial.loss - start.loss > WALL * abs(start.slope) * trial.step


def disagreement(trials: Sequence[Trial], probe: Callable[[float], float] | None = None) -> str | None:
    """Say where the losses along a line contradict the slope at its start, which means that the gradient is wrong.

    The difference quotients of three steps, each at most half of the one before, must agree with one another, on both
    sides of the start, and not with the slope.  Where they do not agree, they are rounding errors, or the line bends;
    where both sides differ, there is a kink.  So nothing needs to be known of the size or the precision of the loss.

    Parameters
    ----------
    trials
        Trials along one line, the start included.
    probe
        Returns the loss at a step, here on the other side of the start.  Only called where the gradient is in doubt.

    Returns
    -------
    str or None
        What was found; None where nothing contradicts the gradient.
    """
    start = next(trial for trial in trials if trial.step == 0)
    ladder: list[Trial] = []
    for trial in sorted((trial for trial in trials if trial.finite and trial.step > 0), key=lambda trial: trial.step):
        if not ladder or trial.step >= 2 * ladder[-1].step:
            ladder.append(trial)
    for three in zip(ladder, ladder[1:], ladder[2:], strict=False):
        steepness = abs(start.slope)
        if any(abs(trial.slope - start.slope) > 0.2 * steepness for trial in three):
            break  # by the gradient, too, the line bends here
        found = _quotients(start.loss, [(trial.step, trial.loss) for trial in three])
        if found is None:
            continue
        if abs(found - start.slope) <= 0.3 * steepness:
            return None
        # Where the loss does not change at all, it should have, by much more than it can be rounded.
        if found == 0 and steepness * three[0].step < FLAT * abs(start.loss):
            continue
        if probe is not None:
            behind = _quotients(start.loss, [(-trial.step, probe(-trial.step)) for trial in three])
            if behind is None or abs(behind - found) > 0.1 * abs(found):
                return None
        return (
            f"between the steps {three[0].step:g} and {three[-1].step:g} the loss changes by {found:g} per unit of "
            f"step, where the gradient says {start.slope:g}"
        )
    return None


def _quotients(loss: float, points: Sequence[tuple[float, float]]) -> float | None:
    """Return the difference quotient of several (step, loss); None where they are rounding errors or do not agree."""
    changes = [value - loss for _, value in points]
    if not any(changes):
        return 0.0
    quotients = [change / step for change, (step, _) in zip(changes, points, strict=True)]
    noise = 100 * ROUNDING * abs(loss)
    agree = max(quotients) - min(quotients) <= 0.05 * max(map(abs, quotients))
    return quotients[0] if agree and all(abs(change) > noise for change in changes) else None


def _tilted(trial: Trial, tilt: float) -> Trial:
    return Trial(trial.step, trial.loss - tilt * trial.step, trial.slope - tilt)


def _next(
    low: Trial, high: Trial, trial: Trial, bracketed: bool, lowest: float, highest: float
) -> tuple[Trial, Trial, float, bool]:
    """Return the new interval, the next step, and whether a minimum is bracketed: More and Thuente, section 4."""
    turned = trial.slope * low.slope < 0
    if trial.loss > low.loss:
        # Case 1: higher than the low end, so that a minimum lies between.
        cubic, quadratic = _cubic_minimum(low, trial), _quadratic_minimum(low, trial)
        near = abs(cubic - low.step) < abs(quadratic - low.step)
        step = cubic if near else cubic + (quadratic - cubic) / 2
        return low, trial, step, True
    if turned:
        # Case 2: lower, and the slope has changed its sign.
        cubic, secant = _cubic_minimum(low, trial), _secant(low, trial)
        step = cubic if abs(cubic - trial.step) > abs(secant - trial.step) else secant
        return trial, low, step, True
    if abs(trial.slope) < abs(low.slope):
        # Case 3: lower, and less steep.  The cubic may have no minimum beyond the trial.
        cubic, secant = _cubic_beyond(low, trial, lowest, highest), _secant(low, trial)
        closer = abs(cubic - trial.step) < abs(secant - trial.step)
        if bracketed:
            step = cubic if closer else secant
            border = trial.step + 0.66 * (high.step - trial.step)
            step = min(step, border) if trial.step > low.step else max(step, border)
        else:
            step = min(max(secant if closer else cubic, lowest), highest)
        return trial, high, step, bracketed
    # Case 4: lower, and no less steep.
    border = highest if trial.step > low.step else lowest
    return trial, high, _cubic_minimum(high, trial) if bracketed else border, bracketed


def _cubic_terms(a: Trial, b: Trial) -> tuple[float, float]:
    """Return d1 and d2 of Nocedal and Wright, equation 3.59, for the cubic through both trials."""
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.step - b.step)
    scale = max(abs(d1), abs(a.slope), abs(b.slope))
    square = (d1 / scale) ** 2 - (a.slope / scale) * (b.slope / scale) if scale > 0 else 0.0
    return d1, math.copysign(scale * math.sqrt(max(square, 0.0)), b.step - a.step)


def _cubic_minimum(a: Trial, b: Trial) -> float:
    """Return where the cubic through both trials has its minimum: Nocedal and Wright, equation 3.59."""
    d1, d2 = _cubic_terms(a, b)
    below = b.slope - a.slope + 2 * d2
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / below if below else (a.step + b.step) / 2


def _cubic_beyond(low: Trial, trial: Trial, lowest: float, highest: float) -> float:
    """Return the minimum of the cubic if it lies beyond the trial, and else the border on that side."""
    d1, d2 = _cubic_terms(low, trial)
    below = trial.slope - low.slope + 2 * d2
    ratio = (trial.slope + d2 - d1) / below if below else 0.0
    if ratio < 0 and d2 != 0:
        return trial.step - ratio * (trial.step - low.step)
    return highest if trial.step > low.step else lowest


def _quadratic_minimum(a: Trial, b: Trial) -> float:
    """Return the minimum of the parabola through phi(a), phi'(a) and phi(b): Nocedal and Wright, equation 3.58."""
    distance = b.step - a.step
    return a.step + a.slope / ((a.loss - b.loss) / distance + a.slope) / 2 * distance


def _secant(a: Trial, b: Trial) -> float:
    """Return where the line through both slopes is zero."""
    return b.step + b.slope / (b.slope - a.slope) * (a.step - b.step)
