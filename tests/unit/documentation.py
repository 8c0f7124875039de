"""Blocks of code in the project's Markdown files, and what is to become of each in a test.

A comment before a block says it:

    <!-- test: quick -->            it is run, after the blocks before it, in one directory for each page
    <!-- test: save as NAME -->     it is written to a file, which later blocks use
    <!-- test: not here, REASON --> neither, e.g. because it installs, needs a cluster, or is made by another target

Blocks without a language, of ``text`` and the like are shown only, and need no comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>sh|python|toml)\n(?P<code>.*?)^(?P=indent)```", re.M | re.DOTALL)
LABEL = re.compile(r"<!-- test: (?P<label>quick|save as [\w.-]+|not here, \S[^>]*) -->\s*\Z")
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


def blocks(text: str) -> list[Block]:
    """Return the blocks of shell, Python and TOML in a page, in their order."""
    found = []
    for match in BLOCK.finditer(text):
        label = LABEL.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(line, label and label["label"], match["code"], match["language"]))
    return found


def sh_blocks(text: str) -> list[Block]:
    """Return the shell's blocks of a page."""
    return [block for block in blocks(text) if block.language == "sh"]
