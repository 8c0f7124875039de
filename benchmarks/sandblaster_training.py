"""Full-batch training by Sandblaster beside PyTorch and SciPy, and what it costs beyond gradients.

A 784-512-256-10 network (tanh) learns all of Fashion-MNIST by L-BFGS with strong Wolfe, in portions of 2,000 samples,
by two replicas of one thread with a shard each.  `torch.optim.LBFGS` and SciPy's L-BFGS-B (with PyTorch's gradient)
have two threads and begin with the same parameters.  All take turns.

The overhead is that of all time, from the sixth pass on, over what the replicas spend in gradients meanwhile.  Beside
it stands that of an iteration over the time that two processes take for the gradients of their portions alone, without
any samples to gather: this sees what caches lose, too, and how the machine's speed changes between the two.

With ``--bfloat16`` ours multiplies bfloat16 (``network.precision``) and comes to the same loss; the others stay as they
are.

Needs the published files in ../shared/data/fashion-mnist, or in the folder that DBMPI_FASHION_MNIST names.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
from fashion_mnist import dbmpi, import_data
from machine import has_feature

PORTION = 2000
UNITS = (512, 256, 10)
REPLICAS = 2
SPEED, SPEED_WITH_AMX, SPEED_WITH_HALVES = 2.0, 1.5, 2.5
"""Times the others' speed that is aimed at: in general, where PyTorch's MKL is at home, and by products of bfloat16."""
OVERHEAD = 0.05


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        contestant(sys.argv[2])
        return
    options = common.options(__doc__, bfloat16="products of bfloat16 in ours")
    precision = "bfloat16" if options.bfloat16 else "float32"
    report = common.Report("sandblaster_training", options.json)
    goal, rounds, epochs = (0.65, 1, 20) if options.quick else (0.45, 3, 50)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        data = import_data(folder)
        configuration = describe(folder, data["train"], epochs, precision)
        write_problem(folder, configuration)
        gradients = stack.enter_context(
            common.Contestant(common.on_ranks(REPLICAS, __file__, "--contestant", str(configuration)))
        )
        peers = {
            name: stack.enter_context(
                common.Contestant(
                    (common.peers_python(), common.PEERS / "full_batch.py", name, folder / "problem.npz", str(goal)),
                    threads=2,
                )
            )
            for name in ("torch", "scipy")
        }
        taken: dict[str, list[Any]] = {"ours": [], "gradients": [], "torch": [], "scipy": []}
        gradients.do()
        for number in range(rounds):
            train_once = partial(train, folder / f"run-{number}", configuration, goal)
            taken["ours"].append(common.undisturbed(train_once))
            taken["gradients"] += [gradients.do() for _ in range(5)]
            for name, peer in peers.items():
                taken[name].append(common.undisturbed(peer.do))
    seconds = {name: common.median([one["seconds"] for one in values]) for name, values in taken.items()}
    rows = [
        (label, seconds[name], taken[name][0]["evaluations"], seconds[name] / seconds["ours"])
        for name, label in (("ours", "Sandblaster"), ("torch", "torch.optim.LBFGS"), ("scipy", "SciPy L-BFGS-B"))
    ]
    title = f"To a training loss of {goal}, ours with products of {precision}"
    report.table(title, ("method", "seconds", "evaluations", "over ours"), rows)
    iteration = common.median([one["iteration"] for one in taken["ours"]])
    alone = seconds["gradients"]
    within = common.median([one["overhead"] for one in taken["ours"]])
    rows = [(1e3 * iteration, f"{100 * within:.1f} %", 1e3 * alone, f"{100 * (iteration / alone - 1):.1f} %")]
    header = ("ms", "overhead within the run", "gradients alone, ms", "overhead over these")
    report.table("An iteration of one evaluation", header, rows)
    speed = SPEED_WITH_AMX if has_feature("amx_tile") else SPEED
    speed = SPEED_WITH_HALVES if options.bfloat16 else speed
    report.at_least("time of torch.optim.LBFGS over ours", seconds["torch"] / seconds["ours"], speed)
    report.at_least("time of SciPy's L-BFGS-B over ours", seconds["scipy"] / seconds["ours"], speed)
    report.at_most("overhead beyond the gradients", within, OVERHEAD)
    report.finish()


def describe(folder: Path, data: Path, epochs: int, precision: str) -> Path:
    """Write the configuration."""
    path = folder / "run.toml"
    layers = [f'[[network.layers]]\nunits = {units}\nactivation = "tanh"\n' for units in UNITS[:-1]]
    path.write_text(
        f'[data]\ntrain = "{data}"\n[network]\nloss = "softmax"\nprecision = "{precision}"\n'
        + "".join(layers)
        + f"[[network.layers]]\nunits = {UNITS[-1]}\n"
        + f"[topology]\nshards = {REPLICAS}\nreplicas = {REPLICAS}\ncolocate = true\n"
        + f'[optimizer]\nmethod = "sandblaster"\nbatch_size = {PORTION}\nepochs = {epochs}\n'
        + "[sandblaster]\ngtol = 0\nftol = 0\n"
        + '[monitor]\nprogress = "none"\n'
    )
    return path


def write_problem(folder: Path, configuration: Path) -> None:
    """Write samples and the first parameters for the peers."""
    import h5py
    import numpy as np

    from dbmpi.config import load
    from dbmpi.replica.whole import WholeNetwork

    run = load(configuration)
    with h5py.File(run.data.train) as file:
        inputs = file["inputs"][()].reshape(len(file["targets"]), -1).astype(np.float32)
        inputs *= np.float32(file["inputs"].attrs.get("scale", 1.0))
        targets = file["targets"][()].astype(np.int64)
        network = WholeNetwork(run.network, file["inputs"].shape[1:], run.run.seed)
    parameters = np.empty(network.layout.size, np.float32)
    network.initial(0, parameters)
    tensors, place = {}, 0
    for tensor in network.layout.tensors:
        size = int(np.prod(tensor.shape))
        tensors[tensor.name] = parameters[place : place + size].reshape(tensor.shape)
        place += size
    np.savez(folder / "problem.npz", inputs=inputs, targets=targets, **tensors)


def train(run: Path, configuration: Path, goal: float) -> dict[str, float]:
    """Train; return the seconds to the goal from the first pass on, those of an iteration, and the overhead."""
    from dbmpi.monitor.records import read_records

    os.environ.update(dict.fromkeys(common.THREAD_VARIABLES, "1"))
    dbmpi("launch", "-n", REPLICAS, "--", "train", configuration, "--set", f"run.directory={run}")
    records = read_records(run)
    passes = [record for record in records if record["kind"] == "batch"]
    reached = [number for number, record in enumerate(passes) if record["loss"] <= goal]
    if not reached:
        sys.exit(f"the loss has only come down to {min(record['loss'] for record in passes)} in {len(passes)} passes")
    # Between the ends of two passes lies all that an iteration of one evaluation takes.
    between = [after["elapsed"] - before["elapsed"] for before, after in pairwise(passes)]
    began = passes[0]["elapsed"] - passes[0]["seconds"]
    return {
        "overhead": overhead(records, passes[5]["elapsed"]),
        "seconds": passes[reached[0]]["elapsed"] - began,
        "evaluations": reached[0] + 1,
        "iteration": common.median(between[5:]),
    }


def overhead(records: list[dict[str, Any]], begin: float) -> float:
    """Return how much more than gradients took, as a fraction of these, in the workers' reports from `begin` on."""
    total = computing = 0.0
    for number in range(REPLICAS):
        # Workers report between two passes; the last report comes after the checkpoint.
        mine = [record for record in records if record["kind"] == "worker" and record["number"] == number]
        mine = [record for record in mine if record["elapsed"] >= begin][:-1]
        total += mine[-1]["elapsed"] - mine[0]["elapsed"]
        computing += sum(record["seconds"]["compute"] for record in mine[1:])
    return total / computing - 1


