"""Networks of untied filters learn real images on two partitions: Fashion-MNIST, with labels and without.

Runs examples/fashion-mnist-local.toml and examples/fashion-mnist-unsupervised.toml, each with one replica of two
partitions and a shard.  Needs the published files, as fashion_mnist.py does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import common
from fashion_mnist import dbmpi, import_data

RANKS = 3


def main() -> None:
    """Run both and print what they came to."""
    options = common.options(__doc__)
    report = common.Report("fashion_mnist_local", options.json)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = import_data(folder)
        labelled = train(folder, data, "fashion-mnist-local", 2 if options.quick else None)
        header = ("epoch", "test loss", "test accuracy %")
        report.table("With labels, P = 2", header, [(e, loss, 100 * accuracy) for e, loss, accuracy in labelled])
        unlabelled = train(folder, data, "fashion-mnist-unsupervised", 1 if options.quick else None)
        report.table("Without labels, P = 2", header[:2], [(e, loss) for e, loss, _ in unlabelled])
    report.at_least("test accuracy, %", 100 * labelled[-1][2], 90)
    report.at_most(
        "objective at the end, of that after a quarter of an epoch", unlabelled[-1][1] / unlabelled[0][1], 0.75
    )
    report.finish()


def train(folder: Path, data: dict[str, Path], name: str, epochs: int | None) -> list[tuple[float, float, float]]:
    """Train once; return epoch, test loss and accuracy (NaN without labels) of every evaluation."""
    from dbmpi.monitor.history import RunHistory
    from dbmpi.monitor.records import read_records

    run = folder / name
    settings: dict[str, object] = {"run.directory": run, "data.train": data["train"], "data.test": data["test"]}
    if epochs is not None:
        settings["optimizer.epochs"] = epochs
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    dbmpi("launch", "-n", RANKS, "--", "train", common.ROOT / "examples" / f"{name}.toml", *overrides)
    return [
        (one["epoch"], one["loss"], one.get("accuracy") or float("nan"))
        for one in RunHistory(read_records(run)).evaluations
    ]


if __name__ == "__main__":
    main()
