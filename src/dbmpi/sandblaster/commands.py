"""The commands that a coordinator sends to the shards: an operation, names of vectors, and numbers.

They are the paper's "small set of operations ... that can be performed by each parameter server shard independently,
with the results being stored locally on the same shard" (section 4.2).  A command is a few hundred bytes in a plain
format of its own; reading one runs no code, and whatever is not a whole command is refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dbmpi.methods.space import Order, RunningSpace, Space

_HEAD = struct.Struct("<4sBHHI")
_MAGIC = b"dbc1"
_NOTHING = np.empty(0)

LONGEST_NAME = 64
"""Characters of the name of a vector: printable ASCII."""


class Command(NamedTuple):
    """What a shard is to do."""

    operation: str
    """One of `OPERATIONS`."""
    names: tuple[str, ...]
    scalars: tuple[float, ...]

    def encode(self) -> bytes:
        """Return the command as bytes.

        Raises
        ------
        ValueError
            If it is not a command that `decode` would read.
        """
        self._check()
        names = b"".join(bytes([len(name)]) + name.encode("ascii") for name in self.names)
        scalars = struct.pack(f"<{len(self.scalars)}d", *self.scalars)
        size = _HEAD.size + len(names) + len(scalars)
        code = _CODES.index(self.operation)
        return _HEAD.pack(_MAGIC, code, len(self.names), len(self.scalars), size) + names + scalars

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Command:
        """Read what `encode` wrote.

        Raises
        ------
        ValueError
            If the bytes are anything but one whole command.
        """
        data = bytes(data)
        if len(data) < _HEAD.size:
            raise ValueError(f"a command has at least {_HEAD.size} bytes, not {len(data)}")
        magic, code, name_count, scalar_count, size = _HEAD.unpack_from(data)
        if magic != _MAGIC or code >= len(_CODES) or size != len(data):
            raise ValueError("these bytes are not a command")
        names, place = [], _HEAD.size
        for _ in range(name_count):
            if place >= size:
                raise ValueError("the command ends within its names")
            length = data[place]
            name = data[place + 1 : place + 1 + length]
            if len(name) != length or not name.isascii():
                raise ValueError("the command has a damaged name")
            names.append(name.decode("ascii"))
            place += 1 + length
        if size - place != 8 * scalar_count:
            raise ValueError(f"the command has {size - place} bytes for {scalar_count} numbers of 8")
        command = cls(_CODES[code], tuple(names), struct.unpack_from(f"<{scalar_count}d", data, place))
        command._check()
        return command

    def _check(self) -> None:
        """Raise a ValueError where the names or numbers are not those of the operation."""
        if self.operation not in OPERATIONS:
            raise ValueError(f"there is no operation {self.operation!r}; there are: {', '.join(OPERATIONS)}")
        if len(self.names) >= 1 << 16 or len(self.scalars) >= 1 << 16:
            raise ValueError(f"a command has at most {(1 << 16) - 1} names and numbers")
        for name in self.names:
            if not 0 < len(name) <= LONGEST_NAME or not name.isascii() or not name.isprintable():
                raise ValueError(f"a vector's name is 1 to {LONGEST_NAME} printable ASCII characters, not {name!r}")
        if not OPERATIONS[self.operation].fits(len(self.names), self.scalars):
            raise ValueError(
                f"the operation {self.operation!r} does not go with {len(self.names)} names "
                f"and the numbers {self.scalars[:4]}"
            )


def execute(space: Space, command: Command) -> np.ndarray:
    """Carry out a command, and return the float64 numbers that it asks for, often none.

    Raises
    ------
    ValueError
        If the command makes no sense, or names a vector that is not there.
    """
    command._check()
    result = OPERATIONS[command.operation].run(space, command.names, command.scalars)
    return _NOTHING if result is None else result


class RemoteSpace:
    """A space that others hold: every operation becomes a command.

    Parameters
    ----------
    submit
        Has a command carried out by all shards, and returns what `execute` returned on one of them.  It need not
        wait for commands that return no numbers, as long as their order is kept.
    names
        Vectors that are there already.
    """

    def __init__(self, submit: Callable[[Command], np.ndarray], names: Iterable[str] = ()) -> None:
        self._submit = submit
        self._names = dict.fromkeys(names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the vectors."""
        return tuple(self._names)

    def create(self, name: str, dtype: str | None = None) -> None:
        """Make a vector of zeros."""
        self._submit(Command("create", (name,), (float(_DTYPES.index(dtype)),)))
        self._names[name] = None

    def copy(self, source: str, target: str) -> None:
        """Set ``target = source``."""
        self._submit(Command("copy", (source, target), ()))

    def scale(self, name: str, factor: float) -> None:
        """Multiply a vector by a number."""
        self._submit(Command("scale", (name,), (float(factor),)))

    def axpy(self, factor: float, source: str, target: str) -> None:
        """Set ``target = target + factor * source``."""
        self._submit(Command("axpy", (source, target), (float(factor),)))

    def combine(self, target: str, terms: Sequence[tuple[float, str]]) -> None:
        """Set `target` to a sum of multiples of vectors."""
        names = (target, *(name for _, name in terms))
        self._submit(Command("combine", names, tuple(float(coefficient) for coefficient, _ in terms)))

    def multiply(self, left: str, right: str, target: str) -> None:
        """Set ``target = left * right``, element by element."""
        self._submit(Command("multiply", (left, right, target), ()))

    def advance(self, point: str, origin: str, step: float, direction: str) -> None:
        """Set ``origin = point`` and then ``point = point + step * direction``."""
        self._submit(Command("advance", (point, origin, direction), (float(step),)))

    def dots(self, pairs: Sequence[tuple[str, str]], maxima: Sequence[str] = ()) -> np.ndarray:
        """Return the dot products of all pairs, then the largest magnitudes of the vectors in `maxima`."""
        names = (*(name for pair in pairs for name in pair), *maxima)
        return self._submit(Command("dots", names, (float(len(pairs)),)))

    def norms(self, names: Sequence[str], order: Order = "max") -> np.ndarray:
        """Return the largest magnitude of every vector, or with ``order="one"`` the sum of its magnitudes."""
        return self._submit(Command("norms", tuple(names), (float(_ORDERS.index(order)),)))

    def pseudo_gradient(self, point: str, gradient: str, strength: float, target: str) -> None:
        """Set `target` to the pseudo-gradient."""
        self._submit(Command("pseudo_gradient", (point, gradient, target), (float(strength),)))

    def align(self, direction: str, gradient: str) -> None:
        """Set elements of the direction to zero where they do not descend."""
        self._submit(Command("align", (direction, gradient), ()))

    def project(self, point: str, origin: str, gradient: str) -> None:
        """Set elements of the point to zero that left the orthant."""
        self._submit(Command("project", (point, origin, gradient), ()))


