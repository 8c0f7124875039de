"""Vector instructions for kernels, written in LLVM's language, which its compiler does not find by itself.

LLVM turns plain loops into vector instructions well, but does not keep a block of two dozen vector accumulators in
registers across a loop.  That is what dense arithmetic lives on: with one accumulator every multiply-add waits for
the one before it, and from memory the core's two multiply-add units starve.

This module knows the processor's vectors and has the parts that instructions are made of.  `tiles` has tiles of matrix
products, `rows` products with rows at any offsets, `lanes` operations across the lanes of vectors, and `streams`
passes over many long vectors; `bus_errors` has a handler of a signal.  Nothing else writes LLVM instructions.

Instructions are functions of a `Call`; their docstrings describe the arguments of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import update_wrapper
from inspect import Parameter, Signature
from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic


def _features() -> frozenset[str]:
    """Return the features of this processor that the compiler may use: those of NUMBA_CPU_FEATURES, if it is set."""
    allowed = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if allowed is None:
        allowed = get_host_cpu_features()  # type: ignore[no-untyped-call]
    return frozenset(allowed.split(","))


FEATURES = _features()
"""The features of the processor, each after a +."""


def _vector_bytes() -> tuple[int, int]:
    """Return the bytes of a vector register and how many of them this processor has."""
    if "+avx512f" in FEATURES:
        return 64, 32
    if "+avx2" in FEATURES:
        return 32, 16
    if "+neon" in FEATURES:
        return 16, 32
    return 16, 16


VECTOR_BYTES, REGISTERS = _vector_bytes()


def lanes(itemsize: int) -> int:
    """Return how many elements of `itemsize` bytes a vector holds."""
    return VECTOR_BYTES // itemsize


def instructions(
    arguments: str, constants: str = "", result: Any = types.void
) -> Callable[[Callable[[Call], Any]], Any]:
    """Let kernels call what the decorated function writes: it is given the `Call`.

    Parameters
    ----------
    arguments : str
        Names of the call's arguments, in order.  Integers among them are as wide as addresses.
    constants : str
        Names of those that must be constants, or tuples of them, when a kernel is compiled.
    result
        Numba's type of the result, or the name of an argument of the same type; by default there is none.
    """
    names, fixed = arguments.split(), constants.split()

    def decorated(write: Callable[[Call], Any]) -> Any:
        def typed(typingctx: Any, *given: Any) -> Any:
            kinds = {name: _passed(kind, name in fixed) for name, kind in zip(names, given, strict=True)}
            if not all(isinstance(one, types.Literal) for name in fixed for one in _elements(kinds[name])):
                return None

            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                written = write(Call(context, builder, kinds, dict(zip(names, values, strict=True))))
                return context.get_dummy_value() if written is None else written

            return kinds.get(result, result)(*kinds.values()), generate

        parameters = [Parameter(name, Parameter.POSITIONAL_ONLY) for name in ("typingctx", *names)]
        typed.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # Numba reads the arguments from it
        return intrinsic(prefer_literal=True)(update_wrapper(typed, write, updated=()))

    return decorated


def _passed(kind: Any, constant: bool) -> Any:
    """Return the type that an argument is passed as."""
    if constant:
        return kind
    kind = getattr(kind, "literal_type", kind)
    return types.intp if isinstance(kind, types.Integer) else kind


def _elements(kind: Any) -> Sequence[Any]:
    """Return the types of a tuple's elements; of anything else, its own."""
    elements: Sequence[Any] = getattr(kind, "types", [kind])
    return elements


