"""Named arrays of a user: what may be trained, how they differ between ranks, and gradients that fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dbmpi.errors import UserError, suggestion
from dbmpi.index.layout import Layout, Tensor
from dbmpi.kernels.checks import all_finite, copy_finite

Named = dict[str, np.ndarray]


def flatten(arrays: Any, what: str = "arrays") -> Named:
    """Return all arrays of a dict, which may contain dicts, by names such as ``layer/weights``, sorted by name.

    Parameters
    ----------
    arrays
        The dict.
    what
        Its name in messages.

    Raises
    ------
    UserError
        If it is no such dict.
    """
    if not isinstance(arrays, Mapping):
        raise UserError(f"ParameterServer: {what} is a {type(arrays).__name__}: expected a dict of named arrays")
    found: Named = {}
    for name, array in _leaves(arrays, what, ""):
        if name in found:
            raise UserError(f"ParameterServer: {what}: two arrays have the name {name!r}; give one another key")
        found[name] = array
    return dict(sorted(found.items()))


def _leaves(arrays: Mapping[Any, Any], what: str, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in arrays.items():
        if not isinstance(key, str):
            raise UserError(f"ParameterServer: {what}: the key {key!r} is a {type(key).__name__}: expected a string")
        if isinstance(value, Mapping):
            yield from _leaves(value, what, f"{prefix}{key}/")
        elif isinstance(value, np.ndarray):
            yield prefix + key, value
        elif isinstance(value, np.generic) and what == "gradients":  # what NumPy makes of arrays with no axes
            yield prefix + key, np.asarray(value)
        else:
            given = type(value).__name__
            raise UserError(f"ParameterServer: {what}: {prefix + key!r} is a {given}: expected a NumPy array")


def check(arrays: Named) -> tuple[Layout, np.dtype[Any]]:
    """Return the layout of arrays that can be trained, and their dtype.

    Parameters
    ----------
    arrays
        By name.

    Raises
    ------
    UserError
        If there are none, or one cannot be trained.
    """
    if not sum(array.size for array in arrays.values()):
        raise UserError("ParameterServer: there are no parameters: expected at least one array with an element")
    first, dtype = next((name, array.dtype) for name, array in arrays.items())
    owners: dict[tuple[Any, ...], str] = {}
    for name, array in arrays.items():
        if array.dtype not in (np.float32, np.float64) or not array.dtype.isnative:
            raise UserError(f"ParameterServer: {name!r} has the dtype {array.dtype}: expected float32 or float64")
        if array.dtype != dtype:
            raise UserError(
                f"ParameterServer: {name!r} is {array.dtype} and {first!r} is {dtype}: expected one dtype; use a "
                "parameter server for each"
            )
        if not array.flags.writeable:
            raise UserError(f"ParameterServer: {name!r} is read-only, and fetch writes to it; give a copy of it")
        memory = (array.__array_interface__["data"][0], array.shape, array.strides)
        if array.size and owners.setdefault(memory, name) != name:
            raise UserError(
                f"ParameterServer: {owners[memory]!r} and {name!r} are the same array: give it once, and add up its "
                "gradients"
            )
        if not np.isfinite(array).all():
            raise UserError(f"ParameterServer: {name!r} {_not_finite(array)}: expected initial values that are finite")
    return Layout(tuple(Tensor(name, array.shape) for name, array in arrays.items())), dtype


def described(arrays: Named) -> dict[str, list[Any]]:
    """Return the shape and dtype of each of these `arrays`, as JSON keeps them."""
    return {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()}


def difference(mine: dict[str, list[Any]], theirs: dict[str, list[Any]], rank: int, other: int) -> str:
    """Return the first difference between the arrays of two ranks in words; empty if there is none.

    Parameters
    ----------
    mine, theirs
        As returned by `described`.
    rank, other
        The ranks.
    """
    for name in sorted({*mine, *theirs}):
        if name not in mine or name not in theirs:
            has, lacks = (other, rank) if name not in mine else (rank, other)
            return f"rank {has} has an array {name!r}, which rank {lacks} has not"
        for what, own, its in zip(("shape", "dtype"), mine[name], theirs[name], strict=True):
            if own != its:
                return f"{name!r} has the {what} {own} on rank {rank}, and {its} on rank {other}"
    return ""


def take(gradients: Any, places: Named, *, finite: bool) -> None:
    """Copy gradients to where they are pushed from; one that lies there already is only looked at.

    Parameters
    ----------
    gradients
        A dict like that of the parameters.
    places
        Where each belongs, contiguous.
    finite
        Whether to refuse numbers that are not finite.

    Raises
    ------
    UserError
        If a gradient is missing, or is not one of its parameter.
    """
    given = flatten(gradients, "gradients")
    for name in given:
        if name not in places:
            raise UserError(f"ParameterServer: no parameter has the name {name!r}; {suggestion(name, places)}")
    for name, place in places.items():
        gradient = given.get(name)
        if gradient is None:
            raise UserError(f"ParameterServer: the gradient of {name!r} is missing; push zeros if it has none")
        for what, got, wanted in (("shape", gradient.shape, place.shape), ("dtype", gradient.dtype, place.dtype)):
            if got != wanted:
                raise UserError(
                    f"ParameterServer: the gradient of {name!r} has the {what} {got}, and the parameter {wanted}"
                )
        if place.size and not _put(gradient, place, finite):
            raise UserError(
                f"ParameterServer: the gradient of {name!r} {_not_finite(gradient)}; nothing was pushed: lower the "
                "learning rate, or look at the batch"
            )


def _put(gradient: np.ndarray, place: np.ndarray, finite: bool) -> bool:
    """Copy a gradient; return whether it may be pushed."""
    flat = place.reshape(-1)
    lies_there = gradient.ctypes.data == place.ctypes.data and gradient.flags.c_contiguous
    if not lies_there and finite and gradient.flags.carray:  # others would be compiled for
        return bool(copy_finite(flat, gradient.reshape(-1)))
    if not lies_there:
        np.copyto(place, gradient)
    return not finite or all_finite(flat)


def _not_finite(array: np.ndarray) -> str:
    """Name the first element that is not finite."""
    index = tuple(int(number) for number in np.argwhere(~np.isfinite(array))[0])
    return f"is not finite: its element {list(index)} is {array[index]}"
