"""What dbmpi costs a training step of a PyTorch module: beside PyTorch's own loops and DDP over gloo, in turn.

The module is the paper's speech network (41,777,152 parameters), trained by plain SGD on batches of 128, with one
thread for each process.  One replica: PyTorch's loop; the same loop with ``dbmpi.torch.Downpour``, where one process is
worker and shard; and ``dbmpi.train`` with a `ModuleObjective`, from a data file.  Two replicas with n_push = n_fetch =
1: two loops of PyTorch at the same time that know nothing of each other; DDP; and dbmpi's ways on two workers and a
shard.  "In place" lets workers compute on the shard's own parameters (``server.fetch = "shared"``).

Every way does a few steps whenever it is told to; what counts is samples/s, of two replicas the sum.  A step ends where
the next begins, so that dbmpi's own loop counts with all that it does in between.  The processor's time of a worker
stands beside it: on a quiet machine they agree, on a busy one it says what the program is to blame for.

It needs one environment with dbmpi and PyTorch, as ``make test-torch`` makes it:
``.venv-torch/bin/python benchmarks/objectives.py``.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import common

SIZES = (440, 2560, 2560, 2560, 2560, 8192)
BATCH, RATE, SAMPLES = 128, 0.01, 2048
STEPS = {1: 2, 2: 4}
"""Of a measurement, by replicas."""
PLAIN, DDP = "plain loop", "DDP over gloo"
OURS = {
    "Downpour": {},
    "Downpour, in place": {"fetch": "shared"},
    "dbmpi.train": {},
    "dbmpi.train, in place": {"fetch": "shared"},
}
"""Ways through dbmpi, and how gradients and parameters travel."""
LEAST = {1: 0.95, 2: 0.9}
"""Samples/s of the plain loop that are aimed at, by replicas."""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    options = common.options(__doc__)
    report = common.Report("objectives", options.json)
    for replicas in (1, 2):
        compare(report, replicas, 3 if options.quick else 11)
    report.finish()


def compare(report: common.Report, replicas: int, rounds: int) -> None:
    """Time all ways in turn, and add a table and the targets."""
    with ExitStack() as stack:
        work = {way: stack.enter_context(Job(way, replicas)).measure for way in (PLAIN, *OURS)}
        if replicas == 2:
            command = (sys.executable, common.PEERS / "ddp_step.py", str(BATCH), str(STEPS[2]))
            ddp = stack.enter_context(common.Contestant(command))
            work[DDP] = functools.partial(measure_ddp, ddp)
        found = common.in_turn(rounds, together=replicas > 1, **work)
    speeds = {way: common.median([speed for speed, _ in values]) for way, values in found.items()}
    plural = f"{replicas} replica{'s' if replicas > 1 else ''}"
    others = [way for way in (PLAIN, DDP) if way in work]
    rows = []
    for way, values in found.items():
        ratios = [f"{speeds[way] / speeds[other]:.2f}" for other in others]
        quartiles = common.spread([speed for speed, _ in values])
        processor = 1e3 * common.median([seconds for _, seconds in values])
        rows.append((way, speeds[way], quartiles, *ratios, processor))
    header = ("way", "samples/s", "quartiles", *(f"times {other}" for other in others), "CPU ms a step")
    report.table(f"{plural}, batch {BATCH}, in turn, on {common.machine()['processor']}", header, rows)
    for way in OURS:
        report.at_least(f"samples/s of the {PLAIN}: {way}, {plural}", speeds[way] / speeds[PLAIN], LEAST[replicas])
        if DDP in work:
            report.at_least(f"samples/s of {DDP}: {way}, {plural}", speeds[way] / speeds[DDP], 1.0)


def measure_ddp(ddp: common.Contestant) -> tuple[float, float]:
    """Return the samples/s of both processes, and the processor's seconds of one for a step."""
    told = ddp.do("steps")
    return 2 * STEPS[2] * BATCH / told["seconds"], told["processor"] / STEPS[2]


class Job:
    """Processes that do a few steps whenever they are told to, by named pipes: one for each worker and direction.

    Parameters
    ----------
    way
        Through what they train.
    replicas
        Number of workers.
    """

    def __init__(self, way: str, replicas: int) -> None:
        self._steps, self._way = STEPS[replicas], way
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        pipes = [[folder / f"{kind}-{number}" for number in range(replicas)] for kind in ("orders", "answers")]
        for pipe in (*pipes[0], *pipes[1]):
            os.mkfifo(pipe)
        # Open in both directions: neither end waits for the other one.
        self._orders, self._answers = (
            [os.fdopen(os.open(pipe, os.O_RDWR), "r+b", 0) for pipe in some] for some in pipes
        )
        program = (__file__, "--worker", way, str(folder), str(self._steps))
        commands: list[tuple[str, ...]] = [(sys.executable, *program, str(number)) for number in range(replicas)]
        if way != PLAIN and replicas > 1:
            commands = [common.on_ranks(replicas + 1, *program)]
        self._jobs = [subprocess.Popen(one, env=common.environment(1), stdin=subprocess.DEVNULL) for one in commands]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (*self._orders, *self._answers):
            pipe.close()  # which ends the loops
        if self._way.startswith("dbmpi.train"):
            for job in self._jobs:
                job.terminate()
        for job in self._jobs:
            try:
                job.wait(60)
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()
        self._folder.cleanup()

    def measure(self) -> tuple[float, float]:
        """Let all workers do their steps at the same time.

        Returns
        -------
        float
            Samples/s, the sum of what each worker reaches.
        float
            The processor's seconds of a worker for a step.
        """
        for pipe in self._orders:
            pipe.write(b"\n")
        told = [json.loads(self._answer(pipe)) for pipe in self._answers]
        speed = sum(self._steps * BATCH / seconds for seconds, _ in told)
        return speed, common.median([processor for _, processor in told]) / self._steps

    def _answer(self, pipe: Any) -> bytes:
        while not select.select([pipe], [], [], 1)[0]:
            if any(job.poll() is not None for job in self._jobs):
                raise RuntimeError(f"{self._way} has ended")
        return bytes(pipe.readline())


