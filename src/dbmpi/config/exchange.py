"""Which settings go together with the relatives of Downpour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dbmpi.config.local import LocalSection
from dbmpi.config.optimizer import OptimizerSection
from dbmpi.config.server import ServerSection

if TYPE_CHECKING:
    from dbmpi.config.sections import TopologySection


def in_rounds(optimizer: OptimizerSection, local: LocalSection) -> bool:
    """Return whether shards apply the mean of several pushes, for which replicas wait.

    Parameters
    ----------
    optimizer, local
        The sections.
    """
    synchronous = optimizer.exchange == "local" and local.pushes == "synchronous"
    return synchronous or optimizer.exchange in ("synchronous", "backup")


def mistakes(
    server: ServerSection, optimizer: OptimizerSection, local: LocalSection, topology: TopologySection
) -> Iterator[str]:
    """Yield the messages about settings that do not go together.

    Parameters
    ----------
    server, optimizer, local, topology
        The sections.
    """
    if optimizer.backups > 1 and optimizer.exchange != "backup":
        yield (
            f'optimizer.backups = {optimizer.backups} goes with optimizer.exchange = "backup", not with '
            f'"{optimizer.exchange}": leave one of the two out'
        )
    if optimizer.exchange == "asynchronous":
        return
    given = f'optimizer.exchange = "{optimizer.exchange}"'
    if optimizer.method != "downpour":
        yield f"{given} is for Downpour: leave it out, as Sandblaster adds up the gradients of all replicas anyway"
    if optimizer.n_push > 1 or optimizer.n_fetch > 1 or optimizer.local_rate:
        steps = ", and local.steps as the number of steps" if optimizer.walks else ""
        yield (
            f"{given} pushes after each fetch: set optimizer.n_push = 1, not {optimizer.n_push}, optimizer.n_fetch = "
            f"1, not {optimizer.n_fetch}, and optimizer.local_rate = 0, not {optimizer.local_rate:g}{steps}"
        )
    if server.overlap == "threads":
        yield (
            f"{given} lets a replica fetch when its push is applied, and not while it computes: set server.overlap to "
            '"none"'
        )
    if optimizer.walks:
        yield from _mistakes_in_steps(given, server, optimizer)
    if in_rounds(optimizer, local):
        yield from _mistakes_in_rounds(given, server, optimizer)
    if optimizer.spared and topology.replicas is not None:
        yield from too_many_backups(optimizer, topology.replicas - topology.spares)


def too_many_backups(optimizer: OptimizerSection, replicas: int) -> Iterator[str]:
    """Yield a message if the shards would wait for no gradient at all.

    Parameters
    ----------
    optimizer
        The section.
    replicas
        Number of replicas that learn.
    """
    if optimizer.spared >= replicas:
        fewer = f"optimizer.backups to at most {replicas - 1}, or " if replicas > 1 else ""
        yield (
            f"optimizer.backups = {optimizer.backups} of {replicas} replicas leaves none whose gradients the shards "
            f"wait for: set {fewer}topology.replicas to at least {optimizer.backups + 1}"
        )


def _mistakes_in_rounds(given: str, server: ServerSection, optimizer: OptimizerSection) -> Iterator[str]:
    if optimizer.warms:
        yield (
            f"{given} needs no warmstart, as nothing pushed is stale: leave optimizer.warmstart, warmstart_samples and "
            "warmstart_loss out, or begin a run with another exchange from the checkpoint of this one"
        )
    stale = {
        f"server.max_staleness = {server.max_staleness}": server.max_staleness > 0,
        f'optimizer.staleness_rate = "{optimizer.staleness_rate}"': optimizer.staleness_rate != "constant",
        f'optimizer.delay_compensation = "{optimizer.delay_compensation}"': optimizer.delay_compensation != "none",
    }
    for setting, is_set in stale.items():
        if is_set:
            yield f"{given} applies nothing that is stale: leave {setting} out"
    if server.wire == "bfloat16":
        other = 'local.pushes = "asynchronous"' if optimizer.walks else 'optimizer.exchange = "asynchronous"'
        yield (
            f"{given} applies the mean of a round, in which the rest that a replica keeps of its rounding has no part: "
            f'set server.wire = "float32", or {other}'
        )
    if server.fetch == "shared" and optimizer.exchange == "backup":
        yield (
            f"{given} changes the parameters while late replicas still compute: set server.fetch = "
            '"copied", or optimizer.exchange = "synchronous"'
        )


def _mistakes_in_steps(given: str, server: ServerSection, optimizer: OptimizerSection) -> Iterator[str]:
    if server.fetch == "shared" or server.gradients == "layers":
        yield (
            f"{given} needs parameters of a replica's own, and a whole difference to push: set server.fetch = "
            f'"copied", not "{server.fetch}", and server.gradients = "whole", not "{server.gradients}"'
        )
    if optimizer.delay_compensation != "none":
        yield (
            f"{given} pushes differences, which cannot be compensated as gradients: leave optimizer.delay_compensation "
            f'= "{optimizer.delay_compensation}" out'
        )
    if optimizer.exchange == "easgd" and (optimizer.rule, optimizer.learning_rate) != ("sgd", 1.0):
        yield (
            f'{given} moves the shards by as much as the replica: leave optimizer.rule = "{optimizer.rule}" and '
            f"optimizer.learning_rate = {optimizer.learning_rate:g} out, and set local.elasticity and "
            "local.learning_rate"
        )
    if optimizer.weight_decay:
        yield (
            f"{given} lets replicas decay the parameters: set local.weight_decay instead of optimizer.weight_decay = "
            f"{optimizer.weight_decay:g}"
        )
