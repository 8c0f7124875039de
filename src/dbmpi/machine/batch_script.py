"""Batch scripts for Slurm: the one source of ``jobs/slurm`` and of ``dbmpi submit``.

Values reach a script in two ways only.  In a directive they match a pattern without blanks, quotes or ends of
lines; everything else is a word that `shlex.quote` has quoted.  So no value can become a command.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from dbmpi.errors import UserError

WARNING = 120
"""Seconds before the time limit at which Slurm warns the job; Slurm may take up to a minute more."""
REQUEUES = 100
"""How often a job goes back into the queue at most."""

_WORD, _NUMBER, _NAMES = r"[\w.+-]+", r"[1-9]\d{0,8}", r"[\w.,:+@-]+"
_SHAPES = {
    "job-name": (_WORD, "letters, digits and . _ + -"),
    "array": (r"\d+-\d+", "e.g. 0-3"),
    "nodes": (_NUMBER, "a number from 1"),
    "ntasks": (_NUMBER, "a number from 1"),
    "ntasks-per-node": (_NUMBER, "a number from 1"),
    "cpus-per-task": (_NUMBER, "a number from 1"),
    "mem": (r"[1-9]\d*[KMGT]?", "MiB, or a number with K, M, G or T, e.g. 16G"),
    "time": (r"\d+|\d+(:\d\d){1,2}|\d+-\d+(:\d\d){0,2}", "minutes, hours:minutes:seconds or days-hours:minutes"),
    "partition": (_NAMES, "its name"),
    "account": (_NAMES, "its name"),
    "qos": (_NAMES, "its name"),
    "constraint": (r"[\w.,:+@&|*()\[\]-]+", "names of features, e.g. avx512 or a&b"),
    "output": (r"[\w.%+-]+", "letters, digits and . _ + - %"),
    "open-mode": ("append", "append"),
    "signal": (rf"B:USR2@{_NUMBER}", "e.g. B:USR2@120"),
}
"""Directives with a value: the pattern of the value, and what a user can give."""

_JOB, _TASK = "job=$SLURM_JOB_ID", "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
"""What is requeued.  The last task of an array has the number of the array as its own."""
_ANNOUNCE = """echo "$(date '+%F %T') job $job on $SLURM_JOB_NODELIST, requeued ${SLURM_RESTART_COUNT:-0} times\""""
_TRAPS = """\
ranks="" warned="" ended=""
# At the warning, the ranks end with a checkpoint; by scancel --batch --signal=TERM as well, but for good.
trap 'warned=1; [[ -z $ranks ]] || kill -USR2 "$ranks" || true' USR1 USR2
trap 'warned=1 ended=1; [[ -z $ranks ]] || kill -USR2 "$ranks" || true' TERM
"""
_COPY = "Copy this file to where your data is, edit it down to the line, and submit it:"
_RULE = "# " + "-" * 100
_SRUN = "--distribution=block --kill-on-bad-exit=0 --wait=30"
"""Consecutive ranks share nodes; where a rank has died, the others have half a minute to write a checkpoint."""
_CHOICE = """\
# Which MPI dbmpi has loaded decides how srun starts the ranks; if this Slurm has no such plugin, mpirun starts them.
ask='import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(repr(MPI.Get_library_version()))'
case $(python -c "$ask") in
  *"Open MPI"*) plugin=pmix ;;
  *CRAY*) plugin=cray_shasta ;;
  *) plugin=pmi2 ;; # MPICH and its relatives
esac
srun --mpi=list 2>&1 | grep -w "$plugin" >/dev/null || plugin=mpirun
echo "$SLURM_NTASKS ranks by $plugin"
"""
_END = """\
ranks=$!
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks" || true; done
code=0
wait "$ranks" || code=$?
# After a warning (138: USR1, 140: USR2) the job goes back into the queue, and later on from the checkpoint.
if [[ ($code == 138 || $code == 140) && -z $ended && ${SLURM_RESTART_COUNT:-0} -lt $requeues ]]; then
  scontrol requeue "$job" || echo "not requeued: submit the script again to continue"
fi
exit "$code"
"""


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind, and the ranks on them."""

    nodes: int
    """How many nodes."""
    per_node: int
    """Ranks on each node."""
    threads: int = 1
    """Cores of each rank."""
    ranks: int | None = None
    """Ranks on all nodes together, where that is less than `nodes` x `per_node`; Slurm then divides them."""
    memory: str = ""
    """Of a node, as Slurm has it, e.g. ``16G``; empty for what the site gives."""
    partition: str = ""
    """Slurm's partition; empty for the site's usual one."""
    constraint: str = ""
    """Features that the nodes must have."""

    @property
    def total(self) -> int:
        """Number of ranks."""
        return self.nodes * self.per_node if self.ranks is None else self.ranks

    def directives(self) -> list[str]:
        """Return the lines that ask Slurm for these nodes; raises UserError for a value that cannot be in one."""
        values = {
            "nodes": str(self.nodes),
            # A number for each node as well would make srun warn that the two do not agree.
            "ntasks": "" if self.ranks is None else str(self.ranks),
            "ntasks-per-node": str(self.per_node) if self.ranks is None else "",
            "cpus-per-task": str(self.threads),
            "mem": self.memory,
            "partition": self.partition,
            "constraint": self.constraint,
        }
        return [directive(name, value) for name, value in values.items() if value]


@dataclass(frozen=True)
class Variants:
    """A setting with another value in each task of an array of jobs."""

    setting: str
    """``section.key``."""
    values: tuple[str, ...]
    """One for each task."""


@dataclass(frozen=True)
class BatchJob:
    """A training as a job of Slurm."""

    name: str
    """Of the job, and of its log."""
    groups: tuple[NodeGroup, ...]
    """One group of nodes; of a heterogeneous job several, in the order of ranks."""
    time: str
    """Limit of the job, as Slurm has it."""
    configuration: str
    """Path of the configuration, from the directory in which the job is submitted."""
    launcher: Literal["srun", "mpirun", "auto"] = "auto"
    """Starts the ranks; ``auto`` lets the script decide when it runs."""
    plugin: str = "pmix"
    """How srun starts this MPI, ``srun --mpi=...``."""
    overrides: tuple[str, ...] = ()
    """Settings that replace those of the configuration, ``section.key=value``."""
    variants: Variants | None = None
    """Makes the job an array, each of whose tasks is a run of its own."""
    account: str = ""
    """That is charged."""
    qos: str = ""
    """Quality of service."""
    warning: int = WARNING
    """Seconds before the limit at which the run ends with a checkpoint."""
    requeues: int = REQUEUES
    """How often the job goes back into the queue then; 0 for never."""
    program: str = "dbmpi"
    """Words of the shell that start dbmpi."""
    preparation: tuple[str, ...] = ()
    """Lines of the shell that come first, e.g. to load modules."""


def directive(name: str, value: str) -> str:
    """Return the line of a script that gives Slurm an option.

    Parameters
    ----------
    name
        Of the option.
    value
        Its value.

    Raises
    ------
    UserError
        If the value does not look as Slurm's documentation says.
    """
    shape, expected = _SHAPES[name]
    if not re.fullmatch(shape, value, re.ASCII):
        raise UserError(f"--{name} {value!r}: cannot be written into a batch script; expected {expected}")
    return f"#SBATCH --{name}={value}"


def render(job: BatchJob, about: str, file: str = "") -> str:
    """Return the script of a job.

    Parameters
    ----------
    job
        What is to be run, and where.
    about
        The first line, for people; one sentence of the program's own.
    file
        Name of the script, where people copy it and edit it.

    Raises
    ------
    UserError
        If a value cannot be in a directive.
    """
    lines = ["#!/bin/bash", f"# {about}"]
    lines += [f"# {_COPY}", f"#   sbatch {file} [--set SECTION.KEY=VALUE ...]"] if file else []
    lines += ["", *_directives(job), "", f"configuration={shlex.quote(job.configuration)}"]
    if job.variants is not None:
        lines.append(f"values=({shlex.join(job.variants.values)})  # as many as --array has numbers")
    lines += [f"requeues={job.requeues}  # at most", *job.preparation, _RULE if file else "", "set -euo pipefail"]
    lines += [_JOB if job.variants is None else _TASK, _ANNOUNCE, "", _TRAPS, *_start(job), _END]
    return "\n".join(lines)


def _directives(job: BatchJob) -> list[str]:
    """Return the lines with options for sbatch; those of all groups of a heterogeneous job come first."""
    count = 0 if job.variants is None else len(job.variants.values)
    values = {
        "job-name": job.name,
        "array": f"0-{count - 1}" if count else "",
        "time": job.time,
        "account": job.account,
        "qos": job.qos,
        "output": "%x-%a.log" if count else "%x.log",
        "open-mode": "append",
        "signal": f"B:USR2@{job.warning}",
    }
    lines = [directive(name, value) for name, value in values.items() if value]
    lines.append("#SBATCH --requeue" if job.requeues else "#SBATCH --no-requeue")
    for number, group in enumerate(job.groups):
        lines += ["#SBATCH hetjob"] if number else []
        lines += group.directives()
    return lines


def _start(job: BatchJob) -> list[str]:
    """Return the lines that start the ranks in the background."""
    words = [f"--set {shlex.quote(override)}" for override in job.overrides]
    lines = []
    if job.variants is not None:
        setting = job.variants.setting
        if not re.fullmatch(r"\w+(\.\w+)+", setting, re.ASCII):
            raise UserError(f"{setting!r}: cannot be varied; expected section.key, e.g. optimizer.learning_rate")
        lines.append("value=${values[$SLURM_ARRAY_TASK_ID]}")
        words += [f'--set "{setting}=$value"', f'--set "run.directory=runs/{setting.rpartition(".")[2]}-$value"']
    words = ['train "$configuration"', *words, '--set checkpoint.resume=auto "$@"']
    inside = f"{' '.join(words)}" if len(words) == 2 else "\n  ".join(["", *words]) + "\n"
    lines.append(f"arguments=({inside})")
    by_mpirun = f'{job.program} launch -n "$SLURM_NTASKS" --restarts 3 -- "${{arguments[@]}}" &'
    if not re.fullmatch(_WORD, job.plugin, re.ASCII):
        raise UserError(f"--mpi {job.plugin!r}: expected a name that srun --mpi=list shows, e.g. pmix")
    plugin = '"$plugin"' if job.launcher == "auto" else job.plugin
    by_srun = [f"srun --mpi={plugin} {_SRUN} \\"]
    if len(job.groups) == 1:
        by_srun.append(f'  --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" {job.program} "${{arguments[@]}}" &')
    else:
        by_srun += [
            f'  --het-group={number} --cpus-per-task="${{SLURM_CPUS_PER_TASK_HET_GROUP_{number}:-1}}" {job.program} '
            f'"${{arguments[@]}}"{" &" if number == len(job.groups) - 1 else " : " + chr(92)}'
            for number in range(len(job.groups))
        ]
    # A signal that comes before the ranks are there would be lost.
    lines += ["if [[ -n $warned ]]; then", "  bash -c 'exit 140' &"]
    if job.launcher == "auto":
        lines += ["elif [[ $plugin == mpirun ]]; then", f"  {by_mpirun}"]
    started = [by_mpirun] if job.launcher == "mpirun" else by_srun
    lines += ["else", *(f"  {line}" for line in started), "fi"]
    return [_CHOICE, *lines] if job.launcher == "auto" else lines
