"""Write jobs/slurm/*.sbatch by `dbmpi.machine.batch_script`, which also writes the scripts of `dbmpi submit`.

Run it after a change there or here; a test compares the files with what this program would write.
"""

from __future__ import annotations

from pathlib import Path

from dbmpi.machine.batch_script import BatchJob, NodeGroup, Variants, render

FOLDER = Path(__file__).parent.parent / "jobs" / "slurm"
ENVIRONMENT = (
    "source .venv/bin/activate  # the environment that dbmpi is installed in",
    "# module load gcc openmpi  # if dbmpi was installed for an MPI of the site",
)
LATER = "It ends with a checkpoint before its time limit, and Slurm starts it again until the training is complete."
SEVERAL = (NodeGroup(nodes=2, per_node=4, threads=4),)
SCRIPTS = {
    "train": (
        "Train on one or several nodes, with the launcher that fits the MPI.",
        BatchJob("dbmpi", SEVERAL, "04:00:00", "train.toml", preparation=ENVIRONMENT),
    ),
    "one-node": (
        "Train on the cores of one node.",
        BatchJob(
            "dbmpi",
            (NodeGroup(nodes=1, per_node=8, threads=2, memory="16G"),),
            "04:00:00",
            "train.toml",
            launcher="mpirun",
            preparation=ENVIRONMENT,
        ),
    ),
    "srun": (
        "Train on several nodes by srun: --mpi=pmix below for Open MPI, pmi2 for MPICH, cray_shasta for Cray's.",
        BatchJob("dbmpi", SEVERAL, "04:00:00", "train.toml", launcher="srun", preparation=ENVIRONMENT),
    ),
    "mpirun": (
        "Train on several nodes by the mpirun of dbmpi's own MPI, which starts again on what is left after a death.",
        BatchJob("dbmpi", SEVERAL, "04:00:00", "train.toml", launcher="mpirun", preparation=ENVIRONMENT),
    ),
    "heterogeneous": (
        "Train with shards on few nodes with much memory, and workers on many (for MPICH: pmi2 instead of pmix).",
        BatchJob(
            "dbmpi",
            (
                NodeGroup(nodes=1, per_node=2, threads=8, memory="200G"),
                NodeGroup(nodes=4, per_node=8, threads=4, memory="16G"),
            ),
            "04:00:00",
            "train.toml",
            launcher="srun",
            overrides=("topology.shards=2", "topology.shard_ranks=first"),
            preparation=ENVIRONMENT,
        ),
    ),
    "array": (
        "Train once for each value of a hyper-parameter; then, in one table:   dbmpi status runs/learning_rate-*",
        BatchJob(
            "dbmpi",
            (NodeGroup(nodes=1, per_node=4, threads=4),),
            "04:00:00",
            "train.toml",
            launcher="mpirun",
            variants=Variants("optimizer.learning_rate", ("0.003", "0.01", "0.03", "0.1")),
            preparation=ENVIRONMENT,
        ),
    ),
}
"""What each file says of itself, and the job that it is."""


def texts() -> dict[str, str]:
    """Return the text of each script, by the name of its file."""
    return {
        f"{name}.sbatch": render(job, f"{about}\n# {LATER}", f"{name}.sbatch") for name, (about, job) in SCRIPTS.items()
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
