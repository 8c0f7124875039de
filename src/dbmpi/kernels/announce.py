"""Reports on kernels that are being compiled: the first start on a machine takes much longer than others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from numba.core import event

from dbmpi.kernels.store import KernelStore

EVERY = 3.0
"""Seconds between two lines."""


@contextmanager
def announced(say: Callable[[str], object] | None) -> Iterator[Callable[[], object]]:
    """Report kernels that are compiled in the block, from the first one on; those loaded from disk are not reported.

    Parameters
    ----------
    say
        Takes a line of text; None reports nothing.

    Yields
    ------
    callable
        Call it when all kernels are compiled: it reports how many there were, if any.
    """
    if say is None:
        yield lambda: None
        return
    listener = _Listener(say)
    with event.install_listener("numba:compile", listener):
        yield listener.finish


def stderr_line(name: str, line: str) -> None:
    """Write ``name: line`` on standard error; a closed stream is ignored."""
    with suppress(OSError):
        print(f"{name}: {line}", file=sys.stderr, flush=True)


def _is_foreign(event: Any) -> bool:
    """Whether a function is no kernel of ours: a user's objective, for instance, or a function that it calls."""
    return not event.data["dispatcher"].py_func.__module__.startswith("dbmpi.")


class _Listener(event.Listener):
    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._kernels = self._depth = 0
        self._began = self._said = 0.0

    def on_start(self, event: Any) -> None:
        """Report that a function begins to be compiled: a kernel, or one that it calls."""
        if _is_foreign(event):
            return
        now = time.monotonic()
        if self._kernels == self._depth == 0:
            self._began = self._said = now
            self._say("compiling kernels for this processor, which takes up to a minute, the first time on a machine")
        elif now - self._said >= EVERY:
            self._said = now
            self._say(f"compiling kernels: {self._kernels} done, {now - self._began:.0f} s")
        self._depth += 1

    def on_end(self, event: Any) -> None:
        """Count it."""
        if _is_foreign(event):
            return
        self._depth -= 1
        self._kernels += self._depth == 0

    def finish(self) -> None:
        """Report how many there were."""
        if not self._kernels:
            return
        kept = "later starts find them"
        if KernelStore.unkept:
            kept = f"later starts will compile them again, as they cannot be kept: {KernelStore.unkept}"
        seconds = time.monotonic() - self._began
        self._say(f"compiled {self._kernels} kernel{'s' if self._kernels > 1 else ''} in {seconds:.0f} s; {kept}")
        self._kernels = 0
