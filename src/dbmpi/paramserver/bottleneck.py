"""Do the shards limit the speed of a run?  Advice from what shards and workers measure of themselves."""

from __future__ import annotations

import time
from functools import cache

import numpy as np

APPLYING = 0.8
"""Fraction of a shard's time spent applying gradients from which it is a bottleneck, however little workers wait."""
WAITING = 0.25
"""Fraction of the workers' time spent in transfers from which a shard busy half the time is a bottleneck too."""
_BYTES = 32 << 20
_ROUNDS = 3


@cache
def copy_bandwidth() -> float:
    """Return the bytes that a core reads and writes a second when it copies: measured once, in some 50 ms.

    By the processor's time, as other programs may use the core, too.
    """
    source, target = np.ones(_BYTES, np.uint8), np.ones(_BYTES, np.uint8)
    fastest = np.inf
    for _ in range(_ROUNDS):
        began = time.thread_time()
        np.copyto(target, source)
        fastest = min(fastest, time.thread_time() - began)
    return 2 * _BYTES / fastest


def moved_bytes(applied_bytes: int, states: int) -> int:
    """Return the bytes that a rule's kernel has read and written.

    It reads the gradient, and reads and writes the parameters and each array of state.

    Parameters
    ----------
    applied_bytes
        Bytes of gradients applied.
    states
        Number of arrays in the rule's state.
    """
    return (3 + 2 * states) * applied_bytes


def advice(applying: float, waiting: float) -> str:
    """Return one line for the user if the shards limit the speed of a run, otherwise an empty string.

    Parameters
    ----------
    applying
        Fraction of the busiest shard's time spent in the rule's kernel, 0 to 1.
    waiting
        Fraction of the workers' time spent in fetches and pushes, 0 to 1.
    """
    if applying < APPLYING and not (waiting >= WAITING and applying >= 0.5):
        return ""
    return (
        f"shards are the bottleneck: the busiest one applies gradients {100 * applying:.0f} % of the time, and workers "
        f"wait {100 * waiting:.0f} % of theirs for fetches and pushes; set a larger topology.shards or optimizer.n_push"
    )
