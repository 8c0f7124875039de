"""What do local steps save on slow lines?  Three hosts of which each sends at most 100 Mbit/s, Fashion-MNIST.

A shard and two replicas, each on a host of its own, learn 784-128-64-10 in three ways: a push and a fetch with every
step; with every 50th (n_push = n_fetch = 50); and 50 local steps (`optimizer.exchange = "local"`), which move the same
bytes.  Rates are searched for as by `convergence.py`, on one host, whose lines have no limit; then three seeds on the
hosts.

Runs that are complete are kept in the folder ``--folder``, and a second start goes on behind them; ``--minutes`` ends
it before the first run that begins later.  The hosts are those of `hosts.py`; needs root and iproute2, and the
published files in ../shared/data, beside the project, or in the folder that DBMPI_FASHION_MNIST names.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import common
from convergence import SEEDS, TASKS, prepared, searched
from convergence_methods import LOCAL_RATE, Method
from trainings import Found, Training, complete, found

sys.path.insert(0, str(common.ROOT / "tests"))
from harness.hosts import NoHostsError, at, hosts, limit_link, mend_link, spread

STEPS, REPLICAS, LINE = 50, 2, "100mbit"
EACH, SELDOM, LOCAL = "each step", f"n_push = n_fetch = {STEPS}", f"{STEPS} local steps"
_ADAGRAD = {"optimizer.rule": "adagrad"}
WAYS = (
    Method(EACH, REPLICAS, _ADAGRAD, 0.01),
    Method(SELDOM, REPLICAS, {**_ADAGRAD, "optimizer.n_push": STEPS, "optimizer.n_fetch": STEPS}, 0.01),
    Method(LOCAL, REPLICAS, {"optimizer.exchange": "local", "local.steps": STEPS}, 0.001, LOCAL_RATE),
)
FASTER, MOST = 10.0, 0.5
"""Times the samples a second of a push with each step; points of accuracy that this may cost."""


def main() -> None:
    options = common.resumable_options(__doc__, quick="one seed and a third of the epochs: a look")
    report = common.Report("local_steps", options.json)
    until = time.time() + 60 * options.minutes
    seeds = SEEDS[:1] if options.quick else SEEDS
    with tempfile.TemporaryDirectory() as place:
        folder = (options.folder or Path(place)).resolve()
        problem = prepared(folder / TASKS[0].name, TASKS[0], quick=options.quick)
        rates = searched(problem, WAYS, until)
        wanted = {
            way.name: [problem.training(way, rate, seed, "ranks") for seed in seeds]
            for way in WAYS
            if (rate := (rates or {}).get(way.name))
        }
        if not rates or not on_slow_hosts(
            problem.runs, [one for trainings in wanted.values() for one in trainings], until
        ):
            print("local_steps.py: not finished; start it again to go on behind the runs that are complete")
            return
        ends = {
            way: [end for one in trainings if (end := found(problem.runs, one.name))]
            for way, trainings in wanted.items()
        }
        show(report, ends, rates)
    report.finish()


def on_slow_hosts(runs: Path, trainings: Sequence[Training], until: float) -> bool:
    """Train what is not complete on hosts whose lines are limited, a rank on each; return whether everything is."""
    with slow_hosts() as names:
        options, variables = spread(names)

        def launch(ranks: int, *program: str) -> Sequence[str]:
            command = list(common.on_ranks(ranks, *program))
            command[1:1] = options
            return at(names[0], command, Path.cwd())

        return complete(runs, trainings, until, launch, **variables)


@contextmanager
def slow_hosts() -> Iterator[list[str]]:
    """Yield the names of three hosts whose lines are limited."""
    try:
        with hosts(REPLICAS + 1) as names:
            try:
                for name in names:
                    limit_link(name, LINE)
                yield names
            finally:
                for name in names:
                    mend_link(name)
    except NoHostsError as why:
        sys.exit(f"local_steps.py {why}")


def show(report: common.Report, ends: dict[str, list[Found]], rates: dict[str, float]) -> None:
    """Print the table, and check the targets."""
    speed = {way: common.median([one.samples / one.seconds for one in runs]) for way, runs in ends.items()}
    accuracy = {way: sum(one.accuracy for one in runs) / len(runs) for way, runs in ends.items()}
    rows = [
        (
            way,
            f"{rates[way]:g}",
            speed[way],
            speed[way] / speed[EACH],
            f"{common.median([one.bytes / one.samples for one in runs]):.0f}",
            f"{accuracy[way]:.2f}",
            ", ".join(f"{one.accuracy:.2f}" for one in runs),
        )
        for way, runs in ends.items()
    ]
    header = ("exchange", "rate", "samples/s", f"times {EACH}", "bytes a sample", "accuracy %", "of each seed")
    report.table(f"{REPLICAS} replicas and a shard on three hosts, lines of 100 Mbit/s", header, rows)
    report.at_least(f"times the samples/s of {EACH}", speed[LOCAL] / speed[EACH], FASTER)
    report.at_most(f"points lost on {EACH}", accuracy[EACH] - accuracy[LOCAL], MOST)
    report.at_least(f"points more than {SELDOM}", accuracy[LOCAL] - accuracy[SELDOM], 0.0)


if __name__ == "__main__":
    main()
