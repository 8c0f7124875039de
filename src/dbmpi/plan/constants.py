"""The constants of a machine that predictions are made of: measured by ``dbmpi bench machine``, kept as TOML."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from dbmpi.config import Section, explain
from dbmpi.config.values import Count, NotNegative, Positive
from dbmpi.errors import UserError

WEIGHTED = ("dense", "local", "convolution")
"""Kinds of layers with weights; as the first layer of a network, they compute no gradient for their inputs."""
FIRST = "_first"
"""Behind the kind of a first layer."""
KINDS = (*WEIGHTED, *(f"{kind}{FIRST}" for kind in WEIGHTED), "pooling", "normalisation", "dropout")
"""Kinds of layers, each with rates of its own."""
STATES = ("0", "1", "2")
"""Arrays in the state of an update rule, as keys of `updates`."""
REFERENCE = Path(__file__).with_name("reference.toml")
_LARGEST = 1 << 20
"""Bytes of a file; one of ``dbmpi bench machine`` has a few thousand."""

Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A positive number, also one written as an integer."""
SizeRow = tuple[Number, Number]
LayerRow = tuple[Number, Number, Number]


class MachineConstants(Section):
    """What a machine can do, as far as the plan of a run depends on it."""

    processor: Annotated[str, Field(max_length=200)]
    """Name of the processor."""
    ranks: Count
    """Ranks that measured at the same time."""
    hosts: Count
    """Hosts that they were on."""
    measured: tuple[str, ...] = ()
    """Which of the constants below were measured; the others are those of a reference machine."""
    rates: dict[str, tuple[LayerRow, ...]]
    """For each kind of layer rows of a size, samples of a batch, and operations a second of one thread.  The size is
    that of one product of weights (units times inputs; of filters, maps times the inputs of one), or the operations for
    a sample of a layer without weights."""
    updates: dict[str, tuple[SizeRow, ...]]
    """For the arrays in a rule's state, rows of elements and bytes a second that an update reads and writes."""
    copies: tuple[SizeRow, ...]
    """Rows of bytes and bytes a second, of a copy of parameters within a host: each byte counts once."""
    thread_gain: Annotated[NotNegative, Field(le=1)]
    """What each further thread of a rank adds, as a fraction of the first one's speed."""
    step_seconds: NotNegative
    """Time of a step that depends neither on the network nor on the batch: Python, a push and a fetch on one host."""
    far_step_seconds: NotNegative
    """What is added to it where shards are on other hosts, beyond latencies and bytes."""
    loss_seconds: NotNegative
    """Time of the loss, and of its gradient, for each output of each sample, by one thread."""
    partition_seconds: NotNegative
    """What a step takes longer where partitions decide together, beyond their exchanges."""
    batch_bandwidth: Positive
    """Bytes a second at which samples in memory become a batch."""
    service_seconds: NotNegative
    """Time of a shard for a push, beyond the update."""
    poll_seconds: NotNegative
    """Processor's time of a shard that waits, each time that it polls."""
    exchange_seconds: NotNegative
    """Time of one exchange between partitions on one host, beyond its bytes."""
    far_exchange_seconds: NotNegative
    """Time of one exchange between partitions on several hosts, beyond latencies and bytes."""
    message_seconds: NotNegative
    """Time of the processor for each message between hosts."""
    latency: Positive
    """Seconds from one host to another, one way."""
    bandwidth: Positive
    """Bytes a second between two hosts, one way."""
    spread: NotNegative
    """Standard deviation of the time of equal work on equal machines, as a fraction of its mean."""
    rank_bytes: NotNegative
    """Memory of a rank before it has a network: Python, NumPy, Numba and MPI."""

    @model_validator(mode="after")
    def _all_kinds_are_there(self) -> MachineConstants:
        for name, wanted in (("rates", KINDS), ("updates", STATES)):
            rows = getattr(self, name)
            for key in wanted:
                if not rows.get(key):
                    raise ValueError(f"{name}.{key} is missing: rows of measured speeds; run dbmpi bench machine again")
        if not self.copies:
            raise ValueError("copies is empty: expected rows of measured speeds; run dbmpi bench machine again")
        return self


def load(path: Path) -> MachineConstants:
    """Read the constants that ``dbmpi bench machine`` has written.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    UserError
        If it cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UserError(f"{path}: has more than {_LARGEST:,} bytes, and is no file of dbmpi bench machine")
        table = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read: {reason}; make it with dbmpi bench machine --out {path}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid TOML: {error}; make it with dbmpi bench machine --out {path}") from None
    try:
        return MachineConstants.model_validate(table)
    except ValidationError as error:
        raise UserError(explain(error, MachineConstants, str(path), table)) from None


def reference() -> MachineConstants:
    """Return the constants of the machine that the project was measured on: two cores of an AMD EPYC (Zen 4)."""
    return load(REFERENCE)


def as_toml(constants: MachineConstants) -> str:
    """Return `constants` as the text of a file that `load` reads."""
    lines = ["# What dbmpi plan --machine takes; written by dbmpi bench machine (seconds, bytes, operations a second)."]
    tables: list[str] = []
    for name, value in constants.model_dump().items():
        if isinstance(value, dict):
            tables += ["", f"[{name}]", *(f"{json.dumps(key)} = {_rows(rows)}" for key, rows in value.items())]
        elif name == "copies":
            lines.append(f"{name} = {_rows(value)}")
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _rows(rows: tuple[tuple[float, ...], ...]) -> str:
    """Return rows of numbers as TOML, a row a line."""
    inner = "".join(f"    [{', '.join(f'{number:.4g}' for number in row)}],\n" for row in rows)
    return f"[\n{inner}]"
