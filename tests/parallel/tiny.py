"""A learning problem small enough for tests, and its serial twin, written naively."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from mpi4py import MPI
from unit.rule_twins import RuleTwin

from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.data.stream import Order
from dbmpi.network import own
from dbmpi.objective import Batch, Outcome
from dbmpi.replica.whole import WholeNetwork

SAMPLES, TEST_SAMPLES, FEATURES, CLASSES = 40, 17, 6, 3
LAYERS = ({"units": 7, "activation": "tanh"}, {"units": CLASSES})


def write_data(directory: Path, samples: int = SAMPLES) -> None:
    """Write ``train.h5`` and ``test.h5``: a cloud of points around a corner for each class."""
    rng = np.random.default_rng(5)
    for name, count in (("train", samples), ("test", TEST_SAMPLES)):
        labels = rng.integers(0, CLASSES, count)
        inputs = rng.normal(0, 0.5, (count, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[labels]
        write_file(directory / f"{name}.h5", inputs, labels)


def write_file(path: Path, inputs: np.ndarray, targets: np.ndarray, classes: int | None = CLASSES) -> None:
    """Write one data file; `classes` is None where the targets are values."""
    with h5py.File(path, "w") as file:
        file["inputs"] = inputs.astype(np.float32)
        file["targets"] = targets
        if classes is not None:
            file["targets"].attrs["classes"] = classes


def describe(directory: Path, **sections: dict[str, Any]) -> Run:
    """Describe a run on the data in `directory`, in ``directory/run``; what `sections` say replaces the usual."""
    usual: dict[str, dict[str, Any]] = {
        "run": {"directory": directory / "run", "seed": 3},
        "data": {"train": directory / "train.h5", "test": directory / "test.h5"},
        "network": {"layers": LAYERS},
        "optimizer": {"learning_rate": 0.1, "batch_size": 6, "epochs": 3},
        "checkpoint": {"every_seconds": 0, "resume": "auto"},
        "monitor": {"progress": "none", "report_seconds": 0.05, "evaluate_epochs": 0},
    }
    names = usual | sections
    return Run.model_validate({name: usual.get(name, {}) | sections.get(name, {}) for name in names})


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file below a directory."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in directory.rglob("*") if not p.is_dir()}


class Hosts(MPI.Intracomm):
    """Ranks that seem to be on several hosts, two on each."""

    def Split_type(self, kind: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> MPI.Intracomm:  # noqa: N802
        return self.Split(self.rank // 2, key)


class Apart(MPI.Intracomm):
    """Ranks that seem to be on a host of its own each."""

    def Split_type(self, kind: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> MPI.Intracomm:  # noqa: N802
        return self.Split(self.rank, key)


class Twin:
    """The same run without ranks, shards and messages: a network, a vector, and a loop."""

    def __init__(self, run: Run, load: own.Loader = own.refuse) -> None:
        self.run = run
        with h5py.File(run.data.train) as file:
            self.inputs, self.targets = file["inputs"][()], file["targets"][()]
            self.classes = file["targets"].attrs.get("classes")
        kind = "values" if self.classes is None else "classes"
        self.network = WholeNetwork(run.network, self.inputs.shape[1:], run.run.seed, targets=kind, load=load)
        settings = run.optimizer
        self.order = Order(len(self.inputs), settings.batch_size, settings.epochs, run.run.seed)
        self.server = np.empty(self.network.layout.size, np.float32)
        self.network.initial(0, self.server)
        self.rule = RuleTwin(settings, self.server)

    def learn(self) -> np.ndarray:
        """Learn by algorithm 1.1 of the paper with one replica; return the parameters."""
        settings = self.run.optimizer
        accrued, gradient = np.zeros_like(self.server), np.empty_like(self.server)
        before = samples = 0
        for step in range(self.order.batches):
            if step % settings.n_fetch == 0:
                parameters = self.server.copy()
            self.network.loss_and_gradient(parameters, self.batch(step), gradient)
            accrued += gradient
            size = len(self.order.indices(step))
            parameters -= np.float32(settings.local_rate * self.factor(before + samples, size)) * gradient
            samples += size
            if step % settings.n_push == 0 or step == self.order.batches - 1:
                self.apply(accrued, self.factor(before, samples))
                before, samples = before + samples, 0
                accrued[:] = 0
        return self.server

    def apply(self, gradient: np.ndarray, factor: float = 1.0) -> None:
        """Update the server's parameters."""
        largest = self.run.optimizer.clip_norm
        if largest:
            norm = np.linalg.norm(gradient.astype(np.float64))
            gradient = gradient * np.float32(min(1, largest / norm))
        self.server[:] = self.rule.step(self.server, gradient, factor)

    def factor(self, before: int, samples: int) -> float:
        """Return the factor of the learning rate for a push of so many samples, after all those before."""
        settings, epoch = self.run.optimizer, len(self.inputs)
        warm = settings.warmup_epochs * epoch
        factor = min(1, (before + samples) / warm) if warm else 1.0
        later = max(0, before - warm) / epoch
        match settings.schedule:
            case "step":
                factor *= settings.decay_factor ** int(later / settings.decay_epochs)
            case "cosine":
                whole = settings.decay_epochs or settings.epochs - settings.warmup_epochs
                wave = (1 + math.cos(math.pi * min(1, later / whole))) / 2
                factor *= settings.decay_factor + (1 - settings.decay_factor) * wave
            case "inverse_root":
                whole = settings.decay_epochs or settings.warmup_epochs
                factor *= (1 / (1 + later / whole)) ** 0.5
        return factor

    def batch(self, number: int) -> Batch:
        """Return a batch of the stream."""
        chosen = self.order.indices(number)
        inputs = np.ascontiguousarray(np.moveaxis(self.inputs[chosen], 0, -1))
        targets = self.targets[chosen]
        targets = targets.astype(np.int32) if self.classes is not None else targets.astype(np.float32).T.copy()
        return Batch(inputs, targets)

    def test(self, parameters: np.ndarray) -> Outcome:
        """Return the outcome on the test data, one sample after the other."""
        with h5py.File(self.run.data.test) as file:
            inputs, targets = file["inputs"][()], file["targets"][()].astype(np.int32)
        total = Outcome(0, 0.0, 0)
        for one, target in zip(inputs, targets, strict=True):
            total = total.plus(self.network.evaluate(parameters, Batch(one[..., None].copy(), target[None])))
        return total


def vectors(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return the vectors in a checkpoint, by name."""
    with Checkpoint.open(checkpoint) as opened:
        found = {}
        for name in opened.vectors:
            found[name] = np.empty(opened.layout.size, opened.dtype)
            opened.read(name, 0, found[name])
        return found
