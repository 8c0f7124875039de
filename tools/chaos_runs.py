"""The small runs that ``tools/chaos.py`` disturbs: their files, and what must hold when one has come to its end."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.index.layout import cut
from dbmpi.monitor.records import read_records

SHARDS = 2
CONFIGURATION = """
[run]
directory = "run"
[data]
train = "train.h5"
test = "test.h5"
LEARN
[topology]
shards = 2
[optimizer]
method = "METHOD"
learning_rate = RATE
batch_size = 20
epochs = EPOCHS
[sandblaster]
gtol = 0
ftol = 0
l2 = 1e-4
[checkpoint]
every_seconds = 0.3
resume = "auto"
[monitor]
report_seconds = 0.1
evaluate_epochs = 0
progress = "lines"
"""
LEARN = {
    "digits": """[[network.layers]]
units = 64
activation = "tanh"
[[network.layers]]
units = 10""",
    "counts": """[objective]
use = "counts:Counts\"""",
}
"""What is learned: a network, or the number of updates."""
RATES = {"digits": "0.01", "counts": "1.0\nrule = 'sgd'"}
COUNTS = """
import numpy as np

class Counts:
    parameters = {"weights": np.zeros((64, 100)), "biases": np.zeros(77)}

    def loss_and_gradient(self, parameters, batch):
        return 1.0, {name: -np.ones_like(values) for name, values in parameters.items()}
"""
EPOCHS = {"downpour": 60, "sandblaster": 150}


def write_run(directory: Path, method: str, learn: str, epochs: int) -> None:
    """Write the configuration and the data of a run.

    Parameters
    ----------
    directory
        Where to write them.
    method, learn, epochs
        The optimizer, what is learned (of `LEARN`), and for how long.
    """
    text = CONFIGURATION
    words = {"METHOD": method, "EPOCHS": str(epochs), "LEARN": LEARN[learn], "RATE": RATES[learn]}
    for word, value in words.items():
        text = text.replace(word, value)
    (directory / "config.toml").write_text(text, encoding="utf-8")
    (directory / "counts.py").write_text(COUNTS, encoding="utf-8")
    write_data(directory)


def write_data(directory: Path) -> None:
    """Write data that look like the digits: ten blurred patterns of 8x8, with noise."""
    patterns = np.random.default_rng(1).uniform(0, 1, (10, 64))
    for name, count, seed in (("train", 1200, 2), ("test", 1000, 3)):
        dice = np.random.default_rng(seed)
        targets = dice.integers(0, 10, count)
        with h5py.File(directory / f"{name}.h5", "w") as file:
            file["inputs"] = (patterns[targets] + dice.normal(0, 0.5, (count, 64))).astype(np.float32)
            file["targets"] = targets
            file["targets"].attrs["classes"] = 10


def counts(run: Path, method: str) -> str:
    """Return what is wrong with the counts of a run that has come to its end; empty if nothing is."""
    with Checkpoint.open(run) as checkpoint:
        info = checkpoint.info
    if method == "downpour":
        whole = info.frontier == info.total and not info.holes and info.step >= info.total
        return "" if whole else f"{info.step} steps, frontier {info.frontier} of {info.total}, {len(info.holes)} holes"
    portions = {len(record["ledger"]) for record in read_records(run) if record["kind"] == "batch"}
    counted = {sum(record["portions"].values()) for record in read_records(run) if record["kind"] == "batch"}
    return "" if portions == counted and len(portions) == 1 else f"batches of {portions}, {counted} portions"


def updates(run: Path) -> str:
    """Return what is wrong with the parameters of a run that count its updates; empty if nothing is."""
    records = list(read_records(run))
    repeated = sum(record["repeated"] for record in records if record["kind"] == "loss")
    versions = {record["number"]: record["version"] for record in records if record["kind"] == "shard"}
    with Checkpoint.open(run) as checkpoint:
        values, batches = checkpoint.parameters(), checkpoint.info.total
    problems = []
    for shard, held in enumerate(cut(len(values), SHARDS)):
        least, most = int(values[held.start : held.stop].min()), int(values[held.start : held.stop].max())
        if not (batches <= least <= most <= batches + repeated and least == versions[shard]):
            problems.append(f"shard {shard}: {least} to {most} updates, {versions[shard]} counted")
    return "; ".join(problems) and f"{'; '.join(problems)}, of {batches} and {repeated} repeated"
