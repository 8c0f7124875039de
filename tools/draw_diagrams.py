"""Draw the diagrams of docs/background.md and docs/architecture.md into docs/images.

Run it after a change here; a test compares the files with what this program would write.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).parent.parent / "docs" / "images"
COLOURS = {
    "shard": ("#fde9d0", "#b35900"),
    "worker": ("#dcebf8", "#0b5a9e"),
    "lead": ("#e3f1dd", "#2f7327"),
    "group": ("none", "#8a8a8a"),
    "plain": ("#f2f2f2", "#5c5c5c"),
}
"""Fill and line of each kind of box."""
LINE = 18
"""Pixels from one line of text to the next."""


class Drawing:
    """An SVG of boxes with text and arrows between points, in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size = (width, height)
        self._parts = [f"<title>{escape(title)}</title>"]

    def box(self, x: int, y: int, width: int, height: int, kind: str, *lines: str) -> None:
        """Draw a rectangle with lines of text in its middle; of a group, with its name in the lower left corner."""
        fill, stroke = COLOURS[kind]
        dash = ' stroke-dasharray="5 4"' if kind == "group" else ""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"{dash}/>'
        )
        if kind == "group":
            self.text(x + 12, y + height - 8, *lines)
            return
        first = y + (height - LINE * len(lines)) // 2 + 13
        for number, line in enumerate(lines):
            self.text(x + width // 2, first + LINE * number, line, anchor="middle", bold=number == 0 < len(lines) - 1)

    def text(self, x: int, y: int, line: str, *, anchor: str = "start", bold: bool = False) -> None:
        """Write a line of text."""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(line)}</text>')

    def arrow(self, *points: tuple[int, int], dashed: bool = False, both: bool = False) -> None:
        """Draw a line through some points, with a head at the last one, or at both ends."""
        path = " ".join(f"{x},{y}" for x, y in points)
        look = ' stroke-dasharray="4 4"' if dashed else ""
        look += ' marker-start="url(#head)"' if both else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="#333333" stroke-width="1.5"{look} marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """Return the file."""
        width, height = self._size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14" fill="#222222" role="img">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 z" fill="#333333"/></marker></defs>'
        )
        paper = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        return "\n".join([head, marker, paper, *self._parts, "</svg>"]) + "\n"


def roles() -> Drawing:
    """Draw ranks by role, in a world of eight: two shards, and three replicas of two partitions each."""
    drawing = Drawing(480, 346, "Ranks by role")
    drawing.box(30, 12, 190, 62, "lead", "shard 0, the lead (rank 0)", "parameters of", "partition 0")
    drawing.box(260, 12, 190, 62, "shard", "shard 1 (rank 1)", "parameters of", "partition 1")
    for replica in range(3):
        left = 8 + 158 * replica
        drawing.box(left, 210, 148, 126, "group", f"replica {replica}")
        for partition in range(2):
            x = left + 6 + 70 * partition
            rank = 2 + 2 * replica + partition
            drawing.box(x, 222, 66, 82, "worker", "worker", f"rank {rank}", "partition", str(partition))
            end = (95 if partition == 0 else 290) + 30 * replica
            drawing.arrow((x + 33, 220), (end, 76), both=True, dashed=partition == 1)
    drawing.text(8, 106, "push", bold=True)
    drawing.text(8, 124, "gradients")
    drawing.text(472, 106, "fetch", anchor="end", bold=True)
    drawing.text(472, 124, "parameters", anchor="end")
    return drawing