def contestant(configuration: str) -> None:
    """Compute the gradients of a rank's share of the portions, all ranks at the same time."""
    common.prepare_runtime()
    import numpy as np
    from mpi4py import MPI

    from dbmpi.config import load
    from dbmpi.data.source import Source
    from dbmpi.data.stream import Order
    from dbmpi.mpi import waiting
    from dbmpi.replica.whole import WholeNetwork

    comm = MPI.COMM_WORLD
    run = load(Path(configuration))
    with Source.open(run.data.train, 4096) as source:
        network = WholeNetwork(run.network, source.input_shape, run.run.seed)
        order = Order(source.samples, PORTION, 1, run.run.seed)
        share = range(comm.rank, order.batches, comm.size)
        samples = [source.batch(order.indices(number)) for number in share[:4]]
    parameters, gradient = np.empty(network.layout.size, np.float32), np.empty(network.layout.size, np.float32)
    network.initial(0, parameters)

    def step() -> dict[str, float]:
        waiting.barrier(comm, "the other rank")
        began = MPI.Wtime()
        for place in range(len(share)):
            network.loss_and_gradient(parameters, samples[place % len(samples)], gradient)
        waiting.barrier(comm, "the other rank")
        return {"seconds": MPI.Wtime() - began, "evaluations": 1}

    common.serve_together(comm, step=step)


if __name__ == "__main__":
    main()
