"""The plan over numbers of machines, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dbmpi.monitor.pictures import figures, make_folder, plain, save
from dbmpi.plan.report import as_json

if TYPE_CHECKING:
    from dbmpi.plan.recommendation import Advice

_PARTS = {
    "compute": "computing",
    "slowest": "slowest partition",
    "exchange": "exchange between partitions",
    "fixed": "fixed costs",
    "transfers": "a worker's transfers",
    "waiting": "shards and their lines",
}

_MOST_TICKS = 7


def draw(advices: Sequence[Advice], name: str, path: Path) -> Path:
    """Draw samples a second, the time of a step, and what is recommended, over numbers of nodes; return the path.

    Parameters
    ----------
    advices
        For some numbers of nodes.
    name
        Name of the configuration, for the title.
    path
        The picture: PNG, PDF or SVG, by its suffix.

    Raises
    ------
    UserError
        If Matplotlib is missing, or the file cannot be written.
    """
    figure_of, style = figures()
    make_folder(path.parent)
    with style():
        figure = figure_of()
        figure.set_size_inches(12, 5.2)
        speed, parts, counts = figure.subplots(1, 3)
        found = [as_json(advice) for advice in advices]
        nodes = [advice.hardware.nodes for advice in advices]
        rates = [one["samples_per_second"] for one in found]
        speed.plot(nodes, rates, marker="o", color="tab:blue", label="predicted")
        ideal = [rates[0] * number / nodes[0] for number in nodes]
        speed.plot(nodes, ideal, linestyle="--", color="grey", label="in proportion to the nodes")
        speed.set(title="Samples a second", ylabel="samples/s", yscale="log")

        bottom = [0.0] * len(found)
        positions = list(range(len(found)))
        for part, label in _PARTS.items():
            heights = [1e3 * one["seconds"][part] for one in found]
            if max(heights) > 0.002 * 1e3 * max(one["step_seconds"] for one in found):
                parts.bar(positions, heights, bottom=bottom, label=label)
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        parts.set(title="Where the time of a step goes", ylabel="ms")
        parts.set_xticks(positions, [f"{number:,}" for number in nodes], rotation=60)

        for key, marker in (("replicas", "o"), ("shards", "s"), ("partitions", "^"), ("n_push", "v")):
            counts.plot(nodes, [one[key] for one in found], marker=marker, label=key, alpha=0.8)
        counts.plot(nodes, [one["staleness"] + 1 for one in found], ":", color="black", label="mean staleness + 1")
        counts.set(title="What to use", yscale="log")
        some = nodes[:: max(1, -(-len(nodes) // _MOST_TICKS))]
        for axes in (speed, counts):
            axes.set(xscale="log")
            axes.set_xticks(some, [f"{number:,}" for number in some])
            axes.minorticks_off()
        for axes in (speed, parts, counts):
            axes.set_xlabel("nodes")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        figure.suptitle(f"{plain(name)}: predicted, on nodes of {advices[-1].hardware.cores} cores", fontsize=12)
        return save(figure, path)
