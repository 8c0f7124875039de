"""What networks learn from what the importers write, beside scikit-learn on the same files and the same split.

Fashion-MNIST (idx), UCI Adult (libsvm), Free Spoken Digits with two speakers held out (wav), and the characters of
Shakespeare with the end of the text held out (text).  Needs the published files in ../shared/data, beside the project,
or in the folder that DBMPI_DATA names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import common

PUBLISHED = Path(os.environ.get("DBMPI_DATA", common.ROOT.parent / "shared" / "data"))
EVERY = 5
"""Of the windows of text, those that logistic regression learns from: it holds all of them in memory."""


class Task(NamedTuple):
    """A data set, the commands that import it, and the network."""

    name: str
    imports: tuple[tuple[str, ...], ...]
    """Words after ``data import``; {} is the folder of published files."""
    hidden: tuple[int, ...]
    outputs: int
    epochs: int
    settings: tuple[str, ...] = ()


TASKS = (
    Task(
        "Fashion-MNIST",
        tuple(
            (
                *("idx", "--images", f"{{}}/fashion-mnist/{prefix}-images-idx3-ubyte.gz"),
                *("--labels", f"{{}}/fashion-mnist/{prefix}-labels-idx1-ubyte.gz", "--out", f"{part}.h5"),
            )
            for prefix, part in (("train", "train"), ("t10k", "test"))
        ),
        (512, 256),
        10,
        10,
        ("optimizer.warmstart=200",),
    ),
    Task(
        "UCI Adult (a9a)",
        (
            ("libsvm", "{}/libsvm/a9a", "--out", "train.h5"),
            ("libsvm", "{}/libsvm/a9a.t", "--like", "train.h5", "--out", "test.h5"),
        ),
        (32,),
        2,
        10,
        ("optimizer.learning_rate=0.02",),
    ),
    Task(
        "Free Spoken Digits, frames",
        (
            (
                *("wav", "{}/fsdd/fsdd-recordings.tar", "--test-speakers", "theo,lucas"),
                *("--out", "train.h5", "--test-out", "test.h5"),
            ),
        ),
        (256,),
        30,
        5,
    ),
    Task(
        "Shakespeare, next character",
        (
            (
                *("text", "{}/text/tinyshakespeare.txt", "--out", "train.h5"),
                *("--test-out", "test.h5", "--test-fraction", "0.1"),
            ),
        ),
        (256,),
        65,
        3,
        ('optimizer.rule="adam"', "optimizer.learning_rate=0.001", "optimizer.batch_size=128"),
    ),
)


def main() -> None:
    """Run all and print the table."""
    options = common.options(__doc__)
    report = common.Report("imported", options.json)
    if not PUBLISHED.is_dir():
        sys.exit(f"{PUBLISHED}: not there; set DBMPI_DATA to the folder with the published files")
    rows = []
    for task in TASKS[1:2] if options.quick else TASKS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            seconds = imported(task, folder)
            reached = 100 * learned(task, folder)
            regression = 100 * logistic_regression(folder)
        rows.append((task.name, seconds, "-".join(map(str, (*task.hidden, task.outputs))), reached, regression))
        report.at_least(f"{task.name}: points more than logistic regression", reached - regression, -0.2)
    header = ("data", "import, s", "network", "test accuracy %", "logistic regression %")
    report.table("Learned from imported data", header, rows)
    report.finish()


def imported(task: Task, folder: Path) -> float:
    """Import a data set into a folder; return the seconds."""
    begin = time.perf_counter()
    for words in task.imports:
        dbmpi(folder, "data", "import", *(word.format(PUBLISHED) for word in words))
    return time.perf_counter() - begin


def learned(task: Task, folder: Path) -> float:
    """Train a network; return its accuracy on the test file."""
    from dbmpi.monitor.history import summary

    layers = "".join(f'[[network.layers]]\ntype = "dense"\nunits = {n}\nactivation = "relu"\n' for n in task.hidden)
    layers += f'[[network.layers]]\ntype = "dense"\nunits = {task.outputs}\n'
    rule = '[optimizer]\nrule = "adagrad"\nlearning_rate = 0.01\nbatch_size = 64\n'
    data = f'[data]\ntrain = "train.h5"\ntest = "test.h5"\n{layers}{rule}epochs = {task.epochs}\n'
    (folder / "run.toml").write_text(f'{data}[run]\ndirectory = "run"\n')
    dbmpi(folder, "train", "run.toml", *(word for setting in task.settings for word in ("--set", setting)))
    return summary(folder / "run").test_accuracy or 0.0


def logistic_regression(folder: Path) -> float:
    """Return the accuracy of scikit-learn on the same files."""
    from sklearn.linear_model import LogisticRegression

    inputs, labels = contents(folder / "train.h5", EVERY)
    return float(LogisticRegression(max_iter=100).fit(inputs, labels).score(*contents(folder / "test.h5")))


def contents(path: Path, every: int = 1) -> tuple[Any, Any]:
    """Return inputs and labels of a data file; of tokens, which become sparse one-hot rows, those of `every` n-th."""
    import h5py
    import numpy as np
    import scipy.sparse

    with h5py.File(path) as file:
        inputs, labels, attributes = file["inputs"][()], file["targets"][()], dict(file["inputs"].attrs)
    if "one_hot" not in attributes:
        return inputs.reshape(len(inputs), -1).astype(np.float32) * np.float32(attributes.get("scale", 1)), labels
    size, tokens = int(attributes["one_hot"]), inputs[::every]
    columns = (tokens.astype(np.int64) + size * np.arange(tokens.shape[1])).reshape(-1)
    starts = np.arange(0, tokens.size + 1, tokens.shape[1])
    ones = np.ones(tokens.size, np.float32)
    return scipy.sparse.csr_matrix((ones, columns, starts), (len(tokens), size * tokens.shape[1])), labels[::every]


def dbmpi(folder: Path, *words: object) -> None:
    """Run a command of dbmpi in a folder, its output on standard error."""
    command = [sys.executable, "-m", "dbmpi", *(str(word) for word in words)]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)


if __name__ == "__main__":
    main()
