"""A network of 1.7 billion parameters learns by Downpour with Adagrad in 18 GiB.

The paper's image network with 36 maps (examples/images-36.toml) takes 20 steps, cut over two ranks that hold the
shards, too.  Parameters and Adagrad's sums are 12.6 GiB; for all else there is room because shards follow partitions,
workers compute on the shards' own memory, and gradients leave layer by layer.  The images are made up: a pattern for
each of a few of the 21,000 classes, and noise.

While it runs, the proportional set sizes of all processes of the job are read from /proc and added up.  With --quick,
the network with 8 maps (80 million parameters).  Needs /dev/shm for parameters and the gradients of the largest layer
on each rank: 9.5 GiB, which containers must be given (docker run --shm-size=12g, or mount -o remount,size=12g
/dev/shm), and as much disk as the checkpoint at the end takes, 13 GB, in --directory.

Ends with exit code 1 if the loss does not fall or the memory exceeds the target.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import common

STEPS, BATCH, CLASSES, PATTERNS, PARTITIONS = 20, 8, 21_000, 16, 2
MOST_GIB = 18.0
GIB = 2**30
RATES = {8: 1e-3, 36: 2e-4}
"""By maps.  Adagrad's first step moves every weight by the rate: the more inputs a unit has, the less it bears."""
SETTINGS = {
    "optimizer.rule": "adagrad",
    "optimizer.batch_size": BATCH,
    "optimizer.epochs": 1,
    "optimizer.warmstart": 0,
    "topology.replicas": 1,
    "topology.partitions": PARTITIONS,
    "topology.shards": PARTITIONS,
    "topology.colocate": "true",
    "server.align": "partition",
    "server.fetch": "shared",
    "server.gradients": "layers",
    "checkpoint.every_seconds": 0,
    "monitor.report_seconds": 1e-6,
    "monitor.evaluate_epochs": 0,
    "monitor.progress": "lines",
}


def main() -> int:
    """Train, watch, and judge."""
    options = read_options()
    maps = 8 if options.quick else 36
    report = common.Report("billion", options.json)
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        folder = Path(place)
        for name, samples in (("train", STEPS * BATCH), ("test", BATCH)):
            write_images(folder / f"{name}.h5", samples)
        configuration = common.ROOT / "examples" / f"images-{maps}.toml"
        expected = account(configuration)
        rows = [(what, size / GIB) for what, size in expected.items()]
        report.table(
            f"{maps} maps, what is held (GiB)", ("what", "GiB"), [*rows, ("sum", sum(expected.values()) / GIB)]
        )
        peak, code = train(folder, configuration, RATES[maps])
        if code:
            return code
        steps = losses(folder / "run")
    report.table("Steps", ("step", "loss a sample", "seconds"), steps)
    first, last = (sum(loss for _, loss, _ in some) / 5 for some in (steps[:5], steps[-5:]))
    report.at_most("loss of the last five steps over that of the first five", last / first, 0.99)
    report.at_most("steps whose loss is above the first one's", sum(loss > steps[0][1] for _, loss, _ in steps), 0)
    report.at_most("peak proportional set size of the job, GiB", peak / GIB, MOST_GIB)
    report.finish()
    return 0 if all(target["ok"] for target in report.targets) else 1


def read_options() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="the network with 8 maps")
    parser.add_argument("--json", action="store_true", help="print machine and targets as JSON on the last line")
    parser.add_argument("--directory", type=Path, help="where data and checkpoint go, for a while; by default /tmp")
    return parser.parse_args()


def write_images(path: Path, samples: int) -> None:
    """Write a file of images, each the pattern of its class and noise."""
    import h5py
    import numpy as np

    rng = np.random.default_rng(1)
    patterns = rng.normal(0, 1, (PATTERNS, 3, 100, 100))
    labels = rng.permutation(CLASSES)[:PATTERNS]
    rng = np.random.default_rng(samples)
    chosen = rng.integers(0, PATTERNS, samples)
    with h5py.File(path, "w") as file:
        images = file.create_dataset("inputs", (samples, 3, 100, 100), np.float32)
        for number, pattern in enumerate(chosen):
            images[number] = patterns[pattern] + rng.normal(0, 0.5, (3, 100, 100))
        file["targets"] = labels[chosen]
        file["targets"].attrs["classes"] = CLASSES


def account(configuration: Path) -> dict[str, float]:
    """Return the bytes of what the job must hold, by name."""
    import numpy as np

    from dbmpi.config import load
    from dbmpi.downpour.buffer import buffer_size
    from dbmpi.network.description import Network
    from dbmpi.replica.placement import automatic
    from dbmpi.replica.tensors import tensor_boxes

    network = Network(load(configuration).network, (3, 100, 100), 1)
    placed = automatic(network.layers, PARTITIONS)
    gradients, activations = 0, 0
    for worker in range(PARTITIONS):
        boxes = tensor_boxes(network.layers, placed, worker)
        sizes = [sum(boxes[one.name].size for one in layer.tensors.values()) for layer in network.layers]
        ends = np.cumsum([0, *sizes]).tolist()
        gradients += buffer_size([range(start, stop) for start, stop in pairwise(ends)])
        activations += BATCH * sum(2 * boxes[worker].size for boxes in placed.boxes)
    return {
        "parameters": 4 * network.size,
        "sums of Adagrad": 4 * network.size,
        "gradients on their way": 4 * gradients,
        "activations, at least": 4 * activations,
    }


def train(folder: Path, configuration: Path, rate: float) -> tuple[int, int]:
    """Run the training; return the largest sum of proportional set sizes, in bytes, and the exit code."""
    settings = SETTINGS | {
        "run.directory": folder / "run",
        "optimizer.learning_rate": rate,
        "data.train": folder / "train.h5",
        "data.test": folder / "test.h5",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = ["launch", "-n", str(PARTITIONS), "--", "train", str(configuration), *words]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if configuration.stem == "images-36" and free < (MOST_GIB + 1) * GIB:
        sys.exit(f"{free / GIB:.1f} GiB of memory are free, and {MOST_GIB + 1:g} are needed")
    job = subprocess.Popen([sys.executable, "-m", "dbmpi", *command], stdout=sys.stderr)
    peak = 0
    try:
        while job.poll() is None:
            peak = max(peak, sum(map(proportional, family(job.pid))))
            if peak > (MOST_GIB + 2) * GIB:  # rather than that the machine begins to kill
                job.terminate()
            time.sleep(0.5)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait()
    return peak, job.returncode


def family(root: int) -> list[int]:
    """Return a process and all that it has started, directly or not."""
    parents = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
    found, more = set(), {root}
    while more:
        found |= more
        more = {process for process, parent in parents.items() if parent in more} - found
    return sorted(found)


def proportional(process: int) -> int:
    """Return the proportional set size of a process in bytes; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def losses(directory: Path) -> list[tuple[int, float, float]]:
    """Return each step's number, loss and seconds, as the first partition has recorded them."""
    from dbmpi.monitor.records import read_records

    mine = [one for one in read_records(directory) if one["kind"] == "worker" and one["partition"] == 0]
    return [(one["step"], one["loss"], sum(one["seconds"].values())) for one in mine]


if __name__ == "__main__":
    sys.exit(main())
