"""Kills a rank at an exact moment: the COUNT-th time that it enters a phase.

Python imports this file when it starts, if its folder is on PYTHONPATH.  It does something only where
``DBMPI_TEST_KILL`` is set, to one or several ``RANK:PHASE:COUNT[:SIGNAL]`` with commas in between, e.g.
``2:compute:5,0:commit:1:STOP``.  The methods of a phase are then wrapped as soon as their modules have been imported.
A process that takes the place of rank 2 is ``new 2``.

Portions of Sandblaster go to the worker that is free, and a slow one may get too few of them to come to its moment.
Where ``DBMPI_TEST_HOLD`` names a directory, every other rank computes at most COUNT portions before that.

Where ``DBMPI_TEST_APART`` is set, each rank seems to be on a host of its own: none shares memory with another.
dbmpi itself knows nothing of it.  Only the standard library is used, because this is loaded before everything else.
"""

from __future__ import annotations

import importlib.machinery
import os
import signal
import sys
import time
from collections import Counter

VARIABLE = "DBMPI_TEST_KILL"
HOLD = "DBMPI_TEST_HOLD"
APART = "DBMPI_TEST_APART"
PHASES = {
    "start": ("dbmpi.session Session compile_kernels",),
    "step": ("dbmpi.downpour.worker Worker proceed", "dbmpi.downpour.round_worker RoundWorker proceed"),
    "fetch": ("dbmpi.paramserver.copies ShardCopies _begin_copy",),
    "compute": (
        "dbmpi.replica.replica Replica loss_and_gradient",
        "dbmpi.replica.own_objective OwnReplica loss_and_gradient",
    ),
    "exchange": (
        "dbmpi.replica.exchange Shelved start",
        "dbmpi.replica.exchange Messaged start",
        "dbmpi.replica.exchange Gathered start",
    ),
    "push": ("dbmpi.paramserver.client Client push",),
    "post": ("dbmpi.paramserver.client Client _send_next",),
    "apply": (
        "dbmpi.paramserver.server Server _update",
        "dbmpi.paramserver.round_server RoundServer _add",
        "dbmpi.sandblaster.shard ShardSpace accrue",
    ),
    "portion": ("dbmpi.sandblaster.replica Portions _compute",),
    "keep": ("dbmpi.sandblaster.replica Portions _keep",),
    "deliver": ("dbmpi.sandblaster.replica Portions _commit",),
    "line search": ("dbmpi.sandblaster.coordinator Coordinator evaluate",),
    "command": ("dbmpi.sandblaster.shard ShardSpace poll",),
    "meet": ("dbmpi.sandblaster.shard ShardSpace meet",),
    "checkpoint": ("dbmpi.checkpoint.saver ShardSaver start",),
    "write": ("dbmpi.checkpoint.new_file NewFile write",),
    "commit": ("dbmpi.checkpoint.new_file NewFile commit",),
    "evaluate": (
        "dbmpi.replica.replica Replica evaluate",
        "dbmpi.replica.own_objective OwnReplica evaluate",
    ),
    "recovery": ("dbmpi.sandblaster.evaluation Evaluator _mourn", "dbmpi.sandblaster.replica Portions give_up"),
    "rest": ("dbmpi.downpour.worker Worker _rest",),
    "deal": ("dbmpi.downpour.worker Worker _take_share",),
    "settle": ("dbmpi.downpour.settlement HeldReplicas settle",),
    "renew": ("dbmpi.mpi.replacement Replacements renew",),
    "spawn": ("dbmpi.mpi.replacement Replacements _commands",),
    "join": ("dbmpi.mpi.replacement join",),
    "begin": ("dbmpi.mpi.replacement Replacements begin",),
    "end": ("dbmpi.session Session conclude",),
}
"""For each phase, what enters it: module, class if it is a method, name."""

_OF_PORTIONS = ("portion", "fetch", "compute", "keep", "deliver")
"""Phases that a worker of Sandblaster enters once for each portion."""
_LONGEST_HOLD = 60.0
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


