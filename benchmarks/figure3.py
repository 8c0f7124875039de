"""The paper's figure 3 by the cost model of dbmpi plan: the speed-up of one model over machines.

Four constants of a machine are fitted, the same for all four networks: how fast it computes layers with weights, how
fast others, the time of a message, and the spread of the machines' speeds.  Its line is taken to have 1 Gbit/s:
speed-ups say nothing of the unit of time, so that one constant is free.  That the speech network's peak is at 8
machines, by 2 % at least, is a condition of the fit.  The cut is the one that the paper describes: each layer by
itself, images by a grid, dense layers by units, every value once to each machine that needs it, and a loss that needs
no more than sums.  Beside that, the same machines with dbmpi's cut, and its loss, which moves outputs.

Writes docs/images/figure3.png (with ``--quick`` figure3.png in the current directory).  The size of a mini-batch is not
in the paper; another one only scales the constants.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from dbmpi.network.description import Network
    from dbmpi.plan.constants import MachineConstants
    from dbmpi.plan.step import Hardware
    from dbmpi.plan.work import ReplicaWork

CURVES: dict[str, dict[int, float]] = {
    "speech": {2: 1.36, 4: 1.85, 8: 2.23, 16: 0.95, 32: 1.36, 64: 1.41, 128: 1.15},
    "images-8": {2: 1.12, 4: 1.46, 8: 2.23, 16: 2.39, 36: 3.09, 64: 4.58, 100: 5.1},
    "images-16": {2: 1.49, 4: 2.23, 8: 3.78, 16: 4.71, 36: 6.29, 64: 7.01, 100: 11.09},
    "images-36": {2: 1.13, 4: 2.2, 8: 3.36, 16: 4.65, 36: 5.61, 64: 9.94, 100: 12.38},
}
"""Speed-ups over machines, read off the figure; 1 on one machine by definition, which is not counted."""
NAMES = {
    "speech": "speech, 42 M",
    "images-8": "images, 80 M",
    "images-16": "images, 330 M",
    "images-36": "images, 1.7 B",
}
COLORS = {"speech": "tab:blue", "images-8": "tab:orange", "images-16": "tab:green", "images-36": "tab:red"}
INPUTS = {"speech": (440,)}
SAMPLES = 32
_BELOW = 0.98
"""What the speech network may reach beside its peak, as a fraction of that."""
ERROR, PEAK = 20.0, 8
BANDWIDTH = 1e9 / 8
"""Bytes a second of a machine's line."""
FITTED = {
    # logarithms (base 10) of the bounds
    "weights": (9.0, 13.0),
    "others": (8.0, 13.0),
    "message": (-6.0, -1.0),
    "spread": (-3.0, 0.0),
}
UNITS = {
    "weights": "GFLOP/s of layers with weights",
    "others": "GFLOP/s of other layers",
    "message": "us for a message",
    "spread": "spread of speeds, %",
}
FACTORS = {"weights": 1e-9, "others": 1e-9, "message": 1e6, "spread": 100.0}
Works = dict[str, dict[int, "ReplicaWork"]]


