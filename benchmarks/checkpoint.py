"""Checkpoints of 500 million parameters and their Adagrad state, 4 GB: written, read, and written during training.

Writing and reading take turns with a plain write and read of the same bytes, by as many processes, and with PyTorch:
``torch.save`` and ``torch.load`` of one process with half as many, and its distributed checkpoints of two.  What is
written is brought to disk in every case, and what is read is not in the cache.  Ours are written by two shards, each
its file, and loaded by two ranks, each its half.

Then two shards and a worker train a network of 500 million parameters, and write checkpoints.  The training rests while
the worker pauses, and while a change of the shards' vectors waits for a copy; both are compared with the time that a
checkpoint takes.  The memory of the shards is watched, too.

PyTorch is found in the environment that ``make bench-peers`` makes.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common

ELEMENTS = 500_000_000
WIDTH, HIDDEN, INPUTS, OUTPUTS = 10_000, 5, 9_740, 256
"""Of the network that is trained: 500 million parameters, in six layers."""
SAMPLES, BATCH = 256, 16
RANKS = 2
PEER = common.PEERS / "checkpoint.py"
WRITE, READ, STALL, MEMORY = 0.8, 0.8, 0.03, 1.1
"""Aims: fractions of the plain bandwidths; of the time of writing; of one copy of what is written."""


def main() -> None:
    if sys.argv[1:2] == ["--ranks"]:
        ranks(Path(sys.argv[2]))
        return
    options = common.options(__doc__)
    report = common.Report("checkpoint", options.json)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=Path.cwd()) as folder:
        compare(report, Path(folder), 2 if options.quick else 7)
        train(report, Path(folder), 4 if options.quick else 10)
    report.finish()


def compare(report: common.Report, folder: Path, rounds: int) -> None:
    """Write and read in turn."""
    with ExitStack() as stack:
        ours = stack.enter_context(common.Contestant(common.on_ranks(RANKS, __file__, "--ranks", str(folder))))
        work = {name: functools.partial(ours.do, name) for name in ("plain write", "write", "plain read", "read")}
        if common.PEERS_PYTHON.exists():
            torch = stack.enter_context(common.Contestant((common.peers_python(), PEER, folder, str(ELEMENTS))))
            names = ("torch.save", "torch.load", "distributed save", "distributed load")
            work |= {name: functools.partial(torch.do, name) for name in names}
        found = common.in_turn(rounds, **work)
    seconds = {name: common.median([one["seconds"] for one in values]) for name, values in found.items()}
    rows = []
    for name, values in found.items():
        plain = "plain read" if "read" in name or "load" in name else "plain write"
        rate = 8 * ELEMENTS / seconds[name] / 1e9 / (2 if name.startswith("torch.") else 1)
        quartiles = common.spread([one["seconds"] for one in values])
        share = rate * seconds[plain] * 1e9 / 8 / ELEMENTS
        rows.append((name, seconds[name], quartiles, f"{rate:.2f}", f"{share:.2f}"))
    header = ("what", "s", "quartiles", "GB/s", "of plain")
    report.table(f"{8 * ELEMENTS / 1e9:.0f} GB, in turn, on {common.machine()['processor']}", header, rows)
    report.at_least("bandwidth of a plain write", seconds["plain write"] / seconds["write"], WRITE)
    report.at_least("bandwidth of a plain read", seconds["plain read"] / seconds["read"], READ)


def train(report: common.Report, folder: Path, checkpoints: int) -> None:
    """Train, and look at what checkpoints cost."""
    run, data = folder / "run", folder / "data.h5"
    layers = ", ".join([f'{{type = "dense", units = {WIDTH}, activation = "relu"}}'] * HIDDEN)
    configuration = folder / "run.toml"
    configuration.write_text(f"""
[run]
directory = {json.dumps(str(run))}
[data]
train = {json.dumps(str(data))}
[network]
layers = [{layers}, {{type = "dense", units = {OUTPUTS}}}]
[topology]
shards = {RANKS}
replicas = 1
[optimizer]
learning_rate = 0.001
batch_size = {BATCH}
epochs = 100000
[checkpoint]
every_seconds = 5
[monitor]
progress = "none"
""")
    make = f"""
import h5py, numpy as np
with h5py.File({str(data)!r}, "w") as file:
    file["inputs"] = np.random.default_rng(1).random(({SAMPLES}, {INPUTS}), dtype=np.float32)
    file["targets"] = np.arange({SAMPLES}, dtype=np.int32) % {OUTPUTS}
