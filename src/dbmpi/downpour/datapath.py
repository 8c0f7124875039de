"""How a Downpour client's loop gets its parameters and hands over its gradients: one after the other, or all at once.

The paper (section 4.1) lets a client fetch, push and compute in three threads that are only weakly synchronised.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dbmpi.config import OptimizerSection, ServerSection
from dbmpi.downpour.buffer import Buffer, buffer_size
from dbmpi.kernels import updates
from dbmpi.kernels.checks import all_finite
from dbmpi.kernels.memory import aligned_empty
from dbmpi.mpi import waiting
from dbmpi.objective import Gradient, Outcome
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.clip import Clip

_FINITE, _LOSS, _LAYERS = 0, 1, 2
"""What is wrong with a gradient: nothing, its loss alone, or from here on the number of a layer added."""


@dataclass(frozen=True)
class Flow:
    """How the gradients of one client leave.

    Without overlap the loop fetches, computes and pushes in turn; with one client this is plain serial learning, bit
    for bit.  With overlap the next parameters arrive and gradients leave while one is computed, and fetched parameters
    may lack the client's own last push.
    """

    layers: tuple[range, ...]
    """For each layer, the range of its parameters in the client's own vector."""
    overlap: bool = False
    """Whether fetches and pushes go on while a gradient is computed."""
    whole: bool = True
    """Whether there is memory for a whole gradient; with overlap for two, one of which grows while the other leaves.
    Otherwise each layer waits for memory that layers share, and a gradient is pushed in every step."""
    apart: bool = False
    """Whether the gradient of each step is needed by itself before it is added to those of earlier steps."""
    at_once: bool = False
    """Whether the whole gradient must be known before any of it leaves: to clip it, or to withhold it."""
    mean: bool = False
    """Whether the mean of the accrued gradients is pushed, and not their sum."""

    @classmethod
    def from_config(cls, server: ServerSection, optimizer: OptimizerSection, layers: tuple[range, ...]) -> Flow:
        """Return the flow that the ``[server]`` and ``[optimizer]`` sections describe.

        Parameters
        ----------
        server, optimizer
            The sections.
        layers
            As the field.
        """
        apart = optimizer.local_rate > 0 and optimizer.n_push > 1
        whole = server.gradients == "whole"
        at_once = optimizer.clip_norm > 0 or (optimizer.most_withheld > 0 and whole)
        return cls(layers, server.overlap == "threads", whole, apart, at_once, optimizer.accumulate == "mean")

    @property
    def by_layers(self) -> bool:
        """Whether each layer's gradient leaves as soon as it is complete."""
        return (self.overlap or not self.whole) and not self.apart and not self.at_once

    @property
    def parts(self) -> tuple[range, ...]:
        """The ranges of the client's own vector that are pushed one by one."""
        return self.layers if self.by_layers else (range(self.size),)

    @property
    def size(self) -> int:
        """Elements of the client's own vector."""
        return sum(map(len, self.layers))

    @property
    def buffer_size(self) -> int:
        """Elements of memory to compute gradients in."""
        return self.size if self.whole else buffer_size(self.layers)


class Push(NamedTuple):
    """What has become of an accrued gradient."""

    steps: int
    """Number of gradients that were added up."""
    outcome: Outcome
    """Of the samples behind them."""
    withheld: bool = False
    """Whether nothing of it is pushed, because it or its loss is not finite on some partition of the replica."""
    layer: int | None = None
    """The last layer whose gradient is not finite; None if all are."""


