"""How fast a small network learns from an HDF5 file of 2 GiB, shuffled: where rows are read, and how.

Rows of 1 KiB (256 numbers, float32), batches of 128, a network of 16 units.  In turn: from memory; from the file as it
is (contiguous, in chunks of 128 rows, the same with gzip) as ``data.keep = "auto"`` reads it; by HDF5's own selection
of the rows of a batch (a function of h5py, given to ``dbmpi.train``); and by PyTorch's DataLoader over h5py.  One rank
and two; private memory of a rank; and the start, from the launcher's start to the first step, beside that of a small
file.  The part of the time that goes into data is that of the network of `speech_step.py`.  With ``--quick``, a file of
a quarter of a GiB.

With ``DBMPI_MEMORY_CGROUP`` set to the directory of a memory cgroup that may be changed, also with half the memory of
the file, beside what the disk gives under the same limit: in any order, and in blocks of 4,096 samples.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import h5py
import numpy as np

from dbmpi.monitor.records import read_records

FEATURES, BATCH, ROWS_OF_CHUNK = 256, 128, 128
FORMS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunked": {"chunks": (ROWS_OF_CHUNK, FEATURES)},
    "gzip": {"chunks": (ROWS_OF_CHUNK, FEATURES), "compression": "gzip", "compression_opts": 1, "shuffle": True},
}
CGROUP = "DBMPI_MEMORY_CGROUP"
TARGETS = {"contiguous": 0.85, "chunked": 0.7, "gzip": 0.5}
"""Least ratios to learning from memory, on two ranks."""
LAYER = """[[network.layers]]
units = {units}
activation = "{activation}"
"""
TINY = LAYER.format(units=16, activation="tanh")
SPEECH = LAYER.format(units=2560, activation="sigmoid") * 5
CONFIGURATION = """
[run]
directory = "{directory}"
seed = {seed}
[data]
train = "{train}"
keep = "{keep}"
shuffle = {shuffle}
{layers}
[[network.layers]]
units = 10
[topology]
colocate = true
shards = 1
[optimizer]
learning_rate = 0.01
batch_size = {batch}
epochs = {epochs:.6f}
[checkpoint]
every_seconds = 100000
[monitor]
progress = "none"
report_seconds = 0.05
"""
SELECTION = """
import sys
import dbmpi, h5py
from dbmpi.config.reading import read

class Rows:
    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
    def __len__(self):
        return len(self.values)
    def __getitem__(self, selection):
        return self.values[selection]

file = h5py.File(sys.argv[2])
run = read(sys.argv[1], ())
dbmpi.train(run, data=(Rows(file["inputs"]), file["targets"][:]))
"""


class Found(NamedTuple):
    """What a run has shown."""

    rate: float
    """Samples a second of all ranks, from the first report on."""
    private: float
    """MiB of the rank with most."""
    start: float
    """Seconds from the launcher's start to the first step."""
    waiting: float
    """Part of the workers' time that went into making batches, or waiting for them."""


def write(path: Path, rows: int, **layout: Any) -> None:
    """Write a file of that many rows, which compress about as well as measurements of a few digits do."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        inputs = file.create_dataset("inputs", (rows, FEATURES), "f4", **layout)
        step = 1 << 15
        for start in range(0, rows, step):
            count = min(step, rows - start)
            inputs[start : start + count] = np.round(random.normal(size=(count, FEATURES)), 2)
        file["targets"] = random.integers(0, 10, rows).astype("i4")


def private_mib(parent: int) -> float:
    """Return the memory of its own (MiB) of the largest process that descends from one.

    A mapped file is the system's cache, and does not count where a process is alone with it, either.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    most, left = 0.0, [parent]
    while left:
        process = left.pop()
        left += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        most = max(most, sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024)
    return most