class Call:
    """A call of instructions, whose arguments have names.

    Parameters
    ----------
    context, builder
        Numba's and llvmlite's: where instructions go.
    kinds : dict[str, type]
        Numba's types of the arguments.
    values : dict[str, value]
        Their values in LLVM.
    """

    def __init__(self, context: Any, builder: Any, kinds: dict[str, Any], values: dict[str, Any]) -> None:
        self.builder, self.kinds, self.values = builder, kinds, values
        self._context = context

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def constant(self, name: str) -> Any:
        """Return the value of the constant `name`; that of a tuple of constants as a list."""
        kind = self.kinds[name]
        return kind.literal_value if isinstance(kind, types.Literal) else [one.literal_value for one in kind]

    def pointer(self, array: str, start: str = "") -> Any:
        """Return the address of the first element of `array`, or that of the element whose index is `start`."""
        data = self._made(array).data
        return self.builder.gep(data, [self.values[start]], inbounds=True) if start else data

    def size(self, array: str) -> Any:
        """Return the number of elements of `array`, 1-D."""
        return self.builder.extract_value(self._made(array).shape, 0)

    def numbers(self, name: str) -> list[Any]:
        """Return the elements of the tuple `name`."""
        return list(cgutils.unpack_tuple(self.builder, self.values[name]))  # type: ignore[no-untyped-call]

    def itemsize(self, array: str) -> int:
        """Return the bytes of an element of `array`."""
        return int(self._context.get_abi_sizeof(self._context.get_data_type(self.kinds[array].dtype)))

    def _made(self, array: str) -> Any:
        return self._context.make_array(self.kinds[array])(self._context, self.builder, self.values[array])


class Writer:
    """Writes instructions on vectors of one float type, the base of all others.

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
        """Return the function of LLVM's own that is called `name`, with types of its `result` and `arguments`."""
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)  # type: ignore[no-untyped-call]

    def multiply_add(self, one: Any, other: Any, addend: Any) -> Any:
        """Return ``one * other + addend``."""
        return self.builder.call(self._fmuladd, [one, other, addend])

    def loop(
        self, count: int, start: Any, stop: Any, carried: list[Any], steps: Callable[[Any, list[Any]], list[Any]]
    ) -> tuple[Any, list[Any]]:
        """Loop k from `start` to `stop`, `count` at a time; vectors that are carried on stay in registers.

        Parameters
        ----------
        count : int
            How much k grows each time.
        start, stop : value
        carried : list of vectors
            Before the loop.
        steps
            Writes the body for k and the carried vectors, and returns the new ones.

        Returns
        -------
        tuple
            The last k, and the last vectors.
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
        """Loop as `loop` does, as long as `count` steps remain (a power of two), and by single ones then.

        Parameters
        ----------
        count, start, stop, carried
            As for `loop`.
        steps
            Writes some steps: takes k, their number and the carried vectors, and returns the new ones.

        Returns
        -------
        list
            The last vectors.
        """
        if count == 1:
            return self.loop(1, start, stop, carried, lambda k, values: steps(k, 1, values))[1]
        whole = self.builder.add(start, self.builder.and_(self.builder.sub(stop, start), self.index(-count)))
        k, carried = self.loop(count, start, whole, carried, lambda k, values: steps(k, count, values))
        return self.loop(1, k, stop, carried, lambda k, values: steps(k, 1, values))[1]

    def blocks(self, heights: list[int], numbers: list[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the height and the first row of blocks of rows, one below the other, where their instructions belong.

        There are ``numbers[i]`` blocks of ``heights[i]`` rows; heights of 0 are passed over.
        """
        first = self.index(0)
        for height, number in zip(heights, numbers, strict=True):
            if height > 0:
                stop = self.builder.add(first, self.builder.mul(number, self.index(height)))
                with cgutils.for_range_slice(self.builder, first, stop, self.index(height)) as (row, _):
                    yield height, row
                first = stop

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """Return the address that is all `offsets` elements, numbers or values, after `pointer`."""
        for offset in offsets:
            steps = self.index(offset) if isinstance(offset, int) else offset
            pointer = self.builder.gep(pointer, [steps], inbounds=True)
        return pointer

    def strided(self, start: Any, stride: Any, count: int) -> list[Any]:
        """Return `count` addresses from `start` on, each `stride` elements after the one before."""
        pointers = [start]
        for _ in range(count - 1):
            pointers.append(self.at(pointers[-1], stride))
        return pointers

    def opaque(self, pointer: Any) -> Any:
        """Return `pointer` in a way that hides from the compiler how it was computed."""
        kind = ir.FunctionType(pointer.type, [pointer.type])
        return self.builder.asm(kind, "", "=r,0", [pointer], side_effect=False)

    def barrier(self) -> None:
        """Keep the compiler from moving loads across this point; it is no instruction."""
        self.builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], side_effect=True)

    def spread(self, value: Any, kind: Any = None) -> Any:
        """Return a vector of one value; of the type `kind` where its elements are no floats."""
        nothing = ir.Constant(kind or self.vector, ir.Undefined)
        single = self.builder.insert_element(nothing, value, self.short(0))
        return self.shuffle(single, nothing, [0] * self.lanes)

    def spread_at(self, pointer: Any, *offsets: Any) -> Any:
        """Return a vector of the one value at an address: `offsets` elements after `pointer`."""
        return self.spread(self.builder.load(self.at(pointer, *offsets)))

    def shuffle(self, one: Any, other: Any, order: list[int]) -> Any:
        """Return the elements of the vectors `one` and `other`, numbered on through both, in the order `order`."""
        return self.builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(self.short, len(order)), order))

    def load(self, pointer: Any, alignment: int | None = None) -> Any:
        """Return the vector at `pointer`, which is aligned to an element, or to `alignment` bytes."""
        value = self.builder.load(self.as_vector(pointer))
        value.align = alignment or self.itemsize
        return value

    def store(self, value: Any, pointer: Any) -> None:
        """Store the vector `value` at `pointer`, which is aligned to an element."""
        self.builder.store(value, self.as_vector(pointer)).align = self.itemsize

    def as_vector(self, pointer: Any) -> Any:
        """Return the address `pointer` as that of a vector."""
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def prefetch(self, pointer: Any, write: bool = False, level: int = 3) -> None:
        """Prefetch the cache line at `pointer`, to `write` or to read; `level` 3 is the first cache, 2 the second."""
        address = self.builder.bitcast(pointer, ir.IntType(8).as_pointer())
        flags = [self.short(flag) for flag in (int(write), level, 1)]
        self.builder.call(self._prefetch, [address, *flags])


