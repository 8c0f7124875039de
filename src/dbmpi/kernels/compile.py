"""How kernels are compiled: the one module that owns Numba's options.

A kernel is a function of arrays that Numba compiles on its first call and stores on disk.  Every kernel releases the
GIL, divides as NumPy does (no exception at zero), and works for float32 and float64.  Three kinds differ in what the
compiler may do with the arithmetic:

==================  ==============================================================================
`kernel`            IEEE arithmetic in the order of the source: bit for bit what NumPy computes
`fast_kernel`       sums may be reordered and products fused into additions, so that reductions vectorise
`parallel_kernel`   as `fast_kernel`, and loops over ``prange`` are shared by the threads of the process
==================  ==============================================================================

NaN and infinity keep their meaning in all of them.

Threads cost time themselves: to wake them takes longer than what a tiny network's kernels do.  Calls on few elements
therefore run on one thread, with the same result; and a process that is to use one thread alone (`limit_threads`) runs
code that was compiled without threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, update_wrapper
from types import FunctionType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import numba
import numpy as np

from dbmpi.kernels.store import KernelStore, code_text, source_digest
from dbmpi.machine import threads

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)

# Where Numba was loaded before dbmpi, it has more threads than this rank should use.
THREADS: int = min(numba.config.NUMBA_NUM_THREADS, threads.prepare().kernels)  # type: ignore[attr-defined]
"""The most threads that kernels may use in this process."""

SERIAL = 1 << 16
"""Elements, in all arrays of a call, up to which a kernel runs on one thread."""

REORDERED = {"reassoc", "nsz", "contract"}
"""Fast-math flags of sums: order and fusing are free, NaN and infinity are not."""


class Kernel(Protocol[P, R_co]):
    """A compiled function; `py_func` is the same in plain Python, for tests and debuggers."""

    @property
    def py_func(self) -> Callable[P, R_co]:
        """The function as it was written."""
        ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run the compiled code."""
        ...


def kernel(function: Callable[P, R_co]) -> Kernel[P, R_co]:
    """Compile `function` with IEEE arithmetic in the order of the source."""
    return _compile(function, "exact")


def exact_parallel_kernel(function: Callable[P, R_co]) -> Kernel[P, R_co]:
    """Compile `function` as `kernel` does, with loops over ``prange`` shared by the threads."""
    return _compile(function, "exact_parallel", parallel=True)


def fast_kernel(function: Callable[P, R_co]) -> Kernel[P, R_co]:
    """Compile `function` with sums that may be reordered."""
    return _compile(function, "fast", fastmath=REORDERED)


def parallel_kernel(function: Callable[P, R_co]) -> Kernel[P, R_co]:
    """Compile `function` as `fast_kernel` does, with loops over ``prange`` shared by the threads."""
    return _compile(function, "fast_parallel", fastmath=REORDERED, parallel=True)


def inlined(function: Callable[P, R_co]) -> Kernel[P, R_co]:
    """Compile `function`, of an element or a row, into the loops that call it; products may be fused into additions."""
    return _compile(function, "inlined", fastmath={"contract"}, forceinline=True)


class _Limit:
    """How many threads kernels use at present."""

    threads = THREADS


def limit_threads(number: int) -> int:
    """Let kernels use at most `number` threads from now on, and return how many they will use."""
    _Limit.threads = max(1, min(number, THREADS))
    return _Limit.threads


@contextmanager
def at_most(number: int) -> Iterator[None]:
    """Let kernels that this thread of Python's calls use at most `number` threads for a while."""
    before = numba.get_num_threads()
    if before <= number:
        yield
        return
    numba.set_num_threads(number)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def _compile(function: Callable[P, R_co], kind: str, parallel: bool = False, **options: Any) -> Kernel[P, R_co]:
    if parallel and THREADS > 1:
        return _Threaded(function, kind, options)
    return _jitted(function, kind, options)


def _jitted(function: Callable[P, R_co], kind: str, options: dict[str, Any]) -> Kernel[P, R_co]:
    # Symbols follow from names: functions that one factory made, or that were compiled from other sources or with other
    # options, may meet in a process that loads all of them from disk.
    sources = source_digest(function) or ""
    function.__qualname__ = f"{function.__qualname__}{_variant(function)}_{kind}_{sources}"
    disabled, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, 0  # type: ignore[attr-defined]
    try:  # some kernels contain LLVM's instructions, which Python cannot run; only a user's own code is not compiled
        compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    finally:
        numba.config.DISABLE_JIT = disabled  # type: ignore[attr-defined]
    store = KernelStore(function)
    compiled._cache, compiled.compile = store, store.compile_once(compiled.compile)
    return cast(Kernel[P, R_co], compiled)


class _Threaded(Generic[P, R_co]):
    """A kernel that leaves the threads alone where there is little to do."""

    def __init__(self, function: Callable[P, R_co], kind: str, options: dict[str, Any]) -> None:
        self._alone_as = (_copy(function), kind, options)
        self._compiled = _jitted(function, f"{kind}_threads", options | {"parallel": True})
        self.py_func = self._compiled.py_func

    @cached_property
    def _alone(self) -> Kernel[P, R_co]:
        """The same, compiled without threads."""
        return _jitted(*self._alone_as)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        most = _Limit.threads
        if most == 1:
            return self._alone(*args, **kwargs)
        elements = 0
        for value in (*args, *kwargs.values()):
            for one in value if isinstance(value, tuple) else (value,):  # an array may come with its steps
                if isinstance(one, np.ndarray):
                    elements += one.size
        with at_most(1 if elements <= SERIAL else most):
            return self._compiled(*args, **kwargs)


def _copy(function: Callable[P, R_co]) -> Callable[P, R_co]:
    """Return a function of the same code that can have another name."""
    assert isinstance(function, FunctionType)
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return update_wrapper(made, function)


def _variant(function: Callable[..., Any]) -> str:
    """Return a suffix that distinguishes functions of one factory, by the variables that they close over."""
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    if not held:
        return ""
    return "_" + hashlib.blake2s(" ".join(map(_text, held)).encode(), digest_size=4).hexdigest()


def _text(value: Any) -> str:
    """Return a text that distinguishes a value, or a function, from others that a kernel may close over."""
    value = getattr(value, "py_func", value)
    if isinstance(value, FunctionType):
        return f"{value.__qualname__} {code_text(value.__code__)}"
    if isinstance(value, (np.generic, np.ndarray)):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    if isinstance(value, (bool, int, float, str, tuple, type(None))):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__name__))