def learn(
    place: Path,
    file: Path,
    ranks: int,
    keep: str,
    batches: int,
    rows: int,
    *,
    selection: bool = False,
    shuffle: str = '"auto"',
    cgroup: Path | None = None,
    layers: str = TINY,
) -> Found:
    """Learn so many batches from a file, and return what that has shown."""
    number = len(list(place.glob("run-*")))
    directory = place / f"run-{number}"
    directory.mkdir()
    text = CONFIGURATION.format(
        directory=directory,
        seed=number,
        train=file,
        keep=keep,
        shuffle=shuffle,
        layers=layers,
        batch=BATCH,
        epochs=batches * BATCH / rows,
    )
    if selection:
        text = text.replace(f'train = "{file}"\n', "")
        (place / "selection.py").write_text(SELECTION, encoding="utf-8")
    configuration = directory / "config.toml"
    configuration.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "dbmpi"]
    program = [*command, "train", str(configuration)]
    if selection:
        program = [sys.executable, str(place / "selection.py"), str(configuration), str(file)]
    elif ranks > 1:
        program = [*command, "launch", "-n", str(ranks), "--no-fault-tolerance", "--", "train", str(configuration)]
    if selection and ranks > 1:
        program = [*command, "launch", "-n", str(ranks), "--", *program]
    began, private = time.time(), 0.0
    with subprocess.Popen(program, env=common.environment(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(run.pid))
        while run.poll() is None:
            private = max(private, private_mib(run.pid))
            time.sleep(0.2)
        assert run.stdout is not None
        said = run.stdout.read().decode()
    if run.returncode:
        raise SystemExit(f"{' '.join(program)} has failed:\n{said}")
    records = [record for record in read_records(directory) if record["kind"] == "worker"]
    first = max(min(r["time"] for r in records if r["number"] == worker) for worker in range(ranks))
    rates = []
    for worker in range(ranks):
        mine = [record for record in records if record["number"] == worker]
        rates.append((mine[-1]["samples"] - mine[0]["samples"]) / (mine[-1]["time"] - mine[0]["time"]))
    spent = [record["seconds"] for record in records[ranks:]]
    waiting = sum(seconds["data"] for seconds in spent) / sum(sum(seconds.values()) for seconds in spent)
    return Found(sum(rates), private, first - began, waiting)


def limited(place: Path, file: Path, shuffle: str, batches: int, rows: int) -> Found:
    """Learn with two ranks in the memory cgroup, from a file that is not in the cache."""
    forget(file)
    return learn(place, file, 2, "file", batches, rows, shuffle=shuffle, cgroup=Path(os.environ[CGROUP]))


def forget(file: Path) -> None:
    """Drop a file from the system's cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(file: Path) -> float:
    """Return how many rows a second the disk gives, read from the beginning."""
    forget(file)
    began, size = time.perf_counter(), 0
    with file.open("rb", buffering=0) as opened:
        while block := opened.read(1 << 24):
            size += len(block)
    return size / (FEATURES * 4) / (time.perf_counter() - began)


def loader(file: Path, workers: int, batches: int) -> Found:
    """Return the speed of PyTorch with a DataLoader of so many workers."""
    program = [common.peers_python(), common.PEERS / "data_loader.py", file, workers, batches]
    done = subprocess.run([str(word) for word in program], env=common.environment(1), capture_output=True, check=True)
    return Found(float(done.stdout), 0.0, 0.0, 0.0)


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("data", options.json)
    rows = 1 << (18 if options.quick else 21)
    rounds, batches = (1, 1000) if options.quick else (3, 3000)
    with tempfile.TemporaryDirectory(prefix="dbmpi-data-") as folder:
        place = Path(folder)
        files = {form: place / f"{form}.h5" for form in FORMS}
        for form, layout in FORMS.items():
            write(files[form], rows, **layout)
        small = place / "small.h5"
        write(small, 1 << 14)
        for ranks in (1, 2):
            ways: dict[str, Callable[[], Found]] = {
                "memory": partial(learn, place, files["contiguous"], ranks, "memory", batches, rows)
            }
            for form, file in files.items():
                few = batches // 50
                ways[form] = partial(learn, place, file, ranks, "file", batches, rows)
                ways[f"{form}, h5py's selection"] = partial(
                    learn, place, file, ranks, "file", few, rows, selection=True
                )
                if ranks == 1:
                    for workers in (0, 2):
                        ways[f"{form}, DataLoader, {workers} workers"] = partial(loader, file, workers, few)
            found = common.in_turn(rounds, together=ranks > 1, **ways)
            show(report, ranks, found)
        begin = common.in_turn(
            rounds,
            small=partial(learn, place, small, 2, "file", 200, 1 << 14),
            large=partial(learn, place, files["contiguous"], 2, "file", 200, rows),
        )
        more = common.median([run.start for run in begin["large"]]) - common.median(
            [run.start for run in begin["small"]]
        )
        report.at_most("seconds of the start more than with a small file", more, 1.0)
        few = 10 if options.quick else 60
        speech = {form: learn(place, file, 1, "file", few, rows, layers=SPEECH) for form, file in files.items()}
        for form, run in speech.items():
            report.at_most(f"{form}: part of the speech network's time that goes into data", run.waiting, 0.02)
        if CGROUP in os.environ:
            with_half_the_memory(report, place, files["contiguous"], batches, rows)
    report.finish()


def with_half_the_memory(report: common.Report, place: Path, file: Path, batches: int, rows: int) -> None:
    """Learn from a file of which half fits into the memory of a cgroup."""
    cgroup, half = Path(os.environ[CGROUP]), file.stat().st_size // 2
    for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2 and 1
        if (cgroup / name).exists():
            (cgroup / name).write_text(str(half))
    memory = learn(place, file, 2, "memory", batches, rows).rate
    of_disk = disk(file)
    table = [("memory, without a limit", memory, 1.0), ("the disk, from the beginning", of_disk, of_disk / memory)]
    for name, shuffle in (("any order", '"samples"'), ("blocks of 4,096 samples", "4096")):
        found = limited(place, file, shuffle, batches, rows)
        table.append((name, found.rate, found.rate / memory))
    report.table("Two ranks, memory for half of the file", ("samples from", "a second", "of memory's"), table)
    report.at_least(
        "half the memory, in blocks: over the lesser of memory and disk", table[-1][1] / min(memory, of_disk), 0.7
    )


LOADERS: dict[str, float] = {}
"""Samples a second with two workers, by form."""


def show(report: common.Report, ranks: int, found: dict[str, list[Found]]) -> None:
    """Print the table of one number of ranks, and compare with the targets."""
    memory = common.median([run.rate for run in found["memory"]])
    table = []
    for way, runs in found.items():
        rate = common.median([run.rate for run in runs])
        table.append((way, rate, rate / memory, max(run.private for run in runs)))
        if way.endswith("2 workers"):
            LOADERS[way.partition(",")[0]] = rate
    report.table(f"{ranks} ranks", ("samples from", "a second", "of memory's", "private MiB"), table)
    if ranks == 1:
        return
    for form, least in TARGETS.items():
        rate = common.median([run.rate for run in found[form]])
        selection = common.median([run.rate for run in found[f"{form}, h5py's selection"]])
        report.at_least(f"{form}: speed over that from memory, two ranks", rate / memory, least)
        report.at_least(f"{form}: speed over that of h5py's selection, two ranks", rate / selection, 8.0)
        report.at_least(f"{form}: speed over a DataLoader with two workers", rate / LOADERS[form], 5.0)
        report.at_most(f"{form}: private MiB of a rank", max(run.private for run in found[form]), 250.0)


if __name__ == "__main__":
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
    main()
