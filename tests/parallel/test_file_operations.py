"""File-system operations of the ranks of a start: few, the same for any number of ranks, and known by their place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from harness.environment import kernel_cache
from harness.launching import Launch
from parallel import counted_files, tiny

MOST = 20
"""Of a rank, apart from imports and the kernel cache."""
LEAD = 80
"""Of the lead, which reads the configuration and looks after the run directory, for all."""

CONFIGURATION = """
[data]
train = "train.h5"
test = "test.h5"
[[network.layers]]
units = 5
[[network.layers]]
units = 3
[optimizer]
learning_rate = 0.1
batch_size = 6
epochs = 1
"""


def own(counts: dict[str, int]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if name.startswith("own: ")}


@pytest.mark.timeout(150)
def test_a_rank_starts_with_few_operations(launch: Launch, tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    (tmp_path / "run.toml").write_text(CONFIGURATION)
    found: dict[int, list[dict[str, int]]] = {}
    for ranks in (2, 4):
        out = tmp_path / f"counts-{ranks}"
        argv = [sys.executable, counted_files.__file__, out, "train", "run.toml", "--set", f"run.directory=run{ranks}"]
        done = launch(ranks, argv, timeout=60, env={"NUMBA_CACHE_DIR": str(kernel_cache())}, cwd=tmp_path)
        assert done.returncode == 0, done.transcript
        found[ranks] = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]
        for rank, counts in enumerate(found[ranks]):
            mine = own(counts)
            assert 0 < sum(mine.values()) <= (MOST if rank else LEAD), (rank, mine)
            # Those of others are known, too; imports are most.
            assert {"imports", "kernel cache", "system"} <= set(counts), counts
    totals = {ranks: [sum(own(counts).values()) for counts in all_] for ranks, all_ in found.items()}
    # The first worker looks at all of the data; the others need not.
    assert totals[4][1] == totals[2][1] >= totals[4][2] == totals[4][3], totals
    assert abs(totals[4][0] - totals[2][0]) <= 2, totals
