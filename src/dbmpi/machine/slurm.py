"""What Slurm's environment variables say, and when they may be believed.

A batch script's body sees ``SLURM_NTASKS`` and ``SLURM_PROCID`` although it is one process and no task; only what
``srun`` starts has a ``SLURM_STEP_ID``.  mpirun and hydra start a daemon per node as a step of their own, whose
variables the ranks below inherit: there ``SLURM_NTASKS`` counts daemons, so the launcher's own variables are to be
asked before these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step numbers from here on are Slurm's own: the batch script, the interactive shell, the external step."""

_GROUP = re.compile(r"^(\d+)(?:\(x(\d+)\))?$")


def inside_job(environment: Mapping[str, str]) -> bool:
    """Return whether this process belongs to a Slurm job."""
    return "SLURM_JOB_ID" in environment or "SLURM_JOBID" in environment


def inside_step(environment: Mapping[str, str]) -> bool:
    """Return whether this process is a task of a step, that is, started by ``srun``."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def tasks(environment: Mapping[str, str]) -> int | None:
    """Return how many tasks the step has of which this process is one, or None outside a step."""
    if not inside_step(environment):
        return None
    text = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", ""))
    return int(text) if text.isdecimal() else None


def tasks_on_node(environment: Mapping[str, str]) -> int | None:
    """Return how many tasks of this process's step run on its node, or None outside a step."""
    if not inside_step(environment):
        return None
    per_node = expand(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
    node = environment.get("SLURM_NODEID", "0")
    if not node.isdecimal() or int(node) >= len(per_node):
        return None
    return per_node[int(node)]


def expand(text: str) -> list[int]:
    """Expand Slurm's list of counts, one per node: ``"4(x2),3"`` is ``[4, 4, 3]``; a list that is none gives ``[]``."""
    counts: list[int] = []
    for part in text.split(","):
        match = _GROUP.match(part.strip())
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
