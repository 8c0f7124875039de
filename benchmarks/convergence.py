"""What does asynchrony cost, and what helps against it?  Accuracy over samples and seconds, as in the paper's figure 4.

Fashion-MNIST (784-128-64-10) and frames of spoken digits (11 frames of 40 log-energies, 440-256-256-30, one speaker
held out), by each method with its own rate: on the grid 0.001, 0.003, 0.01 ..., that with the best final accuracy on
validation samples (of another held-out speaker), with seed 0; three rates first, and on while the best one is at the
edge.  Then three other seeds, and the accuracy on the test file after the last sample.

Eight replicas have no cores of their own here.  Asynchronous methods are therefore run by `dbmpi simulate`, two of them
on real ranks, too; the synchronous one as one replica with batches of all eight, which is the same; and the others on
real ranks.  Seconds are virtual (`virtual_seconds.py`): those of `dbmpi simulate`, or the times of rounds.

Writes the figure to docs/images/convergence.png (with ``--quick`` into the current directory).  Runs that are complete
are kept in the folder ``--folder``, and a second start goes on behind them; ``--minutes`` ends it before the first run
that begins later.  Needs the published files in ../shared/data, beside the project, or in the folders that
DBMPI_FASHION_MNIST and DBMPI_FSDD name.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from convergence_methods import METHODS, ONE, ONE_ADAGRAD, OWN_STEPS, RATES, RECOMMENDED, Method, next_rates
from fashion_mnist import dbmpi, import_data
from simulate import import_frames
from trainings import Found, Training, complete, found
from virtual_seconds import Cluster

BATCH_SIZE, EPOCHS, PASSES = 25, 3.0, 30
"""Of a step, of the stochastic methods, of Sandblaster."""
EVERY = 0.25
"""Epochs from one evaluation to the next."""
SEEDS, SEARCH_SEED = (1, 2, 3), 0
BELOW = 1.0
"""Points below the end of SGD with one replica, of the accuracy whose seconds are shown."""
MOST = 0.5
"""Points that eight replicas may lose."""
PARTS = {"jackson": "validation", "theo": "test"}
"""Of the speakers that are held out."""


@dataclass(frozen=True)
class Task:
    """A data set and its network."""

    name: str
    title: str
    inputs: int
    units: tuple[int, ...]
    compute: float
    """Seconds that one core (AMD EPYC, Zen 4) takes for a step."""
    service: float
    """And for an update with Adagrad."""
    prepare: Callable[[Path], Mapping[str, Path]]

    @property
    def parameters(self) -> int:
        """Their number."""
        return sum((here + 1) * there for here, there in zip((self.inputs, *self.units), self.units, strict=False))

    def cluster(self, replicas: int) -> Cluster:
        """Return the virtual cluster for so many replicas."""
        return Cluster(self.parameters, self.compute, self.service, replicas)


@dataclass(frozen=True)
class Problem:
    """A task whose data are there."""

    task: Task
    folder: Path
    quick: bool
    samples: int

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.samples // BATCH_SIZE)

    @property
    def epochs(self) -> float:
        """Of the stochastic methods."""
        return EPOCHS / 3 if self.quick else EPOCHS

    @property
    def runs(self) -> Path:
        """Folder of what is complete."""
        return self.folder / "runs"

    def training(self, method: Method, rate: float | None, seed: int, kind: str = "test") -> Training:
        """Return a training: for the search (kind ``validation``), the ``test``, or the test on ``ranks``."""
        batch = method.exchange == "sandblaster"
        simulated = kind != "ranks" and method.exchange == "asynchronous"
        values: dict[str, Any] = {
            "run.seed": seed,
            "data.test": self.folder / f"{'validation' if kind == 'validation' else 'test'}.h5",
            "topology.shards": 1,
            "topology.replicas": method.replicas,
            "optimizer.epochs": self.epochs * PASSES / EPOCHS if batch else self.epochs,
            "monitor.evaluate_epochs": 0 if kind == "validation" else 1.0 if batch else EVERY,
            **method.settings,
            **({} if rate is None else {method.rate: rate}),
            **(self.task.cluster(method.replicas).settings() if simulated else {}),
        }
        ranks = method.replicas + 1
        if method.exchange == "synchronous":  # learns what one replica does with batches of all of them
            del values["optimizer.exchange"]
            values |= {"topology.replicas": 1, "optimizer.batch_size": method.replicas * BATCH_SIZE}
            ranks = 1
        name = f"{method.slug}-{kind}-{'' if rate is None else f'{rate:g}-'}{seed}"
        return Training(name, self.folder / "run.toml", values, ranks, simulated)

    def ends(self, method: Method, rate: float | None, seeds: Sequence[int], kind: str = "test") -> list[Found]:
        """Return what the trainings of these seeds have come to, as far as they are complete."""
        names = [self.training(method, rate, seed, kind).name for seed in seeds]
        return [end for name in names if (end := found(self.runs, name))]


@dataclass(frozen=True)
class Row:
    """What a method has come to on a task."""

    method: Method
    rate: float | None
    runs: list[Found]
    on_ranks: list[Found]
    """The same on real ranks, where `runs` are simulated, of some methods."""
    epochs: list[float]
    """Of the curve."""
    accuracies: list[float]
    """In %, mean of the runs."""
    seconds: list[float]
    """Virtual ones."""

    @property
    def accuracy(self) -> float:
        """At the end, mean of the runs."""
        return mean(self.runs)


def fashion(folder: Path) -> Mapping[str, Path]:
    """Import Fashion-MNIST, a sixth of the training samples for validation."""
    data = import_data(folder)
    parts = {part: folder / f"{part}.h5" for part in ("train", "validation", "test")}
    whole = data["train"].rename(folder / "whole.h5")
    words = ("--fraction", "0.1666667", "--by", "class", "--out", parts["train"], "--test-out", parts["validation"])
    dbmpi("data", "split", whole, *words)
    return parts


def speech(folder: Path) -> Mapping[str, Path]:
    """Import frames of four speakers, and of one each for validation and test."""
    return import_frames(folder, 25, lambda speaker, _: PARTS.get(speaker, "train"))


TASKS = (
    Task("fashion", "Fashion-MNIST", 784, (128, 64, 10), 0.00035, 0.00004, fashion),
    Task("speech", "Spoken digits: 30 states, a speaker held out", 440, (256, 256, 30), 0.00055, 0.00006, speech),
)


def main() -> None:
    options = common.resumable_options(__doc__, quick="one seed and a third of the epochs: a look")
    report = common.Report("convergence", options.json)
    until = time.time() + 60 * options.minutes
    seeds = SEEDS[:1] if options.quick else SEEDS
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        rows = {}
        for problem in [prepared(folder / task.name, task, quick=options.quick) for task in TASKS]:
            rates = searched(problem, METHODS, until)
            if rates is None or not complete(problem.runs, finals(problem, rates, seeds), until):
                print("convergence.py: not finished; start it again to go on behind the runs that are complete")
                return
            rows[problem.task] = [row(problem, one, rates, seeds) for one in METHODS]
            show(report, problem, rows[problem.task])
    path = Path("convergence.png") if options.quick else common.ROOT / "docs" / "images" / "convergence.png"
    draw(rows, path)
    print(f"\nfigure: {path}")
    report.finish()


def prepared(folder: Path, task: Task, *, quick: bool) -> Problem:
    """Import the data of a task, and write its configuration."""
    import h5py

    configuration = folder / "run.toml"
    if not configuration.exists():
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        task.prepare(folder)
        hidden = [f'[[network.layers]]\nunits = {units}\nactivation = "relu"\n' for units in task.units[:-1]]
        configuration.write_text(
            '[data]\ntrain = "train.h5"\n[network]\nloss = "softmax"\n'
            + "".join(hidden)
            + f"[[network.layers]]\nunits = {task.units[-1]}\n[optimizer]\nbatch_size = {BATCH_SIZE}\n"
            + "[checkpoint]\nevery_seconds = 0.0\n"
            + '[monitor]\nprogress = "none"\nreport_seconds = 1.0\ntimeline_seconds = 0.0\n'
        )
    with h5py.File(folder / "train.h5") as file:
        return Problem(task, folder, quick, len(file["targets"]))


def tried(problem: Problem, method: Method) -> dict[float, float]:
    """Return the accuracy on the validation samples for each rate that has been tried."""
    ends = {rate: problem.ends(method, rate, (SEARCH_SEED,), "validation") for rate in RATES}
    return {rate: mean(end) for rate, end in ends.items() if end}


def searched(problem: Problem, methods: Sequence[Method], until: float) -> dict[str, float] | None:
    """Search for the rates, and return them by the method's name; None where the time is over."""
    searching = [method for method in methods if method.middle]
    while True:
        wanted = [
            problem.training(method, rate, SEARCH_SEED, "validation")
            for method in searching
            for rate in next_rates(tried(problem, method), method.middle)
        ]
        if not wanted:
            break
        if not complete(problem.runs, wanted, until):
            return None
    rates = {}
    for method in searching:
        accuracies = tried(problem, method)
        rates[method.name] = max(accuracies, key=lambda rate: accuracies[rate])
    return rates


