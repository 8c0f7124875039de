"""JAX's processor: chosen before JAX chooses a device itself, with as many threads as dbmpi's kernels."""

from __future__ import annotations

import os
from functools import cache

import jax

from dbmpi.errors import UserError
from dbmpi.machine import threads

_THREADS = "NPROC"
"""The variable that XLA reads when it makes its pool of threads, and takes the cores of the process without."""


@cache
def prepare() -> jax.Device:
    """Return JAX's processor, and start JAX, if that has not happened yet.

    Where the user has not chosen platforms, JAX is limited to the processor: it would otherwise take a GPU by default,
    and most of its memory.

    Raises
    ------
    UserError
        If the user has chosen platforms without the processor.
    """
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    theirs = os.environ.get(_THREADS)
    if theirs is None:
        os.environ[_THREADS] = str(threads.prepare().threads)
    try:
        return jax.local_devices(backend="cpu")[0]
    except (RuntimeError, AssertionError):  # the latter where no platform of the list exists
        raise UserError(
            f"dbmpi.jax computes on the processor, and JAX has none: JAX_PLATFORMS is {jax.config.jax_platforms!r}; "
            "add cpu to it, or unset it"
        ) from None
    finally:
        if theirs is None:
            del os.environ[_THREADS]