Names = tuple[str, ...]
Scalars = tuple[float, ...]


class _Operation(NamedTuple):
    fits: Callable[[int, Scalars], bool]
    """Whether so many names and these numbers go with the operation."""
    run: Callable[[Space, Names, Scalars], np.ndarray | None]


def _counts(names: int, scalars: int) -> Callable[[int, Scalars], bool]:
    return lambda name_count, numbers: name_count == names and len(numbers) == scalars


def _choice(names: int, choices: int) -> Callable[[int, Scalars], bool]:
    """Fit at least so many names, and a number that is a place among the choices."""
    return lambda count, numbers: count >= names and len(numbers) == 1 and numbers[0] in range(choices)


def _fits_dots(count: int, numbers: Scalars) -> bool:
    return len(numbers) == 1 and math.isfinite(numbers[0]) and numbers[0] in range(count // 2 + 1)


def _run_dots(space: Space, names: Names, scalars: Scalars) -> np.ndarray:
    pairs = int(scalars[0])
    return space.dots(list(zip(names[: 2 * pairs : 2], names[1 : 2 * pairs : 2], strict=True)), names[2 * pairs :])


def _of_a_run(space: Space) -> RunningSpace:
    if not isinstance(space, RunningSpace):
        raise ValueError("this operation is only for the shards of a run")
    return space


_DTYPES = (None, "float32", "float64")
_ORDERS: tuple[Order, ...] = ("max", "one")

OPERATIONS: dict[str, _Operation] = {
    "create": _Operation(
        lambda count, numbers: count == 1 and _choice(1, len(_DTYPES))(count, numbers),
        lambda space, names, scalars: space.create(names[0], _DTYPES[int(scalars[0])]),
    ),
    "copy": _Operation(_counts(2, 0), lambda space, names, scalars: space.copy(*names)),
    "scale": _Operation(_counts(1, 1), lambda space, names, scalars: space.scale(names[0], scalars[0])),
    "axpy": _Operation(_counts(2, 1), lambda space, names, scalars: space.axpy(scalars[0], *names)),
    "combine": _Operation(
        lambda count, numbers: count == len(numbers) + 1 and count > 1,
        lambda space, names, scalars: space.combine(names[0], list(zip(scalars, names[1:], strict=True))),
    ),
    "multiply": _Operation(_counts(3, 0), lambda space, names, scalars: space.multiply(*names)),
    "advance": _Operation(
        _counts(3, 1), lambda space, names, scalars: space.advance(names[0], names[1], scalars[0], names[2])
    ),
    "dots": _Operation(_fits_dots, _run_dots),
    "norms": _Operation(
        _choice(0, len(_ORDERS)), lambda space, names, scalars: space.norms(names, _ORDERS[int(scalars[0])])
    ),
    "pseudo_gradient": _Operation(
        _counts(3, 1), lambda space, names, scalars: space.pseudo_gradient(names[0], names[1], scalars[0], names[2])
    ),
    "align": _Operation(_counts(2, 0), lambda space, names, scalars: space.align(*names)),
    "project": _Operation(_counts(3, 0), lambda space, names, scalars: space.project(*names)),
    "accrue": _Operation(
        lambda count, numbers: count == 1 and len(numbers) == 2 and all(n >= 0 and n % 1 == 0 for n in numbers),
        lambda space, names, scalars: _of_a_run(space).accrue(names[0], int(scalars[0]), int(scalars[1])),
    ),
    "meet": _Operation(_counts(0, 0), lambda space, names, scalars: _of_a_run(space).meet()),
    "hand_over": _Operation(
        lambda count, numbers: not numbers, lambda space, names, scalars: _of_a_run(space).hand_over(names)
    ),
    "end": _Operation(_counts(0, 0), lambda space, names, scalars: _of_a_run(space).end()),
}
"""What shards can do; the place in this table is an operation's code."""

_CODES = tuple(OPERATIONS)