"""
    subprocess.run([sys.executable, "-c", make], check=True)
    command = common.on_ranks(RANKS + 1, "-m", "dbmpi", "train", str(configuration))
    environment = common.environment(1)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        memory: dict[int, list[tuple[float, int]]] = {}
        try:
            while process.poll() is None and len(reports(run)) < checkpoints + 1:
                for child in descendants(process.pid):
                    memory.setdefault(child, []).append((time.time(), anonymous(child)))
                time.sleep(0.05)
        finally:
            process.terminate()
            process.wait(120)
    found = reports(run)[1:]  # the first one is written while files of the run itself are made
    if not found:
        raise RuntimeError("no checkpoint was written")
    rows = [(one["name"], one["bytes"] / 1e9, one["seconds"], one["rested"], one["waited"]) for one in found]
    report.table("Checkpoints during training", ("file", "GB", "s", "rested, s", "waited, s"), rows)
    stall = common.median([(one["rested"] + one["waited"]) / one["seconds"] for one in found])
    report.at_most("training stalls, of the time of writing", stall, STALL)
    first = reports(run)[0]
    taken = first["time"] - first["seconds"]
    grown = 0.0
    for series in memory.values():
        before = [size for moment, size in series if moment < taken - 0.5]
        if before:
            grown += max(size for _, size in series) - max(before)
    report.at_most("memory beyond training, of what is written", grown / found[0]["bytes"], MEMORY)


def records(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / "records" / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def reports(run: Path) -> list[dict[str, Any]]:
    """Return what is recorded of checkpoints."""
    return [record for record in records(run, "shard-0") if record["kind"] == "checkpoint"]


def descendants(process: int) -> Iterator[int]:
    """Yield the processes that a process has started, and theirs."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def anonymous(process: int) -> int:
    """Return the bytes of memory of a process that are neither shared nor of files."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def ranks(folder: Path) -> None:
    """Be two shards, which write and read checkpoints, and as many bytes plainly."""
    common.prepare_runtime()
    import numpy as np

    from dbmpi.checkpoint.reader import Checkpoint
    from dbmpi.index.layout import Layout, Tensor
    from dbmpi.mpi import waiting, world
    from dbmpi.replica.arrangement import equal

    comm = world.start()
    layout = Layout(tuple(Tensor(f"dense{number}/weights", (10_000, 10_000)) for number in range(ELEMENTS // 10**8)))
    arrangement = equal(layout, comm.size)
    held = arrangement.ranges[comm.rank]
    random = np.random.default_rng(comm.rank)
    vectors = {name: random.random(len(held), dtype=np.float32) for name in ("parameters", "accumulator")}
    plain, kept = folder / f"plain-{comm.rank}", folder / "checkpoints"

    def write_plainly() -> None:
        descriptor = os.open(plain, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for piece in pieces():
            os.write(descriptor, piece)
        os.fsync(descriptor)
        os.close(descriptor)

    def read() -> None:
        with Checkpoint.open(folder) as checkpoint:
            for name, vector in vectors.items():
                checkpoint.load(name, held.start, vector)

    def read_plainly() -> None:
        descriptor = os.open(plain, os.O_RDONLY)
        for piece in pieces():
            os.readv(descriptor, [piece])
        os.close(descriptor)

    def pieces() -> Iterator[memoryview]:
        for vector in vectors.values():
            data = vector.view(np.uint8).data
            yield from (data[start : start + 2**20] for start in range(0, len(data), 2**20))

    def timed(work: Callable[[], None]) -> common.Action:
        def action() -> dict[str, float]:
            for path in (plain, *kept.glob("*.h5")):
                if path.exists():
                    forget(path)
            waiting.barrier(comm, "the other rank")
            start = time.perf_counter()
            work()
            waiting.barrier(comm, "the other rank")
            return {"seconds": time.perf_counter() - start}

        return action

    write = writer(comm, folder, arrangement, vectors)
    actions = {"plain write": write_plainly, "write": write, "plain read": read_plainly, "read": read}
    common.serve_together(comm, **{name: timed(work) for name, work in actions.items()})


def writer(comm: Any, folder: Path, arrangement: Any, vectors: dict[str, Any]) -> Callable[[], None]:
    """Return what writes a checkpoint, as shards do at the end of a run."""
    import numpy as np

    from dbmpi.checkpoint.lead_saver import LeadSaver, unusable
    from dbmpi.checkpoint.saver import ShardSaver
    from dbmpi.checkpoint.schema import CheckpointInfo
    from dbmpi.config import CheckpointSection
    from dbmpi.mpi import waiting

    steps = itertools.count(1)
    facts = {"configuration": "{}", "shards": comm.size, "replicas": 1, "partitions": 1, "input_shape": ()}
    facts |= {"classes": 0, "frontier": 0, "total": 0}
    lead = None
    if comm.rank == 0:
        failed = functools.partial(unusable, folder)
        lead = LeadSaver(comm, folder, range(comm.size), arrangement, CheckpointSection(keep=1), failed)
    saver = lead or ShardSaver(comm, folder, comm.rank, comm.size)

    def write() -> None:
        step, identity = next(steps), np.zeros(1, np.int64)
        if lead is not None:
            identity[0] = lead.plan(step, functools.partial(CheckpointInfo, step=step, samples=step, **facts), {})
        waiting.broadcast(comm, identity, 0, "the lead")
        saver.begin(step, int(identity[0]), vectors, step, last=True)

        def written() -> bool:
            return not saver.busy if lead is None else lead.result() is not None

        waiting.until(written, "the checkpoint", serve=saver.poll, longest_sleep=0.01)

    return write


def forget(path: Path) -> None:
    """Drop a file from the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
