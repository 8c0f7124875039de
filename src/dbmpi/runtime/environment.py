"""What a process must decide before NumPy and Numba are loaded, in one call."""

from __future__ import annotations

from dbmpi.runtime import blas, kernelcache, threads


def prepare() -> str:
    """Choose threads, BLAS kernel and kernel cache for this process; return one line that says what was chosen."""
    preparation = threads.prepare()
    kernel = blas.prepare()
    kernelcache.prepare()
    return f"{preparation.line}; {kernel}"
