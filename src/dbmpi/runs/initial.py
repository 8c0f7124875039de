"""The first values of a run's parameters, where they are given: arrays by name, from Python or from a file."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint import named_arrays
from dbmpi.checkpoint.named_arrays import Fill, StoredValues
from dbmpi.checkpoint.named_state import take_state
from dbmpi.config import Run
from dbmpi.errors import UserError
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.network.description import Network
from dbmpi.replica.own_objective import OwnModel
from dbmpi.result import FilePath, path_of

_IN_PYTHON = "initial"


def with_initial(run: Run, initial: Mapping[str, Any] | FilePath | None) -> tuple[Run, dict[str, StoredValues] | None]:
    """Return the run with a file of first values, and arrays that were given instead.

    Parameters
    ----------
    run
        May name a file already.
    initial
        What ``dbmpi.train`` was given.
    """
    if initial is None:
        return run, None
    if run.run.initial is not None:
        raise UserError(
            f"train: given initial=..., but run.initial is {str(run.run.initial)!r} already; leave out either"
        )
    if isinstance(initial, Mapping):
        return run, named_arrays.given(initial, f"train: {_IN_PYTHON}")
    section = run.run.model_copy(update={"initial": path_of(initial, _IN_PYTHON)})
    return run.model_copy(update={"run": section}), None


def first_values(
    run: Run,
    arrays: Mapping[str, StoredValues] | None,
    model: Network | OwnModel,
    comm: MPI.Intracomm,
    stack: ExitStack,
) -> tuple[Fill, tuple[str, ...]]:
    """Return what writes the parameters of a new run, and lines for the user on where they are from (collective).

    The state of an objective that is among the arrays is restored.

    Parameters
    ----------
    run, arrays
        As :func:`with_initial` returned them.
    model
        With the names and shapes of the parameters, and their usual first values.
    comm
        All ranks.
    stack
        Closes the file.

    Raises
    ------
    UserError
        On every rank, if names or shapes do not fit, values are not finite, or arrays, or the first values of an
        objective that are used, differ between ranks.
    """
    _check_same(run, arrays, comm)
    path, partly = run.run.initial, run.run.initial_names == "some"
    given = arrays is not None or path is not None
    if isinstance(model, OwnModel) and (partly or not given):
        _check_objective(model, comm)
    if not given:
        return model.initial, ()
    source = _IN_PYTHON if path is None else str(path)
    with together(comm, "reading the first values", seconds=waiting.LONG_SECONDS):
        stored = stack.enter_context(named_arrays.opened(path)) if path is not None else arrays
        assert stored is not None
        stored, first = dict(stored), {}
        if isinstance(model, OwnModel):
            arrays_now = model.state.arrays
            first = take_state(model.layout, arrays_now, stored, source)
            model.state.restore(arrays_now | first)
        found = named_arrays.match(model.layout, stored, source, partly=partly)
    whole, left = len(model.layout.tensors), len(stored) - len(found)
    state = f", and {len(first)} of state," if first else ""
    unused = f"; {left} others in it are not used" if left else ""
    note = f"first values of {len(found)} of {whole} arrays{state} from {source}{unused}"
    return named_arrays.filler(model.layout, found, source, model.initial), (note,)


def _check_same(run: Run, arrays: Mapping[str, StoredValues] | None, comm: MPI.Intracomm) -> None:
    """Refuse a file or arrays that are not those of the first rank (collective)."""
    digests = [[name, each.shape, _digest(each)] for name, each in sorted((arrays or {}).items())]
    mine = json.dumps([str(run.run.initial), run.run.initial_names, arrays is None, digests])
    first = waiting.broadcast_text(comm, mine, 0, "the first values")
    with together(comm, "comparing the first values", seconds=waiting.LONG_SECONDS):
        if mine != first:
            raise UserError(
                f"{_IN_PYTHON}: the arrays differ between rank {comm.rank} and rank 0, or the file that is named; give "
                "all ranks the same"
            )


def _check_objective(model: OwnModel, comm: MPI.Intracomm) -> None:
    """Refuse first values of an objective that are not those of the first rank (collective)."""
    if comm.size == 1:
        return
    mine: list[tuple[str, int]] = []
    with together(comm, "computing the first values", seconds=waiting.LONG_SECONDS):
        mine = model.digests()
    first = waiting.broadcast_text(comm, json.dumps(mine), 0, "the first values")
    with together(comm, "comparing the first values"):
        differ = [name for (name, digest), (_, other) in zip(mine, json.loads(first), strict=True) if digest != other]
        if differ:
            raise UserError(
                f"{model.called}: the first values of {differ[0]!r} differ between rank {comm.rank} and rank 0; draw "
                "them from a seed (for PyTorch call torch.manual_seed before the module is made), or give all ranks "
                "the same, e.g. by load_state_dict if it was trained before"
            )


def _digest(values: StoredValues) -> int:
    digest = 0
    for part in values.read(0, math.prod(values.shape)):
        digest = zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data, digest)
    return digest
