"""Which settings about stale gradients go together."""

from __future__ import annotations

from collections.abc import Iterator

from dbmpi.config.optimizer import OptimizerSection
from dbmpi.config.server import ServerSection


def pushes_of_a_fetch(optimizer: OptimizerSection) -> int:
    """Return how many pushes are counted from the same fetch, at most, with the last one of what remains at the end.

    Parameters
    ----------
    optimizer
        The section.
    """
    return 1 + -(-(optimizer.n_fetch - 1) // optimizer.n_push)


def least_bound(server: ServerSection, optimizer: OptimizerSection) -> int:
    """Return the staleness that a replica's own pushes cause between a fetch and the last push counted from it.

    With overlap a fetch begins before the push of the step that it overlaps with.

    Parameters
    ----------
    server, optimizer
        The sections.
    """
    return pushes_of_a_fetch(optimizer) - 1 + (server.overlap == "threads")


def mistakes(server: ServerSection, optimizer: OptimizerSection) -> Iterator[str]:
    """Yield the messages about settings that do not go together.

    Parameters
    ----------
    server, optimizer
        The sections.
    """
    if optimizer.delay_compensation != "none":
        yield from _mistakes_in_compensation(server, optimizer)
    if server.max_staleness:
        yield from _mistakes_in_bound(server, optimizer)
    elif server.on_stale == "discard":
        yield (
            'server.on_stale = "discard" needs a bound: set server.max_staleness to the largest staleness of a push '
            "that is applied, or leave it out"
        )


def _mistakes_in_bound(server: ServerSection, optimizer: OptimizerSection) -> Iterator[str]:
    given, least = f"server.max_staleness = {server.max_staleness}", least_bound(server, optimizer)
    if optimizer.method != "downpour":
        yield f"{given} is for Downpour: leave it out, as a batch of Sandblaster has no stale gradients"
    elif server.on_stale == "wait" and server.overlap == "threads":
        yield (
            f"{given}: a replica that waits before a fetch cannot fetch while it computes: set server.overlap to "
            '"none", or server.on_stale to "discard"'
        )
    elif server.max_staleness < least:
        yield (
            f"{given} cannot be kept: between a fetch and the last push that is counted from it, a replica's own "
            f"pushes alone are {least} versions (optimizer.n_fetch = {optimizer.n_fetch}, optimizer.n_push = "
            f'{optimizer.n_push}, server.overlap = "{server.overlap}"); set server.max_staleness to {least} or more, '
            "or a smaller optimizer.n_fetch"
        )
    elif server.on_stale == "discard" and server.gradients == "layers":
        yield (
            f'{given} with server.on_stale = "discard" applies a push at one go, for which all of it must be there: '
            'set server.gradients = "whole", or server.on_stale = "wait"'
        )


def _mistakes_in_compensation(server: ServerSection, optimizer: OptimizerSection) -> Iterator[str]:
    given = f'optimizer.delay_compensation = "{optimizer.delay_compensation}"'
    if optimizer.method != "downpour":
        yield f"{given} is for Downpour: leave it out, as a batch of Sandblaster has no stale gradients"
    elif optimizer.n_push > 1 or optimizer.local_rate:
        yield (
            f"{given} needs gradients that were each computed at fetched parameters: set optimizer.n_push = 1, not "
            f"{optimizer.n_push}, and optimizer.local_rate = 0, not {optimizer.local_rate:g}"
        )
    elif server.overlap == "threads":
        yield (
            f"{given} needs the parameters of a gradient until it is applied, but with server.overlap = "
            f'"{server.overlap}" the next ones take their place: set server.overlap = "none"'
        )
