"""How fast one thread computes layers of each kind, and makes batches of samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from dbmpi import config
from dbmpi.data.gather import gather
from dbmpi.index.boxes import Box
from dbmpi.kernels import compile as compiling
from dbmpi.kernels.memory import aligned_empty
from dbmpi.machine import openblas
from dbmpi.network.description import layer_of
from dbmpi.network.layer import Backward, Context, Forward, Layer
from dbmpi.network.losses import Loss
from dbmpi.plan.constants import FIRST, WEIGHTED
from dbmpi.plan.work import size_of

_SECONDS = 0.03
"""For which something short is repeated."""
_LEAST, _MOST = 3, 40
"""Repeats."""
_SCRUBBED = 1 << 22
"""Numbers that pass through the caches between two repeats: in a step, other layers and vectors do that."""
_ITEM = 4
_SAMPLES = (8, 32, 128, 512)
_BYTES = (1 << 16, 1 << 20, 1 << 24)
_LAYERS: dict[str, tuple[tuple[config.Section, tuple[int, ...]], ...]] = {
    "dense": tuple(
        (config.Dense(units=size, activation="sigmoid"), (size,)) for size in (30, 100, 200, 400, 800, 2000)
    ),
    "local": (
        (config.Local(maps=4, field=5), (3, 32, 32)),
        (config.Local(maps=4, field=7), (3, 32, 32)),
        (config.Local(maps=8, field=7), (3, 32, 32)),
        (config.Local(maps=8, field=10), (8, 40, 40)),
    ),
    "convolution": (
        (config.Convolution(maps=8, field=5), (3, 32, 32)),
        (config.Convolution(maps=32, field=5), (16, 40, 40)),
    ),
    "pooling": (
        (config.Pooling(size=3, stride=3), (8, 24, 24)),
        (config.Pooling(size=5, stride=2), (8, 24, 24)),
        (config.Pooling(size=5, stride=2), (8, 80, 80)),
    ),
    "normalisation": tuple((config.Normalisation(), (8, side, side)) for side in (24, 80)),
    "dropout": tuple((config.Dropout(rate=0.5), (size,)) for size in (256, 4096)),
}
SPREAD_LAYER = (config.Dense(units=512, activation="sigmoid"), (512,))
"""The equal work whose times are compared."""
Rows = list[tuple[float, ...]]


def undisturbed_seconds(work: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """Return the time that a fifth of the repeats of some `work` stay below: disturbances only make it longer.

    By a `clock`: the processor's time of this thread, as other programs may want the core, too.
    """
    return float(np.quantile(repeated_seconds(work, clock=clock), 0.2))


def repeated_seconds(
    work: Callable[[], object], least: int = _LEAST, clock: Callable[[], float] = time.thread_time
) -> list[float]:
    """Return the times of some `work`, after a first time that compiles it: `least` of them, more of short work.

    Parameters
    ----------
    work
        What is timed.
    least
        Repeats, at least.
    clock
        Gives the time, in seconds.
    """
    work()
    others, taken = np.zeros(_SCRUBBED, np.float32), list[float]()
    while len(taken) < least or (sum(taken) < _SECONDS and len(taken) < _MOST):
        others += 1
        began = clock()
        work()
        taken.append(clock() - began)
    return taken


def layers() -> Iterator[tuple[str, float, float, int, Callable[[], object]]]:
    """Yield kind, size, operations of a sample, samples, and a pass forward and backward, of each layer to be timed."""
    for kind, described in _LAYERS.items():
        for section, shape in described:
            layer = layer_of(section, "measured", shape)
            whole = Box.whole(layer.output_shape)
            for first in (False, True) if kind in WEIGHTED else (False,):
                operations = float(layer.flops(whole, 1, input_gradient=not first))
                for samples in _SAMPLES:
                    name = f"{kind}{FIRST}" if first else kind
                    yield name, size_of(layer, whole), operations, samples, passes(layer, samples, first=first)


def passes(layer: Layer, samples: int, *, first: bool = False) -> Callable[[], object]:
    """Return a function that runs a layer forward and backward on a batch of random samples.

    Parameters
    ----------
    layer
        The layer.
    samples
        Of the batch.
    first
        Whether it is the first one, so that no gradient for its inputs is needed.
    """
    random, context, output = np.random.default_rng(1), Context(), Box.whole(layer.output_shape)
    tensors = {name: _random(random, layer.tensors[name].shape, 0.05) for name in layer.tensors}
    gradients = {name: np.empty_like(values) for name, values in tensors.items()}
    inputs = _random(random, (*layer.input_shape, samples), 1.0)
    outputs, below = aligned_empty((*layer.output_shape, samples)), None if first else np.empty_like(inputs)
    given = _random(random, outputs.shape, 0.01)
    gradient = np.empty_like(given)

    def work() -> None:
        np.copyto(gradient, given)
        layer.forward(Forward(output, tensors, inputs, outputs, context))
        layer.backward(Backward(output, tensors, inputs, outputs, context, gradient, gradients, below))

    return work


def copies() -> Iterator[tuple[int, Callable[[], object]]]:
    """Yield bytes, and a copy of so many, of each to be timed."""
    for nbytes in _BYTES:
        source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        yield nbytes, lambda s=source, t=target: np.copyto(t, s)  # type: ignore[misc]


def loss_seconds() -> float:
    """Return the time of a loss over classes, and of its gradient, for each output of each sample."""
    outputs, samples = 1000, 128
    random, loss = np.random.default_rng(1), Loss("softmax", "classes")
    given = _random(random, (outputs, samples), 1.0)
    targets, values = random.integers(0, outputs, samples).astype(np.int32), np.empty_like(given)

    def work() -> None:
        np.copyto(values, given)
        loss.apply(values, targets)

    return undisturbed_seconds(work) / (outputs * samples)


def batch_bandwidth() -> float:
    """Return the bytes of a batch that are made of samples in memory in a second."""
    rows = np.ones((8192, 2048), np.float32)  # far more than caches hold, as samples are
    indices = np.random.default_rng(1).permutation(len(rows))[:128]
    seconds = undisturbed_seconds(lambda: gather(rows, indices, np.float32(1)))
    return rows.shape[1] * len(indices) * _ITEM / seconds


@contextmanager
def one_thread() -> Iterator[int]:
    """Use one thread in the block; give the number of threads that there are otherwise."""
    threads = compiling.THREADS
    changed = [library for library in openblas.loaded() if library.threads > 1]
    before = [library.threads for library in changed]
    compiling.limit_threads(1)
    for library in changed:
        library.set_threads(1)
    try:
        yield threads
    finally:
        compiling.limit_threads(threads)
        for library, number in zip(changed, before, strict=True):
            library.set_threads(number)


def thread_gain(threads: int) -> float | None:
    """Return what each further thread adds to the speed of a large dense layer, 0 to 1; None with one thread.

    Parameters
    ----------
    threads
        That a rank has.
    """
    if threads < 2:
        return None
    section, shape = _LAYERS["dense"][-1]
    work = passes(layer_of(section, "measured", shape), 128)
    with one_thread():
        alone = undisturbed_seconds(work, time.perf_counter)
    ratio = alone / undisturbed_seconds(work, time.perf_counter)
    return min(max((ratio - 1) / (threads - 1), 0.0), 1.0)


def _random(random: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    values = aligned_empty(shape)
    values[...] = size * random.standard_normal(math.prod(shape), np.float32).reshape(shape)
    return values
