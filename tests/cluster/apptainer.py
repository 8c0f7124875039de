#!/usr/bin/env python3
"""A stand-in for Apptainer, as far as jobs/apptainer needs one: ``build IMAGE DEFINITION`` and ``run IMAGE WORDS ...``.

An image is a directory with the folders below /opt that the definition fills; they are mounted there, in a namespace of
their own, for the commands of the definition.  Python and everything else are those of this host, so that this shows
what the commands do, and not that the base image suffices.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDERS = ("dbmpi", "dbmpi-wheel")


def sections(definition: Path) -> dict[str, str]:
    """Return the text of each section by its name."""
    parts = re.split(r"^%(\w+)\n", definition.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def inside(image: Path, commands: str, words: list[str]) -> int:
    """Run commands of the shell in an image, with what %environment says; srun hands on a connection by its number."""
    mounts = [f"mkdir -p /opt/{name}; mount --bind {shlex.quote(str(image / name))} /opt/{name}" for name in FOLDERS]
    text = "\n".join(["set -e", *mounts, sections(image / "definition")["environment"], commands])
    command = ["unshare", "--mount", "sh", "-c", text, "apptainer", *words]
    return subprocess.run(command, close_fds=False, check=False).returncode


def build(image: Path, definition: Path) -> int:
    """Make an image, and try it."""
    for name in FOLDERS:
        (image / name).mkdir(parents=True)
    shutil.copy(definition, image / "definition")
    found = sections(definition)
    for line in filter(str.strip, found["files"].splitlines()):
        source, target = line.split()
        for path in glob.glob(source):
            shutil.copy(path, image / target.removeprefix("/opt/"))
    return inside(image, found["post"], []) or inside(image, found["test"], [])


def run(image: Path, words: list[str]) -> int:
    """Run the image's program."""
    return inside(image, sections(image / "definition")["runscript"], words)


if __name__ == "__main__":
    action, image, *rest = sys.argv[1:]
    where = Path(os.path.abspath(image))
    sys.exit(build(where, Path(rest[0])) if action == "build" else run(where, rest))
