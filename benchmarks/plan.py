"""What dbmpi plan predicts, beside what runs do: samples a second of configurations that are drawn at random.

First the constants of the machine are measured by ``dbmpi bench machine``, on two ranks of this machine, and on two
hosts with a line of 1 Gbit/s.  Then ten configurations are drawn by a seed for each of the two: networks, batches,
update rules, overlap, partitions, replicas, shards, steps between pushes.  Each is predicted, and then runs for some
seconds: up to three times where the cores were shared with others, of which the fastest counts, as what disturbs a run
only makes it slower.  Nothing is fitted to the runs.

On this machine shards share the two cores with the workers; with hosts there is one rank on each.  The hosts are
network namespaces, see hosts.py; without them (root, iproute2) this part is left out.

Constants and runs are kept in the folder ``--folder``, and a second start goes on behind them; ``--minutes`` ends it
before the first run that begins later.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from hosts import limited_to_gbit

sys.path.insert(0, str(common.ROOT / "tests"))
from harness.hosts import NoHostsError, at, hosts, spread

if TYPE_CHECKING:
    from dbmpi.plan.constants import MachineConstants

SEED, NUMBER, SECONDS, WITHIN = 1012, 10, 6.0, 20.0
CORES = 2
SAMPLES = 4096
WHERE = {"machine": "this machine", "hosts": "hosts with lines of 1 Gbit/s"}
HOSTS = ("dbh1", "dbh2", "dbh3")
_PATIENCE = 300.0
"""Seconds in which a run must end."""
_TRIES = 3


@dataclass(frozen=True)
class Drawn:
    """A configuration."""

    number: int
    inputs: tuple[int, ...]
    layers: tuple[str, ...]
    """Each as TOML."""
    outputs: int
    batch: int
    rule: str
    overlap: str
    partitions: int
    replicas: int
    shards: int
    steps: int
    """Between two pushes, and two fetches."""

    @property
    def ranks(self) -> int:
        """Ranks to start."""
        return self.partitions * self.replicas + self.shards

    @property
    def text(self) -> str:
        """It as TOML, without data and directory."""
        layers = "\n".join(f"[[network.layers]]\n{layer}" for layer in (*self.layers, f"units = {self.outputs}"))
        return (
            f'[network]\nloss = "softmax"\n{layers}\n'
            f"[topology]\npartitions = {self.partitions}\nreplicas = {self.replicas}\nshards = {self.shards}\n"
            f'[optimizer]\nrule = "{self.rule}"\nlearning_rate = 1e-5\nbatch_size = {self.batch}\n'
            f"n_push = {self.steps}\nn_fetch = {self.steps}\n"
            f'[server]\noverlap = "{self.overlap}"\n'
            '[monitor]\nprogress = "none"\ntimeline_seconds = 0.0\nreport_seconds = 1.0\n'
        )

    @property
    def called(self) -> str:
        """Its network, for people."""
        kinds = [layer.partition("\n")[0].partition("= ")[2].strip('"') for layer in self.layers]
        return f"{'x'.join(map(str, self.inputs))}-{'-'.join(kinds)}-{self.outputs}"


@dataclass(frozen=True)
class Measured:
    """What a run has come to."""

    samples_per_second: float
    staleness: float
    seconds: float


def main() -> None:
    options = common.resumable_options(__doc__, quick="three configurations, of two seconds each: a look")
    report = common.Report("plan", options.json)
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        number, seconds = (3, 2.0) if options.quick else (NUMBER, SECONDS)
        for where, called in WHERE.items():
            if where == "hosts":
                try:
                    stack.enter_context(hosts())
                except NoHostsError as why:
                    print(f"\nleft out: {called}: it {why}")
                    continue
                stack.enter_context(limited_to_gbit(*HOSTS))
            path = folder / f"{where}.toml"
            if not path.exists():
                calibrate(where, path)
            rows, errors = [], []
            for drawn in draw(where, number):
                if time.monotonic() > deadline and not kept(where, drawn, folder).exists():
                    print(f"plan.py: not finished; start it again to go on behind {len(rows)} runs")
                    return
                predicted = predict(where, drawn, path)
                measured = run(where, drawn, folder, predicted["samples_per_second"], seconds)
                error = 100 * (predicted["samples_per_second"] / measured.samples_per_second - 1)
                errors.append(abs(error))
                rows.append(row(drawn, predicted, measured, error))
                print(f"  {where} {drawn.number}: {error:+.0f} %", file=sys.stderr)
            report.table(f"Predicted and measured, {called}", HEADER, rows)
            report.at_least(f"configurations within {WITHIN:g} %, {called}", sum(e <= WITHIN for e in errors), number)
            report.at_most(f"median error, %, {called}", common.median(errors), WITHIN)
    report.finish()


HEADER = (
    *("network", "batch", "rule", "overlap", "P x R + S", "n_push", "predicted", "measured", "error %"),
    *("staleness: predicted", "measured", "bottleneck"),
)


def row(drawn: Drawn, predicted: dict[str, Any], measured: Measured, error: float) -> tuple[Any, ...]:
    ranks = f"{drawn.partitions} x {drawn.replicas} + {drawn.shards}"
    return (
        *(drawn.called, drawn.batch, drawn.rule, drawn.overlap, ranks, drawn.steps),
        *(f"{predicted['samples_per_second']:.0f}", f"{measured.samples_per_second:.0f}", f"{error:+.0f}"),
        *(f"{predicted['staleness']:.2f}", f"{measured.staleness:.2f}", predicted["bottleneck"]),
    )


def draw(where: str, number: int) -> list[Drawn]:
    """Draw configurations by the seed."""
    chance = random.Random(f"{SEED} {where}")
    found = []
    for position in range(NUMBER):
        partitions, replicas = chance.choice([(1, 1), (1, 2), (2, 1)])
        shards = chance.choice([1, 2]) if where == "machine" and partitions * replicas == 2 else 1
        inputs: tuple[int, ...]
        if chance.random() < 0.3:
            inputs, maps, field = (3, 32, 32), chance.choice([4, 8]), chance.choice([5, 7])
            pooling = 'type = "pooling"\nsize = 3\nstride = 3'
            layers: tuple[str, ...] = (
                f'type = "local"\nmaps = {maps}\nfield = {field}',
                pooling,
                'type = "normalisation"',
            )
        else:
            inputs = (chance.choice([200, 440, 784]),)
            units = [chance.choice([256, 512, 1024, 1536]) for _ in range(chance.choice([1, 2, 3]))]
            layers = tuple(f'units = {each}\nactivation = "sigmoid"' for each in units)
        found.append(
            Drawn(
                position,
                inputs,
                layers,
                outputs=chance.choice([10, 100, 1000]),
                batch=chance.choice([32, 64, 128, 256]),
                rule=chance.choice(["sgd", "adagrad", "adam"]),
                overlap=chance.choice(["none", "threads"]),
                partitions=partitions,
                replicas=replicas,
                shards=shards,
                steps=chance.choice([1, 1, 2, 5]),
            )
        )
    return found[:number]


def calibrate(where: str, path: Path) -> None:
    """Measure the constants."""
    words = (sys.executable, "-m", "dbmpi", "bench", "machine", "--out", str(path.resolve()))
    launch(where, words[1:], 2)


def launch(where: str, program: Sequence[str], ranks: int) -> None:
    """Run a program of Python on so many ranks, with hosts one on each."""
    command, more = list(common.on_ranks(ranks, *program)), dict[str, str]()
    if where == "hosts":
        command[1:1], more = spread(HOSTS[:ranks])
        command = at(HOSTS[0], command, Path.cwd())
    subprocess.run(
        command,
        env=common.environment(1, **more),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        timeout=_PATIENCE,
        check=True,
    )


def predict(where: str, drawn: Drawn, path: Path) -> dict[str, Any]:
    """Predict what a configuration will come to, with the constants that were measured."""
    import tomllib

    from dbmpi.config import Run
    from dbmpi.network.description import Network
    from dbmpi.plan.candidates import Candidates
    from dbmpi.plan.constants import load
    from dbmpi.plan.recommendation import Planner

    constants = load(path)
    described = Run.model_validate(tomllib.loads(drawn.text))
    planner = Planner(described, Network(described.network, drawn.inputs, 1), constants)
    on_node = drawn.ranks if where == "machine" else 1
    ways = Candidates.one(drawn.partitions, drawn.replicas, drawn.shards, drawn.steps, drawn.steps, on_node)
    found = planner.predict(ways, hardware(where, drawn, constants))
    return {
        "samples_per_second": float(found.samples_per_second[0]),
        "staleness": float(found.staleness[0]),
        "bottleneck": found.bottleneck(0),
    }


def hardware(where: str, drawn: Drawn, constants: MachineConstants) -> Any:
    """Return the machine, or the hosts: each has a rank, of one thread."""
    from dbmpi.plan.step import Hardware

    nodes, cores = (1, CORES) if where == "machine" else (drawn.ranks, 1)
    return Hardware(nodes, cores, 2.0**33, constants.bandwidth, constants.latency)


def run(where: str, drawn: Drawn, folder: Path, predicted: float, seconds: float) -> Measured:
    """Let a configuration run for about some seconds, unless that has been done; return what it has come to."""
    path = kept(where, drawn, folder)
    if not path.exists():
        tries: list[Measured] = []
        for _ in range(_TRIES):
            while not common.cores.ours() and common.cores.patience > 0:
                time.sleep(0.5)
                common.cores.patience -= 0.5
            with tempfile.TemporaryDirectory(dir=folder) as place:
                tries.append(_run(where, drawn, Path(place), predicted, seconds))
            if common.cores.ours():
                break
        path.write_text(json.dumps(asdict(max(tries, key=lambda one: one.samples_per_second))))
    return Measured(**json.loads(path.read_text()))


def kept(where: str, drawn: Drawn, folder: Path) -> Path:
    """Return the file in which a run is kept."""
    return folder / f"{where}-{drawn.number}.json"


def _run(where: str, drawn: Drawn, place: Path, predicted: float, seconds: float) -> Measured:
    import h5py
    import numpy as np

    from dbmpi.monitor.history import summary

    chance = np.random.default_rng(1)
    with h5py.File(place / "train.h5", "w") as file:
        file["inputs"] = chance.standard_normal((SAMPLES, *drawn.inputs), np.float32)
        file["targets"] = chance.integers(0, drawn.outputs, SAMPLES)
    epochs = max(1.0, round(seconds * predicted / SAMPLES, 1))
    path, directory = place / "run.toml", place / "run"
    data = f'[data]\ntrain = "{(place / "train.h5").resolve()}"\n'
    path.write_text(f'[run]\ndirectory = "{directory.resolve()}"\n{data}{drawn.text}')
    launch(where, ("-m", "dbmpi", "train", str(path.resolve()), "--set", f"optimizer.epochs={epochs}"), drawn.ranks)
    found = summary(directory)
    return Measured(found.samples_per_second, found.mean_staleness, found.seconds)


if __name__ == "__main__":
    main()
