"""Does bfloat16 in products, or on the wire, cost accuracy?  Downpour with Adagrad beside float32, on the same samples.

Fashion-MNIST, 784-512-256-10, as examples/fashion-mnist.toml has it; and frames of spoken digits, 440-256-256-30, of
which the usual test half, recordings 0 to 4 of each digit and speaker, is held out.  One replica and one shard, so
that nothing else than the precision differs, with three seeds each.  Where the wire rounds, the two seem to be on two
hosts.

Runs that are complete are kept in the folder ``--folder``, and a second start goes on behind them; ``--minutes`` ends
it before the first run that begins later.  Needs the published files in ../shared/data, beside the project, or in the
folders that DBMPI_FASHION_MNIST and DBMPI_FSDD name.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
from fashion_mnist import CONFIGURATION, dbmpi, import_data
from simulate import import_frames, settings

SABOTAGE = common.ROOT / "tests" / "sabotage"
"""What sets ranks apart, if it is on the path of Python's modules."""
WAYS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"network.precision": "bfloat16"},
    "bfloat16 wire": {"server.wire": "bfloat16"},
}
SEEDS = (1, 2, 3)
MOST = 0.3
"""Points that bfloat16 may lose, in the mean over the seeds."""
DIGITS = """[network]
loss = "softmax"
[[network.layers]]
units = 256
activation = "relu"
[[network.layers]]
units = 256
activation = "relu"
[[network.layers]]
units = 30
[topology]
shards = 1
[optimizer]
rule = "adagrad"
learning_rate = 0.01
batch_size = 100
epochs = 5.0
[monitor]
progress = "none"
evaluate_epochs = 0
"""


def main() -> None:
    options = common.resumable_options(__doc__, quick="one seed and half an epoch: a look")
    report = common.Report("bfloat16", options.json)
    began = time.monotonic()
    seeds = SEEDS[:1] if options.quick else SEEDS
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        problems = prepared(folder)
        reached: dict[str, dict[str, list[float]]] = {}
        rows = []
        for problem, (configuration, data) in problems.items():
            reached[problem] = {way: [] for way in WAYS}
            for seed in seeds:
                for way in WAYS:
                    run = folder / f"{problem}-{way}-{seed}".replace(" ", "-")
                    if not done(run) and time.monotonic() - began > 60 * options.minutes:
                        print(f"bfloat16.py: not finished; start it again to go on behind {len(rows)} runs")
                        return
                    found = learned(configuration, data, run, way, seed, quick=options.quick)
                    reached[problem][way].append(found["accuracy"])
                    rows.append((problem, seed, way, *found.values()))
    report.table("After the same samples", ("data", "seed", "numbers", "accuracy %", "loss", "samples/s"), rows)
    for problem, found in reached.items():
        plain, *others = (sum(found[way]) / len(seeds) for way in WAYS)
        for way, rounded in zip(tuple(WAYS)[1:], others, strict=True):
            report.at_most(f"points that {way} loses, {problem}", plain - rounded, MOST)
    report.finish()


def prepared(folder: Path) -> dict[str, tuple[Path, Mapping[str, Path]]]:
    """Import the data; return configuration and files for each problem."""
    problems: dict[str, tuple[Path, Mapping[str, Path]]] = {}
    for problem in ("fashion-mnist", "spoken digits"):
        place = folder / problem.replace(" ", "-")
        configuration, files = place / "run.toml", {part: place / f"{part}.h5" for part in ("train", "test")}
        if not configuration.exists():
            place.mkdir(parents=True, exist_ok=True)
            if problem == "fashion-mnist":
                import_data(place)
            else:
                import_frames(place, 50, lambda _, number: "test" if number < 5 else "train")
            configuration.write_text(CONFIGURATION.read_text() if problem == "fashion-mnist" else DIGITS)
        problems[problem] = (configuration, files)
    return problems


def done(run: Path) -> bool:
    """Whether a run is complete."""
    return (run / "found.json").exists()


def learned(
    configuration: Path, data: Mapping[str, Path], run: Path, way: str, seed: int, *, quick: bool
) -> dict[str, Any]:
    """Train, unless that has been done, and return accuracy, loss and samples a second."""
    from dbmpi.monitor.history import summary

    if not done(run):
        values = {
            **{"run.directory": run, "run.seed": seed, "checkpoint.resume": "never"},
            **{f"data.{part}": file for part, file in data.items()},
            **WAYS[way],
            **{"topology.replicas": 1, "server.overlap": "none"},
            **({"optimizer.epochs": 0.5} if quick else {}),
        }
        apart = {"DBMPI_TEST_APART": "1", "PYTHONPATH": str(SABOTAGE)} if "server.wire" in WAYS[way] else {}
        os.environ.update(apart)
        try:
            dbmpi("launch", "-n", 2, "--", "train", configuration, *settings(values))
        finally:
            for name in apart:
                del os.environ[name]
        end = summary(run)
        assert end.test_accuracy is not None
        found = {"accuracy": 100 * end.test_accuracy, "loss": end.test_loss, "samples/s": end.samples_per_second}
        (run / "found.json").write_text(json.dumps(found))
        print(f"  {run.name}: {found['accuracy']:.2f} %", file=sys.stderr)
    result: dict[str, Any] = json.loads((run / "found.json").read_text())
    return result


if __name__ == "__main__":
    main()