def gradient() -> Drawing:
    """Draw the way of a gradient in Downpour, from a batch to the parameters."""
    drawing = Drawing(480, 536, "The way of a gradient")
    drawing.box(10, 10, 460, 308, "group", "worker")
    drawing.box(30, 24, 420, 44, "worker", "batch", "samples dealt to this replica")
    drawing.arrow((240, 68), (240, 91))
    drawing.box(30, 92, 420, 44, "worker", "forward", "layer by layer; partitions exchange boxes")
    drawing.arrow((240, 136), (240, 159))
    drawing.box(30, 160, 420, 44, "worker", "backward", "each layer writes its part of one flat gradient")
    drawing.arrow((240, 204), (240, 227))
    drawing.box(
        30,
        228,
        420,
        62,
        "worker",
        "push",
        "to a shard on this host: left in this worker's window",
        "to another host: chunks into the shard's inbox",
    )
    drawing.arrow((240, 290), (240, 357))
    drawing.text(252, 336, "a flag says that it is there")
    drawing.box(10, 344, 460, 182, "group", "shard")
    drawing.box(30, 358, 300, 62, "shard", "apply", "one pass over gradient, state and", "parameters: Adagrad or SGD")
    drawing.arrow((180, 420), (180, 437))
    drawing.box(30, 438, 300, 62, "shard", "parameters", "version + 1; staleness:", "versions since the worker's fetch")
    drawing.arrow((330, 469), (462, 469), (462, 114), (451, 114), dashed=True)
    drawing.text(340, 442, "fetch,", bold=True)
    drawing.text(340, 460, "before a step")
    return drawing


def portion() -> Drawing:
    """Draw the way of a portion in Sandblaster, from the board to the sum of the gradient."""
    drawing = Drawing(480, 518, "The way of a portion")
    drawing.box(
        10,
        10,
        460,
        62,
        "lead",
        "coordinator, on the lead's rank",
        "asks for loss and gradient at a new point: opens a",
        "board with a word for each portion of the batch",
    )
    drawing.arrow((240, 72), (240, 115))
    drawing.text(252, 98, "atomic operations")
    drawing.box(10, 102, 460, 238, "group", "a replica")
    drawing.box(30, 116, 420, 44, "worker", "draw", "its next portion; if none is left, a late one of another")
    drawing.arrow((240, 160), (240, 179))
    drawing.box(30, 180, 420, 44, "worker", "compute", "loss and gradient of the portion's samples")
    drawing.arrow((240, 224), (240, 243))
    drawing.box(
        30,
        244,
        420,
        62,
        "worker",
        "claim, by compare-and-swap",
        "the first result for a portion counts: add it to the",
        "bundle, and commit the bundle every few portions",
    )
    drawing.arrow((240, 306), (240, 363))
    drawing.text(252, 358, "one-sided reads")
    drawing.box(10, 364, 460, 44, "shard", "shards", "each takes its range of the bundle's sum")
    drawing.arrow((240, 408), (240, 445))
    drawing.text(252, 431, "a few scalars")
    drawing.box(
        10,
        446,
        460,
        62,
        "lead",
        "coordinator",
        "when every portion counts once: decides the next step",
        "of L-BFGS; the vectors stay on the shards",
    )
    return drawing


FOLDERS = (
    ("lead", ("cli",)),
    ("lead", ("formats",)),
    ("lead", ("runs",)),
    ("worker", ("simulation", "sandblaster")),
    ("worker", ("downpour", "torch", "jax")),
    ("plain", ("data", "loops")),
    ("plain", ("checkpoint", "plan")),
    ("shard", ("methods", "paramserver", "replica")),
    ("shard", ("mpi", "network")),
    ("plain", ("kernels",)),
    ("plain", ("config", "machine", "monitor")),
    ("plain", ("index",)),
)
"""Folders of the source from the top to the bottom: each imports only from its own row's folder and from rows below."""
CONTENTS = {
    "cli": "one file for each command",
    "formats": "npz, safetensors, ONNX",
    "runs": "training and inference from a description",
    "simulation": "Downpour in virtual time",
    "sandblaster": "section 4.2: portions",
    "downpour": "section 4.1: push, fetch",
    "torch": "for PyTorch",
    "jax": "for JAX",
    "data": "sources, stream, importers",
    "loops": "loops of a user's own",
    "checkpoint": "one HDF5 file with all",
    "plan": "the cost model of a cluster",
    "methods": "batch methods",
    "paramserver": "push and fetch",
    "replica": "a model on ranks",
    "mpi": "the only folder that names MPI",
    "network": "layers, without ranks",
    "kernels": "arrays in, arrays out: Numba and LLVM",
    "config": "description of a run",
    "machine": "before NumPy loads",
    "monitor": "records, plots",
    "index": "boxes and layouts: pure integers",
}


