"""How long ``import dbmpi`` and every ``--help`` take, and how long ``dbmpi train`` until its first step.

The first start no MPI and load neither NumPy nor Numba, so that a shell's completion, a batch script's check or a look
at the options is answered at once, also on a login node.  A value is the median of whole processes, from the start of
Python to its end; Python's own start is in it and is shown beside it.

``dbmpi train`` is started once under each number of ranks, on however few cores there are, with the kernels compiled
before.  Seconds count from the launcher's start: until the last rank has loaded its libraries and started MPI, and
until the last worker has taken its first step.  Memory is the peak of the resident set by then, shared memory included.
The MPI is that of the Python that runs this.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

MOST_SECONDS = 0.3
BARE, IMPORT = "python -c pass", "import dbmpi"


RANKS = (2, 4, 8, 16, 32)
KINDS = ("separate", "colocated")
FEATURES, UNITS, CLASSES = 64, 128, 10
SAMPLES, BATCH_SIZE = 4096, 16
BEGAN = "DBMPI_BENCHMARK_BEGAN"


def main() -> None:
    """Measure all of them in turn."""
    if sys.argv[1:2] == ["--rank"]:
        play(Path(sys.argv[2]), sys.argv[3:])
        return
    options = common.options(__doc__)
    report = common.Report("startup", options.json)
    programs = {
        BARE: ["-c", "pass"],
        IMPORT: ["-c", "import dbmpi"],
        **{" ".join(["dbmpi", *words, "--help"]): ["-m", "dbmpi", *words, "--help"] for words in commands()},
    }
    seconds = common.in_turn(
        3 if options.quick else 15,
        together=False,
        **{name: functools.partial(run, words) for name, words in programs.items()},
    )
    rows = [(name, common.median(values), common.spread(values)) for name, values in seconds.items()]
    report.table("Whole processes, in turn (seconds)", ("what", "median", "quartiles"), rows)
    for name, median, _ in rows:
        if name != BARE:
            report.at_most(f"seconds: {name}", median, MOST_SECONDS)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder / "train.h5")
        start(folder, 2, shards=1, colocate=False)  # compiles
        rows = [measured(folder, ranks, kind) for kind in KINDS for ranks in ((2, 4) if options.quick else RANKS)]
    columns = ("shards", "ranks", "loaded, s", "first step, s", "between, s", "worker, MiB", "shard, MiB")
    report.table("dbmpi train, from the launcher's start; memory of the largest", columns, rows)
    report.finish()


def run(words: list[str]) -> float:
    """Run Python once and return the seconds that it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measured(folder: Path, ranks: int, kind: str) -> tuple[Any, ...]:
    """Start `dbmpi train` on so many ranks; return a row of the table."""
    colocate = kind == "colocated"
    shards = ranks if colocate else max(1, ranks // 4)
    found = start(folder, ranks, shards, colocate)
    loaded = max(one["loaded"] for one in found)
    stepped = max(one["stepped"] for one in found if "stepped" in one)
    memory = {
        role: max((one["memory"] for one in found if ("stepped" in one) == (role == "worker")), default="-")
        for role in ("worker", "shard")
    }
    name = f"{shards} {kind}"
    return name, ranks, loaded, stepped, stepped - loaded, memory["worker"], memory["shard"]


def start(folder: Path, ranks: int, shards: int, colocate: bool) -> list[dict[str, float]]:
    """Run `dbmpi train` under the launcher; return what every rank has noted."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        notes = Path(place)
        configuration = notes / "run.toml"
        configuration.write_text(
            f'[run]\ndirectory = "{notes / "run"}"\n[data]\ntrain = "{folder / "train.h5"}"\n'
            f'[network]\nloss = "softmax"\n[[network.layers]]\nunits = {UNITS}\nactivation = "tanh"\n'
            f"[[network.layers]]\nunits = {CLASSES}\n"
            f"[topology]\nshards = {shards}\ncolocate = {str(colocate).lower()}\n"
            f"[optimizer]\nbatch_size = {BATCH_SIZE}\nepochs = 1\n"
            '[monitor]\nprogress = "none"\n'
        )
        command = common.on_ranks(ranks, __file__, "--rank", str(notes), "train", str(configuration))
        environment = common.environment(1, **{BEGAN: str(time.time())})
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment, check=True)
        found = [json.loads(path.read_text()) for path in notes.glob("*.json")]
    assert len(found) == ranks
    return found


def play(notes: Path, words: list[str]) -> None:
    """Be a rank of `dbmpi train`, and note when it has loaded all, and when it has taken its first step."""
    from dbmpi.machine.environment import prepare

    prepare()  # as the command does, before NumPy is loaded

    from dbmpi.cli import main as program
    from dbmpi.downpour.shard import Shard
    from dbmpi.downpour.worker import Worker

    train: Any = importlib.import_module("dbmpi.runs.training")
    began = float(os.environ[BEGAN])
    noted: dict[str, float] = {}
    whole, stepped, serve = train.train, Worker.stepped, Shard.serve

    def note(name: str) -> None:
        if name not in noted:
            noted[name] = time.time() - began
            noted["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def training(*given: Any) -> Any:
        note("loaded")
        result = whole(*given)
        (notes / f"{os.getpid()}.json").write_text(json.dumps(noted))
        return result

    def first_step(*given: Any) -> None:
        note("stepped")
        stepped(*given)

    def serving(*given: Any) -> None:
        if "stepped" not in noted:
            note("serving")
        serve(*given)

    train.train, Worker.stepped, Shard.serve = training, first_step, serving  # type: ignore[method-assign]
    sys.exit(program.main(words))


def write_data(path: Path) -> None:
    """Write random samples."""
    import h5py
    import numpy as np

    rng = np.random.default_rng(1)
    with h5py.File(path, "w") as file:
        file["inputs"] = rng.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
        file["targets"] = rng.integers(0, CLASSES, SAMPLES)
        file["targets"].attrs["classes"] = CLASSES


def commands() -> Iterator[list[str]]:
    """Yield the words of every command, and of the commands below it."""
    from dbmpi.cli import main as program

    yield []
    for name in program.COMMANDS:
        yield from _below(_choices(program.build_parser([name]))[name], [name])


def _below(parser: argparse.ArgumentParser, words: list[str]) -> Iterator[list[str]]:
    yield words
    for name, child in _choices(parser).items():
        yield from _below(child, [*words, name])


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


if __name__ == "__main__":
    main()
