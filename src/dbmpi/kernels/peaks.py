"""The most operations a second that one core does, without any memory: what products are measured against.

By the processor's time, as it is a property of the core and not of what else the core is doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from dbmpi.kernels.compile import Kernel, kernel
from dbmpi.kernels.llvm.pairs import CHAIN_OPERATIONS, CONFIGURATION, configure_tiles, pair_chains, release_tiles
from dbmpi.kernels.llvm.tiles import CHAINS, multiply_add_chains
from dbmpi.kernels.llvm.writer import lanes

_ROUNDS = 2_000_000
"""Length of the chains that are measured: some thousandths of a second."""


def multiply_add_peak() -> float:
    """Measure the float32 multiply-add peak of one core, in operations a second."""
    return 2 * CHAINS * lanes(4) * _rounds_a_second(lambda rounds: _multiply_add(np.float32(0), rounds))


def pairs_peak(tiles: bool) -> float:
    """Measure the peak of one core on pairs of bfloat16 numbers, by tiles or by vectors, in operations a second."""
    chains, configuration = _pairs(tiles), np.frombuffer(CONFIGURATION, np.uint8)
    return CHAIN_OPERATIONS[tiles] * _rounds_a_second(lambda rounds: chains(configuration, np.float32(0), rounds))


def _rounds_a_second(work: Callable[[int], object]) -> float:
    work(10)
    began = time.process_time()
    work(_ROUNDS)
    return _ROUNDS / max(time.process_time() - began, 1e-9)


@kernel
def _multiply_add(start: Any, rounds: int) -> float:
    return multiply_add_chains(start, rounds)  # type: ignore[no-any-return]


@cache
def _pairs(tiles: bool) -> Kernel[..., float]:
    def chains(configuration: np.ndarray, start: Any, rounds: int) -> float:
        if tiles:
            configure_tiles(configuration)
        result = pair_chains(tiles, start, rounds)
        if tiles:
            release_tiles()
        return result  # type: ignore[no-any-return]

    return kernel(chains)
