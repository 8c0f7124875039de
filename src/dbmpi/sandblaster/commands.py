"""The commands that a coordinator sends to the shards: an operation and its arguments, as JSON.

They are the paper's "small set of operations ... that can be performed by each parameter server shard independently,
with the results being stored locally on the same shard" (section 4.2).  Reading one runs no code, and anything but a
whole command with fitting arguments is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from dbmpi.methods.space import Order, Space

LONGEST_NAME = 64
"""Characters of the name of a vector: printable ASCII."""

_Name = Annotated[str, StringConstraints(pattern=f"^[ -~]{{1,{LONGEST_NAME}}}$")]
_Count = Annotated[int, Field(ge=0)]

OPERATIONS: dict[str, TypeAdapter[Any]] = {
    "create": TypeAdapter(tuple[_Name, Literal["float32", "float64"] | None]),
    "copy": TypeAdapter(tuple[_Name, _Name]),
    "scale": TypeAdapter(tuple[_Name, float]),
    "axpy": TypeAdapter(tuple[float, _Name, _Name]),
    "combine": TypeAdapter(tuple[_Name, Annotated[tuple[tuple[float, _Name], ...], Field(min_length=1)]]),
    "multiply": TypeAdapter(tuple[_Name, _Name, _Name]),
    "advance": TypeAdapter(tuple[_Name, _Name, float, _Name]),
    "dots": TypeAdapter(tuple[tuple[tuple[_Name, _Name], ...], tuple[_Name, ...]]),
    "norms": TypeAdapter(tuple[tuple[_Name, ...], Order]),
    "pseudo_gradient": TypeAdapter(tuple[_Name, _Name, float, _Name]),
    "align": TypeAdapter(tuple[_Name, _Name]),
    "project": TypeAdapter(tuple[_Name, _Name, _Name]),
    "accrue": TypeAdapter(tuple[_Name, _Count, _Count]),
    "meet": TypeAdapter(tuple[()]),
    "snapshot": TypeAdapter(tuple[_Count, _Count, tuple[_Name, ...], bool]),
    "end": TypeAdapter(tuple[()]),
}
"""What shards can do: methods of `Space` and of :class:`~dbmpi.sandblaster.shard.ShardSpace`, with their arguments."""


class Command(NamedTuple):
    """An operation for a shard to carry out."""

    operation: str
    """One of `OPERATIONS`."""
    arguments: tuple[Any, ...]

    def checked(self) -> Command:
        """Return the command with its arguments as plain numbers, texts and tuples.

        Raises
        ------
        ValueError
            If there is no such operation, or the arguments do not fit it.
        """
        if self.operation not in OPERATIONS:
            raise ValueError(f"there is no operation {self.operation!r}; there are: {', '.join(OPERATIONS)}")
        try:
            return Command(self.operation, OPERATIONS[self.operation].validate_python(self.arguments))
        except ValidationError as error:
            wrong = "; ".join(f"{problem['msg']}, not {problem['input']!r:.80}" for problem in error.errors()[:3])
            raise ValueError(f"wrong arguments for the operation {self.operation!r}: {wrong}") from None

    def encode(self) -> bytes:
        """Return the command as bytes; raises as `checked` does."""
        return _text(self.checked())

    @classmethod
    def decode(cls, data: bytes | bytearray) -> Command:
        """Return the command that `data` holds, bytes that `encode` wrote; a ValueError for any others."""
        try:
            operation, arguments = json.loads(data)
            command = cls(operation, arguments).checked()
            whole = _text(command) == data
        except (ValueError, TypeError) as error:
            raise ValueError(f"these bytes are not a command: {error}") from None
        if not whole:
            raise ValueError("these bytes are not a command as it is written")
        return command


def _text(command: Command) -> bytes:
    return json.dumps(command, separators=(",", ":")).encode()


def execute(space: Space, command: Command) -> np.ndarray:
    """Carry out a command, and return the float64 numbers that it asks for, often none.

    Raises
    ------
    ValueError
        If the command is none of `OPERATIONS`, cannot be carried out by this space, or names a missing vector.
    """
    operation, arguments = command.checked()
    method = getattr(space, operation, None)
    if method is None:
        raise ValueError(f"the operation {operation!r} is only for the shards of a run")
    result = method(*arguments)
    return np.empty(0) if result is None else result


class RemoteSpace:
    """A :class:`~dbmpi.methods.space.Space` whose vectors lie on shards: every operation becomes a command.

    Parameters
    ----------
    submit
        Has a command carried out by all shards, and returns the result of `execute` on one of them.  It need not
        wait for commands that return no numbers, as long as their order is kept.
    names
        Vectors that exist already.
    """

    def __init__(self, submit: Callable[[Command], np.ndarray], names: Iterable[str] = ()) -> None:
        self._submit = submit
        self._names = dict.fromkeys(names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the vectors."""
        return tuple(self._names)

    def create(self, name: str, dtype: str | None = None) -> None:
        """Make a vector `name` of zeros, of the given `dtype` or that of the space."""
        self._do("create", name, dtype)
        self._names[name] = None

    def copy(self, source: str, target: str) -> None:
        """Set ``target = source``."""
        self._do("copy", source, target)

    def scale(self, name: str, factor: float) -> None:
        """Multiply the vector `name` by `factor`."""
        self._do("scale", name, factor)

    def axpy(self, factor: float, source: str, target: str) -> None:
        """Set ``target = target + factor * source``."""
        self._do("axpy", factor, source, target)

    def combine(self, target: str, terms: Sequence[tuple[float, str]]) -> None:
        """Set `target` to the sum of ``coefficient * vector`` over the `terms`."""
        self._do("combine", target, terms)

    def multiply(self, left: str, right: str, target: str) -> None:
        """Set ``target = left * right``, element by element."""
        self._do("multiply", left, right, target)

    def advance(self, point: str, origin: str, step: float, direction: str) -> None:
        """Set ``origin = point`` and then ``point = point + step * direction``.

        Parameters
        ----------
        point, origin, step, direction
            As for `Space`.
        """
        self._do("advance", point, origin, step, direction)

    def dots(self, pairs: Sequence[tuple[str, str]], maxima: Sequence[str] = ()) -> np.ndarray:
        """Return the dot products of all pairs, then the largest magnitudes of the vectors in `maxima`."""
        return self._do("dots", pairs, maxima)

    def norms(self, names: Sequence[str], order: Order = "max") -> np.ndarray:
        """Return the largest magnitude of each of the vectors `names`, or with ``order="one"`` the sum."""
        return self._do("norms", names, order)

    def pseudo_gradient(self, point: str, gradient: str, strength: float, target: str) -> None:
        """Set `target` to the pseudo-gradient.

        Parameters
        ----------
        point, gradient, strength, target
            As for `Space`.
        """
        self._do("pseudo_gradient", point, gradient, strength, target)

    def align(self, direction: str, gradient: str) -> None:
        """Set elements of `direction` to zero where they do not descend along ``-gradient``."""
        self._do("align", direction, gradient)

    def project(self, point: str, origin: str, gradient: str) -> None:
        """Set elements of `point` to zero that left the orthant of `origin` and ``-gradient``."""
        self._do("project", point, origin, gradient)

    def _do(self, operation: str, *arguments: Any) -> np.ndarray:
        return self._submit(Command(operation, arguments))
