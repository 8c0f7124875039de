"""Whether the hosts of a job reach each other, found out by a message between ranks before anything else is.

MPI connects two ranks when the first message is sent between them, and a firewall between their hosts is silence: no
MPI seen so far reports it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import EndedElsewhere, UserError
from dbmpi.machine.rank_variables import ranks_on_node
from dbmpi.mpi import waiting
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

SECONDS = 60.0
"""In which a message between two ranks must arrive that have both started MPI."""
_ALL_PAIRS = 32
"""Ranks of a world in which each writes to each; in larger ones, to as many as its size has binary digits."""

_NAME = 64
"""Bytes of the name of a host in a report."""
_REPORT = 16
"""Words of a report: how many ranks are not heard, the first of them, and the name of the host."""
_MOST_SHOWN = 6


def check_reach(comm: MPI.Intracomm, seconds: float = SECONDS) -> None:
    """Raise an error on all ranks if one hears nothing from another (collective).

    Only for a program in which nothing else uses `comm`, and all ranks call this as soon as MPI has started.

    Parameters
    ----------
    comm
        All ranks.
    seconds
        How long to wait; at most a quarter of ``DBMPI_STALL_SECONDS``.

    Raises
    ------
    UserError
        On rank 0, and on a rank that does not reach that.
    EndedElsewhere
        On all others.
    """
    if comm.size == 1 or ranks_on_node(os.environ) == comm.size:
        return
    seconds = min(seconds, waiting.STALL_SECONDS / 4)
    before, behind = neighbours(comm.rank, comm.size)
    word, words = np.zeros(1, np.int64), np.zeros((len(before), 1), np.int64)
    sent = [comm.Isend(word, rank, Tag.REACH) for rank in behind]
    awaited = {rank: comm.Irecv(words[place], rank, Tag.REACH) for place, rank in enumerate(before)}
    silent = _silent(awaited, seconds)
    report = np.zeros(_REPORT, np.int64)
    report[0], some = len(silent), silent[: _REPORT - 1 - _NAME // 8]
    report[1 : 1 + len(some)] = some
    name = os.uname().nodename.encode()[:_NAME]
    report.view(np.uint8)[-_NAME:][: len(name)] = np.frombuffer(name, np.uint8)
    if comm.rank:
        sent.append(comm.Isend(report, 0, Tag.REACH_REPORT))
        if _silent({0: comm.Irecv(word, 0, Tag.REACH_REPORT)}, 3 * seconds):
            raise UserError(_message([f"rank {comm.rank} on {_host(report)} hears nothing from rank 0"], seconds))
        if word[0]:
            raise EndedElsewhere(2)
    else:
        reports = np.zeros((comm.size, _REPORT), np.int64)
        reports[0] = report
        lost = _silent(
            {rank: comm.Irecv(reports[rank], rank, Tag.REACH_REPORT) for rank in range(1, comm.size)}, seconds
        )
        problems = [f"rank 0 on {_host(report)} hears nothing from rank {rank}" for rank in lost]
        for rank in np.flatnonzero(reports[:, 0]).tolist():
            others = reports[rank, 1 : 1 + reports[rank, 0]][: _REPORT - 1 - _NAME // 8].tolist()
            told = (f"rank {other}" + (f" on {_host(reports[other])}" if other not in lost else "") for other in others)
            problems.append(f"rank {rank} on {_host(reports[rank])} hears nothing from {', '.join(told)}")
        word[0] = bool(problems)
        for rank in {*range(1, comm.size)}.difference(lost):
            sent.append(comm.Isend(word, rank, Tag.REACH_REPORT))
        if problems:
            raise UserError(_message(problems, seconds))
    _silent(dict(enumerate(sent)), seconds)


def _silent(requests: dict[int, MPI.Request], seconds: float) -> list[int]:
    """Wait for requests; return the keys of those that are not complete after so many seconds."""
    until, backoff = time.monotonic() + seconds, waiting.Backoff(longest=0.01)
    left = list(requests)
    while left := [key for key in left if not requests[key].Test()]:
        if time.monotonic() > until:
            break
        backoff.sleep()
    return left


def _host(report: np.ndarray) -> str:
    return report.view(np.uint8)[-_NAME:].tobytes().rstrip(b"\0").decode(errors="replace")


def _message(problems: list[str], seconds: float) -> str:
    """Return the message on which ranks do not reach each other; of many the first ones."""
    more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
    return (
        f"hosts do not reach each other: {'; '.join(problems[:_MOST_SHOWN])}{more}, {seconds:g} s after MPI has "
        "started on them.  Open all ports between them in the firewall, or name the network that they share (Open MPI: "
        "OMPI_MCA_btl_tcp_if_include=eth0; MPICH: FI_TCP_IFACE=eth0)"
    )


def neighbours(rank: int, size: int) -> tuple[list[int], list[int]]:
    """Return the ranks that write to a rank, and those that it writes to.

    Parameters
    ----------
    rank, size
        The rank, and how many there are.
    """
    steps = list(range(1, size)) if size <= _ALL_PAIRS else [1 << digit for digit in range((size - 1).bit_length())]
    return [(rank - step) % size for step in steps], [(rank + step) % size for step in steps]
