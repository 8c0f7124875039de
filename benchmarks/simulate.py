"""How many replicas of Downpour are of use?  In virtual time, in the manner of figure 5 of Dean et al. (2012).

Frames of spoken digits, 11 frames of 40 log-energies each as in the paper, 440-256-256-30, one speaker held out, with 1
to 2,000 virtual replicas: plain SGD of a fixed rate, and Adagrad, after a warmstart.  Each rule has the best of some
rates for each number of replicas: from the best one for fewer replicas on, smaller ones are tried as long as the
accuracy at the end grows.  Writes the figure to docs/images/simulate.png (with ``--quick`` into the current
directory), and measures what simulating costs: samples a second beside a plain loop of steps in one process, and
memory.

Runs that are complete are kept in the folder ``--folder``, and a second start goes on behind them; ``--minutes`` ends
it before the first run that begins later.

Needs the published tar of the Free Spoken Digit Dataset in ../shared/data/fsdd, beside the project, or in the folder
that DBMPI_FSDD names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import common
from fashion_mnist import dbmpi

REPLICAS = (1, 10, 20, 100, 200, 1000, 2000)
RATES = {"sgd": (0.03, 0.01, 0.003, 0.001, 0.0003), "adagrad": (0.01, 0.003, 0.001, 0.0003, 0.0001)}
"""That are tried, in this order."""
NAMES = {"sgd": "fixed rate", "adagrad": "Adagrad"}
COLORS = {"sgd": "tab:blue", "adagrad": "tab:green"}
SPEAKER = "theo"
"""The one that is held out."""
UNITS = (256, 256, 30)
RECORDINGS, BATCH_SIZE, EPOCHS, WARM_STEPS = 20, 20, 3.0, 200
GOAL = 40.0
"""Accuracy in % for the right half of the figure."""
CHANCE = 10.0
"""Accuracy in % below which nothing was learned."""
TIMES = """[simulation]
compute = {distribution = "lognormal", mean = 1.0, deviation = 0.2}
network = {mean = 0.05}
service = {mean = 0.00025}
"""
"""A step takes a second, and the shards could take 4,000 pushes in it: they are many, as in the paper."""
AT_LEAST, AT_MOST = 0.5, 4.0
"""Share of a plain step's samples a second with 200 replicas; GiB with 2,000."""


@dataclass(frozen=True)
class Found:
    """What a virtual run has come to."""

    rule: str
    replicas: int
    rate: float
    seconds: list[float]
    """Virtual ones, of each evaluation."""
    accuracy: list[float]
    """In %, likewise."""
    staleness: float
    samples_per_second: float
    """Real ones."""
    gibibytes: float

    @property
    def last(self) -> float:
        """Accuracy at the end."""
        return self.accuracy[-1]

    def reached(self, goal: float) -> float | None:
        """Return the virtual seconds after which an accuracy was reached first."""
        return next((at for at, one in zip(self.seconds, self.accuracy, strict=True) if one >= goal), None)


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(*map(Path, sys.argv[2:4]))
        return
    options = common.resumable_options(__doc__, quick="few replicas, recordings and epochs: a look")
    report = common.Report("simulate", options.json)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        configuration = prepare(folder, 10 if options.quick else RECORDINGS)
        runs = Runs(configuration, 1.0 if options.quick else EPOCHS, began + 60 * options.minutes)
        found = []
        for rule, rates in RATES.items():
            first = 0
            for replicas in (1, 20, 200, 2000) if options.quick else REPLICAS:
                tried = runs.downward(rule, replicas, first)
                if tried is None:
                    print(f"simulate.py: not finished; start it again to go on behind {runs.complete} runs")
                    return
                found.append(max(tried, key=lambda one: one.last))
                first = rates.index(found[-1].rate)
        show(report, found)
        cost(report, configuration, folder, found, quick=options.quick)
        path = Path("simulate.png") if options.quick else common.ROOT / "docs" / "images" / "simulate.png"
        draw(found, path)
    print(f"\nfigure: {path}")
    report.finish()


