"""Which method learns fastest, and from how many samples?  In the manner of figure 4 of Dean et al. (2012).

Test accuracy over seconds and over samples, on Fashion-MNIST (784-128-64-10) and on frames of spoken digits
(440-256-256-30), for SGD with one replica, Downpour with four, Downpour with Adagrad with four, and Sandblaster L-BFGS
with four; all go on from one checkpoint of a warmstart, as in the paper.  Writes the figure to docs/images/figure4.png
(with ``--quick`` into the current directory).

Needs the published files in ../shared/data/fashion-mnist and ../shared/data/fsdd, beside the project, or in the
folders that DBMPI_FASHION_MNIST and DBMPI_FSDD name.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import common
from fashion_mnist import dbmpi, import_data

REPLICAS = 4
BATCH_SIZE = 100
"""Samples of a step, and of a portion: a checkpoint is gone on from with the same."""


@dataclass(frozen=True)
class Method:
    """One curve."""

    name: str
    replicas: int
    settings: Mapping[str, Any]
    color: str


@dataclass(frozen=True)
class Task:
    """One row of the figure."""

    title: str
    units: tuple[int, ...]
    rate: float
    adagrad_rate: float
    warm_epochs: float
    epochs: float
    """Of the stochastic methods, after the warmstart."""
    passes: float
    """Of Sandblaster: evaluations of the loss on all samples, after the warmstart."""
    goals: tuple[int, ...]
    """Accuracies in %, for the table."""

    def methods(self) -> list[Method]:
        """Return what is compared."""
        sgd = {"optimizer.rule": "sgd", "optimizer.learning_rate": self.rate}
        adagrad = {"optimizer.rule": "adagrad", "optimizer.learning_rate": self.adagrad_rate}
        sandblaster = {"optimizer.method": "sandblaster", "sandblaster.portions_per_push": 16}
        return [
            Method("SGD [1]", 1, sgd, "black"),
            Method(f"Downpour SGD [{REPLICAS}]", REPLICAS, sgd, "tab:blue"),
            Method(f"Downpour SGD [{REPLICAS}] with Adagrad", REPLICAS, adagrad, "tab:green"),
            Method(f"Sandblaster L-BFGS [{REPLICAS}]", REPLICAS, sandblaster, "tab:red"),
        ]


@dataclass(frozen=True)
class Curve:
    """Test accuracy (%) after seconds and samples since the warmstart."""

    seconds: list[float]
    samples: list[float]
    accuracy: list[float]

    def reached(self, goal: float) -> tuple[str, str]:
        """Return after how many seconds, and thousand samples, the accuracy is first seen."""
        for seconds, samples, accuracy in zip(self.seconds, self.samples, self.accuracy, strict=True):
            if accuracy >= goal:
                return f"{seconds:.1f}", f"{samples / 1000:.0f}"
        return "-", "-"


TASKS = {
    "fashion": Task("Fashion-MNIST", (128, 64, 10), 0.05, 0.005, 0.25, 6, 50, (80, 85)),
    "speech": Task("Spoken digits: 30 states of frames", (256, 256, 30), 0.05, 0.005, 0.25, 6, 50, (60, 70)),
}


def main() -> None:
    """Run all, print the tables and draw the figure."""
    options = common.options(__doc__)
    report = common.Report("figure4", options.json)
    curves: dict[str, dict[str, Curve]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, task in TASKS.items():
            folder = Path(place) / name
            folder.mkdir()
            data = import_data(folder) if name == "fashion" else import_speech(folder, 10 if options.quick else 25)
            curves[name] = learn(folder, task, data, 0.1 if options.quick else 1.0)
            show(report, task, curves[name])
    path = Path("figure4.png") if options.quick else common.ROOT / "docs" / "images" / "figure4.png"
    draw(curves, path)
    print(f"\nfigure: {path}")
    report.finish()


def import_speech(folder: Path, recordings: int) -> dict[str, Path]:
    """Import the first recordings of every digit by every speaker.

    Those with the numbers 0 to 4 are held out, as the data's authors propose: the speakers are the same.
    """
    published = Path(os.environ.get("DBMPI_FSDD", common.ROOT.parent / "shared" / "data" / "fsdd"))
    archive = published / "fsdd-recordings.tar"
    if not archive.is_file():
        sys.exit(f"{archive}: not there; set DBMPI_FSDD to the folder with this tar of the Free Spoken Digit Dataset")
    with tarfile.open(archive) as members:
        names = [PurePosixPath(name).name for name in members.getnames() if name.endswith(".wav")]
    numbers = {name: int(name.removesuffix(".wav").split("_")[2]) for name in names}
    files, more = {}, []
    for part in ("train", "test"):
        table = folder / f"{part}.csv"
        chosen = range(5) if part == "test" else range(5, recordings)
        rows = [name for name in names if numbers[name] in chosen]
        table.write_text("file,label\n" + "".join(f"{name},{name.split('_')[0]}\n" for name in rows))
        files[part] = folder / f"{part}.h5"
        dbmpi("data", "import", "wav", archive, "--table", table, "--states", 3, "--out", files[part], *more)
        more = ["--like", files["train"]]
    return files


def learn(folder: Path, task: Task, data: Mapping[str, Path], share: float) -> dict[str, Curve]:
    """Take the warmstart, let every method go on from a copy of it, and return what they reached."""
    configuration = folder / "run.toml"
    hidden = [f'[[network.layers]]\nunits = {units}\nactivation = "relu"\n' for units in task.units[:-1]]
    configuration.write_text(
        f'[data]\ntrain = "{data["train"]}"\ntest = "{data["test"]}"\n[network]\nloss = "softmax"\n'
        + "".join(hidden)
        + f"[[network.layers]]\nunits = {task.units[-1]}\n"
        + f'[optimizer]\nrule = "sgd"\nlearning_rate = {task.rate}\nbatch_size = {BATCH_SIZE}\n'
        + '[checkpoint]\nresume = "auto"\n[monitor]\nprogress = "none"\nreport_seconds = 0.2\nevaluate_epochs = 0.5\n'
    )
    warm = folder / "warmstart"
    train(configuration, warm, 1, {"optimizer.epochs": task.warm_epochs})
    curves = {}
    for number, method in enumerate(task.methods()):
        sandblaster = "optimizer.method" in method.settings
        epochs = task.warm_epochs + share * (task.passes if sandblaster else task.epochs)
        run = folder / f"run-{number}"
        shutil.copytree(warm, run, symlinks=True)
        train(configuration, run, method.replicas, {**method.settings, "optimizer.epochs": epochs})
        curves[method.name] = curve(run, data["train"])
    return curves


def train(configuration: Path, run: Path, replicas: int, settings: Mapping[str, Any]) -> None:
    """Learn with so many replicas and one shard."""
    overrides = [
        word for key, value in {**settings, "run.directory": run}.items() for word in ("--set", f"{key}={value}")
    ]
    dbmpi("launch", "-n", replicas + 1, "--", "train", configuration, *overrides)


def curve(run: Path, train_file: Path) -> Curve:
    """Return the evaluations of the last session of a run, behind that of the warmstart."""
    import h5py

    from dbmpi.monitor.history import RunHistory
    from dbmpi.monitor.records import read_records

    with h5py.File(train_file) as file:
        samples = len(file["targets"])
    history = RunHistory(read_records(run))
    first, last = history.sessions[0], history.sessions[-1]
    warm = [record for record in history.evaluations if record["session"] == first][-1]
    reports = [own for own in history.workers.values() for own in [[r for r in own if r["session"] == last]] if own]
    passes = [record for record in history.batches if record["session"] == last]
    begin = (
        passes[0]["elapsed"] - passes[0]["seconds"]
        if passes
        else min(next(history.spans(own)).begin for own in reports) - history.starts[last]
    )
    found = Curve([0.0], [0.0], [100 * warm["accuracy"]])
    for record in history.evaluations:
        if record["session"] == last:
            found.seconds.append(record["elapsed"] - begin)
            found.samples.append((record["epoch"] - warm["epoch"]) * samples)
            found.accuracy.append(100 * record["accuracy"])
    return found


def show(report: common.Report, task: Task, curves: Mapping[str, Curve]) -> None:
    """Print the table of a task."""
    header = ["method", "start %", *(f"{goal} %: s, thousand samples" for goal in task.goals), "best %", "last %", "s"]
    rows = [
        [
            name,
            f"{one.accuracy[0]:.1f}",
            *(", ".join(one.reached(goal)) for goal in task.goals),
            f"{max(one.accuracy):.2f}",
            f"{one.accuracy[-1]:.2f}",
            f"{one.seconds[-1]:.1f}",
        ]
        for name, one in curves.items()
    ]
    report.table(task.title, header, rows)


def draw(curves: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw accuracy over seconds (left) and over samples (right), a row for each task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(curves), 2, figsize=(11, 4 * len(curves)), squeeze=False, layout="constrained")
    for row, (name, methods) in zip(axes, curves.items(), strict=True):
        task = TASKS[name]
        colors = {method.name: method.color for method in task.methods()}
        for label, one in methods.items():
            style = {"color": colors[label], "label": label, "marker": ".", "markersize": 4, "linewidth": 1.4}
            row[0].plot(one.seconds, one.accuracy, **style)
            row[1].plot([samples / 1e6 for samples in one.samples], one.accuracy, **style)
        top = max(max(one.accuracy) for one in methods.values())
        for axis, text in zip(row, ("seconds after the warmstart", "million samples after the warmstart"), strict=True):
            axis.set(xlabel=text, ylabel="accuracy on test set (%)", title=task.title, xlim=(0, None))
            axis.set_ylim(next(iter(methods.values())).accuracy[0] - 2, top + 1)
            axis.grid(alpha=0.3)
        row[1].set_xscale("symlog", linthresh=0.1)
    axes[0][0].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
