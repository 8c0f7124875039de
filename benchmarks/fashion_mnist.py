"""Does asynchrony cost accuracy?  Fashion-MNIST, 784-512-256-10, by Downpour SGD with Adagrad.

One replica and three replicas, each with a shard of its own, learn from the same number of samples: ten epochs of
examples/fashion-mnist.toml, with two seeds.  Needs the published files in ../shared/data/fashion-mnist, beside the
project, or in the folder that DBMPI_FASHION_MNIST names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common

FILES = {"train": "train", "test": "t10k"}
CONFIGURATION = common.ROOT / "examples" / "fashion-mnist.toml"


def main() -> None:
    """Run all and print the table."""
    options = common.options(__doc__)
    report = common.Report("fashion_mnist", options.json)
    seeds = (1,) if options.quick else (1, 2)
    accuracies: dict[int, list[float]] = {1: [], 3: []}
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = import_data(folder)
        for seed in seeds:
            for replicas, reached in accuracies.items():
                summary = train(folder, data, replicas, seed)
                reached.append(100 * (summary.test_accuracy or 0.0))
                rows.append(
                    (
                        f"{replicas} x 1 + 1 shard, seed {seed}",
                        reached[-1],
                        summary.test_loss,
                        summary.epochs,
                        summary.samples_per_second,
                        summary.mean_staleness,
                        summary.seconds,
                    )
                )
    header = ("replicas", "test accuracy %", "test loss", "epochs", "samples/s", "mean staleness", "seconds")
    report.table("Fashion-MNIST, 784-512-256-10", header, rows)
    report.at_least("test accuracy of 3 replicas, %", min(accuracies[3]), 88.5)
    difference = common.median(accuracies[1]) - common.median(accuracies[3])
    report.at_most("points that 3 replicas lose on one", difference, 0.5)
    report.finish()


def import_data(folder: Path) -> dict[str, Path]:
    """Import the published files; return the HDF5 files."""
    published = Path(os.environ.get("DBMPI_FASHION_MNIST", common.ROOT.parent / "shared" / "data" / "fashion-mnist"))
    if not published.is_dir():
        sys.exit(f"{published}: not there; set DBMPI_FASHION_MNIST to the folder with the published .gz files")
    files = {}
    for part, prefix in FILES.items():
        files[part] = folder / f"{part}.h5"
        images, labels = (published / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        dbmpi("data", "import", "idx", "--images", images, "--labels", labels, "--out", files[part])
    return files


def train(folder: Path, data: dict[str, Path], replicas: int, seed: int):
    """Train once; return the summary of the run."""
    from dbmpi.monitor.history import summary

    run = folder / f"run-{replicas}-{seed}"
    settings = {
        "run.directory": run,
        "run.seed": seed,
        "data.train": data["train"],
        "data.test": data["test"],
        "topology.replicas": replicas,
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    dbmpi("launch", "-n", replicas + 1, "--", "train", CONFIGURATION, *overrides)
    return summary(run)


def dbmpi(*words: object) -> None:
    """Run a command of dbmpi, its output on standard error."""
    command = [sys.executable, "-m", "dbmpi", *(str(word) for word in words)]
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
