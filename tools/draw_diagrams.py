"""Draw the diagrams of docs/background.md: docs/images/roles.svg, gradient.svg and portion.svg.

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


def files() -> dict[str, str]:
    """Return the text of each file by its name."""
    return {"roles.svg": roles().svg(), "gradient.svg": gradient().svg(), "portion.svg": portion().svg()}


if __name__ == "__main__":
    for name, text in files().items():
        (TARGET / name).write_text(text, encoding="utf-8")