def folders() -> Drawing:
    """Draw the folders of the source in the order of imports."""
    drawing = Drawing(480, 12 + 56 * len(FOLDERS), "Folders in the order of imports")
    for row, (kind, names) in enumerate(FOLDERS):
        width = (440 - 8 * (len(names) - 1)) // len(names)
        for column, name in enumerate(names):
            drawing.box(8 + column * (width + 8), 8 + 56 * row, width, 48, kind, name, CONTENTS[name])
    drawing.arrow((464, 12), (464, 56 * len(FOLDERS)))
    return drawing


def exchange() -> Drawing:
    """Draw how two workers exchange the rows that filters of 10 x 10 need at the boundary of 100 x 100 images."""
    drawing = Drawing(480, 424, "An exchange between two workers")
    for number, left in enumerate((8, 250)):
        drawing.box(left, 10, 222, 404, "group", f"worker {number}")
    drawing.box(24, 24, 190, 44, "worker", "outputs of the layer", "rows 0 to 45")
    drawing.box(266, 24, 190, 44, "worker", "outputs of the layer", "rows 46 to 90")
    drawing.text(24, 100, "need input rows 0 to 54:")
    drawing.text(266, 100, "need input rows 46 to 99:")
    drawing.box(24, 112, 190, 130, "lead", "owned", "rows 0 to 49")
    drawing.box(24, 246, 190, 62, "plain", "halo, from worker 1", "rows 50 to 54")
    drawing.box(266, 112, 190, 62, "plain", "halo, from worker 0", "rows 46 to 49")
    drawing.box(266, 178, 190, 130, "lead", "owned", "rows 50 to 99")
    drawing.arrow((214, 132), (265, 132))
    drawing.arrow((266, 288), (215, 288))
    drawing.arrow((266, 158), (215, 158), dashed=True)
    drawing.arrow((214, 262), (265, 262), dashed=True)
    drawing.arrow((30, 338), (70, 338))
    drawing.text(78, 343, "forward: fills the halo")
    drawing.arrow((30, 366), (70, 366), dashed=True)
    drawing.text(78, 371, "backward: adds")
    drawing.text(266, 343, "each pair of ranks")
    drawing.text(266, 361, "exchanges one message,")
    drawing.text(266, 379, "planned once")
    return drawing


def inbox() -> Drawing:
    """Draw a push to a shard on another host: chunks, slots and flags."""
    drawing = Drawing(480, 356, "A push to another host")
    drawing.box(8, 10, 180, 336, "group", "worker")
    drawing.box(24, 24, 148, 62, "worker", "gradient", "what this shard", "owns of it")
    drawing.box(24, 106, 148, 44, "worker", "chunk 1")
    drawing.box(24, 158, 148, 44, "worker", "chunk 2")
    drawing.box(24, 210, 148, 44, "worker", "chunk 3", "waits for a free slot")
    drawing.box(292, 10, 180, 336, "group", "shard")
    drawing.box(308, 24, 148, 62, "plain", "inbox", "slots of the", "other workers")
    drawing.box(308, 106, 148, 44, "shard", "slot 1", "of this worker")
    drawing.box(308, 158, 148, 44, "shard", "slot 2", "of this worker")
    drawing.box(308, 236, 148, 80, "shard", "apply", "polls the flags, runs", "the rule's kernel,", "frees the slot")
    drawing.arrow((172, 122), (307, 122))
    drawing.text(240, 114, "put, then flag", anchor="middle")
    drawing.arrow((172, 174), (307, 174))
    drawing.arrow((382, 202), (382, 235))
    drawing.arrow((308, 276), (240, 276), (240, 232), (173, 232), dashed=True)
    drawing.text(240, 296, "slot is free", anchor="middle")
    return drawing


def files() -> dict[str, str]:
    """Return the text of each file by its name."""
    drawings = (roles, gradient, portion, folders, exchange, inbox)
    return {f"{draw.__name__}.svg": draw().svg() for draw in drawings}


if __name__ == "__main__":
    for name, text in files().items():
        (TARGET / name).write_text(text, encoding="utf-8")