class Turns:
    """A worker's end of the pipes.

    Parameters
    ----------
    folder
        Where they are.
    steps
        Of a measurement.
    number
        Of the worker.
    """

    def __init__(self, folder: Path, steps: int, number: int) -> None:
        self._orders = (folder / f"orders-{number}").open("rb", 0)
        self._answers = (folder / f"answers-{number}").open("wb", 0)
        self._all, self._left = steps, 0
        self._start: tuple[float, float] | None = None

    def next(self) -> bool:
        """Begin a step: if the last one was that of a measurement, answer and wait for the next; False at the end."""
        if self._left == 0:
            if self._start is not None:
                taken = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
                self._answers.write(f"{json.dumps(taken)}\n".encode())
            if not self._orders.readline():
                self._start = None
                return False
            self._left, self._start = self._all, (time.perf_counter(), time.process_time())
        self._left -= 1
        return True


def worker(way: str, folder: str, steps: str, number: str = "") -> None:
    """Train in one way, as one of the job's processes."""
    turns = functools.partial(Turns, Path(folder), int(steps))
    if way == PLAIN:
        plain(turns(int(number)))
        return
    common.prepare_runtime()
    if way.startswith("Downpour"):
        downpour(turns, OURS[way])
    else:
        trained(turns, Path(folder), OURS[way], alone=bool(number))


def plain(turns: Turns) -> None:
    """Train in PyTorch's loop."""
    import torch

    torch.set_num_threads(1)
    network = module()
    loop(turns, network, torch.optim.SGD(network.parameters(), lr=RATE))


def downpour(turns: Any, server: dict[str, Any]) -> None:
    """Train in the same loop with dbmpi's optimizer."""
    import dbmpi.torch
    from dbmpi.config import ServerSection

    if dbmpi.serve(shards=1):
        return
    network = module()
    optimizer = dbmpi.torch.Downpour(
        network.parameters(), "sgd", learning_rate=RATE, server=ServerSection.model_validate(server)
    )
    loop(turns(optimizer.worker), network, optimizer)


def trained(turns: Any, folder: Path, server: dict[str, Any], *, alone: bool) -> None:
    """Train by dbmpi.train, until it is interrupted."""
    import h5py
    import numpy as np
    import torch
    from mpi4py import MPI

    import dbmpi.torch

    comm, samples = MPI.COMM_WORLD, folder / "samples.h5"
    number = 0 if alone else comm.rank - 1
    if comm.rank == 0:
        with h5py.File(samples, "w") as file:
            random = np.random.default_rng(1)
            file["inputs"] = random.normal(size=(SAMPLES, SIZES[0])).astype(np.float32)
            file["targets"] = random.integers(0, SIZES[-1], SAMPLES)
            file["targets"].attrs["classes"] = SIZES[-1]
    comm.Barrier()

    class Counted(dbmpi.torch.ModuleObjective):  # type: ignore[misc]
        tried = number > 0  # the first worker tries a gradient before the run
        turns: Turns | None = None

        def write_gradient(self, *arguments: Any) -> Any:
            if self.tried:
                self.turns = self.turns or turns(number)
                self.turns.next()
            self.tried = True
            return super().write_gradient(*arguments)

    run = dbmpi.Run(
        run={"directory": folder / "run"},
        data={"train": samples},
        topology={"colocate": alone},
        optimizer={"rule": "sgd", "learning_rate": RATE, "batch_size": BATCH, "epochs": 1e6},
        server=server,
        checkpoint={"every_seconds": 0},
        monitor={"evaluate_epochs": 0, "progress": "none"},
    )
    dbmpi.train(run, objective=Counted(module(), torch.nn.functional.cross_entropy))


def module() -> Any:
    """Return the speech network, always with the same first values."""
    import torch

    torch.manual_seed(1)
    layers: list[Any] = []
    for inputs, outputs in pairwise(SIZES):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])


def loop(turns: Turns, network: Any, optimizer: Any) -> None:
    """Train on one batch."""
    import torch

    samples, classes = torch.randn(BATCH, SIZES[0]), torch.randint(SIZES[-1], (BATCH,))
    while turns.next():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(samples), classes).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
