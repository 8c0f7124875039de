"""Memory that was freed is used again, instead of coming page by page from the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource

from dbmpi.machine.allocation import keep_freed_memory

print(keep_freed_memory())
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * (100 << 20)
    del block
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("mine", [{}, {"MALLOC_ARENA_MAX": "8"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}])
def test_large_blocks_are_kept_unless_the_user_has_settings(mine: dict[str, str]) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = (sys.executable, "-c", PROGRAM)
    done = subprocess.run(command, env=others | mine, capture_output=True, text=True, check=True)
    kept, first, *later = done.stdout.split()
    assert kept == str(not mine)
    if kept == "True":
        assert int(first) > 100
        assert max(map(int, later)) < 50
