"""Blocks of code in the project's Markdown files, and what a test does with each of them.

A comment before the block says so:

    <!-- test: quick -->            it is run, after the blocks before it, in one directory for each page
    <!-- test: quick after PAGE --> it is run in the directory of another page, after all blocks of that page
    <!-- test: save as NAME -->     it is written to a file, which later blocks use
    <!-- test: on a cluster -->     it is typed in one shell with the others of its page, on a Slurm (tests/cluster)
    <!-- test: not here, REASON --> neither, e.g. because it installs software or needs a cluster

Blocks of other languages, such as ``text``, and blocks of TOML without a comment are only shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>sh|python|toml)\n(?P<code>.*?)^(?P=indent)```", re.M | re.DOTALL)
LABEL = re.compile(
    r"<!-- test: (?P<label>quick(?: after [\w-]+)?|on a cluster|save as [\w.-]+|not here, \S[^>]*) -->\s*\Z"
)
RUNNABLE = ("sh", "python")


@dataclass(frozen=True)
class Block:
    line: int
    label: str | None
    code: str
    language: str = "sh"

    @property
    def saved_as(self) -> str | None:
        """Name of the file that the block is, if any."""
        return self.label.removeprefix("save as ") if self.label and self.label.startswith("save as ") else None

    @property
    def continues(self) -> str | None:
        """Name of the page in whose directory the block is run, if it is another one."""
        return self.label.removeprefix("quick after ") if self.label and self.label.startswith("quick after ") else None

    @property
    def is_run(self) -> bool:
        return self.label == "quick" or self.continues is not None


def blocks(text: str) -> list[Block]:
    """Return the blocks of shell, Python and TOML in a page, in their order."""
    found = []
    for match in BLOCK.finditer(text):
        label = LABEL.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(line, label and label["label"], match["code"], match["language"]))
    return found
