"""The section ``[server]``: how gradients and parameters travel."""

from __future__ import annotations

from typing import Literal

from dbmpi.config.values import CountOrNone, Positive, Section


class ServerSection(Section):
    """How gradients travel to the shards."""

    inbox_mib: Positive = 64.0
    """Memory (MiB) that each shard reserves for incoming gradients, for all replicas together."""
    chunk_kib: Positive = 4096.0
    """Largest piece (KiB) in which a gradient is sent; smaller where many replicas share the inbox."""
    push: Literal["shared", "copied"] = "shared"
    """``shared``: shards read the gradients of workers on the same host in place; ``copied``: all use the inbox."""
    fetch: Literal["copied", "shared"] = "copied"
    """``shared``: workers compute on the shards' own memory, which changes meanwhile; on one host.  Where a replica has
    partitions, not with ``align = "equal"``."""
    transport: Literal["auto", "rma", "p2p"] = "auto"
    """Without shared memory, ``rma``: one-sided; ``p2p``: messages, same results; ``auto``: what is faster at start."""
    wire: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` (Downpour): between hosts, gradients and fetched parameters travel rounded, in half the bytes.  A
    worker keeps what the rounding of a gradient leaves, adds it to the next one, and pushes it before checkpoints."""
    align: Literal["equal", "partition"] = "partition"
    """``partition`` (Downpour): shards end where partitions do, so that a worker deals with the shards of its own part
    alone, and in one piece with each; ``equal``: each shard holds as much, whatever the number of partitions.  Without
    partitions, as with an objective of your own, both are the same."""
    gradients: Literal["whole", "layers"] = "whole"
    """``whole``: a worker has a buffer for a whole gradient, with overlap for two; ``layers`` (Downpour): for that of
    the largest layer; each is sent when it is complete, and its buffer is reused when the shards have applied it."""
    consistent: bool = False
    """A fetch never sees a push that a shard has half applied; it may have to wait for it."""
    overlap: Literal["none", "threads"] = "none"
    """``threads``: fetch, push and compute at the same time, as in the paper; ``none``: one after the other."""
    max_staleness: CountOrNone = 0
    """Downpour: the largest staleness of a push that is applied; 0 for no bound."""
    on_stale: Literal["wait", "discard"] = "wait"
    """``wait``: a replica waits before a step for others that its push could make too stale; ``discard``: shards drop
    pushes that have become too stale, and count them."""
    mirror: CountOrNone = 0
    """Downpour, with fault tolerance: each shard is also in the memory of another one, which lacks at most so many of
    its updates; if it dies, they are what is lost, and not all since the last checkpoint.  0 for never."""
