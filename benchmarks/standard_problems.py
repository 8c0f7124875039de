"""Unconstrained least-squares problems of Moré, Garbow and Hillstrom, written from their definitions.

J. J. Moré, B. S. Garbow and K. E. Hillstrom, "Testing unconstrained optimization software", ACM TOMS 7(1), 1981.  Each
is a sum of squared residuals with a standard start.  A residual function takes an array of any complex numbers, so that
gradients follow from the definition alone, to the last digits: by complex steps, ``Im r(x + i h) / h``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
_STEP = 1e-30


@dataclass(frozen=True)
class Problem:
    """A sum of squares.

    Parameters
    ----------
    name
        Of the problem.
    residuals
        A function of n numbers, real or complex, that returns the residuals.
    start
        The standard start.
    least
        The sum of squares at the minimum; of several ones, at each.
    """

    name: str
    residuals: Callable[[Array], Array]
    start: Array
    least: tuple[float, ...] = (0.0,)

    def __call__(self, x: Array) -> tuple[float, Array]:
        """Return the sum of squares and its gradient; infinite where it is not defined or overflows."""
        with np.errstate(all="ignore"):
            values = self.residuals(x)
            steps = x[:, None] + 1j * _STEP * np.eye(x.size)
            jacobian = np.array([self.residuals(steps[:, j]).imag / _STEP for j in range(x.size)])
            loss, gradient = float(values @ values), 2 * jacobian @ values
        return (loss, gradient) if np.isfinite(loss) else (np.inf, gradient)

    def in_units(self, of_x: float, of_f: float) -> Callable[[Array], tuple[float, Array]]:
        """Return the same function of ``of_x * x``, with ``of_f`` times the loss."""

        def scaled(z: Array) -> tuple[float, Array]:
            loss, gradient = self(z / of_x)
            return of_f * loss, of_f / of_x * gradient

        return scaled


def _stack(*rows: Array | complex | float) -> Array:
    return np.concatenate([np.atleast_1d(row) for row in rows])


def rosenbrock(x: Array) -> Array:
    """Problems 1 and 21, of any even number of variables."""
    return _stack(10 * (x[1::2] - x[::2] ** 2), 1 - x[::2])


def freudenstein_roth(x: Array) -> Array:
    """Problem 2."""
    a, b = x
    return _stack(-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b)


def powell_badly_scaled(x: Array) -> Array:
    """Problem 3."""
    a, b = x
    return _stack(1e4 * a * b - 1, np.exp(-a) + np.exp(-b) - 1.0001)


def brown_badly_scaled(x: Array) -> Array:
    """Problem 4."""
    a, b = x
    return _stack(a - 1e6, b - 2e-6, a * b - 2)


def beale(x: Array) -> Array:
    """Problem 5."""
    a, b = x
    return _stack(*(y - a * (1 - b**i) for i, y in ((1, 1.5), (2, 2.25), (3, 2.625))))


def jennrich_sampson(x: Array) -> Array:
    """Problem 6, with 10 residuals."""
    i = np.arange(1, 11)
    return 2 + 2 * i - (np.exp(i * x[0]) + np.exp(i * x[1]))


def helical_valley(x: Array) -> Array:
    """Problem 7."""
    a, b, c = x
    turn = np.arctan(b / a) / (2 * np.pi) + (0.5 if a.real < 0 else 0.0)
    return _stack(10 * (c - 10 * turn), 10 * (np.sqrt(a * a + b * b) - 1), c)


def bard(x: Array) -> Array:
    """Problem 8."""
    y = np.array([0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39])
    u = np.arange(1, 16)
    return y - (x[0] + u / ((16 - u) * x[1] + np.minimum(u, 16 - u) * x[2]))


def gaussian(x: Array) -> Array:
    """Problem 9."""
    half = np.array([0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521])
    y, t = np.concatenate([half, [0.3989], half[::-1]]), (8 - np.arange(1, 16)) / 2
    return x[0] * np.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


def meyer(x: Array) -> Array:
    """Problem 10."""
    y = [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]
    t = 45 + 5 * np.arange(1, 17)
    return x[0] * np.exp(x[1] / (t + x[2])) - np.array(y)


def gulf(x: Array) -> Array:
    """Problem 11, with 99 residuals."""
    a, b, c = x
    t = np.arange(1, 100) / 100
    y = 25 + (-50 * np.log(t)) ** (2 / 3) - b
    return np.exp(-((y * np.sign(y.real)) ** c) / a) - t


def box(x: Array) -> Array:
    """Problem 12, with 10 residuals."""
    a, b, c = x
    t = 0.1 * np.arange(1, 11)
    return np.exp(-t * a) - np.exp(-t * b) - c * (np.exp(-t) - np.exp(-10 * t))


def powell_singular(x: Array) -> Array:
    """Problems 13 and 22, of a multiple of four variables."""
    a, b, c, d = x[::4], x[1::4], x[2::4], x[3::4]
    return _stack(a + 10 * b, np.sqrt(5) * (c - d), (b - 2 * c) ** 2, np.sqrt(10) * (a - d) ** 2)


def wood(x: Array) -> Array:
    """Problem 14."""
    a, b, c, d = x
    return _stack(
        10 * (b - a * a), 1 - a, np.sqrt(90) * (d - c * c), 1 - c, np.sqrt(10) * (b + d - 2), (b - d) / np.sqrt(10)
    )


def kowalik_osborne(x: Array) -> Array:
    """Problem 15."""
    y = np.array([0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246])
    u = np.array([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])
    return y - x[0] * (u * u + u * x[1]) / (u * u + u * x[2] + x[3])


def brown_dennis(x: Array) -> Array:
    """Problem 16, with 20 residuals."""
    t = np.arange(1, 21) / 5
    return (x[0] + t * x[1] - np.exp(t)) ** 2 + (x[2] + x[3] * np.sin(t) - np.cos(t)) ** 2


def osborne_1(x: Array) -> Array:
    """Problem 17."""
    y = [
        844, 908, 932, 936, 925, 908, 881, 850, 818, 784, 751, 718, 685, 658, 628, 603, 580, 558, 538, 522, 506, 490,
        478, 467, 457, 448, 438, 431, 424, 420, 414, 411, 406,
    ]  # fmt: skip
    t = 10 * np.arange(33)
    return np.array(y) / 1000 - (x[0] + x[1] * np.exp(-t * x[3]) + x[2] * np.exp(-t * x[4]))


def biggs(x: Array) -> Array:
    """Problem 18, with 13 residuals."""
    t = 0.1 * np.arange(1, 14)
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)
    return x[2] * np.exp(-t * x[0]) - x[3] * np.exp(-t * x[1]) + x[5] * np.exp(-t * x[4]) - y


def osborne_2(x: Array) -> Array:
    """Problem 19."""
    y = [
        1366, 1191, 1112, 1013, 991, 885, 831, 847, 786, 725, 746, 679, 608, 655, 616, 606, 602, 626, 651, 724, 649,
        649, 694, 644, 624, 661, 612, 558, 533, 495, 500, 423, 395, 375, 372, 391, 396, 405, 428, 429, 523, 562, 607,
        653, 672, 708, 633, 668, 645, 632, 591, 559, 597, 625, 739, 710, 729, 720, 636, 581, 428, 292, 162, 98, 54,
    ]  # fmt: skip
    t = np.arange(65) / 10
    bells = sum(x[k] * np.exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3))
    return np.array(y) / 1000 - (x[0] * np.exp(-t * x[4]) + bells)


def watson(x: Array) -> Array:
    """Problem 20, of any number of variables."""
    powers = (np.arange(1, 30) / 29)[:, None] ** np.arange(x.size)
    slope = (powers[:, :-1] * np.arange(1, x.size)) @ x[1:]
    return _stack(slope - (powers @ x) ** 2 - 1, x[0], x[1] - x[0] ** 2 - 1)


def penalty_1(x: Array) -> Array:
    """Problem 23, of any number of variables."""
    return _stack(np.sqrt(1e-5) * (x - 1), x @ x - 0.25)


def penalty_2(x: Array) -> Array:
    """Problem 24, of any number of variables."""
    i, small = np.arange(2, x.size + 1), np.sqrt(1e-5)
    y = np.exp(i / 10) + np.exp((i - 1) / 10)
    return _stack(
        x[0] - 0.2,
        small * (np.exp(x[1:] / 10) + np.exp(x[:-1] / 10) - y),
        small * (np.exp(x[1:] / 10) - np.exp(-0.1)),
        np.arange(x.size, 0, -1) @ (x * x) - 1,
    )


def variably_dimensioned(x: Array) -> Array:
    """Problem 25, of any number of variables."""
    total = np.arange(1, x.size + 1) @ (x - 1)
    return _stack(x - 1, total, total**2)


def trigonometric(x: Array) -> Array:
    """Problem 26, of any number of variables."""
    i = np.arange(1, x.size + 1)
    return x.size - np.cos(x).sum() + i * (1 - np.cos(x)) - np.sin(x)


def brown_almost_linear(x: Array) -> Array:
    """Problem 27, of any number of variables."""
    return _stack(x[:-1] + x.sum() - (x.size + 1), np.prod(x) - 1)


def boundary_value(x: Array) -> Array:
    """Problem 28, of any number of variables."""
    h = 1 / (x.size + 1)
    t = h * np.arange(1, x.size + 1)
    around = np.concatenate([[0], x, [0]])
    return 2 * x - around[:-2] - around[2:] + h * h * (x + t + 1) ** 3 / 2


def integral_equation(x: Array) -> Array:
    """Problem 29, of any number of variables."""
    h = 1 / (x.size + 1)
    t = h * np.arange(1, x.size + 1)
    cube = (x + t + 1) ** 3
    before, after = np.cumsum(t * cube), np.cumsum(((1 - t) * cube)[::-1])[::-1]
    return x + h / 2 * ((1 - t) * before + t * np.concatenate([after[1:], [0]]))


def broyden_tridiagonal(x: Array) -> Array:
    """Problem 30, of any number of variables."""
    around = np.concatenate([[0], x, [0]])
    return (3 - 2 * x) * x - around[:-2] - 2 * around[2:] + 1


def broyden_banded(x: Array) -> Array:
    """Problem 31, of any number of variables."""
    n = x.size
    near = [sum(x[j] * (1 + x[j]) for j in range(max(0, i - 5), min(n, i + 2)) if j != i) for i in range(n)]
    return x * (2 + 5 * x * x) + 1 - np.array(near)


def linear_full_rank(x: Array) -> Array:
    """Problem 32, with twice as many residuals as variables."""
    m = 2 * x.size
    mean = 2 / m * x.sum()
    return _stack(x - mean - 1, np.full(m - x.size, -1) - mean)


def linear_rank_one(x: Array) -> Array:
    """Problem 33, with twice as many residuals as variables."""
    return np.arange(1, 2 * x.size + 1) * (np.arange(1, x.size + 1) @ x) - 1


def linear_rank_one_zeros(x: Array) -> Array:
    """Problem 34, with twice as many residuals as variables."""
    inner = np.arange(1, 2 * x.size - 1) * (np.arange(2, x.size) @ x[1:-1]) - 1
    return _stack(-1.0, inner, -1.0)


def chebyquad(x: Array) -> Array:
    """Problem 35, with as many residuals as variables."""
    y = 2 * x - 1
    before, here, rows = np.ones_like(y), y, []
    for i in range(1, x.size + 1):
        rows.append(here.mean() - (0.0 if i % 2 else -1 / (i * i - 1)))
        before, here = here, 2 * y * here - before
    return np.array(rows)


def _of(residuals: Callable[[Array], Array], start: object, *least: float) -> Problem:
    numbers = np.array(start, np.float64)
    return Problem(f"{residuals.__name__} {numbers.size}", residuals, numbers, least or (0.0,))


_GRID = np.arange(1, 11) / 11

PROBLEMS = (
    _of(rosenbrock, [-1.2, 1]),
    _of(freudenstein_roth, [0.5, -2], 0, 48.98425),
    _of(powell_badly_scaled, [0, 1]),
    _of(brown_badly_scaled, [1, 1]),
    _of(beale, [1, 1]),
    _of(jennrich_sampson, [0.3, 0.4], 124.3622),
    _of(helical_valley, [-1, 0, 0]),
    _of(bard, [1, 1, 1], 8.214877e-3, 17.4286),
    _of(gaussian, [0.4, 1, 0], 1.127933e-8),
    _of(meyer, [0.02, 4000, 250], 87.9458),
    _of(gulf, [5, 2.5, 0.15], 0, 0.038, 6.65),
    _of(box, [0, 10, 20], 0, 0.0755887),
    _of(powell_singular, [3, -1, 0, 1]),
    _of(wood, [-3, -1, -3, -1]),
    _of(kowalik_osborne, [0.25, 0.39, 0.415, 0.39], 3.075056e-4, 1.02734e-3),
    _of(brown_dennis, [25, 5, -5, -1], 85822.2),
    _of(osborne_1, [0.5, 1.5, -1, 0.01, 0.02], 5.464895e-5),
    _of(biggs, [1, 2, 1, 1, 1, 1], 0, 5.65565e-3, 0.3),
    _of(osborne_2, [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5], 4.013774e-2, 1.789813),
    _of(watson, np.zeros(6), 2.287670e-3),
    _of(watson, np.zeros(9), 1.399760e-6),
    _of(rosenbrock, [-1.2, 1] * 5),
    _of(powell_singular, [3, -1, 0, 1] * 3),
    _of(penalty_1, np.arange(1, 5), 2.249978e-5),
    _of(penalty_1, np.arange(1, 11), 7.087651e-5),
    _of(penalty_2, np.full(4, 0.5), 9.376293e-6),
    _of(penalty_2, np.full(10, 0.5), 2.936605e-4),
    _of(variably_dimensioned, 1 - np.arange(1, 11) / 10),
    _of(trigonometric, np.full(10, 0.1), 0, 2.795057e-5),
    _of(brown_almost_linear, np.full(10, 0.5), 0, 1),
    _of(boundary_value, _GRID * (_GRID - 1)),
    _of(integral_equation, _GRID * (_GRID - 1)),
    _of(broyden_tridiagonal, np.full(10, -1)),
    _of(broyden_banded, np.full(10, -1)),
    _of(linear_full_rank, np.ones(10), 10),
    _of(linear_rank_one, np.ones(10), 10 * 19 / 41 + 0.0),
    _of(linear_rank_one_zeros, np.ones(10), 6.135135),
    _of(chebyquad, np.arange(1, 9) / 9, 3.516874e-3),
)
"""With the numbers of variables that the authors propose."""