def moments(text: str, rank: str) -> list[tuple[str, int, signal.Signals]]:
    """Return phase, count and signal of what is to happen on a rank, by the `text` of the variable."""
    found = []
    for each in filter(None, text.split(",")):
        whose, phase, count, *number = each.split(":")
        if phase not in PHASES:
            raise ValueError(f"{VARIABLE}={text}: {phase!r} is none of {', '.join(PHASES)}")
        if whose == rank:
            found.append((phase, int(count), signal.Signals[f"SIG{number[0] if number else 'KILL'}"]))
    return found


def awaited(text: str, rank: str) -> list[tuple[str, int]]:
    """Return for each other rank the file that says that it has been struck, and its portions before that."""
    others = [each.split(":")[:3] for each in text.split(",")] if os.environ.get(HOLD) else []
    others = [words for words in others if words[0] != rank and words[1] in _OF_PORTIONS]
    return [(mark(whose, phase, count), int(count)) for whose, phase, count in others]


def mark(rank: str, phase: str, count: str | int) -> str:
    """Return the path of the file that says that a rank has been struck at this moment."""
    return os.path.join(os.environ[HOLD], f"struck-{rank}-{phase}-{count}")


class Saboteur:
    """Wraps what enters some phases when their modules are imported (a finder of ``sys.meta_path``)."""

    def __init__(self, wanted: list[tuple[str, int, signal.Signals]], others: list[tuple[str, int]]) -> None:
        self._signals, self._others = {(phase, count): number for phase, count, number in wanted}, others
        self._counts: Counter[str] = Counter()
        self._targets: dict[str, list[tuple[list[str], str, str]]] = {}
        for phase in {phase for phase, _, _ in wanted} | ({"portion"} if others else set()):
            for target in PHASES[phase]:
                module, *owner, name = target.split()
                self._targets.setdefault(module, []).append((owner, name, phase))

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """Return the module's own spec, with a loader that wraps something in the end."""
        if name not in self._targets:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        execute = spec.loader.exec_module

        def exec_module(module: object) -> None:
            execute(module)
            for owner, method, phase in self._targets[name]:
                self._wrap(getattr(module, *owner) if owner else module, method, phase)

        spec.loader.exec_module = exec_module
        return spec

    def _wrap(self, owner: object, name: str, phase: str) -> None:
        method = getattr(owner, name)

        def wrapped(*arguments: object, **named: object) -> object:
            self._counts[phase] += 1
            number = self._signals.get((phase, self._counts[phase]))
            if phase == "portion":
                self._hold()
            if number is not None:
                if os.environ.get(HOLD):
                    open(mark(_rank, phase, self._counts[phase]), "w").close()
                os.write(2, f"sabotage: {number.name} at {phase} {self._counts[phase]}\n".encode())
                os.kill(os.getpid(), number)
            return method(*arguments, **named)

        setattr(owner, name, wrapped)

    def _hold(self) -> None:
        deadline = time.monotonic() + _LONGEST_HOLD
        for path, portions in self._others:
            while self._counts["portion"] > portions and not os.path.exists(path) and time.monotonic() < deadline:
                time.sleep(0.002)


class Separator:
    """Sets ranks apart when the module is imported that finds those of one host (a finder of ``sys.meta_path``)."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """Return the module's own spec, with a loader that replaces one function in the end."""
        if name != "dbmpi.mpi.blocking":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        execute = spec.loader.exec_module

        def exec_module(module: object) -> None:
            execute(module)
            module.on_this_host = lambda comm, what: module.split(comm, comm.rank, comm.rank, what)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get(APART):
    sys.meta_path.insert(0, Separator())
_rank = next((os.environ[name] for name in _RANKS if name in os.environ), None)
if _rank is not None and "DBMPI_REPLACES" in os.environ:
    _rank = f"new {_rank}"
if _rank is not None and os.environ.get(VARIABLE):
    _wanted, _others = moments(os.environ[VARIABLE], _rank), awaited(os.environ[VARIABLE], _rank)
    if _wanted or _others:
        sys.meta_path.insert(0, Saboteur(_wanted, _others))