class MaskedWriter(Writer):
    """Writes instructions on rows of vectors that need not be full.

    A row comes with a list of masks, one a vector, that mark its elements: all where a mask is None.  Nothing else is
    read or written.

    Parameters
    ----------
    builder, itemsize
        As for `Writer`.
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
        """Return the masks of `vectors` vectors of which `filled` elements are used."""
        builder, many = self.builder, ir.VectorType(self.index, self.lanes)
        counts = self.spread(filled, many)
        return [
            builder.icmp_signed("<", ir.Constant(many, list(range(first, first + self.lanes))), counts)
            for first in range(0, vectors * self.lanes, self.lanes)
        ]

    def load_row(self, row: Any, masks: list[Any]) -> list[Any]:
        """Return the vectors of the row at an address, 0 where `masks` have no element."""
        values = []
        for vector, mask in enumerate(masks):
            address = self.at(row, vector * self.lanes)
            if mask is None:
                values.append(self.load(address))
            else:
                arguments = [self.as_vector(address), self.short(self.itemsize), mask, self.zero]
                values.append(self.builder.call(self._masked_load, arguments))
        return values

    def store_row(self, values: list[Any], row: Any, masks: list[Any]) -> None:
        """Store the vectors `values` of the row at an address, but for elements that `masks` leave out."""
        for vector, (value, mask) in enumerate(zip(values, masks, strict=True)):
            address = self.at(row, vector * self.lanes)
            if mask is None:
                self.store(value, address)
            else:
                arguments = [value, self.as_vector(address), self.short(self.itemsize), mask]
                self.builder.call(self._masked_store, arguments)
