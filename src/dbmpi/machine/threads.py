"""How many threads a rank may use, settled before NumPy and Numba are loaded.

OpenBLAS, OpenMP, MKL and Numba each start a thread for every core of the machine unless the environment says
otherwise.  With a rank on every core that is cores x cores threads, and runs become a hundred times slower.  They read
the environment once, when they are loaded; therefore this module uses the standard library alone, and :func:`prepare`
comes first in a program.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dbmpi.errors import UserError
from dbmpi.machine import capacity, processes
from dbmpi.machine.rank_variables import number, ranks_on_node

VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
"""Variables that the libraries read; each is set only where the user has not set it."""

PATIENCE = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "4"}
"""Idle threads sleep at once instead of spinning; set unless the user has set them.

OpenBLAS's threads and those of Numba's OpenMP are two pools: while one works, the other one spins on the same cores
for up to 30 ms after each call.  On two cores that others used, too, a layer of 256 units took 0.1 ms without spinning,
and 12 to 33 ms with it.
"""

_DAEMONS = {
    *("prterun", "prted", "prte", "mpirun", "mpiexec", "orterun", "orted"),  # of Open MPI
    *("hydra_pmi_proxy", "slurmstepd", "palsd"),
}
"""Names of the processes that start ranks and may bind each of them to cores of its own."""


@dataclass(frozen=True)
class Node:
    """What the ranks of this node have to share."""

    ranks: int
    """Ranks on this node."""
    cores: int
    """Cores that all of them together may use."""
    mine: int
    """Cores that this rank may use; fewer than `cores` where a launcher has bound it."""


@dataclass(frozen=True)
class Preparation:
    """What was decided about threads."""

    threads: int
    """Threads of this rank."""
    node: Node
    settings: Mapping[str, str]
    """Environment variables to set; :func:`prepare` has set them."""
    oversubscribed: bool
    """Whether the user's own settings ask for more threads than there are cores."""
    line: str
    """All of this for people, on one line."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Those of `VARIABLES` that the user has set."""

    @property
    def kernels(self) -> int:
        """Threads that compiled kernels may use."""
        return number(self.given.get("NUMBA_NUM_THREADS")) or self.threads


MARK = "DBMPI_PREPARED"
"""Holds the variables that dbmpi has set, as JSON: a program that inherits them must not take them for the user's."""

_prepared: Preparation | None = None


def prepare() -> Preparation:
    """Set the environment of this process so that the threads of all ranks fit the node.

    A second call returns what the first one decided.  Libraries that were loaded before, and have read the environment,
    are left to :mod:`dbmpi.machine.environment`.
    """
    global _prepared  # noqa: PLW0603 - the environment, too, belongs to the whole process
    if _prepared is None:
        theirs = without_prepared(os.environ)
        decision = decide(theirs, this_node(theirs))
        put(decision.settings)
        _prepared = decision
    return _prepared


def put(settings: Mapping[str, str]) -> None:
    """Set variables of this process's environment, and mark them as set by dbmpi.

    Parameters
    ----------
    settings
        Their values by name.
    """
    marked = json.dumps(_marked(os.environ) | dict(settings))
    os.environ.update(settings)
    os.environ[MARK] = marked


def unset(*names: str) -> dict[str, str]:
    """Take variables that dbmpi has set out of this process's environment again, and return their values.

    Parameters
    ----------
    names
        The variables; any that dbmpi has not set stay.
    """
    ours = _marked(os.environ)
    gone = {name: ours.pop(name) for name in names if name in ours and os.environ.get(name) == ours[name]}
    for name in gone:
        del os.environ[name]
    os.environ[MARK] = json.dumps(ours)
    return gone


