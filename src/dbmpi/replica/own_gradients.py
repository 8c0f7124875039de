"""Gradients of a user's own objective on their way to where they are pushed from, array by array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dbmpi.errors import RunFailed, UserError
from dbmpi.index.layout import Layout
from dbmpi.kernels import updates
from dbmpi.kernels.checks import all_finite, copy_finite
from dbmpi.kernels.memory import aligned_empty
from dbmpi.objective import Gradient, Gradients

DTYPE = np.dtype(np.float32)


class OwnGradients(Gradients):
    """Takes the gradients of one batch after the other.

    An optimizer wants arrays from the last to the first.  One that comes too early waits: where it is to be pushed from
    if that is its own memory, and else, where arrays share memory, as the user's own array.

    Parameters
    ----------
    layout
        Of the parameters.
    shapes
        Of the parameters as the user knows them, by name.
    called
        What the objective is called in messages.
    checks
        Whether gradients that are not finite are to be noticed here.
    """

    def __init__(
        self, layout: Layout, shapes: Mapping[str, tuple[int, ...]], called: str, *, checks: bool = True
    ) -> None:
        self._checks = checks
        self._shapes, self._called = shapes, called
        self._numbers = {name: number for number, name in enumerate(shapes)}
        self._parts = [
            slice(start, start + tensor.size)
            for tensor, start in zip(layout.tensors, layout.offsets.values(), strict=True)
        ]
        self._scratch: dict[int, np.ndarray] = {}
        self._gradient: Gradient = np.empty(0, DTYPE)
        self._on_gradient: Callable[[int], None] | None = None
        self._add = False
        self._next = -1
        self._complete: set[int] = set()
        self._early: dict[int, np.ndarray] = {}
        """What waits for memory that it shares with others."""
        self._not_finite = ""

    def begin(self, gradient: Gradient, on_gradient: Callable[[int], None] | None = None, *, add: bool = False) -> None:
        """Take the gradients of another batch.

        Parameters
        ----------
        gradient, on_gradient, add
            As for any objective; each array is a layer.
        """
        self._gradient, self._on_gradient, self._add = gradient, on_gradient, add
        self._next, self._not_finite = len(self._parts) - 1, ""
        self._complete.clear()
        self._early.clear()

    def out(self, name: str) -> np.ndarray:
        """Return memory to compute the gradient of the parameter `name` in (see `Gradients`)."""
        number = self._number(name)
        if self._add or (callable(self._gradient) and number != self._next):
            if number not in self._scratch:
                part = self._parts[number]
                self._scratch[number] = aligned_empty(part.stop - part.start, DTYPE)
            found = self._scratch[number]
        else:
            found = self._target(number)
        return found.reshape(self._shapes[name])

    def ready(self, name: str, values: Any) -> None:
        """Take the complete gradient of the parameter `name` from `values` (see `Gradients`)."""
        number = self._number(name)
        if number in self._complete:
            raise UserError(f"{self._called}: the gradient of {name!r} is ready twice; expected it once in a step")
        array = np.asarray(values)
        if array.dtype.kind != "f":
            raise UserError(f"{self._called}: the gradient of {name!r} is {array.dtype}; expected a float array")
        if array.shape != self._shapes[name]:
            raise UserError(
                f"{self._called}: the gradient of {name!r} has shape {array.shape}; expected that of the parameter, "
                f"{self._shapes[name]}"
            )
        self._complete.add(number)
        if callable(self._gradient) and number != self._next:
            self._early[number] = array
        else:
            self._write(number, array)
        while self._next in self._complete:
            if self._next in self._early:
                self._write(self._next, self._early.pop(self._next))
            if self._on_gradient is not None:
                self._on_gradient(self._next)
            self._next -= 1

    def finish(self, *, expect_finite: bool) -> None:
        """Check that all gradients came, and that they are finite if that is expected.

        Parameters
        ----------
        expect_finite
            Whether the loss is.

        Raises
        ------
        UserError
            If one is missing.
        RunFailed
            If one is not finite.
        """
        if self._next >= 0:
            missing = next(name for name, number in self._numbers.items() if number not in self._complete)
            raise UserError(
                f"{self._called}: the gradient of {missing!r}: there is none; expected one for each of "
                f"{[*self._shapes]}"
            )
        if expect_finite and self._not_finite:
            raise RunFailed(f"{self._called}: the loss is finite, but the gradient of {self._not_finite!r} is not")

    def _number(self, name: str) -> int:
        try:
            return self._numbers[name]
        except KeyError:
            raise UserError(
                f"{self._called}: the gradient of {name!r}: no parameter is called so; expected one for each of "
                f"{[*self._shapes]}"
            ) from None

    def _target(self, number: int) -> np.ndarray:
        """Return the memory that the gradient of an array is pushed from, flat."""
        return self._gradient(number) if callable(self._gradient) else self._gradient[self._parts[number]]

    def _write(self, number: int, values: np.ndarray) -> None:
        """Copy or add a gradient to where it is pushed from, and note whether it is finite."""
        target = self._target(number)
        # A kernel knows arrays of one kind only: others would be compiled anew.
        plain = values.dtype == target.dtype == DTYPE and values.flags.carray
        there = plain and values.ctypes.data == target.ctypes.data
        if plain and not self._add and not there:
            finite = copy_finite(target, values.reshape(-1))
        else:
            shaped = target.reshape(values.shape)
            if plain and self._add:
                updates.add(target, values.reshape(-1))
            elif self._add:
                with np.errstate(over="ignore"):
                    np.add(shaped, values, out=shaped, casting="same_kind")
            elif not there:
                with np.errstate(over="ignore"):
                    np.copyto(shaped, values, casting="same_kind")
            finite = not self._checks or all_finite(target)
        if not finite and not self._not_finite:
            self._not_finite = [*self._shapes][number]