class DataPath:
    """Parameters and gradients of one client, in the form that algorithm 1.1 of the paper needs.

    Within a host an overlapped fetch is a copy by a thread that releases the interpreter, and a push needs no thread:
    shards read the gradient in place.  To other hosts a second thread drives the transfers.

    Parameters
    ----------
    client
        Fetches and pushes; its parts and gradients are those of the flow.
    flow
        How gradients leave.
    waiting
        Entered while a gradient waits for its memory, to account for that time.
    clip
        Scales a gradient before it is pushed, if it is clipped.
    largest
        Returns the largest of the numbers that the partitions of a replica pass to it.

    Attributes
    ----------
    parameters
        What the next gradient is computed from; another array after `fetch` or `refresh`.
    on_gradient
        To be called in a step that ends in a push, with the number of each layer once its gradient is complete; or
        None.
    steps
        Number of gradients accrued since the last push.
    changed
        Whether the parameters may have changed since the last gradient.
    """

    def __init__(
        self,
        client: Client,
        flow: Flow,
        waiting: AbstractContextManager[None],
        clip: Clip | None = None,
        largest: Callable[[int], int] = int,
    ) -> None:
        self._client, self._flow, self._clip, self._largest = client, flow, clip, largest
        # The first one grows; the other one, if there is one, leaves.
        self._buffers = deque(Buffer(client, memory, waiting) for memory in client.gradients)
        dtype = client.gradients[0].dtype
        self._apart = np.zeros(flow.size, dtype) if flow.apart else None
        self._accrued, self.steps, self.changed = Outcome(0, 0.0, 0), 0, True
        self._handed_over, self._broken = False, _FINITE
        self.on_gradient: Callable[[int], None] | None = self._hand_over if flow.by_layers else None
        given = client.kept if client.parameters is None else client.parameters
        self.parameters = aligned_empty(flow.size, dtype) if given is None else given
        self._next: np.ndarray | None = None
        self._fetcher = ThreadPoolExecutor(1, "dbmpi-fetch")
        self._sender = ThreadPoolExecutor(1, "dbmpi-push")
        self._fetch: Future[list[int]] | None = None
        self._sending: list[Future[None]] = []

    @property
    def add(self) -> bool:
        """Whether to add the next gradient to those of earlier steps, instead of overwriting."""
        return self._apart is None and self.steps > 0

    def fetch(self) -> None:
        """Get parameters from the shards, where the algorithm says so.

        With overlap this makes the fetch before this one current and begins the next; only the first is waited for.
        """
        client, self.changed = self._client, True
        if self._flow.overlap and client.parameters is not None:
            client.versions = client.copy(self.parameters)  # the worker computes on the shards' memory
        elif self._flow.overlap and self._next is not None:
            self._take()
            self._fetch = self._fetcher.submit(client.copy, self._next)
        else:
            client.fetch(self.parameters)
            self._next = aligned_empty(self._flow.size, self.parameters.dtype) if self._flow.overlap else None

    def refresh(self) -> None:
        """Make a fetch current that has ended since the last step, without waiting."""
        if self._fetch is not None and self._fetch.done():
            self._take()

    def begin(self) -> Gradient:
        """Return where to write the next gradient, when the shards have applied the old content."""
        buffer = self._buffers[0]
        if not self._flow.whole:
            return buffer
        if self._apart is not None:
            return self._apart
        return buffer.memory if self.steps else buffer.whole()

    def accrue(self, outcome: Outcome, local_rate: float) -> None:
        """Count the gradient among those to be pushed, and take a local step of plain SGD.

        Parameters
        ----------
        outcome
            Of the gradient's samples.
        local_rate
            Learning rate of the local step; 0 for none.
        """
        accrued = self._buffers[0].memory
        gradient = accrued if self._apart is None else self._apart
        self.changed = bool(local_rate)
        if local_rate:
            updates.sgd(self.parameters, gradient, local_rate)
        if self._apart is not None and self.steps == 0:
            np.copyto(self._buffers[0].whole(), gradient)
        elif self._apart is not None:
            updates.add(accrued, gradient)
        self._accrued, self.steps = self._accrued.plus(outcome), self.steps + 1

    def push(self) -> Push:
        """Push the accrued gradient, or withhold it from all shards where it is not finite."""
        if not self._handed_over:
            self._average(self._buffers[0].memory, self.steps)
        broken = self._agreed()
        if broken != _FINITE:
            self._client.withhold()
        elif not self._handed_over:
            for part in reversed(range(len(self._client.parts))):
                self._buffers[0].push(part)
        self._client.report(self._accrued, self.steps, withheld=broken != _FINITE)
        if self._flow.overlap:
            self._send()
        else:
            self._client.drain(self._client.serve)
        self._buffers.rotate()
        layer = broken - _LAYERS if broken >= _LAYERS else None
        push = Push(self.steps, self._accrued, broken != _FINITE, layer)
        self._accrued, self.steps, self._handed_over, self._broken = Outcome(0, 0.0, 0), 0, False, _FINITE
        return push

    def settle(self) -> None:
        """Wait until everything is pushed and applied, what roundings have left, too, and no transfer is under way."""
        self._take()
        for future in self._sending:
            waiting.until(future.done, "gradients to leave", serve=self._client.serve)
            future.result()
        self._sending.clear()
        self._client.wait()
        self._client.push_kept()

    def close(self) -> None:
        """End the threads, when their transfers have ended; nothing can be moved afterwards."""
        self._fetcher.shutdown(wait=False)
        self._sender.shutdown(wait=False)

    def _hand_over(self, layer: int) -> None:
        """Let a layer's accrued gradient leave, now that the last step's is complete, unless one is not finite."""
        self._handed_over = True
        self._average(self._buffers[0].part(layer), self.steps + 1)
        if self._broken == _FINITE and not all_finite(self._buffers[0].part(layer)):
            self._broken = _LAYERS + layer
        if self._broken == _FINITE:
            self._buffers[0].push(layer)
            self._send()

    def _average(self, gradient: np.ndarray, steps: int) -> None:
        """Make a sum of the gradients of so many steps their mean, if that is pushed."""
        if self._flow.mean and steps > 1:
            updates.scale(gradient, 1 / steps)

    def _agreed(self) -> int:
        """Return what is wrong with the accrued gradient, the same on all partitions; clip it where nothing is."""
        finite, gradient = self._accrued.are_numbers, self._buffers[0].memory
        if finite and self._clip is not None and math.isfinite(self._clip(gradient)):
            return _FINITE  # the norm is that of all partitions
        broken = self._broken
        if not self._handed_over and not all_finite(gradient):
            wrong = (not all_finite(gradient[part.start : part.stop]) for part in self._flow.layers)
            broken = _LAYERS + max(layer for layer, found in enumerate(wrong) if found)
        return self._largest(max(broken, _FINITE if finite else _LOSS))

    def _send(self) -> None:
        """Send what is in line, without waiting for it."""
        if self._flow.overlap and self._client.far:
            for ended in [future for future in self._sending if future.done()]:
                ended.result()
                self._sending.remove(ended)
            self._sending.append(self._sender.submit(self._client.drain))
        else:
            self._client.progress()

    def _take(self) -> None:
        """Wait for the fetch under way, and make its parameters current."""
        if self._fetch is not None and self._next is not None:
            waiting.until(self._fetch.done, "parameters to arrive", serve=self._client.serve)
            self._client.versions = self._fetch.result()
            self.parameters, self._next, self.changed = self._next, self.parameters, True
            self._fetch = None