def main() -> None:
    options = common.options(__doc__)
    report = common.Report("figure3", options.json)
    common.prepare_runtime()
    networks = {name: network(name) for name in CURVES}
    machines = {name: (1, *points) for name, points in CURVES.items()}
    paper = {name: {p: paper_work(networks[name], p) for p in machines[name]} for name in CURVES}
    ours = {name: {p: own_work(networks[name], p) for p in machines[name]} for name in CURVES}
    print("fitting", file=sys.stderr)
    best = fit(paper, rounds=30 if options.quick else 2000)
    found, own = speedups(paper, best), speedups(ours, best)
    rows = []
    for name, points in CURVES.items():
        for number in points:
            row = (points[number], found[name][number], own[name][number])
            rows.append((NAMES[name], number, *(f"{value:.2f}" for value in row)))
    report.table("Speed-up over machines", ("network", "machines", "paper", "model", "dbmpi's cut"), rows)
    values = [(UNITS[name], FACTORS[name] * 10**value) for name, value in zip(FITTED, best, strict=True)]
    report.table(f"Fitted constants (batches of {SAMPLES}, lines of 1 Gbit/s)", ("what", "value"), values)
    errors = curve_errors(found)
    report.table("Mean relative error", ("network", "%"), [(NAMES[name], errors[name]) for name in CURVES])
    mean = sum(errors.values()) / len(errors)
    report.at_most("mean relative error of the four curves, %", mean, ERROR)
    peak = max(found["speech"], key=found["speech"].__getitem__)
    speech = sorted(found["speech"].values(), reverse=True)
    print(
        f"\nThe speech network's peak: {peak} machines, {100 * (speech[0] / speech[1] - 1):.1f} % above the next best."
    )
    report.at_most("machines at the speech network's peak, beside the paper's 8: difference", abs(peak - PEAK), 0)
    path = Path("figure3.png") if options.quick else common.ROOT / "docs" / "images" / "figure3.png"
    draw(found, own, path)
    print(f"\nfigure: {path}")
    report.finish()


def network(name: str) -> Network:
    """Return one of the paper's networks; nothing is allocated."""
    from dbmpi.config import load
    from dbmpi.network.description import Network

    run = load(common.ROOT / "examples" / f"{name}.toml")
    return Network(run.network, INPUTS.get(name, (3, 100, 100)), seed=1)


def paper_work(of: Network, partitions: int) -> ReplicaWork:
    """Return the work of a network that is cut as the paper says."""
    from dbmpi.plan.work import work_of
    from dbmpi.replica import placement
    from dbmpi.replica.cut import Grid, cut_axes

    boxes: dict[str, Any] = {}
    bands = next(n for n in range(math.isqrt(partitions), 0, -1) if partitions % n == 0)
    for layer in of.layers:
        shape = tuple(layer.output_shape)
        even = (1.0,) * partitions
        boxes[layer.name] = Grid(shape, even, bands, 1).boxes if len(shape) == 3 else cut_axes(shape, even)
    splits: dict[str, Any] = {layer.name: "outputs" for layer in of.layers}
    work = work_of(of, placement.explicit(of.layers, boxes, partitions, splits=splits))
    layers = tuple(replace(layer, gathers=False) for layer in work.layers)
    return replace(work, layers=layers, turned=0)


def own_work(of: Network, partitions: int) -> ReplicaWork:
    """Return the work of a network as dbmpi cuts it."""
    from dbmpi.plan.work import work_of
    from dbmpi.replica import placement

    return work_of(of, placement.automatic(of.layers, partitions))


def machine(logarithms: Sequence[float], bandwidth: float = BANDWIDTH) -> tuple[MachineConstants, Hardware]:
    """Return a machine with the constants that are fitted."""
    from dbmpi.plan.constants import KINDS, WEIGHTED, reference
    from dbmpi.plan.step import Hardware

    values = {name: 10.0**value for name, value in zip(FITTED, logarithms, strict=True)}
    with_weights = tuple(kind for kind in KINDS if kind.startswith(WEIGHTED))
    rates = {kind: ((1.0, 1.0, values["weights" if kind in with_weights else "others"]),) for kind in KINDS}
    constants = reference().model_copy(
        update={
            "rates": rates,
            "far_exchange_seconds": 0.0,
            "partition_seconds": 0.0,
            "loss_seconds": 0.0,
            "message_seconds": values["message"],
            "spread": values["spread"],
        }
    )
    return constants, Hardware(nodes=128, cores=1, memory=1e12, bandwidth=bandwidth, latency=1e-300)


