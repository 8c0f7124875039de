"""Vector instructions for kernels, written in LLVM's language: what its compiler does not find by itself.

LLVM turns plain loops into vector instructions well, but does not keep a block of two dozen vector accumulators in
registers across a loop.  That is what dense arithmetic lives on: with one accumulator every multiply-add waits for
the one before it, and from memory the core's two multiply-add units starve.

This module knows the processor's vectors and has what the instructions are made of.  ``vector_tiles`` has tiles of
matrix products, ``vector_rows`` products with rows that lie anywhere, ``vector_lanes`` what goes across the lanes
of vectors, and ``vector_streams`` passes over many long vectors.  Nothing else writes LLVM instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic


def _vector_bytes() -> tuple[int, int]:
    """Return the bytes of a vector register and how many of them this processor has."""
    features = get_host_cpu_features()  # type: ignore[no-untyped-call]  # honours NUMBA_CPU_FEATURES, as the compiler does
    if "+avx512f" in features:
        return 64, 32
    if "+avx2" in features:
        return 32, 16
    if "+neon" in features:
        return 16, 32
    return 16, 16


VECTOR_BYTES, REGISTERS = _vector_bytes()


def lanes(itemsize: int) -> int:
    """Return how many elements of `itemsize` bytes a vector holds."""
    return VECTOR_BYTES // itemsize


def instructions(function: Callable[..., Any]) -> Any:
    """Let kernels call what a function of (typing context, types) describes."""
    return intrinsic(prefer_literal=True)(function)


def constants(*given: Any) -> bool:
    """Return whether the types of arguments are those of constants, or of tuples of them."""
    return all(isinstance(one, types.Literal) for some in given for one in getattr(some, "types", [some]))


def literals(given: Any) -> list[Any]:
    """Return the values of a tuple of constants, of which the type is given."""
    return [one.literal_value for one in given]


def signature_of(*given: Any) -> Any:
    """Return the signature of a call without a result: integers are as wide as addresses, all else is as given."""
    return types.void(
        *(types.intp if isinstance(one, types.Integer) and not isinstance(one, types.Literal) else one for one in given)
    )


class Arguments:
    """The arguments of a call of instructions, by their places."""

    def __init__(self, context: Any, builder: Any, signature: Any, values: Any) -> None:
        self._context, self._builder, self._types, self.values = context, builder, signature.args, values

    def pointer(self, array: int, start: int | None = None) -> Any:
        """Return the address in the array that is one argument, at the index that is another."""
        data = self._context.make_array(self._types[array])(self._context, self._builder, self.values[array]).data
        return data if start is None else self._builder.gep(data, [self.values[start]], inbounds=True)

    def size(self, array: int) -> Any:
        """Return the number of elements of the array that is one argument, 1-D."""
        made = self._context.make_array(self._types[array])(self._context, self._builder, self.values[array])
        return self._builder.extract_value(made.shape, 0)

    def numbers(self, argument: int) -> list[Any]:
        """Return the elements of the tuple that is one argument."""
        return list(cgutils.unpack_tuple(self._builder, self.values[argument]))  # type: ignore[no-untyped-call]

    def itemsize(self, array: int) -> int:
        """Return the bytes of an element of the array that is one argument."""
        return int(self._context.get_abi_sizeof(self._context.get_data_type(self._types[array].dtype)))


class Writer:
    """Writes instructions on vectors of one float type: what all larger pieces are made of.

    Parameters
    ----------
    builder
        Where the instructions go.
    itemsize : int
        Bytes of an element: 4 or 8.
    """

    unrolled = 4

    def __init__(self, builder: Any, itemsize: int) -> None:
        self.builder, self.itemsize, self.lanes = builder, itemsize, lanes(itemsize)
        self.element = ir.FloatType() if itemsize == 4 else ir.DoubleType()
        self.vector = ir.VectorType(self.element, self.lanes)
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)
        self.index, self.short = ir.IntType(64), ir.IntType(32)
        # Fused where the processor can, and otherwise two instructions (llvm.fma would call a function there).
        self._fmuladd = self.declared(f"llvm.fmuladd.v{self.lanes}f{8 * itemsize}", self.vector, [self.vector] * 3)
        byte = ir.IntType(8).as_pointer()
        self._prefetch = self.declared("llvm.prefetch.p0", ir.VoidType(), [byte, *[self.short] * 3])

    def declared(self, name: str, result: Any, arguments: list[Any]) -> Any:
        """Return one of LLVM's own functions."""
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)  # type: ignore[no-untyped-call]

    def multiply_add(self, one: Any, other: Any, addend: Any) -> Any:
        """Return ``one * other + addend``."""
        return self.builder.call(self._fmuladd, [one, other, addend])

    def loop(
        self, count: int, start: Any, stop: Any, carried: list[Any], steps: Callable[[Any, list[Any]], list[Any]]
    ) -> tuple[Any, list[Any]]:
        """Loop k from `start` to `stop`, `count` at a time; vectors that are carried on stay in registers.

        `steps` writes the body for k and the carried vectors, and returns the new ones.  Returns the last k
        and vectors.
        """
        builder = self.builder
        before = builder.block
        head, body, after = (builder.append_basic_block(f"loop.{part}") for part in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(self.index)
        k.add_incoming(start, before)
        phis = []
        for value in carried:
            phis.append(builder.phi(value.type))
            phis[-1].add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", k, stop), body, after)
        builder.position_at_end(body)
        results = steps(k, list(phis))
        k.add_incoming(builder.add(k, self.index(count)), builder.block)
        for phi, value in zip(phis, results, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return k, list(phis)

    def unrolled_loop(
        self,
        count: int,
        start: Any,
        stop: Any,
        carried: list[Any],
        steps: Callable[[Any, int, list[Any]], list[Any]],
    ) -> list[Any]:
        """Loop as `loop` does, for as long as `count` steps remain (a power of two), and by single ones then.

        `steps` is told, after k, how many steps to write.
        """
        if count == 1:
            return self.loop(1, start, stop, carried, lambda k, values: steps(k, 1, values))[1]
        whole = self.builder.add(start, self.builder.and_(self.builder.sub(stop, start), self.index(-count)))
        k, carried = self.loop(count, start, whole, carried, lambda k, values: steps(k, count, values))
        return self.loop(1, k, stop, carried, lambda k, values: steps(k, 1, values))[1]

    def blocks(self, heights: list[int], numbers: list[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the height and the first row of blocks of rows, one below the other, where their instructions belong.

        There are so many of each height; heights of 0 are passed over.
        """
        first = self.index(0)
        for height, number in zip(heights, numbers, strict=True):
            if height > 0:
                stop = self.builder.add(first, self.builder.mul(number, self.index(height)))
                with cgutils.for_range_slice(self.builder, first, stop, self.index(height)) as (row, _):
                    yield height, row
                first = stop

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """Return the address so many elements on; offsets are numbers or values."""
        for offset in offsets:
            steps = self.index(offset) if isinstance(offset, int) else offset
            pointer = self.builder.gep(pointer, [steps], inbounds=True)
        return pointer

    def strided(self, start: Any, stride: Any, count: int) -> list[Any]:
        """Return `count` addresses, each `stride` elements after the one before."""
        pointers = [start]
        for _ in range(count - 1):
            pointers.append(self.at(pointers[-1], stride))
        return pointers

    def opaque(self, pointer: Any) -> Any:
        """Return an address of which the compiler does not know how it was made."""
        kind = ir.FunctionType(pointer.type, [pointer.type])
        return self.builder.asm(kind, "", "=r,0", [pointer], side_effect=False)

    def spread(self, value: Any) -> Any:
        """Return a vector of one value."""
        nothing = ir.Constant(self.vector, ir.Undefined)
        single = self.builder.insert_element(nothing, value, self.short(0))
        return self.shuffle(single, nothing, [0] * self.lanes)

    def spread_at(self, pointer: Any, *offsets: Any) -> Any:
        """Return a vector of the one value at an address."""
        return self.spread(self.builder.load(self.at(pointer, *offsets)))

    def shuffle(self, one: Any, other: Any, order: list[int]) -> Any:
        """Return the elements of two vectors, numbered on through both, in an order."""
        return self.builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(self.short, len(order)), order))

    def load(self, pointer: Any, alignment: int | None = None) -> Any:
        """Return the vector at an address, which is aligned to an element, or to so many bytes."""
        value = self.builder.load(self.as_vector(pointer))
        value.align = alignment or self.itemsize
        return value

    def store(self, value: Any, pointer: Any) -> None:
        """Store a vector at an address, which is aligned to an element."""
        self.builder.store(value, self.as_vector(pointer)).align = self.itemsize

    def as_vector(self, pointer: Any) -> Any:
        """Return the address as that of a vector."""
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def prefetch(self, pointer: Any, write: bool = False, level: int = 3) -> None:
        """Ask for a cache line: 3 is the first cache, 2 the second."""
        address = self.builder.bitcast(pointer, ir.IntType(8).as_pointer())
        flags = [self.short(flag) for flag in (int(write), level, 1)]
        self.builder.call(self._prefetch, [address, *flags])


class MaskedWriter(Writer):
    """Writes instructions on rows of vectors that need not be full.

    A row comes with a list of masks, one a vector, that say which of its elements there are: all where a mask is None.
    Nothing is read or written beyond them.
    """

    def __init__(self, builder: Any, itemsize: int) -> None:
        super().__init__(builder, itemsize)
        mask, pointer = ir.VectorType(ir.IntType(1), self.lanes), self.vector.as_pointer()
        name = f"v{self.lanes}f{8 * itemsize}.p0"
        self._masked_load = self.declared(
            f"llvm.masked.load.{name}", self.vector, [pointer, self.short, mask, self.vector]
        )
        self._masked_store = self.declared(
            f"llvm.masked.store.{name}", ir.VoidType(), [self.vector, pointer, self.short, mask]
        )

    def masks(self, vectors: int, filled: Any) -> list[Any]:
        """Return the masks of vectors of which so many elements are filled."""
        builder, many = self.builder, ir.VectorType(self.index, self.lanes)
        start = ir.Constant(many, ir.Undefined)
        counts = self.shuffle(builder.insert_element(start, filled, self.short(0)), start, [0] * self.lanes)
        return [
            builder.icmp_signed("<", ir.Constant(many, list(range(first, first + self.lanes))), counts)
            for first in range(0, vectors * self.lanes, self.lanes)
        ]

    def load_row(self, row: Any, masks: list[Any]) -> list[Any]:
        """Return the vectors of a row, 0 where there is no element."""
        values = []
        for vector, mask in enumerate(masks):
            place = self.at(row, vector * self.lanes)
            if mask is None:
                values.append(self.load(place))
            else:
                arguments = [self.as_vector(place), self.short(self.itemsize), mask, self.zero]
                values.append(self.builder.call(self._masked_load, arguments))
        return values

    def store_row(self, values: list[Any], row: Any, masks: list[Any]) -> None:
        """Store the vectors of a row."""
        for vector, (value, mask) in enumerate(zip(values, masks, strict=True)):
            place = self.at(row, vector * self.lanes)
            if mask is None:
                self.store(value, place)
            else:
                arguments = [value, self.as_vector(place), self.short(self.itemsize), mask]
                self.builder.call(self._masked_store, arguments)