class Runs:
    """Simulated runs, of which those that are complete are kept.

    Parameters
    ----------
    configuration
        Of all runs; they are kept beside it.
    epochs
        That each learns.
    end
        Moment of `time.monotonic` from which no run begins.
    """

    def __init__(self, configuration: Path, epochs: float, end: float) -> None:
        self._configuration, self._epochs, self._end = configuration, epochs, end
        self.complete = 0

    def downward(self, rule: str, replicas: int, first: int) -> list[Found] | None:
        """Return runs with smaller and smaller rates, up to one that is no better; None where the time is over.

        Parameters
        ----------
        rule, replicas
            Of the runs.
        first
            Number of the first rate.
        """
        found: list[Found] = []
        for rate in RATES[rule][first:]:
            one = self._run(rule, replicas, rate)
            if one is None:
                return None
            found.append(one)
            if len(found) > 1 and found[-1].last <= found[-2].last and found[-2].last > CHANCE:
                break
        return found

    def _run(self, rule: str, replicas: int, rate: float) -> Found | None:
        run = self._configuration.parent / f"{rule}-{replicas}-{rate:g}"
        kept = run / "found.json"
        if not kept.exists():
            if time.monotonic() > self._end:
                return None
            kept.write_text(
                json.dumps(simulated(self._configuration, run, rule, replicas, rate, self._epochs).__dict__)
            )
        self.complete += 1
        found = Found(**json.loads(kept.read_text()))
        print(f"  {run.name}: {found.last:.2f} %", file=sys.stderr)
        return found


def prepare(folder: Path, recordings: int) -> Path:
    """Import the recordings, and return the configuration of all runs."""
    configuration = folder / "run.toml"
    if configuration.exists():
        return configuration
    data = import_frames(folder, recordings)
    hidden = [f'[[network.layers]]\nunits = {units}\nactivation = "relu"\n' for units in UNITS[:-1]]
    configuration.write_text(
        f'[data]\ntrain = "{data["train"].name}"\ntest = "{data["test"].name}"\n[network]\nloss = "softmax"\n'
        + "".join(hidden)
        + f"[[network.layers]]\nunits = {UNITS[-1]}\n"
        + f"[optimizer]\nbatch_size = {BATCH_SIZE}\nwarmstart = {WARM_STEPS}\n"
        + '[monitor]\nprogress = "none"\nreport_seconds = 5.0\ntimeline_seconds = 0.0\nevaluate_epochs = 0.1\n'
        + TIMES
    )
    return configuration


def import_frames(
    folder: Path,
    recordings: int,
    part_of: Callable[[str, int], str] = lambda speaker, _: "test" if speaker == SPEAKER else "train",
) -> dict[str, Path]:
    """Import the first recordings of every digit by every speaker.

    Each goes to the file of the name that `part_of`, called with speaker and number, returns: ``train`` or another one,
    which is normalised alike.  By default all of one speaker are the test file.
    """
    published = Path(os.environ.get("DBMPI_FSDD", common.ROOT.parent / "shared" / "data" / "fsdd"))
    archive = published / "fsdd-recordings.tar"
    if not archive.is_file():
        sys.exit(f"{archive}: not there; set DBMPI_FSDD to the folder with this tar of the Free Spoken Digit Dataset")
    with tarfile.open(archive) as members:
        names = sorted(PurePosixPath(name).name for name in members.getnames() if name.endswith(".wav"))
    rows: dict[str, list[str]] = {"train": []}
    for name in names:
        digit, speaker, number = name.removesuffix(".wav").split("_")
        if int(number) < recordings:
            rows.setdefault(part_of(speaker, int(number)), []).append(f"{name},{digit}\n")
    files, more = {}, []
    for part, lines in rows.items():
        table = folder / f"{part}.csv"
        table.write_text("file,label\n" + "".join(lines))
        files[part] = folder / f"{part}.h5"
        dbmpi("data", "import", "wav", archive, "--table", table, "--states", 3, "--out", files[part], *more)
        more = ["--like", files["train"]]
    return files


def settings(values: Mapping[str, Any]) -> list[str]:
    """Return the words that override settings."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def simulated(configuration: Path, run: Path, rule: str, replicas: int, rate: float, epochs: float) -> Found:
    """Simulate a run, in a process of its own; one whose numbers overflow ends with an accuracy of 0."""
    from dbmpi.monitor.history import RunHistory
    from dbmpi.monitor.records import read_records

    shutil.rmtree(run, ignore_errors=True)
    values = {
        "run.directory": run,
        "optimizer.rule": rule,
        "optimizer.learning_rate": rate,
        "optimizer.epochs": epochs,
        "topology.replicas": replicas,
    }
    command = [sys.executable, "-m", "dbmpi", "simulate", str(configuration), *settings(values)]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    history = RunHistory(read_records(run))
    evaluations = [(record["elapsed"], 100 * record["accuracy"]) for record in history.evaluations]
    if process.returncode:
        evaluations.append((history.duration, 0.0))
    at, accuracy = ([*column] for column in zip(*evaluations, strict=True))
    summary = history.summary()
    return Found(
        rule,
        replicas,
        rate,
        at,
        accuracy,
        summary.mean_staleness,
        summary.samples / seconds,
        usage.ru_maxrss / 2**20,
    )


def show(report: common.Report, found: list[Found]) -> None:
    """Print the table, and check the paper's ordering."""
    header = ("replicas", "rule", "rate", "accuracy %", f"virtual s to {GOAL:g} %", "mean staleness", "samples/s")
    rows = []
    for one in found:
        reached = one.reached(GOAL)
        shown = "-" if reached is None else f"{reached:.0f}"
        rows.append(
            (one.replicas, NAMES[one.rule], f"{one.rate:g}", one.last, shown, one.staleness, one.samples_per_second)
        )
    report.table(f"After {EPOCHS:g} epochs", header, rows)
    useful = {
        rule: max((one.replicas for one in found if one.rule == rule and one.last >= GOAL), default=0) for rule in RATES
    }
    report.table(f"Most replicas that end above {GOAL:g} %", ("rule", "replicas"), list(useful.items()))
    report.at_least("replicas with Adagrad over those with a fixed rate", useful["adagrad"] / (useful["sgd"] or 1), 1)


