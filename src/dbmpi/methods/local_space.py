"""The part of a space that one shard holds.

Results do not depend on the number of shards, to the last bit: see :mod:`dbmpi.kernels.sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from dbmpi.kernels import sums, vectors
from dbmpi.kernels.memory import aligned_empty
from dbmpi.methods.space import Order

Reduce = Callable[[np.ndarray], np.ndarray]
"""Sum of a small float64 array over all shards, the same on each of them: an Allreduce.

The order of the sums does not matter, because what is summed are integers that float64 holds exactly, and numbers that
are zero on all shards but one.
"""

MARGIN = 4
"""A vector that has been written anew is expected to be at most ``2^MARGIN`` times larger than it was."""
LOOSE = 24
"""An expectation that is ``2^LOOSE`` times too large costs too many digits."""

STAGGER = 3
"""Cache lines by which the beginnings of vectors differ within a page."""


def alone(values: np.ndarray) -> np.ndarray:
    """Return the `values`, which are the sum over the only shard."""
    return values


class LocalSpace:
    """The part of a space that one shard holds, as NumPy arrays.

    All shards execute the same operations in the same order.  Vectors that are given to a space may be written from
    outside at any time between two operations, its own ones through :meth:`writable`.

    Sums need a bound of the elements, the same on all shards, before they begin.  To ask for it would cost a reduction
    of its own.  So the space expects one from what it knows of the vector, sums with that, and lets the true magnitudes
    travel with the sums; only where the expectation was wrong, it sums again.

    Parameters
    ----------
    size
        Elements of this shard's part; may be 0.
    dtype
        float32 or float64, of vectors for which nothing else is said.
    reduce
        Sums over the shards.
    shard, shards
        Number of this shard, and how many there are.
    vectors
        Vectors that are there already, e.g. the parameters in a window: C-contiguous, of `size` elements, float32
        or float64.

    Attributes
    ----------
    before_change
        Called with the name of a vector before it changes, if it is given.
    """

    def __init__(
        self,
        size: int,
        dtype: np.dtype[np.floating] | type[np.floating] | str = np.float32,
        reduce: Reduce = alone,
        shard: int = 0,
        shards: int = 1,
        vectors: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._size, self._dtype, self._reduce = size, _float_type(dtype), reduce
        self.before_change: Callable[[str], None] | None = None
        self._vectors: dict[str, np.ndarray] = {}
        self._given = frozenset(vectors or ())
        self._shard, self._shards = shard, shards
        self._own_largest: dict[str, float] = {}
        """Largest magnitudes of this part, where they are known."""
        self._largest: dict[str, float] = {}
        """Largest magnitudes over all shards, where they are known."""
        self._expected: dict[str, int] = {}
        """For vectors whose largest magnitude is not known, an e such that it will hardly be beyond 2^e."""
        for name, vector in (vectors or {}).items():
            if vector.shape != (size,) or not vector.flags.c_contiguous or not vector.flags.writeable:
                raise ValueError(
                    f"the vector {name!r} has shape {vector.shape}: a contiguous, writable one of ({size},) is needed"
                )
            _float_type(vector.dtype)
            self._vectors[name] = vector

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the vectors."""
        return tuple(self._vectors)

    def bounds(self) -> dict[str, tuple[int | None, float | None]]:
        """Return what is known of the sizes of all vectors, the same on all shards.

        The last bits of a dot product follow from it: a resumed run needs it, too.
        """
        return {name: (self._expected.get(name), self._largest.get(name)) for name in self._vectors}

    def restore_bounds(self, bounds: Mapping[str, tuple[int | None, float | None]]) -> None:
        """Know what `bounds` told; vectors that it names and that are not there are made, of zeros."""
        for name in bounds:
            if name not in self._vectors:
                self.create(name)
        for name, (expected, largest) in bounds.items():
            for known, number in ((self._expected, expected), (self._largest, largest)):
                known.pop(name, None)
                if number is not None:
                    known[name] = number  # type: ignore[assignment]

    def array(self, name: str) -> np.ndarray:
        """Return this shard's part of the vector `name`, to be read."""
        view = self._get(name).view()
        view.flags.writeable = False
        return view

    def writable(self, name: str) -> np.ndarray:
        """Return this shard's part of the vector `name`, to be written before the next operation.

        All shards call this for the same vectors between the same operations.
        """
        vector = self._changing(name)
        self._wrote(name)
        return vector

    def create(self, name: str, dtype: str | None = None) -> None:
        """Make a vector `name` of zeros, of the given `dtype` or that of the space."""
        wanted = self._dtype if dtype is None else _float_type(dtype)
        if name not in self._vectors:
            self._vectors[name] = aligned_empty(self._size, wanted, STAGGER * len(self._vectors))
        elif self._vectors[name].dtype != wanted:
            raise ValueError(
                f"the vector {name!r} is there already, as {self._vectors[name].dtype} and not as {wanted}"
            )
        self._changing(name)[:] = 0
        self._wrote(name, 0.0)
        self._largest[name] = 0.0

    def copy(self, source: str, target: str) -> None:
        """Set ``target = source``."""
        self.combine(target, [(1.0, source)])

    def scale(self, name: str, factor: float) -> None:
        """Multiply the vector `name` by `factor`."""
        self.combine(name, [(factor, name)])

    def axpy(self, factor: float, source: str, target: str) -> None:
        """Set ``target = target + factor * source``."""
        self.combine(target, [(1.0, target), (factor, source)])

    def combine(self, target: str, terms: Sequence[tuple[float, str]]) -> None:
        """Set `target` to the sum of ``coefficient * vector`` over the `terms`."""
        if not terms:
            raise ValueError("nothing to combine: give at least one term (coefficient, name)")
        sources = [self._get(name) for _, name in terms]
        expected = self._expected_sum(terms)
        largest = vectors.combine(self._changing(target), [float(coefficient) for coefficient, _ in terms], sources)
        self._wrote(target, largest, expected)

    def multiply(self, left: str, right: str, target: str) -> None:
        """Set ``target = left * right``, element by element."""
        vectors.multiply(self._get(left), self._get(right), self._changing(target))
        self._wrote(target)

    def advance(self, point: str, origin: str, step: float, direction: str) -> None:
        """Set ``origin = point`` and then ``point = point + step * direction``.

        Parameters
        ----------
        point, origin, step, direction
            As for `Space`.
        """
        if origin in (point, direction):
            raise ValueError(f"the origin {origin!r} must be a vector of its own")
        vectors.advance(self._changing(point), self._changing(origin), float(step), self._get(direction))
        self._wrote(point)
        self._wrote(origin)

    def pseudo_gradient(self, point: str, gradient: str, strength: float, target: str) -> None:
        """Set `target` to the pseudo-gradient.

        Parameters
        ----------
        point, gradient, strength, target
            As for `Space`.
        """
        vectors.pseudo_gradient(self._get(point), self._get(gradient), float(strength), self._changing(target))
        self._wrote(target)

    def align(self, direction: str, gradient: str) -> None:
        """Set elements of `direction` to zero where they do not descend along ``-gradient``."""
        vectors.align(self._changing(direction), self._get(gradient))
        self._wrote(direction)

    def project(self, point: str, origin: str, gradient: str) -> None:
        """Set elements of `point` to zero that left the orthant of `origin` and ``-gradient``."""
        vectors.project(self._changing(point), self._get(origin), self._get(gradient))
        self._wrote(point)

    def dots(self, pairs: Sequence[tuple[str, str]], maxima: Sequence[str] = ()) -> np.ndarray:
        """Return the dot products of all pairs, then the largest magnitudes of the vectors in `maxima`."""
        names = list(dict.fromkeys([name for pair in pairs for name in pair] + list(maxima)))
        unknown = self._unknown(names)
        # An expectation beyond what can be summed is of no use.
        if any(self._expected.get(name, sums.HIGHEST) > sums.HIGHEST // 2 for name in unknown):
            self._measure(unknown)
            unknown = []
        bounds = {name: self._expected[name] for name in unknown}
        bounds |= {name: sums.bound(size) for name in names if (size := self._largest.get(name, np.inf)) < np.inf}
        result = np.full(len(pairs) + len(maxima), np.nan)
        left = self._sum(list(enumerate(pairs)), bounds, result, unknown)
        if left:
            bounds = {name: sums.bound(size) for name in names if (size := self._largest[name]) < np.inf}
            self._sum(left, bounds, result, [], exact=True)
        result[len(pairs) :] = [self._largest[name] for name in maxima]
        return result

    def norms(self, names: Sequence[str], order: Order = "max") -> np.ndarray:
        """Return the largest magnitude of each of `names`, or with ``order="one"`` the sum of its magnitudes."""
        if order not in ("max", "one"):
            raise ValueError(f"a norm has order 'max' or 'one', not {order!r}")
        self._measure(self._unknown(names))
        largest = {name: self._largest[name] for name in names}
        if order == "max":
            return np.array([largest[name] for name in names])
        result = np.full(len(names), np.nan)
        sound = [(place, name) for place, name in enumerate(names) if largest[name] <= 2.0**sums.HIGHEST]
        if sound:
            bounds = [sums.bound(largest[name]) for _, name in sound]
            own = [sums.sum_magnitudes(self._vectors[name], e) for (_, name), e in zip(sound, bounds, strict=True)]
            limbs = self._reduce(np.concatenate(own).reshape(-1)).reshape(-1, sums.LIMBS)
            result[[place for place, _ in sound]] = sums.values(limbs, [(e, 0) for e in bounds])
        return result

    def _sum(
        self,
        items: list[_Item],
        bounds: Mapping[str, int],
        result: np.ndarray,
        unknown: list[str],
        exact: bool = False,
    ) -> list[_Item]:
        """Write products into the result, by one reduction; return those that have to be summed again.

        Parameters
        ----------
        items
            The products.
        bounds
            The bounds to sum with; without one, and beyond what can be summed, a product is not a number.
        unknown
            Vectors whose bounds are expectations; afterwards their largest magnitudes are known.
        exact
            Sum in two levels what else takes one.
        """
        items = [
            (place, (left, right))
            for place, (left, right) in items
            if left in bounds and right in bounds and bounds[left] + bounds[right] <= sums.HIGHEST
        ]
        # Float32 vectors are summed at the cost of memory alone; what turns out to be too small beside the largest
        # products, e.g. of vectors that are scaled against one another, is summed again.
        single = {name: not exact and self._vectors[name].dtype == np.float32 for name in bounds}
        coarse, fine = list[_Item](), list[_Item]()
        for item in items:
            (coarse if single[item[1][0]] and single[item[1][1]] else fine).append(item)
        own_largest = np.array([self._own(name) for name in unknown])
        magnitudes = np.zeros((self._shards, len(unknown)))
        magnitudes[self._shard] = own_largest
        # This part's sums would overflow where its elements exceed the expectation; what the others say is then moot.
        beyond = {name for name, size in zip(unknown, own_largest, strict=True) if not size <= 2.0 ** bounds[name]}
        own = [np.array([float(self._size)]), magnitudes.reshape(-1)]
        for its, levels in ((coarse, sums.COARSE), (fine, sums.FINE)):
            limbs = np.zeros((len(its), sums.LIMBS))
            where = [place for place, (_, pair) in enumerate(its) if not beyond.intersection(pair)]
            if where:
                names = list(dict.fromkeys(name for place in where for name in its[place][1]))
                numbers = {name: number for number, name in enumerate(names)}
                pairs = [(numbers[left], numbers[right]) for left, right in (its[place][1] for place in where)]
                arrays = [self._vectors[name] for name in names]
                limbs[where] = sums.sum_products(arrays, pairs, [bounds[name] for name in names], levels)
            own.append(limbs.reshape(-1))
        total = self._reduce(np.concatenate(own)) if items or unknown else np.zeros(1)
        size, total = int(total[0]), total[1:]
        largest = total[: magnitudes.size].reshape(magnitudes.shape).max(axis=0)
        self._know(unknown, largest)
        wrong = {
            name
            for name, found in zip(unknown, largest.tolist(), strict=True)
            if not found <= 2.0 ** bounds[name] or sums.bound(found) < bounds[name] - LOOSE
        }
        limbs = total[magnitudes.size :].reshape(-1, sums.LIMBS)
        found = sums.values(limbs, [(bounds[left], bounds[right]) for _, (left, right) in coarse + fine])
        doubtful = sums.doubtful(limbs[: len(coarse)], size) + [False] * len(fine)
        again = []
        for item, value, doubted in zip(coarse + fine, found, doubtful, strict=True):
            if doubted or (wrong and wrong.intersection(item[1])):
                again.append(item)
            else:
                result[item[0]] = value
        return again

    def _unknown(self, names: Iterable[str]) -> list[str]:
        """Return the vectors whose largest magnitude is not known; it may have changed wherever others may write."""
        for name in names:
            self._get(name)
        return [name for name in dict.fromkeys(names) if name in self._given or name not in self._largest]

    def _own(self, name: str) -> float:
        if name in self._given or name not in self._own_largest:
            self._own_largest[name] = vectors.largest_magnitude(self._vectors[name])
        return self._own_largest[name]

    def _measure(self, names: Sequence[str]) -> None:
        """Find the largest magnitudes over all shards; all shards ask one another for the same ones."""
        if names:
            magnitudes = np.zeros((self._shards, len(names)))
            magnitudes[self._shard] = [self._own(name) for name in names]
            self._know(names, self._reduce(magnitudes.reshape(-1)).reshape(magnitudes.shape).max(axis=0))

    def _know(self, names: Sequence[str], largest: np.ndarray) -> None:
        for name, size in zip(names, largest.tolist(), strict=True):
            self._largest[name] = size
            self._expected.pop(name, None)
            if size < np.inf:
                self._expected[name] = min(sums.bound(size) + MARGIN, sums.HIGHEST)

    def _expected_sum(self, terms: Sequence[tuple[float, str]]) -> int | None:
        """Return what to expect of a sum of multiples; None where one of its vectors is wholly unknown."""
        total = 0.0
        for coefficient, name in terms:
            largest = self._largest.get(name)
            if largest is None or name in self._given:
                if name not in self._expected:
                    return None
                largest = 2.0 ** self._expected[name]
            total += abs(coefficient) * largest
        return min(sums.bound(total), sums.HIGHEST) if total < np.inf else None

    def _wrote(self, name: str, own_largest: float | None = None, expected: int | None = None) -> None:
        """Note that a vector has changed; unless more is known, it is expected to be as large as it was."""
        self._largest.pop(name, None)
        self._own_largest.pop(name, None)
        if own_largest is not None:
            self._own_largest[name] = own_largest
        if expected is not None:
            self._expected[name] = expected

    def _changing(self, name: str) -> np.ndarray:
        """Return a vector that is about to change."""
        vector = self._get(name)
        if self.before_change is not None:
            self.before_change(name)
        return vector

    def _get(self, name: str) -> np.ndarray:
        try:
            return self._vectors[name]
        except KeyError:
            known = ", ".join(self._vectors) or "none"
            raise ValueError(f"there is no vector {name!r}; the vectors are: {known}") from None


_Item = tuple[int, tuple[str, str]]
"""A pair of names, and its place in the result."""


def _float_type(dtype: np.dtype[np.floating] | type[np.floating] | str) -> np.dtype[np.floating]:
    wanted = np.dtype(dtype)
    if wanted not in (np.float32, np.float64):
        raise ValueError(f"vectors are float32 or float64, not {wanted}")
    return wanted
