"""Strange launch environments: each ends in a sentence or in a run, without a traceback, a hang or much memory.

``DBMPI_TEST_ENVIRONMENTS`` is the number of starts, ``DBMPI_TEST_SEED`` begins their numbers; ``make test-starts``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from harness.environment import kernel_cache, mpi_environment
from parallel import launch_environments, tiny
from parallel.test_file_operations import CONFIGURATION

COUNT = int(os.environ.get("DBMPI_TEST_ENVIRONMENTS", "6"))
SEED = int(os.environ.get("DBMPI_TEST_SEED", "1"))
MOST_MIB = 1500
"""Of a process; a run of this size takes some 250."""


@pytest.mark.timeout(120 + 60 * COUNT)
def test_strange_environments_end_in_a_sentence_or_a_run(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    (tmp_path / "run.toml").write_text(CONFIGURATION)
    server = subprocess.Popen(
        [sys.executable, launch_environments.__file__],
        env=mpi_environment() | {"NUMBA_CACHE_DIR": str(kernel_cache())},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    ends: Counter[int] = Counter()
    with server:
        for number in range(SEED, SEED + COUNT):
            start = launch_environments.mutated(np.random.default_rng(number))
            arguments = ["train", "run.toml", "--set", f"run.directory=run{number}"]
            server.stdin.write(json.dumps({"start": start, "arguments": arguments}) + "\n")
            server.stdin.flush()
            end = json.loads(server.stdout.readline())
            told = (number, start, end)
            assert end["code"] in (0, 1, 2), told
            assert "Traceback" not in end["text"], told
            assert end["mib"] < MOST_MIB, told
            # A start that is refused says why, in a line of its own; and one that is not has learned.
            said = [line for line in end["text"].splitlines() if line.startswith("dbmpi: ")]
            checkpoint = (tmp_path / f"run{number}" / "checkpoints" / "latest").exists()
            assert checkpoint if end["code"] == 0 else said, told
            ends[end["code"]] += 1
            shutil.rmtree(tmp_path / f"run{number}", ignore_errors=True)
        server.stdin.close()
    print(dict(ends))
    assert ends[0] > COUNT // 4
    if COUNT >= 50:
        assert ends[2] > COUNT // 50