def without_prepared(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what dbmpi has set in it (:func:`put`), here or in a process before this one."""
    ours = _marked(environment)
    return {name: value for name, value in environment.items() if name != MARK and ours.get(name) != value}


def _marked(environment: Mapping[str, str]) -> dict[str, str]:
    try:
        found = json.loads(environment.get(MARK, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def decide(environment: Mapping[str, str], node: Node) -> Preparation:
    """Decide on threads; changes nothing.

    The number is ``SLURM_CPUS_PER_TASK``, or else cores / ranks of the node, but at least 1 and at most what this rank
    is bound to.  A number that the user gave in one of the variables stays; ``OMP_NUM_THREADS`` also counts for the
    variables not given, as it is how batch scripts usually say it.

    Parameters
    ----------
    environment
        As the user has set it (:func:`without_prepared`).
    node
        What the ranks share.
    """
    given = {name: environment[name] for name in VARIABLES if environment.get(name, "").strip()}
    share = max(1, min(node.mine, node.cores // node.ranks))
    threads, source = share, _shares(node)
    per_task = number(environment.get("SLURM_CPUS_PER_TASK"))
    if per_task is not None:
        # It may be more than there is: under mpirun with more ranks than tasks, and in groups of a heterogeneous job.
        threads = min(per_task, share)
        source = f"SLURM_CPUS_PER_TASK={per_task}" + (f", but {_shares(node)}" if share < per_task else "")
    asked = number(given.get("OMP_NUM_THREADS"))
    if asked is not None:
        threads, source = asked, f"OMP_NUM_THREADS={asked} is set" + (f"; {_shares(node)}" if asked != share else "")

    numbers = {name: number(value) or 0 for name, value in given.items()}
    too_many = [name for name, asked_for in numbers.items() if asked_for > share]
    others = [f"{name}={value}" for name, value in given.items() if numbers[name] != threads]
    line = f"threads: {_count(threads, 'thread')} a rank ({source})"
    if others:
        line += f"; as set: {', '.join(others)}"
    if too_many:
        asked_for = f"{_count(node.ranks, 'rank')} x {_count(max(numbers.values()), 'thread')}"
        line += (
            f"; WARNING: {asked_for} on {_count(node.cores, 'core')} slow each other down: unset {', '.join(too_many)}"
        )
    settings = {name: str(threads) for name in VARIABLES if name not in given}
    settings |= {name: value for name, value in PATIENCE.items() if not environment.get(name, "").strip()}
    return Preparation(threads, node, settings, bool(too_many), line, given)


def check_processors(environment: Mapping[str, str] | None = None, processors: int | None = None) -> None:
    """Raise an error if the user asks for more threads than this rank has logical processors.

    More threads than processors wait for each other in every kernel, which makes runs up to a hundred times slower.
    More ranks than cores do not, and are only warned of (:func:`decide`).

    Parameters
    ----------
    environment
        By default that of this process.
    processors
        Logical processors on which this rank may run; by default those of its affinity.

    Raises
    ------
    UserError
        With the fix; ``DBMPI_OVERSUBSCRIBE=1`` turns the check off.
    """
    environment = without_prepared(os.environ if environment is None else environment)
    processors = len(_affinity(0)) if processors is None else processors
    asked = {name: number(environment.get(name)) or 0 for name in VARIABLES}
    name = max(asked, key=asked.__getitem__)
    if asked[name] <= processors or environment.get("DBMPI_OVERSUBSCRIBE", "") not in ("", "0"):
        return
    raise UserError(
        f"{name}={environment[name]}: this rank may use {_count(processors, 'processor')}, and more threads would wait "
        f"for each other: unset {name}, or give the rank more processors (srun --cpus-per-task={asked[name]}, mpirun "
        "--bind-to none); DBMPI_OVERSUBSCRIBE=1 starts all the same"
    )


def this_node(environment: Mapping[str, str]) -> Node:
    """Return what this process and the other ranks on its node may use.

    A rank's affinity may be narrower than the node for two reasons.  If the *launcher* has bound it (mpirun does,
    without ``--bind-to none``), the set is meant for this rank, or for those of its socket.  If the *job* was given
    a part of the node, all ranks share the set.  The launcher's daemon tells them apart: it is not bound itself, so its
    own affinity is what all ranks of the node have together.

    Parameters
    ----------
    environment
        Environment variables of this process.
    """
    ranks = ranks_on_node(environment)
    mine = _affinity(0)
    daemon = _daemon(os.getppid()) if ranks > 1 else None
    together = mine if daemon is None else mine | _affinity(daemon)
    limits = [physical_cores(together)]
    quota = cpu_quota()
    if quota is not None:
        limits.append(int(quota))
    allocated = number(environment.get("SLURM_CPUS_ON_NODE"))
    if allocated is not None:
        limits.append(allocated)
    cores = max(1, min(limits))
    return Node(ranks=ranks, cores=cores, mine=min(physical_cores(mine), cores))


def physical_cores(cpus: Iterable[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the number of cores behind logical processors: two hardware threads of one core count once.

    Parameters
    ----------
    cpus
        Numbers of the logical processors.
    root
        Folder in which the system describes them.
    """
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(f"cpu{cpu}")
    return len(cores)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many cores' worth of time this process's control groups (version 2) allow; None without a limit.

    Parameters
    ----------
    root
        Folder of the system's control groups.
    membership
        File with the groups of this process.
    """
    quotas = []
    for group in capacity.control_groups("", root, membership):
        try:
            limit, period = (group / "cpu.max").read_text().split()
            quotas.append(int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            pass  # no such group, no limit in it ("max"), or the root, which has no such file
    return min(quotas, default=None)


def _shares(node: Node) -> str:
    """Return the reason for the rank's share of the node."""
    cores = _count(node.cores, "core")
    if node.ranks == 1:
        return f"{cores} for the one rank here"
    if node.mine < node.cores // node.ranks:
        bound = _count(node.mine, "core")
        return f"{node.ranks} ranks share {cores}, but the launcher bound this one to {bound}: --bind-to none frees it"
    return f"{node.ranks} ranks share {cores}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _affinity(pid: int) -> set[int]:
    """Return the logical processors on which a process (0: this one) may run; all if the system does not say."""
    try:
        return set(os.sched_getaffinity(pid))
    except (AttributeError, OSError):
        return set(range(os.cpu_count() or 1)) if pid == 0 else set()


def _daemon(process: int, levels: int = 5) -> int | None:
    """Return the launcher's daemon among the ancestors, past wrappers such as a shell, or None."""
    for _ in range(levels):
        name, fields = processes.stat(process)
        if name in _DAEMONS:
            return process
        process = int(fields[1]) if fields else 0
        if process <= 1:
            return None
    return None