def finals(problem: Problem, rates: Mapping[str, float], seeds: Sequence[int]) -> Iterator[Training]:
    """Yield the trainings that are shown."""
    for method in METHODS:
        rate = rates.get(method.like or method.name)
        for kind in ("test", "ranks") if method.checked else ("test",):
            yield from (problem.training(method, rate, seed, kind) for seed in seeds)


def row(problem: Problem, method: Method, rates: Mapping[str, float], seeds: Sequence[int]) -> Row:
    """Return what a method has come to."""
    import numpy as np

    rate = rates.get(method.like or method.name)
    runs, on_ranks = (problem.ends(method, rate, seeds, kind) for kind in ("test", "ranks"))
    longest = max(runs, key=lambda run: len(run.epochs))
    epochs, cluster, steps = longest.epochs, problem.task.cluster(method.replicas), problem.steps
    curves = [np.interp(epochs, run.epochs, run.accuracies) for run in runs if run.epochs]
    accuracies = [float(one) for one in np.mean(curves, axis=0)] if curves else []
    if method.exchange == "asynchronous":
        seconds = longest.elapsed
    elif method.exchange == "easgd":
        seconds = [cluster.alone(round(epoch * steps), OWN_STEPS) for epoch in epochs]
    elif method.exchange == "sandblaster":
        seconds = [cluster.passes(steps, epoch) for epoch in epochs]
    else:
        needed = method.replicas - method.settings.get("optimizer.backups", 0)
        own_steps = method.settings.get("local.steps", 1)
        seconds = [cluster.rounds(round(epoch * steps), needed, own_steps) for epoch in epochs]
    return Row(method, rate, runs, on_ranks, epochs, accuracies, seconds)


