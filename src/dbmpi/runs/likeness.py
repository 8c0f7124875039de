"""Whether all ranks are alike where they must be: the same software, and the same description of a run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import dbmpi
from dbmpi.config import Run
from dbmpi.config.defaults import settings
from dbmpi.errors import UserError
from dbmpi.machine.mpi_library import first_line
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together

if TYPE_CHECKING:
    from mpi4py import MPI

_LIBRARIES = {"NumPy": "numpy", "Numba": "numba", "llvmlite": "llvmlite", "h5py": "h5py", "mpi4py": "mpi4py"}
"""Modules on which numbers and files depend, by the name for people."""
_SHOWN = 60
"""Letters of a setting in a message."""


class Difference(NamedTuple):
    """What is not the same on all ranks."""

    what: str
    first: str
    """On rank 0."""
    other: str
    """On `rank`."""
    rank: int
    """The lowest rank on which anything differs from rank 0."""
    ranks: int
    """On how many ranks this differs from rank 0."""


def differences(comm: MPI.Intracomm, mine: Mapping[str, str]) -> list[Difference]:
    """Return what differs between ranks, the same on all of them (collective).

    Parameters
    ----------
    comm
        The ranks.
    mine
        Texts of this rank, by names; one that is missing is taken for an empty text.
    """
    from mpi4py import MPI

    what = "the other ranks to compare what must be alike"
    first = json.loads(waiting.broadcast_text(comm, json.dumps(dict(mine)), 0, what))
    differs = np.array([mine.get(name, "") != text for name, text in first.items()], np.int64)
    lowest = np.array([comm.rank if differs.any() else comm.size], np.int64)
    rank = int(waiting.allreduce(comm, lowest, MPI.MIN, what)[0])
    if rank == comm.size:
        return []
    counts = waiting.allreduce(comm, differs, MPI.SUM, what)
    other = json.loads(waiting.broadcast_text(comm, json.dumps(dict(mine)), rank, what))
    found = zip(first.items(), counts.tolist(), strict=True)
    return [Difference(name, text, other.get(name, ""), rank, count) for (name, text), count in found if count]


def check_alike(run: Run, comm: MPI.Intracomm) -> tuple[str, ...]:
    """Refuse ranks with other software or another description; return lines on other processors (collective).

    Parameters
    ----------
    run
        The description on this rank.
    comm
        All ranks.

    Raises
    ------
    UserError
        On every rank, if versions or settings differ.
    """
    if comm.size == 1:
        return ()
    found = {each.what: each for each in differences(comm, {**software(), "processor": processor(), "": run.to_json()})}
    kind, description = found.pop("processor", None), found.pop("", None)
    with together(comm, "comparing the software of the ranks"):
        for name, each in found.items() if comm.rank == 0 else ():
            if each.first != each.other:
                raise UserError(
                    f"the ranks do not run the same software: {name} {each.first} on rank 0, {each.other} on rank "
                    f"{each.rank}; install the same versions on all hosts, or let all ranks start the same Python"
                )
        if description is not None and comm.rank == 0:
            raise UserError(_unlike(description))
    if kind is None:
        return ()
    return (
        f"processors differ: {kind.first} on rank 0, and another kind on {kind.ranks} of {comm.size} ranks"
        f"{f', {kind.other} on rank {kind.rank}' if kind.first != kind.other else ''}: numbers agree to rounding, but "
        "not to the last bit, with those of ranks that are all alike",
    )


def software() -> dict[str, str]:
    """Return the versions of what is loaded, by name; reads no file."""
    from mpi4py import MPI

    versions = {name: str(getattr(sys.modules.get(module), "__version__", "")) for name, module in _LIBRARIES.items()}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"dbmpi": dbmpi.__version__, "Python": python, "MPI": first_line(MPI.Get_library_version()), **versions}


def processor() -> str:
    """Return for what kind of processor this rank compiles: LLVM's name, and a digest of the features."""
    from numba.core.registry import cpu_target

    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return f"{name} ({hashlib.sha256(features.encode()).hexdigest()[:6]})"


def _unlike(description: Difference) -> str:
    """Return the message on descriptions that differ; the first setting that does is named."""
    first, other = (dict(settings(json.loads(text))) for text in (description.first, description.other))
    names = (name for name in {**first, **other} if first.get(name) != other.get(name))
    name = next(names, "the description")
    here, there = (json.dumps(values.get(name))[:_SHOWN] for values in (first, other))
    return (
        f"train: called with different descriptions: {name} = {here} on rank 0, {there} on rank {description.rank}; "
        "give all ranks the same, e.g. load it from one file, and make nothing in it depend on the rank"
    )