def linear(work: ReplicaWork) -> tuple[float, ...]:
    """Return operations of layers with weights and of others, bytes, messages, and what the spread is multiplied by."""
    from dbmpi.plan.step import expected_largest, step_times

    never, rare = 300.0, -300.0
    found = []
    for chosen in ("weights", "others", "bandwidth", "message"):
        one = {"weights": never, "others": never, "message": rare, "spread": rare}
        if chosen in one:
            one[chosen] = 0.0
        constants, hardware = machine(list(one.values()), 1.0 if chosen == "bandwidth" else 1e300)
        found.append(step_times(work, SAMPLES, constants, hardware, near=work.partitions == 1).total)
    return (*found, expected_largest(work.partitions))


def speedups(works: Works, logarithms: Sequence[float]) -> dict[str, dict[int, float]]:
    """Return the speed-ups of all networks over machines."""
    from dbmpi.plan.step import step_times

    constants, hardware = machine(logarithms)
    found = {}
    for name, cuts in works.items():
        seconds = {p: step_times(work, SAMPLES, constants, hardware, near=p == 1).total for p, work in cuts.items()}
        found[name] = {p: seconds[1] / taken for p, taken in seconds.items()}
    return found


def curve_errors(found: dict[str, dict[int, float]]) -> dict[str, float]:
    """Return the mean relative error of each curve, in %."""
    errors = {}
    for name, points in CURVES.items():
        each = [abs(found[name][number] / value - 1) for number, value in points.items()]
        errors[name] = 100 * sum(each) / len(each)
    return errors


def fit(works: Works, rounds: int) -> list[float]:
    """Return the logarithms of the constants with the least mean error of the four curves, and the speech peak at 8."""
    from scipy.optimize import differential_evolution, minimize

    # Times are linear in all constants but the spread, or their inverses; so each is asked for once, by itself.
    parts = {name: {p: linear(work) for p, work in cuts.items()} for name, cuts in works.items()}

    def cost(logarithms: Sequence[float]) -> float:
        weights, others, message, spread = (10.0**value for value in logarithms)
        found: dict[str, dict[int, float]] = {}
        for name, cuts in parts.items():
            seconds = {
                p: (of[0] / weights + of[1] / others) * (1 + spread * of[4]) + of[2] / BANDWIDTH + of[3] * message
                for p, of in cuts.items()
            }
            found[name] = {p: seconds[1] / taken for p, taken in seconds.items()}
        errors = curve_errors(found)
        speech = found["speech"]
        beyond = max(value for number, value in speech.items() if number != PEAK) / speech[PEAK]
        return sum(errors.values()) / len(errors) + 100 * max(0.0, beyond - _BELOW)

    first = differential_evolution(cost, list(FITTED.values()), maxiter=rounds, seed=1, tol=1e-8, popsize=12)
    last = minimize(cost, first.x, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-6, "fatol": 1e-8})
    best = last if last.fun < first.fun else first
    return [float(value) for value in best.x]


def draw(found: dict[str, dict[int, float]], own: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the paper's curves with the model's (left), and dbmpi's cut on the same machines (right)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, points in CURVES.items():
        color = COLORS[name]
        left.plot([1, *points], [1.0, *points.values()], "o", color=color, label=f"{NAMES[name]}: paper")
        left.plot(list(found[name]), list(found[name].values()), "-", color=color)
        right.plot(list(own[name]), list(own[name].values()), "-s", color=color, label=NAMES[name])
        right.plot(list(found[name]), list(found[name].values()), ":", color=color)
    left.plot([], [], "-", color="black", label="lines: model, four constants fitted")
    right.plot([], [], ":", color="black", label="dotted: the paper's cut, as on the left")
    left.set(title="Figure 3 of the paper, and the cost model", ylabel="speed-up of one model", yscale="log")
    right.set(title="The same machines with dbmpi's cut (predicted)", ylabel="speed-up of one model", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="machines", xscale="log")
        axes.set_xticks([1, 2, 4, 8, 16, 36, 64, 128], [1, 2, 4, 8, 16, 36, 64, 128])
        axes.set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