def mean(runs: Sequence[Found]) -> float:
    """Return the mean accuracy."""
    return sum(run.accuracy for run in runs) / len(runs)


def show(report: common.Report, problem: Problem, rows: Sequence[Row]) -> None:
    """Print the table of a task and that of its search, and check the target."""
    by_name, task = {one.method.name: one for one in rows}, problem.task
    goal = by_name[ONE].accuracy - BELOW
    cells = []
    for one in rows:
        base = by_name[ONE_ADAGRAD if "Adagrad" in one.method.name else ONE]
        ends = [end.accuracy for end in one.runs]
        reached = [s for s, accuracy in zip(one.seconds, one.accuracies, strict=True) if accuracy >= goal]
        cells.append(
            (
                one.method.name,
                "" if one.rate is None else f"{one.rate:g}",
                f"{one.accuracy:.2f}",
                f"{min(ends):.2f} to {max(ends):.2f}",
                f"{one.accuracy - base.accuracy:+.2f}",
                f"{mean(one.on_ranks):.2f}" if one.on_ranks else "",
                f"{sum(end.staleness for end in one.runs) / len(ends):.1f}",
                f"{one.seconds[-1]:.2f}" if one.seconds else "",
                f"{reached[0]:.2f}" if reached else "-",
            )
        )
    header = ("method", "rate", "accuracy %", "seeds", "beside one", "on ranks", "staleness")
    header = (*header, "virtual s", f"to {goal:.1f} %")
    report.table(f"{task.title}: {problem.samples} samples, {problem.epochs:g} epochs", header, cells)
    searched = []
    for method in METHODS:
        accuracies = tried(problem, method)
        if accuracies:
            best = max(accuracies.values())
            searched.append((method.name, ", ".join(f"{rate:g}: {one:.1f}" for rate, one in accuracies.items()), best))
    report.table(f"{task.title}: the search, validation accuracy %", ("method", "by rate", "best"), searched)
    base, ours = by_name[ONE_ADAGRAD], by_name[RECOMMENDED]
    for how, ends in (("simulated", ours.runs), ("on ranks", ours.on_ranks)):
        lost = base.accuracy - mean(ends)
        report.at_most(f"points that {RECOMMENDED} loses on {ONE_ADAGRAD}, {task.name}, {how}", lost, MOST)


def draw(rows: Mapping[Task, list[Row]], path: Path) -> None:
    """Draw accuracy over samples (left) and over virtual seconds (right), a row for each task."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(len(rows), 2, figsize=(11, 4 * len(rows)), squeeze=False, layout="constrained")
    for (left, right), (task, methods) in zip(axes, rows.items(), strict=True):
        for one in methods:
            if one.method.line is None or not one.epochs:
                continue
            color, style = one.method.line
            look = {"color": color, "linestyle": style, "label": one.method.name, "linewidth": 1.4}
            left.plot(one.epochs, one.accuracies, **look)
            right.plot(one.seconds, one.accuracies, **look)
        top = max(max(one.accuracies, default=0.0) for one in methods)
        for axis, text in ((left, "passes through the samples"), (right, "virtual seconds")):
            axis.set(xlabel=text, ylabel="accuracy on test set (%)", title=task.title, ylim=(0.75 * top, 1.02 * top))
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