def cost(report: common.Report, configuration: Path, folder: Path, found: list[Found], *, quick: bool) -> None:
    """Measure samples a second beside those of plain steps, and report the memory."""
    with common.Contestant((sys.executable, __file__, "--contestant", configuration, folder / "cost")) as one:
        both = common.in_turn(
            1 if quick else 3,
            plain=lambda: one.do("plain")["seconds"],
            simulated=lambda: one.do("simulated")["seconds"],
        )
    ours, theirs = (common.median(both[name]) for name in ("simulated", "plain"))
    largest = max(found, key=lambda one: one.replicas)
    report.table(
        "Cost of an epoch",
        ("what", "value"),
        [
            ("plain steps, s", theirs),
            ("200 virtual replicas, s", ours),
            (f"peak memory with {largest.replicas} replicas, GiB", largest.gibibytes),
        ],
    )
    report.at_least("share of a plain step's samples/s, 200 replicas", theirs / ours, AT_LEAST)
    report.at_most(f"GiB, {largest.replicas} replicas", largest.gibibytes, AT_MOST)


def contestant(configuration: Path, directory: Path) -> None:
    """Serve an epoch of plain steps, and one of 200 virtual replicas, both with Adagrad."""
    common.prepare_runtime()
    import numpy as np

    import dbmpi as library
    from dbmpi.data.numbered_batches import NumberedBatches
    from dbmpi.data.reading import Reading
    from dbmpi.data.source import Source
    from dbmpi.data.stream import Order
    from dbmpi.paramserver.rules import rule
    from dbmpi.replica.thread_count import fitted
    from dbmpi.replica.whole import WholeNetwork

    overrides = ("optimizer.epochs=1", "optimizer.warmstart=0", "topology.replicas=200")
    run = library.load(configuration, [*overrides, f"run.directory={directory}"])
    run = run.model_copy(update={"data": run.data.model_copy(update={"test": None})})
    assert run.data.train is not None
    source = Source.open(run.data.train, run.data.memory_mib, "required", Reading.of(run.data, run.network))
    source.load()
    order = Order(source.samples, run.optimizer.batch_size, 1.0, 1)
    batches, network = NumberedBatches(source, order), WholeNetwork(run.network, source.input_shape, 1)
    parameters, gradient = np.empty(network.layout.size, np.float32), np.empty(network.layout.size, np.float32)
    network.initial(0, parameters)
    applied = rule(run.optimizer)  # Adagrad, by default
    state = applied.init(parameters)

    def plain() -> None:
        with fitted(network.layers, 1, run.optimizer.batch_size):  # as few threads as a run uses
            for number in range(order.batches):
                network.loss_and_gradient(parameters, batches.batch(number), gradient, step=number)
                applied.apply(parameters, gradient, state)

    def simulated() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        library.simulate(run)

    common.serve(plain=common.timed(plain), simulated=common.timed(simulated))


def draw(found: list[Found], path: Path) -> None:
    """Draw accuracy over replicas (left), and the time to an accuracy over them (right)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for rule, name in NAMES.items():
        ours = [one for one in found if one.rule == rule]
        style = {"color": COLORS[rule], "marker": "o", "label": name}
        left.plot([one.replicas for one in ours], [one.last for one in ours], **style)
        reached = [(one.replicas, one.reached(GOAL)) for one in ours if one.reached(GOAL) is not None]
        if reached:
            right.plot(*zip(*reached, strict=True), **style)
    left.axhline(GOAL, color="grey", linewidth=0.8, linestyle="--")
    left.set(title="After the same samples", ylabel="accuracy, held-out speaker (%)")
    right.set(title=f"Time to {GOAL:g} %", ylabel="virtual seconds, with the warmstart", yscale="log")
    for axis in (left, right):
        axis.set(xlabel="virtual replicas", xscale="log")
        axis.set_xticks(REPLICAS, [f"{replicas:,}" for replicas in REPLICAS], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
