"""What launchers and Slurm put into the environment of the ranks they start, and when it can be believed.

The body of a batch script sees ``SLURM_NTASKS`` and ``SLURM_PROCID`` although it is a single process and no task; only
processes started by ``srun`` have a ``SLURM_STEP_ID``.  mpirun and hydra start one daemon per node as a step of their
own, and the ranks below inherit its variables: there ``SLURM_NTASKS`` counts daemons.  So the launchers' own variables
come first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step numbers from here on are Slurm's own: the batch script, the interactive shell, the external step."""
_GROUP = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_RANKS_ON_NODE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE", "PMI_LOCAL_SIZE")
"""Set by mpirun of Open MPI, by hydra (MPICH, Intel MPI), by MVAPICH2, by Cray PALS."""


def number(text: str | None) -> int | None:
    """Return the positive number in a variable (the first one of a list, as in ``OMP_NUM_THREADS=4,2``), or None.

    Parameters
    ----------
    text
        The variable's value; None if it is not set.
    """
    first = (text or "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def launched(environment: Mapping[str, str]) -> tuple[int, str, int]:
    """Return how many ranks a launcher started, the launcher's name, and the number of this rank.

    Without a launcher ``(1, "", 0)``.  The innermost launcher counts, because the daemons of mpirun and hydra may
    themselves be tasks of Slurm.

    Parameters
    ----------
    environment
        Environment variables of the rank.
    """
    found = [
        ("OMPI_COMM_WORLD_SIZE", "mpirun of Open MPI", "OMPI_COMM_WORLD_RANK"),
        ("MV2_COMM_WORLD_SIZE", "mpirun of MVAPICH", "MV2_COMM_WORLD_RANK"),
    ]
    if "MPI_LOCALNRANKS" in environment or not _inside_step(environment):
        found.append(("PMI_SIZE", "mpiexec of MPICH's kind", "PMI_RANK"))
    if _inside_step(environment):
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        found.append((tasks, "srun", "SLURM_PROCID"))
    for size, name, rank in found:
        if ranks := number(environment.get(size)):
            mine = number(environment.get(rank)) or 0
            return ranks, name, mine if mine < ranks else 0  # else none would be the first, which has to speak
    return 1, "", 0


def ranks_on_node(environment: Mapping[str, str]) -> int:
    """Return how many ranks run on this node according to the launcher, or 1 if it does not say.

    Parameters
    ----------
    environment
        Environment variables of the rank.
    """
    for name in _RANKS_ON_NODE:
        if ranks := number(environment.get(name)):
            return ranks
    if _inside_step(environment):
        per_node = expand(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
        node = environment.get("SLURM_NODEID", "0")
        if node.isdecimal() and int(node) < len(per_node):
            return per_node[int(node)]
    return 1


def batch_job(environment: Mapping[str, str]) -> str:
    """Return the number of the job of Slurm that a process belongs to, ``17_2`` for task 2 of array 17; else "".

    A heterogeneous job has that of its first component.

    Parameters
    ----------
    environment
        Environment variables of the process.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID", ""), environment.get("SLURM_ARRAY_TASK_ID", "")
    if array.isdecimal() and task.isdecimal():
        return f"{array}_{task}"
    job = environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID", "")
    return job if job.isdecimal() else ""


def expand(text: str) -> list[int]:
    """Expand a list of counts, one per node, as Slurm writes it: ``"4(x2),3"`` is ``[4, 4, 3]``.

    Parameters
    ----------
    text
        The list; anything that is not one gives ``[]``.
    """
    groups = [_GROUP.fullmatch(part.strip()) for part in text.split(",")]
    return [int(group[1]) for group in groups if group for _ in range(int(group[2] or 1))] if all(groups) else []


def _inside_step(environment: Mapping[str, str]) -> bool:
    """Return whether this process is a task of a step, that is, was started by ``srun``."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP
