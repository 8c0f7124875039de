"""One replica of Downpour on two cores: samples a second with an evaluator, beside those without any evaluation.

A network of 784-256-10 learns from 20,000 samples in batches of 128, and 5,000 others are evaluated after each epoch:
by nobody, by the replica itself, or by an evaluator.  The shard has a rank of its own, or is on that of the replica.
Each rank has one thread.  What counts is the training alone, until the last report of the replica.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import common

SAMPLES, HELD_OUT, INPUTS, UNITS, CLASSES = 20_000, 5_000, 784, 256, 10
EPOCHS = 12
LEAST = 0.98
LAYOUTS = {"a rank of its own": 2, "the replica's": 1}
"""Ranks of the shard and the replica."""
WAYS = ("nobody", "replica", "evaluator")


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(Path(sys.argv[2]), *sys.argv[3:])
        return
    options = common.options(__doc__)
    report = common.Report("evaluators", options.json)
    for layout, ranks in LAYOUTS.items():
        rows, rates = [], {}
        with tempfile.TemporaryDirectory() as place:
            found = common.in_turn(2 if options.quick else 7, **{way: measure(ranks, place, way) for way in WAYS})
        for way in WAYS:
            rates[way] = common.median([one["rate"] for one in found[way]])
            spread = common.spread([one["rate"] for one in found[way]])
            evaluations = common.median([one["evaluations"] for one in found[way]])
            rows.append((way, rates[way], spread, rates[way] / rates["nobody"], evaluations))
        header = ("evaluated by", "samples/s", "quartiles", "of nobody's", "evaluations")
        report.table(f"The shard is on {layout}", header, rows)
        report.at_least(f"with an evaluator, of without; the shard on {layout}", rows[-1][3], LEAST)
    report.finish()


def measure(ranks: int, place: str, way: str) -> common.Action:
    """Return what trains once in processes of its own, and tells how fast that was."""
    ranks += way == "evaluator"
    names = itertools.count()

    def action() -> dict[str, float]:
        command = common.on_ranks(ranks, __file__, "--contestant", place, way, str(next(names)))
        with common.Contestant(command) as run:
            return run.do()

    return action


def contestant(place: Path, way: str, name: str) -> None:
    """Train once in the directory of that name."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi import config
    from dbmpi.monitor.history import RunHistory
    from dbmpi.monitor.records import read_records
    from dbmpi.mpi import world
    from dbmpi.runs.training import train

    comm = world.start()
    random = np.random.default_rng(1)
    inputs = random.normal(size=(SAMPLES + HELD_OUT, INPUTS)).astype(np.float32)
    targets = random.integers(0, CLASSES, SAMPLES + HELD_OUT)
    colocate = comm.size - (way == "evaluator") == 1
    directory = place / f"{way}-{name}"
    run = config.Run.model_validate(
        {
            "run": {"directory": directory},
            "network": {"layers": [{"units": UNITS, "activation": "relu"}, {"units": CLASSES}]},
            "topology": {"shards": 1, "colocate": colocate, "evaluators": int(way == "evaluator")},
            "optimizer": {"batch_size": 128, "epochs": EPOCHS},
            "checkpoint": {"every_seconds": 0},
            "monitor": {"progress": "none", "evaluate_epochs": int(way != "nobody"), "timeline_seconds": 0},
        }
    )

    def step() -> dict[str, float]:
        data = inputs[:SAMPLES], targets[:SAMPLES]
        train(run, comm, data=data, test=(inputs[SAMPLES:], targets[SAMPLES:]))
        if comm.rank > 0:
            return {}
        history = RunHistory(read_records(directory))
        return {"rate": history.summary().samples_per_second, "evaluations": len(history.evaluations)}

    common.serve_together(comm, step=step)


if __name__ == "__main__":
    main()
