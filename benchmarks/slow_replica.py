"""One of three replicas of Sandblaster ten times slower: what a batch takes, beside what their capacities would allow.

The replicas sleep in each portion, which takes no core from the others: two for 20 ms, and one for 200.  The ideal is a
batch cut to the last bit by what each can do; in equal parts, as by an Allreduce, it would take the slow replica's
third.  What each portion takes beyond its sleep, the gradient, counts as part of the capacities.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import common

PORTIONS, PASSES = 60, 9
SLEEP, SLOWER = 0.02, 10
REPLICAS = 3
MOST = 1.25


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(Path(sys.argv[2]))
        return
    options = common.options(__doc__)
    report = common.Report("slow_replica", options.json)
    rows = []
    for _ in range(1 if options.quick else 3):
        with (
            tempfile.TemporaryDirectory() as place,
            common.Contestant(common.on_ranks(REPLICAS + 1, __file__, "--contestant", place)) as run,
        ):
            rows.append(run.do())
    table = [
        (
            1e3 * row["seconds"],
            1e3 * row["ideal"],
            row["seconds"] / row["ideal"],
            row["slow"],
            1e3 * PORTIONS / REPLICAS * row["slow_portion"],
        )
        for row in rows
    ]
    header = ("ms", "ideal ms", "ratio", "portions of the slow one", "in equal parts ms")
    report.table(f"A batch of {PORTIONS} portions, medians of {PASSES - 1} in each run", header, table)
    report.at_most("time over the ideal", common.median([row["seconds"] / row["ideal"] for row in rows]), MOST)
    report.finish()


def contestant(place: Path) -> None:
    """Serve runs in which replica 0 is slow."""
    common.prepare_runtime()
    import h5py
    import numpy as np

    from dbmpi import config
    from dbmpi.monitor.records import read_records
    from dbmpi.mpi import waiting, world
    from dbmpi.objective import Outcome
    from dbmpi.runs.training import train
    from dbmpi.sandblaster.board import PostedBatch
    from dbmpi.sandblaster.work import PortionWork

    comm = world.start()
    if comm.rank == 0:
        random = np.random.default_rng(1)
        with h5py.File(place / "train.h5", "w") as file:
            file["inputs"] = random.normal(size=(PORTIONS * 6, 8)).astype(np.float32)
            file["targets"] = random.integers(0, 3, PORTIONS * 6)
            file["targets"].attrs["classes"] = 3
    waiting.barrier(comm, "the data")
    compute, taken = PortionWork.compute, list[tuple[bool, float]]()

    def slowly(self: PortionWork, batch: PostedBatch, portion: int, gradient: np.ndarray) -> Outcome:
        began, slow = time.perf_counter(), comm.rank == 1  # replica 0, behind the shard
        time.sleep(SLEEP * (SLOWER if slow else 1))
        outcome = compute(self, batch, portion, gradient)
        taken.append((slow, time.perf_counter() - began))
        return outcome

    PortionWork.compute = slowly  # type: ignore[method-assign]
    run = config.Run.model_validate(
        {
            "run": {"directory": place / "run"},
            "data": {"train": place / "train.h5"},
            "network": {"loss": "softmax", "layers": [{"units": 16, "activation": "tanh"}, {"units": 3}]},
            "topology": {"shards": 1, "replicas": REPLICAS},
            "optimizer": {"method": "sandblaster", "batch_size": 6, "epochs": PASSES},
            "sandblaster": {"gtol": 0.0, "ftol": 0.0},
            "monitor": {"progress": "none"},
        }
    )

    def step() -> dict[str, float]:
        train(run, comm)
        portions = np.zeros((comm.size, 2))
        if taken:
            portions[comm.rank] = taken[0][0], np.median([seconds for _, seconds in taken])
        from mpi4py import MPI

        portions = waiting.allreduce(comm, portions, MPI.SUM, "the others' portions")
        passes = [record for record in read_records(run.run.directory) if record["kind"] == "batch"][1:]
        return {
            "seconds": float(np.median([record["seconds"] for record in passes])),
            "ideal": PORTIONS / float((1 / portions[1:, 1]).sum()),
            "slow": float(np.median([record["portions"].get("0", 0) for record in passes])),
            "slow_portion": float(portions[portions[:, 0] == 1, 1][0]),
        }

    common.serve_together(comm, step=step)


if __name__ == "__main__":
    main()
